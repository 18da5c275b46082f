"""Adapters beside mixtures: of stacks of experts, in packed directories, and on bases in NF4."""

import json
from collections.abc import Iterable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmnorm.config.file import load
from llmnorm.exchange.loading import load_model
from tests.exchange.test_foreign_runs import WORDS, base_of, ids, logits, plain
from tests.exchange.test_foreign_weights import packed_fp4, quantised
from tests.running import SMOKE, llmnorm, metrics_of, state_of

peft = pytest.importorskip("peft", reason="needs the extra finetune")


def trained(base: Path, run: Path, data: Path, words: Iterable[str]) -> str:
    """Train a run, and what it said."""
    places = [f"model.pretrained={base}", f"data.dir={data}", f"run_dir={run}"]
    with redirect_stderr(StringIO()) as said:
        llmnorm("train", SMOKE, *WORDS, *places, *words)
    return said.getvalue()


def distance(model: Any, expected: Tensor) -> float:
    """The largest difference of logits over the largest logit."""
    return float((logits(model) - expected).abs().max() / expected.abs().max())


BESIDE_EXPERTS = ["adapter=lora", "adapter.parameters=[gate_up_proj, down_proj]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """`base`, a gpt-oss whose experts are in MXFP4; `run` beside it; its `adapter` and `said`."""
    place = tmp_path_factory.mktemp("packed")
    base = base_of("gpt_oss", place / "base", smoke_data, intermediate_size=32)
    packed = packed_fp4(load_file(base / "model.safetensors"))
    smaller = {n: t - 6 if n.endswith("_scales") else t for n, t in packed.items()}  # below 1
    quantised(base, smaller, quant_method="mxfp4")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    said = trained(base, place / "run", smoke_data, BESIDE_EXPERTS)
    (place / "said").write_text(said)
    llmnorm("export", place / "run", place / "adapter")
    return place


def test_a_packed_mixture_is_trained_and_goes_back_to_transformers(
    place: Path, tmp_path: Path
) -> None:
    """Oracles: transformers' own loading of the directory in MXFP4, PEFT beside it, PEFT's merge;
    to 1e-5 of the largest logit or weight. A merge rounds every weight once more: twice that."""
    run = place / "run"
    said = (place / "said").read_text()
    assert "adapter: around 16 linear layers and 8 stacks of experts" in said
    written = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert sorted(written["target_parameters"]) == ["down_proj", "gate_up_proj"]
    assert sorted(written["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    values = state_of(run, 4)
    moved = [n for n in values if n.startswith("model.") and ".experts." in n and ".lora_B." in n]
    assert len(moved) == 8 and all(values[name].any() for name in moved)
    beside = peft.PeftModel.from_pretrained(plain(place / "base"), place / "adapter")
    expected = logits(beside)
    assert distance(plain(place / "base"), expected) > 1e-2
    assert distance(load_model(run)[0], expected) < 2e-5
    llmnorm("export", run, tmp_path / "merged", "--merge")
    whole = plain(tmp_path / "merged")
    assert not hasattr(whole.config, "quantization_config")
    assert distance(whole, expected) < 2e-5
    theirs = beside.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        bound = 1e-5 * float(theirs[name].abs().max())
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=bound)


def test_eval_gives_the_figures_of_a_run_beside_experts(place: Path) -> None:
    """Oracle: the run's own last evaluation, to float32's rounding."""
    assert_figures_of_the_run(place / "run")


def assert_figures_of_the_run(run: Path) -> None:
    llmnorm("eval", run)
    found = json.loads((run / "eval" / "step_00000004.json").read_text())["validation"]
    last = [line["validation"] for line in metrics_of(run) if "validation" in line][-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_a_run_beside_experts_begins_with_the_adapter_of_another(
    place: Path, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the exported tensors, which a step with next to no learning rate does not change."""
    words = [*BESIDE_EXPERTS, f"adapter.from={place / 'adapter'}", "optimizer.lr=1e-30"]
    words += ["training.steps=1", "evaluation.every=null", "training.ema=null"]
    trained(place / "base", tmp_path / "run", smoke_data, words)
    stored = load_file(place / "adapter" / "adapter_model.safetensors")
    values = state_of(tmp_path / "run", 1)
    for name, tensor in stored.items():
        inner = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert values[f"model.{inner}"].equal(tensor)
    assert stored["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"].any()


# Rows of 64 numbers: of others bitsandbytes' own layers take a wrong scale on some CPUs.
NF4: dict[str, tuple[dict[str, int], list[str], str]] = {
    "qwen3_moe": (
        {"hidden_size": 64, "head_dim": 16},
        ["adapter=lora", "adapter.parameters=[down_proj]"],
        "in stacks of experts\n",
    ),
    "gpt2": ({"n_embd": 64, "n_inner": 128}, ["adapter=dora"], "stay as they are\n"),
}


@pytest.mark.parametrize("family", NF4)
def test_what_was_trained_beside_a_base_in_nf4_is_what_is_read(
    family: str, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracles: the run's own last evaluation; the card's code, run with PEFT and transformers."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    sizes, words, share = NF4[family]
    base, run = base_of(family, tmp_path / "base", smoke_data, **sizes), tmp_path / "run"
    said = trained(base, run, smoke_data, [*words, "model.quantize=nf4"])
    assert share in said.partition("are stored in NF4; ")[2]
    assert load(run).config.model.quantize == "nf4"  # what a run that goes on reads
    assert_figures_of_the_run(run)
    expected = logits(load_model(run)[0])
    llmnorm("export", run, tmp_path / "merged", "--merge")
    assert distance(plain(tmp_path / "merged"), expected) < 1e-5
    llmnorm("export", run, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.partition("```python")[2].partition("```")[0]
    assert 'llm_int8_skip_modules=["lm_head"]' in code
    code = code.replace("(BASE", f"({str(base)!r}, dtype='float32'").replace("DIRECTORY", "OUT")
    names: dict[str, Any] = {"OUT": str(tmp_path / "adapter")}
    exec(code, names)
    model = names["model"].eval()
    for module in model.modules():  # which multiply in bf16 in evaluation mode on some CPUs
        module.training = type(module).__module__.startswith("bitsandbytes.")
    found = model(input_ids=ids(), use_cache=False).logits.detach()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    other = peft.PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    assert distance(other, expected) > 1e-2
