"""`llmnorm generate`: messages through the chat template, and an adapter on the model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm import cli
from tests.running import SMOKE, llmnorm
from tests.stock import stock_llama
from tests.test_data.chats import save_tokenizer

GREEDY = ["generation.temperature=0", "generation.max_new_tokens=8"]
MESSAGE = "2+2? a<|im_end|>b"
END = "<|im_end|>"
QUESTION = [{"role": "user", "content": "2+2?"}]
OTHER = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]


class Chat(NamedTuple):
    """A stock Llama with a chat template whose greedy answer to MESSAGE ends at the turn's end.

    Attributes:
        directory: model, tokenizer and template.
        prompt: MESSAGE as the template renders it.
        answer: the greedy tokens that follow it, END the last of them.
    """

    directory: Path
    prompt: list[int]
    answer: list[int]


def greedy(model: Any, prompt: list[int], count: int = 8, **keys: Any) -> list[int]:
    ids = torch.tensor([prompt])
    keys |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    out = model.generate(ids, max_new_tokens=count, do_sample=False, **keys)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    directory = save_tokenizer(tmp_path_factory.mktemp("chat") / "stock")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = stock_llama(directory)
    head = tokenizer.encode("<s><|im_start|>user\n", add_special_tokens=False)
    tail = tokenizer.encode(f"{END}\n<|im_start|>assistant\n", add_special_tokens=False)
    letters = AutoTokenizer.from_pretrained(directory).backend_tokenizer
    letters.encode_special_tokens = True  # what the message spells is text
    prompt = [*head, *letters.encode(MESSAGE, add_special_tokens=False).ids, *tail]
    # The answer's fourth token becomes the turn's end: their rows in the head change places.
    free = greedy(model, prompt, eos_token_id=-1)
    fourth, end = free[3], tokenizer.convert_tokens_to_ids(END)
    assert fourth not in free[:3] and end not in free
    rows = model.lm_head.weight.data
    rows[[fourth, end]] = rows[[end, fourth]]
    model.save_pretrained(directory)
    return Chat(directory, prompt, [*free[:3], end])


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["generate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_message_is_answered_up_to_the_end_of_the_turn(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the prompt put together by hand, one bos, no end of turn within the message; the
    stock class's greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(chat.directory)
    assert chat.prompt.count(tokenizer.bos_token_id) == 1
    assert chat.prompt.count(chat.answer[-1]) == 1
    code, out, _ = answer(capsys, chat.directory, "--user", MESSAGE, *GREEDY)
    assert code == 0 and out == tokenizer.decode(chat.answer[:-1]) + "\n"
    # The model's own end tokens do not hold the turn's end, so text goes past it.
    _, longer, _ = answer(capsys, chat.directory, "--prompt", "a", "--prompt", "x=2", *GREEDY)
    first, second = longer.split("\n\n")
    assert first.startswith("a") and second.startswith("x=2")


@pytest.mark.parametrize("words", [[], GREEDY, ["generation.top_k=5"]])
def test_the_sampling_is_said_without_a_warning(
    chat: Chat, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Oracle: transformers' own check of what it is given; it warns of a limit beside greedy."""
    warned: list[str] = []
    log = transformers.generation.configuration_utils.logger
    monkeypatch.setattr(log, "warning_once", lambda message, *_: warned.append(message))
    transformers.GenerationConfig(do_sample=False, top_k=7)
    assert warned and "top_k" in warned[0]
    warned.clear()
    assert answer(capsys, chat.directory, "--prompt", "a", *words)[0] == 0
    assert warned == []


def test_messages_are_answered_one_by_one(chat: Chat, capsys: Any) -> None:
    """Oracle: each message alone."""
    alone = [
        answer(capsys, chat.directory, "--user", message, *GREEDY)[1]
        for message in (MESSAGE, "3+3=6?")
    ]
    both = answer(capsys, chat.directory, "--user", MESSAGE, "--user", "3+3=6?", *GREEDY)[1]
    assert both == "\n".join(alone) and alone[0] != alone[1]


def test_a_run_answers_as_what_it_began_from(chat: Chat, tmp_path: Path, capsys: Any) -> None:
    """Oracle: the base's answer; a step at a rate of 1e-30 changes nothing."""
    tree = yaml.safe_load(SMOKE.read_text())
    del tree["model"], tree["tokenizer"], tree["evaluation"], tree["checkpoint"]
    tree["data"]["dir"] = str(tmp_path / "data")
    tree["training"] = {"steps": 1, "global_batch": 4}
    tree["evaluation"] = {"samples": 0}
    tree["optimizer"] = {"lr": 1e-30}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    words = [f"model.pretrained={chat.directory}", f"run_dir={run}"]
    llmnorm("train", tmp_path / "c.yaml", *words)
    expected = answer(capsys, chat.directory, "--user", MESSAGE, *GREEDY)[1]
    assert answer(capsys, run, "--user", MESSAGE, *GREEDY)[1] == expected


def test_a_run_of_finetune_answers_and_keeps_every_end(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the base's answer, since a rate of 1e-30 changes nothing; the end tokens of template
    and base in the export, which then ends the answer without any argument."""
    base = shutil.copytree(chat.directory, tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, 7]}))
    record = {"messages": [*QUESTION, {"role": "assistant", "content": "It is 4."}]}
    held = {"messages": [*OTHER, *record["messages"]]}
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(record)}\n" * 8)
    (tmp_path / "held.jsonl").write_text(f"{json.dumps(held)}\n")
    paths = {"path": str(tmp_path / "chat.jsonl"), "validation": str(tmp_path / "held.jsonl")}
    source = {"name": "chat", **paths}
    tree = {
        "data": {"sources": [source], "context_length": 64, "dir": str(tmp_path / "data")},
        "training": {"steps": 1, "global_batch": 4},
        "optimizer": {"lr": 1e-30},
        "evaluation": {"samples": 0},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    llmnorm("finetune", tmp_path / "c.yaml", f"model.pretrained={base}", f"run_dir={run}")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["objective"]["name"], saved["adapter"]["name"]) == ("sft", "lora")
    assert saved["optimizer"]["lr"] == 1e-30 and saved["optimizer"]["betas"] == [0.9, 0.999]
    expected = answer(capsys, chat.directory, "--user", MESSAGE, *GREEDY)[1]
    assert answer(capsys, run, "--user", MESSAGE, *GREEDY)[1] == expected
    llmnorm("export", run, tmp_path / "merged", "--merge", "--stock")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == {1, 7, chat.answer[-1]}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert greedy(merged, chat.prompt) == chat.answer


@pytest.fixture(scope="module")
def adapter(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter, and beside it the tokenizer without a template."""
    peft = pytest.importorskip("peft", reason="the extra finetune is not installed")
    model = AutoModelForCausalLM.from_pretrained(chat.directory)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    directory = tmp_path_factory.mktemp("adapter") / "lora"
    peft.get_peft_model(model, settings).save_pretrained(str(directory))
    return directory


def test_an_adapter_is_put_on_the_model(chat: Chat, adapter: Path, capsys: Any) -> None:
    """Oracle: PEFT on the stock class."""
    from peft import PeftModel

    stock = AutoModelForCausalLM.from_pretrained(chat.directory).eval()
    both = PeftModel.from_pretrained(stock, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat.directory)
    ends = [tokenizer.eos_token_id, chat.answer[-1]]
    expected = greedy(both, chat.prompt, eos_token_id=ends)
    words = [chat.directory, "--adapter", adapter, *GREEDY]
    text = tokenizer.decode([t for t in expected if t not in ends])
    assert answer(capsys, *words, "--user", MESSAGE)[1] == text + "\n"
    assert text != tokenizer.decode(chat.answer[:-1])
    prompt = tokenizer("It is").input_ids
    expected = greedy(both, prompt, eos_token_id=ends[:1])
    text = tokenizer.decode([*prompt, *expected], skip_special_tokens=True)
    assert answer(capsys, *words, "--prompt", "It is")[1] == text + "\n"


def test_the_template_of_an_adapter_is_its_own(
    chat: Chat, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    """Oracle: the same template in the base's directory."""
    base = shutil.copytree(chat.directory, tmp_path / "base")
    shutil.copytree(save_tokenizer(tmp_path / "headers", "headers"), base, dirs_exist_ok=True)
    expected = answer(capsys, base, "--adapter", adapter, "--user", "3+3?", *GREEDY)[1]
    own = shutil.copytree(adapter, tmp_path / "own")
    shutil.copytree(tmp_path / "headers", own, dirs_exist_ok=True)
    words = ["--user", "3+3?", *GREEDY]
    assert answer(capsys, chat.directory, "--adapter", own, *words)[1] == expected
    assert answer(capsys, chat.directory, "--adapter", adapter, *words)[1] != expected


def test_what_is_refused(
    chat: Chat, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line each, exit code 2."""
    peft = pytest.importorskip("peft", reason="the extra finetune is not installed")

    def refused(*words: str | Path) -> str:
        code, out, err = answer(capsys, *words)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    assert "has no chat template" in refused(exported, "--user", "a")
    assert "--user: not allowed with argument --prompt" in refused(
        chat.directory, "--prompt", "a", "--user", "b"
    )
    assert "has no adapter_config.json" in refused(chat.directory, "--adapter", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "it is a run: name it" in refused(chat.directory, "--adapter", tmp_path / "run")
    narrow = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    other = tmp_path / "other"
    peft.get_peft_model(narrow, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        str(other)
    )
    found = refused(chat.directory, "--adapter", other)
    assert re.search(r"q_proj.lora_A\S* has shape \[2, 16\] there and \[2, 32\] beside", found)
    bad = shutil.copytree(chat.directory, tmp_path / "bad")
    (bad / "chat_template.jinja").write_text("{{ messages[0].content.nothing.more }}")
    assert "--user: " in refused(bad, "--user", "a")
    small = shutil.copytree(chat.directory, tmp_path / "small")
    tree = json.loads((small / "tokenizer.json").read_text())
    tree["model"]["vocab"] = {
        token: number + 1000 if number > 300 else number
        for token, number in tree["model"]["vocab"].items()
    }
    (small / "tokenizer.json").write_text(json.dumps(tree))
    assert "has a token with the id" in refused(small, "--user", "It is 4. assistant thoughts")
