"""`llmnorm generate`: files of requests, conversations, drafts, and what is refused."""

import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from llmnorm import cli
from tests.running import PATIENCE, Child
from tests.stock import stock_llama
from tests.test_data.chats import save_tokenizer

WORDS = ["the", "river", "runs", "through", "a", "small", "town", "and", "then", "into", "it"]


def prompts(path: Path, count: int, **keys: Any) -> Path:
    """A file of requests of uneven lengths."""
    lines = []
    for number in range(count):
        text = " ".join(WORDS[number % 7 : number % 7 + 1 + number * 5 % 9])
        lines.append(json.dumps({"prompt": text, "max_tokens": 1 + number * 7 % 24, **keys}))
    path.write_text("\n".join(lines) + "\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main(["generate", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_batch_that_is_killed_three_times_is_that_of_one_process(
    exported: Path, tmp_path: Path
) -> None:
    """Oracle: the file of a process that nobody killed, whose batches were others."""
    asked = prompts(tmp_path / "p.jsonl", 24)
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    words = ["generate", str(exported), "--prompts", str(asked), "generation.slots=3"]
    assert Child([*words, "--output", str(whole)], tmp_path / "whole.txt").finish() == 0
    for written in (1, 6, 14):
        child = Child([*words, "--output", str(out)], tmp_path / "log.txt")
        deadline = time.monotonic() + PATIENCE
        while not out.exists() or out.read_bytes().count(b"\n") < written:
            assert child.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(child.process.pid or 0, signal.SIGKILL)
        assert child.finish() == -signal.SIGKILL
        assert out.read_bytes().count(b"\n") < 24
    assert Child([*words, "--output", str(out)], tmp_path / "log.txt").finish() == 0
    found, expected = lines_of(out), lines_of(whole)
    assert [line["line"] for line in found] == list(range(1, 25))
    assert found == expected
    assert "has the answers to" in (tmp_path / "log.txt").read_text()


def test_a_file_gives_what_single_prompts_give(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `--prompt` with the line's own settings; standard output holds the lines too."""
    lines = [
        {"prompt": "The river", "temperature": 0, "max_tokens": 6},
        {"prompt": "It was", "seed": 7, "top_k": 5},
        {"prompt": "It was", "n": 2},
    ]
    asked = tmp_path / "p.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["generation.max_new_tokens=9", "generation.seed=40"]
    code, out, err = answer(capsys, exported, "--prompts", asked, *words)
    assert code == 0 and "3 requests: " in err and "cache: 8 rows of " in err
    found = [json.loads(line) for line in out.splitlines()]
    assert [(v["line"], v.get("row")) for v in found] == [(1, None), (2, None), (3, 0), (3, 1)]
    first = answer(
        capsys, exported, "--prompt", "The river", "--temperature", "0", "--max-tokens", "6"
    )[1]
    assert first == f"The river{found[0]['text']}\n"
    second = answer(
        capsys, exported, "--prompt", "It was", *words, "--seed=7", "generation.top_k=5"
    )
    assert second[1] == f"It was{found[1]['text']}\n"
    # A line without a seed of its own has the setting's plus its number, its second row one more.
    for row in (0, 1):
        third = answer(capsys, exported, "--prompt", "It was", *words, "--seed", str(43 + row))[1]
        assert third == f"It was{found[2 + row]['text']}\n"
    both = answer(capsys, exported, "--prompt", "It was", *words, "--seed=43", "generation.n=2")[1]
    assert both == "\n".join(f"It was{line['text']}\n" for line in found[2:])


def test_a_draft_changes_no_text(
    run: Path, exported: Path, stock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the text without a draft: of lookup, of the model itself as a run and as a Qwen3."""
    for how in (["--temperature", "0"], ["--seed", "3"]):
        words = [exported, "--prompt", "The", "--prompt", "It was", "--max-tokens", "20", *how]
        plain = answer(capsys, *words)
        for draft in ("lookup", run, stock):
            found = answer(capsys, *words, "--draft", draft, "generation.draft_tokens=4")
            assert found[:2] == plain[:2], draft
            assert "drafted ones accepted" in found[2]
        # The target drafts for itself, so it agrees: the draft's cache is that of the target.
        assert "1.00 of " in found[2] or "0.9" in found[2]
    assert "drafted" not in plain[2]


@pytest.fixture(scope="module")
def chat(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers messages."""
    directory = save_tokenizer(tmp_path_factory.mktemp("chat") / "stock")
    stock_llama(directory).save_pretrained(directory)
    return directory


def test_a_conversation_over_a_pipe(
    chat: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: each turn as messages in a file; standard output holds the answers alone."""
    words = ["--temperature", "0", "--max-tokens", "6"]
    piped = io.TextIOWrapper(io.BytesIO("2+2?\nzwölf?\n\n/quit\nnever\n".encode()))
    monkeypatch.setattr(sys, "stdin", piped)
    code, out, _ = answer(capsys, chat, "--chat", *words)
    assert code == 0
    said: list[dict[str, str]] = []
    texts = []
    for message in ("2+2?", "zwölf?"):
        said.append({"role": "user", "content": message})
        asked = tmp_path / "p.jsonl"
        asked.write_text(json.dumps({"messages": said}))
        line = json.loads(answer(capsys, chat, "--prompts", asked, *words)[1])
        texts.append(line["text"])
        said.append({"role": "assistant", "content": line["text"]})
    assert out == "".join(f"{text}\n" for text in texts)


def test_requests_are_read_from_a_pipe(
    exported: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same lines as a file; a broken line costs itself alone, and exit code 2."""
    lines = b'{"prompt": "The"}\nnonsense\n{"prompt": "It", "tempature": 1}\n{"prompt": "It"}\n'
    asked, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    asked.write_bytes(lines)
    words = ["--max-tokens", "4"]
    code, text, err = answer(capsys, exported, "--prompts", asked, "--output", out, *words)
    assert (code, text) == (2, "") and err.count("llmnorm: error: ") == 2
    assert f"error: {asked}:2: not JSON" in err
    assert f"error: {asked}:3: unknown key 'tempature'; did you mean 'temperature'?" in err
    found = lines_of(out)
    assert [("error" in line) for line in found] == [False, True, True, False]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, text, err = answer(capsys, exported, "--prompts", "-", *words)
    assert code == 2 and "error: -:2: not JSON" in err
    texts = [json.loads(line).get("tokens") for line in text.splitlines()]
    assert texts == [line.get("tokens") for line in found]
    # Once more: nothing is left to do, and the broken lines are told again.
    code, text, err = answer(capsys, exported, "--prompts", asked, "--output", out, *words)
    assert (code, text) == (2, "") and err.count("llmnorm: error: ") == 2
    assert lines_of(out) == found


def test_what_is_refused(
    run: Path, exported: Path, masked: Path, chat: Path, tmp_path: Path, capsys: Any
) -> None:
    """Oracle: one line each, exit code 2, nothing on standard output."""

    def refused(*words: str | Path) -> str:
        code, out, err = answer(capsys, *words)
        errors = [line for line in err.splitlines() if "error: " in line]
        assert (code, out, len(errors)) == (2, "", 1), err
        return errors[0]

    def draft(path: str | Path, *words: str) -> str:
        return refused(exported, "--prompt", "The", "--draft", path, *words)

    assert "of class LlmNormForMaskedLM; text is continued by" in refused(masked)
    assert "generation.draft: " in draft(masked) and "tokens are drafted by" in draft(masked)
    assert "generation.draft: there is no directory" in draft(tmp_path / "none")
    assert "has another vocabulary" in draft(chat)
    assert "uses no draft" in draft("lookup", "generation.method=plain")
    for method in ("ragged", "eqspec", "exspec"):
        found = refused(exported, f"generation.method={method}")
        assert f"generation.method '{method}' verifies a draft's tokens" in found
    assert "generation.draft_tokens is 3" in refused(exported, "generation.draft_tokens=3")
    short = shutil.copytree(exported, tmp_path / "short")
    tree = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**tree, "max_position_embeddings": 16}))
    assert "generation.draft: takes 16 tokens a row" in draft(short)
    assert "the context is 16 tokens" in refused(
        short, "--prompt", "a b c d e f g h i j k l m n o p q"
    )
    assert "generation.context: is 99, and the model takes 16" in refused(
        short, "--prompts", prompts(tmp_path / "p.jsonl", 1), "generation.context=99"
    )
    assert "GiB of cache" in refused(
        exported, "--prompts", tmp_path / "p.jsonl", "generation.cache_memory=1e-6"
    )
    for words in (["generation.dtype=bf16"], ["generation.device=cuda"]):
        assert "generation.deterministic is shown on a CPU in float32" in refused(
            exported, "generation.deterministic=true", *words
        )
    if not torch.cuda.is_available():
        assert "has no GPU that torch can use" in refused(exported, "generation.device=cuda")
    assert "--output: holds the answers to --prompts" in refused(
        exported, "--prompt", "a", "--output", tmp_path / "o.jsonl"
    )
    assert "there is no such file" in refused(exported, "--prompts", tmp_path / "none.jsonl")
    assert "--chat: a message has one answer" in refused(chat, "--chat", "generation.n=2")
    assert "has no chat template" in refused(exported, "--chat")
    assert "temperature" in refused(exported, "--temperature", "hot")
    assert "not allowed with argument --prompt" in refused(exported, "--prompt", "a", "--chat")


@pytest.mark.parametrize("method", ["eqspec", "exspec"])
def test_every_method_gives_the_same_file(
    method: str, run: Path, exported: Path, tmp_path: Path, capsys: Any
) -> None:
    """Oracle: the file without a draft; what the batches have cost is said at the end."""
    asked = prompts(tmp_path / "p.jsonl", 9)
    words = [exported, "--prompts", asked, "generation.slots=2"]
    plain = answer(capsys, *words)[1]
    drafts = ["--draft", run, f"generation.method={method}", "generation.draft_tokens=2"]
    code, out, err = answer(capsys, *words, *drafts)
    assert code == 0 and f"{method}: " in err and "rows copied for each row" in err
    kept = ("line", "tokens", "text", "finish")
    texts = [
        [{k: json.loads(line)[k] for k in kept} for line in t.splitlines()] for t in (plain, out)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 9


def test_a_deterministic_text_does_not_depend_on_its_company(
    exported: Path, tmp_path: Path, capsys: Any
) -> None:
    """Oracle: the bits of each request alone in its slots, told by the tokens and by the mode."""
    asked = prompts(tmp_path / "p.jsonl", 4, seed=5)
    words = ["generation.deterministic=true", "generation.slots=2", "generation.context=64"]
    found = []
    for more in ([], ["--draft", "lookup", "generation.draft_tokens=3"]):
        code, out, err = answer(capsys, exported, "--prompts", asked, *words, *more)
        assert code == 0 and "bit-equal in any batch, as a self-test has shown" in err
        found.append([json.loads(line)["tokens"] for line in out.splitlines()])
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_decoder_of_transformers_is_served_as_it_is(tmp_path: Path, capsys: Any) -> None:
    """Oracle: the stock class's greedy tokens; with itself for a draft."""
    directory = save_tokenizer(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(directory)
    ids = tokenizer("It is", return_tensors="pt").input_ids
    keys = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    out = model.generate(ids, max_new_tokens=9, do_sample=False, **keys)
    text = tokenizer.decode(out[0], skip_special_tokens=True) + "\n"
    capsys.readouterr()
    words = [directory, "--prompt", "It is", "--max-tokens", "9", "--temperature", "0"]
    assert answer(capsys, *words)[:2] == (0, text)
    draft = ["--draft", directory, "generation.draft_tokens=3"]
    assert answer(capsys, *words, *draft)[:2] == (0, text)
    for more, complaint in (
        (["generation.deterministic=true"], "for models of this package alone, and this is a GPT2"),
        (["--checkpoint", "3"], "--checkpoint: "),
        (["--adapter", tmp_path], "--adapter: "),
    ):
        code, out, err = answer(capsys, *words, *more)
        assert (code, out) == (2, "") and complaint in err
    tree = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(tree))
    code, out, err = answer(capsys, *words)
    assert (code, out, err.count("error: ")) == (2, "", 1) and "it carries a recurrent state" in err


def test_numbers_and_place_are_those_asked_for(exported: Path, capsys: Any) -> None:
    """Oracle: what the step says that it runs, and the bytes of a cache of half as wide numbers."""
    words = [exported, "--prompt", "The", "--max-tokens", "5", "generation.device=cpu"]
    sizes = []
    for dtype, name in (("fp32", "float32 on cpu"), ("bf16", "bfloat16 on cpu")):
        code, _, err = answer(capsys, *words, f"generation.dtype={dtype}")
        assert code == 0 and name in err
        sizes.append(float(err.partition(" tokens, ")[2].partition(" MiB")[0]))
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=0.2)
