"""Runs whose chat template needs tokens that the base's tokenizer lacks, and the way back."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmnorm import cli
from llmnorm.analysis.plan.layout import alone
from llmnorm.analysis.plan.memory import memory
from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.config.file import load
from llmnorm.exchange.loading import load_model
from tests.running import llmnorm, metrics_of, state_of

peft = pytest.importorskip("peft", reason="needs the extra finetune")

TOKENS = ["<|im_start|>", "<|im_end|>"]
NEW = [512, 513]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied Qwen3 with a row a token, and a Llama whose own head and embedding have 7 rows more.

    The tokenizer has 512 tokens."""
    padded = tmp_path_factory.mktemp("bases") / "padded"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=519,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    ).save_pretrained(padded)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stock / name, padded)
    return {"tied": stock, "padded": padded}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Additions, with the template's tokens around them."""
    place = tmp_path_factory.mktemp("recipe")
    records = [
        {"prompt": f"{a}+{b}?", "completion": f"It is {a + b}."} for a in range(9) for b in range(9)
    ]
    (place / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tree = {
        "data": {
            "sources": [{"name": "sums", "path": str(place / "sums.jsonl")}],
            "context_length": 64,
            "validation_bytes": 400,
            "dir": str(place / "data"),
        },
        "tokenizer": {"chat_template": "chatml"},
        "objective": "sft",
        "adapter": {"name": "lora", "rank": 4},
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "schedule": "constant",
        "training": {"steps": 6, "global_batch": 6, "device": "cpu"},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 6, "samples": 0, "answers": 2},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return place / "recipe.yaml"


@pytest.fixture(scope="module")
def tuned(
    bases: dict[str, Path], recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs beside both bases, one of which trains everything."""
    place = tmp_path_factory.mktemp("tuned")
    everything = ["adapter=none", "optimizer.lr=1e-3"]
    for name, (base, words) in {
        "tied": ("tied", []),
        "padded": ("padded", ["training.precision=bf16"]),
        "whole": ("tied", everything),
    }.items():
        places = [f"model.pretrained={bases[base]}", f"run_dir={place / name}"]
        llmnorm("train", recipe, *places, *words)
    return {path.name: path for path in place.iterdir()}


def ids() -> Tensor:
    drawn = torch.randint(3, 514, (3, 21), generator=torch.Generator().manual_seed(1))
    drawn[:, 4:6] = torch.tensor(NEW)
    return drawn


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(ids()).logits


@pytest.mark.parametrize("name", ["tied", "padded"])
def test_new_rows_move_and_every_other_row_is_bit_equal(
    tuned: Any, bases: Any, tmp_path: Path, name: str
) -> None:
    """Oracle: the base's file; the mean of its rows, where the new ones began."""
    llmnorm("export", tuned[name], tmp_path / "merged", "--merge")
    before, after = (load_file(d / "model.safetensors") for d in (bases[name], tmp_path / "merged"))
    state = state_of(tuned[name], 6)
    for weight in [EMBEDDING] if name == "tied" else [EMBEDDING, HEAD]:
        rows = 514 if name == "tied" else 519
        assert before[weight].shape[0] == (512 if name == "tied" else 519)
        assert after[weight].shape[0] == rows
        others = [n for n in range(len(before[weight])) if n not in NEW]
        assert after[weight][others].equal(before[weight][others])
        mean = before[weight][:512].mean(0)
        moved = (after[weight][NEW] - mean).abs().amax(1)
        assert bool((moved > 1e-3).all()) and bool((moved < 0.2).all())
        assert after[weight][NEW].equal(state[f"model.{weight[:-6]}new_rows"])
    shapes = [t.shape for n, t in state.items() if "new_rows" in n and t.ndim]
    assert shapes == [(2, before[EMBEDDING].shape[1])] * (3 if name == "tied" else 6)  # 2 moments
    losses = [line["loss"] for line in metrics_of(tuned[name]) if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["tied", "padded"])
def test_the_adapter_carries_them_into_plain_peft(
    tuned: Any, bases: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: PEFT on the stock base as the card says it; each other way gives its logits."""
    llmnorm("export", tuned[name], tmp_path / "peft")
    said = capsys.readouterr().out
    assert "rows of 2 new tokens" in said and "vLLM and llama.cpp do not" in said
    card = (tmp_path / "peft" / "README.md").read_text()
    resize = "base.resize_token_embeddings(514)"
    assert (resize in card) == (name == "tied")
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    loaded: dict[str, Any] = {"BASE": bases[name], "DIRECTORY": tmp_path / "peft"}
    exec(code, loaded)
    expected = logits(loaded["model"])
    llmnorm("export", tuned[name], tmp_path / "merged", "--merge")
    llmnorm("export", tuned[name], tmp_path / "stock", "--merge", "--stock")
    merged, stock = (
        AutoModelForCausalLM.from_pretrained(tmp_path / d) for d in ("merged", "stock")
    )
    assert type(stock).__name__ in ("Qwen3ForCausalLM", "LlamaForCausalLM")
    for model in (load_model(tuned[name])[0], merged, stock):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    ends = loaded["model"].generation_config.eos_token_id
    assert ends == merged.generation_config.eos_token_id and NEW[1] in ends
    tokenizer = loaded["tokenizer"]
    assert tokenizer.convert_tokens_to_ids(TOKENS) == NEW
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], add_generation_prompt=True
    )
    assert [n for n in found["input_ids"] if n in NEW] == [512, 513, 512]


def test_pefts_files_on_our_own_class(
    run: Path, recipe: Path, exported: Path, tmp_path: Path
) -> None:
    """Oracle: the run's own logits; the base is a run, whose export PEFT reads."""
    words = [f"model.pretrained={run}", f"run_dir={tmp_path}/run", "adapter=dora"]
    llmnorm("train", recipe, *words, "training.ema=0.5", "training.trainable=norms")
    llmnorm("export", tmp_path / "run", tmp_path / "peft", "--ema")
    base = AutoModelForCausalLM.from_pretrained(exported)
    base.resize_token_embeddings(514)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    expected = logits(load_model(tmp_path / "run", ema=True)[0])
    assert (expected - logits(load_model(tmp_path / "run")[0])).abs().max() > 1e-4
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_new_rows_beside_weights_in_nf4(bases: Any, recipe: Path, tmp_path: Path) -> None:
    """Oracle: the base's other rows, to the bit; the trained rows in the checkpoint."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    words = [f"model.pretrained={bases['padded']}", f"run_dir={tmp_path}/run", "training.steps=2"]
    llmnorm("train", recipe, *words, "model.quantize=nf4")
    llmnorm("export", tmp_path / "run", tmp_path / "out", "--merge")
    before, after = (
        load_file(d / "model.safetensors") for d in (bases["padded"], tmp_path / "out")
    )
    others = [n for n in range(519) if n not in NEW]
    for weight in (EMBEDDING, HEAD):
        assert after[weight][others].equal(before[weight][others])
        rows = state_of(tmp_path / "run", 2)[f"model.{weight[:-6]}new_rows"]
        assert after[weight][NEW].equal(rows)


@pytest.mark.parametrize("name", ["tied", "padded"])
def test_a_gguf_file_has_them(tuned: Any, bases: Any, tmp_path: Path, name: str) -> None:
    """Oracle: the run's weights; the spellings of the tokens, a name for every row."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    llmnorm("export", tuned[name], tmp_path / "model.gguf", "--type", "f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens[512:514] == TOKENS and len(tokens) == (514 if name == "tied" else 519)
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert kinds[512:514] == [gguf.TokenType.CONTROL] * 2
    weights = load_model(tuned[name])[0].state_dict()
    (found,) = (t for t in reader.tensors if t.name == "token_embd.weight")
    assert torch.tensor(found.data).view(len(tokens), -1).equal(weights[EMBEDDING])


def test_a_run_that_trains_everything_has_a_larger_embedding(
    tuned: Any, bases: Any, tmp_path: Path
) -> None:
    """Oracle: the names and shapes of its tensors; every row that a token had has moved."""
    state = state_of(tuned["whole"], 6)
    assert not any("new_rows" in name for name in state)
    weight = state[f"model.{EMBEDDING}"]
    before = load_file(bases["tied"] / "model.safetensors")[EMBEDDING]
    assert weight.shape == (514, before.shape[1])
    mean = before.double().mean(0).float()
    assert bool(((weight[NEW] - mean).abs().amax(1) < 0.02).all())
    assert bool((weight[:512] != before).any(1).all())
    llmnorm("export", tuned["whole"], tmp_path / "out", "--stock")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        logits(model), logits(load_model(tuned["whole"])[0]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["padded", "whole"])
def test_a_checkpoint_is_as_large_as_planned(tuned: Any, name: str) -> None:
    """Oracle: the bytes of all tensors in the run's checkpoint."""
    config = load(tuned[name], ["training.micro_batch=1"]).config
    written = sum(tensor.nbytes for tensor in state_of(tuned[name], 6).values())
    assert memory(alone(config)).checkpoint == written


def test_a_run_goes_on_to_the_same_numbers(
    tuned: Any, bases: Any, recipe: Path, tmp_path: Path
) -> None:
    """Oracle: the run without a pause: rows, moments and losses to the bit."""
    path = tmp_path / "run"
    words = [f"model.pretrained={bases['padded']}", f"run_dir={path}", "training.precision=bf16"]
    llmnorm("train", recipe, *words, "training.steps=3")
    llmnorm("train", path, "training.steps=6")
    found, expected = state_of(path, 6), state_of(tuned["padded"], 6)
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    losses = [[x["loss"] for x in metrics_of(p) if "loss" in x] for p in (path, tuned["padded"])]
    assert losses[0] == losses[1]
    named = read_checkpoint(path / "checkpoints" / "step_00000006").meta["base"]
    assert named["new_tokens"] == [512, 514]


@pytest.mark.parametrize("words", [[], ["adapter=none", "optimizer.lr=1e-3"]], ids=" ".join)
def test_a_run_goes_on_after_its_base_was_moved(
    bases: Any, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Oracle: the identity of its data, and the losses of a run whose base stays where it was.

    A damaged copy of the tokenizer is another tokenizer."""
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(bases["tied"], base)
    words = [*words, f"model.pretrained={base}", "evaluation.every=null"]
    for path, steps in ((tmp_path / "whole", 4), (tmp_path / "run", 2)):
        llmnorm("train", recipe, *words, f"run_dir={path}", f"training.steps={steps}")
    base.rename(moved)
    again = ["train", str(tmp_path / "run"), "training.steps=4"]
    again += [] if "adapter=none" in words else [f"model.pretrained={moved}"]
    file = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    content = file.read_text()
    file.write_text(content.replace("<|im_end|>", "<|im_bye|>"))
    capfd.readouterr()
    assert cli.main(again) == 2
    assert "was trained on the data" in capfd.readouterr().err
    file.write_text(content)
    llmnorm(*again)
    assert f"tokenizer.path: {base} is gone; the run's own copy is used" in capfd.readouterr().err
    losses = [
        [x["loss"] for x in metrics_of(tmp_path / p) if "loss" in x] for p in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_an_adapter_goes_on_with_its_rows(
    tuned: Any, bases: Any, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the exported rows, which a rate of 0 leaves as they are; other ids are refused."""
    llmnorm("export", tuned["padded"], tmp_path / "peft")
    words = [f"model.pretrained={bases['padded']}", f"adapter.from={tmp_path}/peft"]
    still = ["optimizer.lr=0", "optimizer.weight_decay=0", "training.steps=1"]
    still += ["optimizer.auxiliary.weight_decay=0"]
    llmnorm("train", recipe, *words, *still, f"run_dir={tmp_path}/next")
    first, second = state_of(tuned["padded"], 6), state_of(tmp_path / "next", 1)
    for name in (n for n in first if n.startswith("model.")):
        assert second[name].equal(first[name]), name
    file = tmp_path / "peft" / "adapter_config.json"
    tree = json.loads(file.read_text())
    tree["trainable_token_indices"]["lm_head"] = [511, 512]
    file.write_text(json.dumps(tree))
    capfd.readouterr()
    assert cli.main(["train", str(recipe), *words, f"run_dir={tmp_path}/other"]) == 2
    assert "adds here (512 to 513)" in capfd.readouterr().err


def test_a_next_run_has_them_in_its_base(
    tuned: Any, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the tensors of a run beside the run: no new rows; the same logits at a rate of 0."""
    words = [f"model.pretrained={tuned['tied']}", "optimizer.lr=0", "training.steps=1"]
    llmnorm("train", recipe, *words, f"run_dir={tmp_path}/next")
    assert "new tokens" not in capfd.readouterr().err
    assert not any("new_rows" in name for name in state_of(tmp_path / "next", 1))
    found, expected = (load_model(path)[0] for path in (tmp_path / "next", tuned["tied"]))
    assert found.config.vocab_size == 514
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-6)


def test_commands_take_the_run_and_its_adapter(
    tuned: Any, bases: Any, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run's last validation; one text from the run and from base with adapter."""
    llmnorm("eval", tuned["tied"])
    (file,) = (tuned["tied"] / "eval").glob("*.json")
    found = json.loads(file.read_text())["validation"]["loss"]
    last = [line["validation"] for line in metrics_of(tuned["tied"]) if "validation" in line][-1]
    assert found == pytest.approx(last["loss"], rel=1e-5)
    llmnorm("export", tuned["tied"], tmp_path / "peft")
    texts = []
    for words in ([tuned["tied"]], [bases["tied"], "--adapter", tmp_path / "peft"]):
        capsys.readouterr()
        llmnorm("generate", *words, "--user", "2+2?", "generation.temperature=0")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    capsys.readouterr()
    places = [f"model.pretrained={bases['padded']}", f"run_dir={tmp_path}/none"]
    llmnorm("train", recipe, *places, "--print-groups")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "new_rows" in line]
    assert {row[0] for row in rows} == {"model.embed_tokens.new_rows", "lm_head.new_rows"}
    assert all("adamw" in row for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.targets=[q_proj,lm_head]"], "'lm_head' cannot have an adapter beside rows"),
        (["model.vocab_size=600"], "model.vocab_size: .* brings its own; leave it out"),
        (["objective=masked_lm"], "tokenizer.chat_template: .* only a causal language model"),
    ],
)
def test_what_cannot_be_is_refused(
    bases: Any,
    masked: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """Oracle: one line that names the key, and exit code 2."""
    places = [f"model.pretrained={bases['padded']}", f"run_dir={tmp_path}/run"]
    if "objective=masked_lm" in words:
        words = [*words, f"model.pretrained={masked}", "evaluation.answers=0"]
        words.append("data.sources.0.path=llmnorm:text/prose.jsonl")
    capfd.readouterr()
    assert cli.main(["train", str(recipe), *places, *words]) == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("llmnorm: error:")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (tmp_path / "run" / "config.yaml").exists()
