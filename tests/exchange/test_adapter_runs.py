"""A run with an adapter is a set of weights like any other: read, merged, exported, trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3ForCausalLM,
)

from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from tests.running import SMOKE, llmnorm, metrics_of, state_of

peft = pytest.importorskip("peft", reason="needs the extra finetune")
WORDS = ["training.device=cpu", "training.steps=6", "schedule=constant", "optimizer.lr=1e-2"]
WORDS += ["optimizer.weight_decay=0", "evaluation.every=3", "evaluation.samples=0"]


@pytest.fixture(scope="module")
def narrow_base(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run's model in bfloat16, as most models are published."""
    base = tmp_path_factory.mktemp("narrow") / "base"
    shutil.copytree(exported, base)
    weights = {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return base


@pytest.fixture(scope="module")
def tuned(
    exported: Path,
    narrow_base: Path,
    run: Path,
    smoke_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Runs beside an exported directory, one in bfloat16 and a run."""
    place = tmp_path_factory.mktemp("tuned")
    kinds: dict[str, tuple[Path, list[str]]] = {
        "lora": (exported, ["adapter=lora"]),
        "dora": (run, ["adapter=dora", "training.ema=0.5", "checkpoint.every=3"]),
        "narrow": (narrow_base, ["adapter=dora", "training.precision=bf16"]),
        "norms": (exported, ["adapter=lora", "training.trainable=norms"]),
        "gains": (narrow_base, ["training.trainable=norms"]),
    }
    for name, (base, words) in kinds.items():
        places = [f"run_dir={place / name}", f"data.dir={smoke_data}", f"model.pretrained={base}"]
        llmnorm("train", SMOKE, *places, *WORDS, *words)
    return {name: place / name for name in kinds}


@pytest.fixture(scope="module")
def written(tuned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their exports: PEFT's directories, and whole models."""
    place = tmp_path_factory.mktemp("written")
    for name, path in tuned.items():
        llmnorm("export", path, place / name)
        if name != "gains":
            llmnorm("export", path, place / f"{name} merged", "--merge")
    return {path.name: path for path in place.iterdir()}


def ids() -> Tensor:
    return torch.randint(0, 512, (3, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(ids()).logits


def in_peft(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("name", ["lora", "dora", "norms"])
def test_one_set_of_weights_in_every_tool(
    tuned: Any, written: Any, exported: Path, tmp_path: Path, name: str
) -> None:
    """Oracle: the adapter in plain PEFT on the base; each other way gives its logits to 1e-5."""
    expected = logits(in_peft(exported, written[name]))
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(exported))).abs().max() > 1e-2
    llmnorm("export", tuned[name], tmp_path / "stock", "--merge", "--stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is Qwen3ForCausalLM
    merged = AutoModelForCausalLM.from_pretrained(written[f"{name} merged"])
    for model in (load_model(tuned[name])[0], merged, stock):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(written[name])
    assert tokenizer("A text.").input_ids == load_model(tuned[name])[1]("A text.").input_ids


def test_an_adapter_runs_in_plain_peft_on_a_stock_model(
    tuned: Any, written: Any, stock: Path
) -> None:
    """Oracle: the run's own logits; the base as a Qwen3, whose names are the same."""
    expected = logits(load_model(tuned["lora"])[0])
    torch.testing.assert_close(logits(in_peft(stock, written["lora"])), expected, rtol=0, atol=1e-5)


def test_a_merge_into_bf16_is_the_float32_merge_rounded_once(
    tuned: Any, written: Any, narrow_base: Path
) -> None:
    """Oracle: PEFT's merge of the same adapter into the base in float32, rounded."""
    model = in_peft(narrow_base, written["narrow"]).merge_and_unload()
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    found = load_file(written["narrow merged"] / "model.safetensors")
    assert found.keys() | {"lm_head.weight"} == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    assert json.loads((written["narrow merged"] / "config.json").read_text())["dtype"] == "bfloat16"
    base = load_file(narrow_base / "model.safetensors")
    changed = [name for name, tensor in found.items() if not tensor.equal(base[name])]
    assert len(changed) == 14  # 7 layers of 2 blocks
    assert load_model(tuned["narrow"])[0].dtype == torch.float32  # wide where nothing is written


def test_a_run_of_norms_alone_is_exported_whole(
    tuned: Any, written: Any, narrow_base: Path
) -> None:
    """Oracle: the trained gains, rounded to the base's dtype; every other tensor to the bit."""
    found, base = (load_file(d / "model.safetensors") for d in (written["gains"], narrow_base))
    state = {n.removeprefix("model."): t for n, t in state_of(tuned["gains"], 6).items()}
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = state[name].bfloat16() if "norm" in name else base[name]
        assert tensor.equal(expected), name
    assert not found["model.norm.weight"].equal(base["model.norm.weight"])


def test_the_average_of_an_adapter_is_exported(
    tuned: Any, run: Path, exported: Path, tmp_path: Path
) -> None:
    """Oracle: the averages in the checkpoint, as PEFT computes with them; not the weights."""
    llmnorm("export", tuned["dora"], tmp_path / "ema", "--ema")
    expected = logits(in_peft(exported, tmp_path / "ema"))
    model = load_model(tuned["dora"], ema=True)[0]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (logits(load_model(tuned["dora"])[0]) - expected).abs().max() > 1e-3


def test_a_mean_of_checkpoints_is_one_of_merged_weights(tuned: Any, tmp_path: Path) -> None:
    """Oracle: the mean of the two merged directories, in float32."""
    llmnorm("export", tuned["dora"], tmp_path / "mean", "--merge", "--average", "2")
    parts = []
    for step in ("3", "6"):
        llmnorm("export", tuned["dora"], tmp_path / step, "--merge", "--checkpoint", step)
        parts.append(load_file(tmp_path / step / "model.safetensors"))
    for name, tensor in load_file(tmp_path / "mean" / "model.safetensors").items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
    assert not parts[0]["model.layers.0.mlp.up_proj.weight"].equal(
        parts[1]["model.layers.0.mlp.up_proj.weight"]
    )


def test_every_command_takes_an_adapter_run(
    tuned: Any, written: Any, tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run's last validation; the texts of its merged directory; a next run's base."""
    llmnorm("eval", tuned["dora"])
    (file,) = (tuned["dora"] / "eval").glob("*.json")
    found = json.loads(file.read_text())["validation"]["loss"]
    last = [line["validation"] for line in metrics_of(tuned["dora"]) if "validation" in line][-1]
    assert found == pytest.approx(last["loss"], rel=1e-5)
    texts = []
    for path in (tuned["dora"], written["dora merged"]):
        capsys.readouterr()
        llmnorm("generate", path, "--prompt", "The", "generation.temperature=0")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 8
    places = [f"model.pretrained={tuned['dora']}", f"data.dir={smoke_data}"]
    words = [*places, *WORDS, f"run_dir={tmp_path}/next", "optimizer.lr=0", "training.steps=1"]
    llmnorm("train", SMOKE, *words, "adapter=lora")  # an adapter on an adapter
    expected = logits(load_model(tuned["dora"])[0])
    torch.testing.assert_close(
        logits(load_model(tmp_path / "next")[0]), expected, rtol=0, atol=1e-6
    )
    llmnorm("inspect", tuned["lora"], "--rows", "1", "--out", str(tmp_path / "page"))
    assert any((tmp_path / "page").iterdir())


def test_a_new_head_travels_with_its_adapter(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: PEFT's modules_to_save on the base; the merged directory in its Auto class."""
    words = ["training.epochs=null", "training.steps=2", "evaluation.every=2", "adapter=lora"]
    path = tmp_path / "run"
    places = [f"model.pretrained={run}", f"run_dir={path}", "training.device=cpu"]
    llmnorm("train", "configs/finetune/smoke.yaml", *places, *words)
    capsys.readouterr()
    llmnorm("export", path, tmp_path / "peft")
    out = capsys.readouterr().out
    assert "'pooler.weight' and 3 more was trained whole" in out and "--merge" in out
    assert f"llmnorm export {run / 'checkpoints' / 'step_00000012'} BASE" in out
    llmnorm("export", path, tmp_path / "merged", "--merge")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(
        exported, num_labels=merged.num_labels, architectures=merged.config.architectures
    )
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    expected = logits(loaded)
    for model in (merged, load_model(path)[0]):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_the_card_says_how_to_load_it(written: Any, exported: Path) -> None:
    """Oracle: the base's path, PEFT's class, the run's settings."""
    text = (written["lora"] / "README.md").read_text()
    assert f"Its base: {exported}." in text and "PeftModel.from_pretrained(base, " in text
    assert "library_name: peft" in text and "name: lora" in text
    config = json.loads((written["lora"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(exported)
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 16
    attention = {f"{name}_proj" for name in "qkvo"}
    mlp = {f"{name}_proj" for name in ("gate", "up", "down")}
    assert set(config["target_modules"]) == attention | mlp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stock"], "--stock: .* is an adapter; add --merge"),
        (["--average", "2"], "--average: .* is an adapter; add --merge"),
    ],
)
def test_what_is_no_adapter_is_refused(
    tuned: Any, run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    """Oracle: one line; nothing is written."""
    from llmnorm.exchange.export import export

    keys: dict[str, Any] = {"stock": True} if options[0] == "--stock" else {"average": 2}
    with pytest.raises(InputError, match=message):
        export(tuned["dora"], tmp_path / "out", **keys)
    with pytest.raises(InputError, match="has no adapter; leave it out"):
        export(run, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_or_changed_is_named_by_a_reader(
    exported: Path, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the paths of the base and of the run, and one weight changed in the file."""
    base, path = tmp_path / "base", tmp_path / "run"
    shutil.copytree(exported, base)
    words = [f"run_dir={path}", f"data.dir={smoke_data}", f"model.pretrained={base}", *WORDS]
    llmnorm("train", SMOKE, *words, "adapter=lora", "training.steps=1")
    expected = logits(load_model(path)[0])
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=rf"its base {base} is not there; .* llmnorm train {path}"):
        load_model(path)
    llmnorm("train", path, f"model.pretrained={moved}")
    assert logits(load_model(path)[0]).equal(expected)
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds other weights than the base that"):
        load_model(path)
