"""Runs of transformers' classes, exported and evaluated, beside plain transformers and PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from tests.families import tiny
from tests.running import SMOKE, llmnorm

peft = pytest.importorskip("peft", reason="needs the extra finetune")

WORDS = ["training.device=cpu", "training.steps=4", "schedule=constant", "optimizer.lr=1e-2"]
WORDS += ["evaluation.every=4", "evaluation.samples=0", "checkpoint.every=2", "training.ema=0.5"]
WORDS += ["model=null", "tokenizer=null", "data.context_length=32", "training.global_batch=4"]
# Learned positions and transposed layers; names that differ on disk, a state, one document a row.
KINDS = {"gpt2": "dora", "qwen3_next": "lora"}


def base_of(family: str, directory: Path, data: Path, **other: Any) -> Path:
    """A directory of a tiny model with the smoke tokenizer."""
    settings = load(SMOKE, [f"data.dir={data}"]).config
    found = packing.find(settings.data, settings.tokenizer)
    assert found is not None
    tiny(family, **({"vocab_size": 512} | other)).save_pretrained(directory)
    shutil.copytree(found.tokenizer_directory, directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """`base`, `adapter` and `full` of each kind: a directory, and two runs that began from it."""
    place = tmp_path_factory.mktemp("foreign")
    for family, adapter in KINDS.items():
        base = base_of(family, place / family / "base", smoke_data)
        begin = [*WORDS, f"model.pretrained={base}", f"data.dir={smoke_data}"]
        for name, words in (("adapter", [f"adapter={adapter}"]), ("full", [])):
            llmnorm("train", SMOKE, f"run_dir={place / family / name}", *begin, *words)
    return place


def ids() -> Tensor:
    return torch.randint(0, 512, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids(), use_cache=False).logits
    return found


def plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("family", KINDS)
def test_one_set_of_weights_in_plain_tools(family: str, place: Path, tmp_path: Path) -> None:
    """Oracle: the adapter in plain PEFT on the base, and merged there; to 1e-5 of the largest.

    A merge rounds every weight once more, which these large random ones carry on: twice that.
    """
    base, run = place / family / "base", place / family / "adapter"
    llmnorm("export", run, tmp_path / "adapter")
    llmnorm("export", run, tmp_path / "merged", "--merge")
    beside = peft.PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    expected = logits(beside)
    assert (expected - logits(plain(base))).abs().max() > 1e-2
    merged = logits(beside.merge_and_unload())
    bound = 1e-5 * float(expected.abs().max())
    for model in (plain(tmp_path / "merged"), load_model(run)[0]):
        assert type(model) is type(plain(base))
        torch.testing.assert_close(logits(model), merged, rtol=0, atol=bound)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2 * bound)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["task_type"] == "CAUSAL_LM"
    for name in ("adapter", "merged"):
        assert len(AutoTokenizer.from_pretrained(tmp_path / name)) == 512


@pytest.mark.parametrize("family", KINDS)
def test_a_trained_model_is_written_as_transformers_would(
    family: str, place: Path, tmp_path: Path
) -> None:
    """Oracle: `save_pretrained` of the run's model; files and configuration are the same."""
    run = place / family / "full"
    llmnorm("export", run, tmp_path / "ours")
    model, _ = load_model(run)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    for file in ("config.json", "generation_config.json"):
        own, other = (json.loads((tmp_path / d / file).read_text()) for d in ("ours", "theirs"))
        assert own == other, file
    again = plain(tmp_path / "ours")
    assert logits(again).equal(logits(model))
    before = load_file(place / family / "base" / "model.safetensors")
    assert not all(tensor.equal(before[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family", KINDS)
def test_eval_gives_the_figures_of_the_run(family: str, place: Path) -> None:
    """Oracle: the run's own last evaluation, to the last digit."""
    run = place / family / "full"
    llmnorm("eval", run)
    found = json.loads((run / "eval" / "step_00000004.json").read_text())["validation"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation"] for line in lines if "validation" in line][-1]
    del last["ema"]
    assert found == last


def test_eval_of_an_adapter_beside_its_base_is_that_of_the_run(place: Path, tmp_path: Path) -> None:
    """Oracle: the run's own last evaluation, to float32's rounding."""
    run = place / "gpt2" / "adapter"
    llmnorm("export", run, tmp_path / "it")
    llmnorm("eval", place / "gpt2" / "base", "--adapter", tmp_path / "it", "--data", run)
    found = json.loads((tmp_path / "it" / "eval.json").read_text())["validation"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation"] for line in lines if "validation" in line][-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["loss"] != pytest.approx(last["ema"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("inspect", "gpt2/full"), "is of transformers' class GPT2LMHeadModel, not of llmnorm's"),
        (("convert", "gpt2/full", "OUT", "--to", "rms"), "GPT2LMHeadModel of transformers and not"),
        (("export", "gpt2/full", "OUT", "--stock"), "GPT2LMHeadModel of transformers and not of"),
        (("export", "gpt2/full", "OUT.gguf"), "GPT2LMHeadModel of transformers and not of llmnorm"),
        (("export", "gpt2/full", "OUT", "--merge"), "has no adapter; leave it out"),
    ],
)
def test_what_depends_on_our_classes_is_refused_by_name(
    words: tuple[str, ...], why: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    """Oracle: exit code 2 and one line; nothing is written."""
    given = [
        str(tmp_path / w) if w.startswith("OUT") else str(place / w) if "/" in w else w
        for w in words
    ]
    assert cli.main(given) == 2
    error = capsys.readouterr().err.strip()
    assert why in error and "\n" not in error
    assert not [*tmp_path.iterdir()]


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class NovelConfig(LlamaConfig):
    model_type = "novel"


class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig
"""


def test_code_of_a_directory_is_trained_and_exported_with_it(
    tmp_path: Path, smoke_data: Path, capsys: Any
) -> None:
    """Oracles: a refusal without the setting; the class of the export in plain transformers."""
    base = base_of("llama", tmp_path / "base", smoke_data)
    (base / "novel.py").write_text(REMOTE)
    tree = json.loads((base / "config.json").read_text())
    tree |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    tree["auto_map"] = {"AutoConfig": "novel.NovelConfig"}
    tree["auto_map"]["AutoModelForCausalLM"] = "novel.NovelForCausalLM"
    (base / "config.json").write_text(json.dumps(tree))
    hints = {"do_sample": True, "top_k": 7}
    (base / "generation_config.json").write_text(json.dumps(hints))
    words = [f"run_dir={tmp_path / 'run'}", *WORDS, f"model.pretrained={base}"]
    words += [f"data.dir={smoke_data}", "training.steps=2", "evaluation.every=null"]
    assert cli.main(["train", str(SMOKE), *words]) == 2
    assert "model.trust_remote_code=true" in capsys.readouterr().err
    llmnorm("train", SMOKE, *words, "model.trust_remote_code=true")
    llmnorm("export", tmp_path / "run", tmp_path / "out")
    shutil.rmtree(base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "NovelForCausalLM" and model.generation_config.top_k == 7
    with pytest.raises(InputError, match="the code of its model lies in .*, which is not there"):
        load_model(tmp_path / "run")


def test_another_base_is_refused_when_an_adapter_is_read(place: Path, tmp_path: Path) -> None:
    """Oracle: the hash in the checkpoint; the message."""
    shutil.copytree(place / "qwen3_next" / "adapter", tmp_path / "run")
    base = place / "qwen3_next" / "base"
    shutil.copytree(base, tmp_path / "kept")
    weights = base / "model.safetensors"
    try:
        tiny("qwen3_next", seed=1, vocab_size=512).save_pretrained(base)
        with pytest.raises(InputError, match="holds other weights than the base"):
            load_model(tmp_path / "run")
    finally:
        shutil.copy(tmp_path / "kept" / weights.name, weights)
    load_model(tmp_path / "run")
