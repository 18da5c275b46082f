"""Runs that train an adapter, or some weights only: what they keep, how they go on, their base."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmnorm import cli
from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.training import loop
from tests.running import CHILDREN, PATIENCE, SMOKE, assert_same_run, llmnorm, metrics_of, state_of

pytest.importorskip("peft", reason="needs the extra finetune")
RUNS = {
    "lora": ["adapter=lora", "training.steps=12"],
    "dora": ["adapter=dora", "adapter.dropout=0.1", "training.precision=bf16", "training.ema=0.9"],
    "nf4": ["adapter=lora", "model.quantize=nf4", "training.precision=bf16"],
}


def settings(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    """What trains a small adapter beside `base` on the smoke data, on one CPU."""
    words = [
        f"model.pretrained={base}",
        f"data.dir={data}",
        f"run_dir={run}",
        "training.device=cpu",
    ]
    words += ["training.steps=12", "schedule=constant", "optimizer.lr=1e-2"]
    words += ["checkpoint.every=6", "evaluation.every=6", "evaluation.samples=0"]
    return [str(SMOKE), *words, *more]


def tuned(base: Path, data: Path, run: Path, *more: str) -> Path:
    llmnorm("train", *settings(base, data, run, *more))
    return run


def said(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command that the user can mend."""
    capfd.readouterr()
    assert cli.main(["train", *words]) == 2
    return capfd.readouterr().err


def dies(words: list[str], step: int, log: Path) -> None:
    """A run in a process of its own that is killed by -9 while it takes a step."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 2)
    real = loop.step

    def take(prepared: Any, *arguments: Any) -> Any:
        if prepared.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(prepared, *arguments)

    loop.step = take
    cli.main(["train", *words])


@pytest.fixture(scope="module", params=RUNS)
def whole(
    request: pytest.FixtureRequest, run: Path, smoke_data: Path, tmp_path_factory: Any
) -> tuple[Path, list[str]]:
    """A run of 12 steps beside the smoke run, and what it was started with."""
    words = RUNS[request.param]
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    return tuned(run, smoke_data, tmp_path_factory.mktemp("a") / "run", *words), words


def test_a_killed_run_goes_on_to_the_same_numbers(
    whole: tuple[Path, list[str]], run: Path, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the run that was not killed: adapter, moments, averages and metrics to the bit."""
    expected, words = whole
    words = settings(run, smoke_data, tmp_path / "run", *words)
    process = CHILDREN.Process(target=dies, args=(words, 7, tmp_path / "log"))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "checkpoints" / "step_00000012").exists()
    llmnorm("train", *words)
    assert_same_run(tmp_path / "run", expected, 12)
    losses = [line["loss"] for line in metrics_of(expected) if "loss" in line]
    assert abs(losses[6] - losses[0]) > 0.01  # a run that began anew would be seen


def test_a_checkpoint_holds_what_is_trained(whole: tuple[Path, list[str]], run: Path) -> None:
    """Oracle: the adapter's tensors by name; the base's directory; its unchanged weights."""
    path, words = whole
    checkpoint = read_checkpoint(path / "checkpoints" / "step_00000012")
    tensors = checkpoint.manifest["tensors"]
    assert all(".lora_" in name for name in tensors)
    assert {entry["dtype"] for entry in tensors.values()} == {"float32"}
    kinds = {name.partition(".")[0] for name in tensors}
    averaged = {"ema"} if "training.ema=0.9" in words else set()
    assert kinds == {"model", "optimizer"} | averaged
    base = checkpoint.meta["base"]
    assert base["path"] == str(run / "checkpoints" / "step_00000012") and len(base["hash"]) == 16
    state = state_of(path, 12)
    assert all(t.any() for name, t in state.items() if name.endswith("lora_B.default.weight"))


def test_recomputed_blocks_train_every_b(run: Path, smoke_data: Path, tmp_path: Path) -> None:
    """Oracle: zeros before the first step; two steps of one process."""
    words = ["parallel.activation_checkpointing=true", "training.steps=2", "evaluation.every=null"]
    for kind in ("lora", "dora"):
        state = state_of(tuned(run, smoke_data, tmp_path / kind, f"adapter={kind}", *words), 2)
        found = [t for n, t in state.items() if n.startswith("model.") and ".lora_B." in n]
        assert len(found) == 14 and all(t.any() for t in found)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_adapter_begins_with_pefts_files(
    run: Path, smoke_data: Path, tmp_path: Path, optimizer: str
) -> None:
    """Oracle: the saved tensors, which a step with a rate of 0 leaves as they are."""
    from llmnorm.models import adapters

    first = tuned(run, smoke_data, tmp_path / "first", "adapter=lora", "training.steps=6")
    state = {
        n.removeprefix("model."): t for n, t in state_of(first, 6).items() if n[:6] == "model."
    }
    directory = tmp_path / "peft"
    directory.mkdir()
    save_file({adapters.peft_name(n): t for n, t in state.items()}, directory / adapters.WEIGHTS)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": False}
    (directory / adapters.CONFIG).write_text(json.dumps(config))
    words = ["adapter=lora", f"adapter.from={directory}", "training.steps=6"]
    still = ["optimizer.lr=0", "optimizer.weight_decay=0", f"optimizer={optimizer}"]
    words += [still[2], *still[:2], "evaluation.every=null"]
    again = state_of(tuned(run, smoke_data, tmp_path / "second", *words), 6)
    assert all(again[f"model.{name}"].equal(tensor) for name, tensor in state.items())
    shutil.rmtree(directory)  # it is needed once
    llmnorm("train", tmp_path / "second", "training.steps=7")


def test_a_new_head_is_trained_beside_an_adapter(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the names of the tensors in the checkpoint."""
    words = [f"model.pretrained={run}", "adapter=lora", "adapter.targets=[v_proj]"]
    words += ["training.epochs=null", "training.steps=2", "evaluation.every=2"]
    words += [f"run_dir={tmp_path}/run", "training.device=cpu"]
    llmnorm("train", "configs/finetune/smoke.yaml", *words)
    names = {n for n in state_of(tmp_path / "run", 2) if n.startswith("model.")}
    layers = [f"model.model.layers.{n}.self_attn.v_proj.lora_" for n in (0, 1)]
    adapter = {f"{layer}{kind}.default.weight" for layer in layers for kind in "AB"}
    heads = {f"model.{m}.{p}" for m in ("pooler", "score") for p in ("weight", "bias")}
    assert names == adapter | heads
    assert "a new head" in capfd.readouterr().err


def test_norms_alone_are_trained(run: Path, smoke_data: Path, tmp_path: Path) -> None:
    """Oracle: the names of the tensors in the checkpoint, 2 norms and 2 of QK a block and one."""
    path = tuned(run, smoke_data, tmp_path / "run", "adapter=none", "training.trainable=norms")
    names = [n for n in state_of(path, 12) if n.startswith("model.")]
    assert len(names) == 9 and all("norm" in name for name in names)


def test_lora_plus_raises_the_rate_of_every_b(
    run: Path, smoke_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the table of rules; the rates that the steps are taken with."""
    words = settings(run, smoke_data, tmp_path / "run", "adapter=lora", "adapter.b_lr_ratio=16")
    llmnorm("train", *words, "--print-groups")
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if ".lora_" in line]
    assert {(".lora_B." in row[0], row[-2]) for row in rows} == {(True, "0.16"), (False, "0.01")}
    # Adam's first step is as long as the rate, whatever the gradient.
    llmnorm("train", *words, "training.steps=1", "evaluation.every=null", "optimizer.eps=1e-30")
    state = state_of(tmp_path / "run", 1)
    largest = max(float(t.abs().max()) for n, t in state.items() if n.endswith("B.default.weight"))
    assert largest == pytest.approx(0.16, rel=1e-5)
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert lines[0]["lr"] == 0.01


# The base


@pytest.fixture
def moving(exported: Path, smoke_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of 6 steps beside a directory of its own, and that directory."""
    base = tmp_path / "base"
    shutil.copytree(exported, base)
    words = ["adapter=lora", "training.steps=6", "evaluation.every=null"]
    return tuned(base, smoke_data, tmp_path / "run", *words), base


def test_a_base_that_was_moved_is_found(
    moving: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the messages; the setting that is then saved."""
    run, base = moving
    new = base.rename(tmp_path / "elsewhere")
    error = said(capfd, str(run), "training.steps=8")
    assert f"{base}, the base of this run, is not there" in error
    assert f"llmnorm train {run} model.pretrained=NEW" in error
    llmnorm("train", run, f"model.pretrained={new}")  # finished as it is: only the place is new
    assert f"pretrained: {new}" in (run / "config.yaml").read_text()
    llmnorm("train", run, "training.steps=8")
    assert metrics_of(run)[-1]["step"] == 8


def test_another_base_is_refused(
    moving: tuple[Path, Path],
    run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    smoke_data: Path,
) -> None:
    """Oracle: one weight changed in the file; another model; a run that freezes nothing."""
    path, base = moving
    words = [f"run_dir={tmp_path}/o", f"data.dir={smoke_data}", "training.steps=1"]
    llmnorm("train", SMOKE, *words, "model.num_hidden_layers=1", "training.device=cpu")
    error = said(capfd, str(path), "training.steps=8", f"model.pretrained={tmp_path}/o")
    assert "another model than the base" in error and "num_hidden_layers (2 in the run" in error
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    error = said(capfd, str(path), "training.steps=8")
    assert "holds other weights than the base" in error and "the hash of its files is" in error
    error = said(capfd, str(tmp_path / "o"), f"model.pretrained={run}")
    assert "an existing run cannot change this key" in error


def test_a_base_that_is_a_run_may_be_trained_further(
    run: Path, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the checkpoint that the base had when the adapter began."""
    base = tmp_path / "base"
    shutil.copytree(run, base)
    path = tuned(base, smoke_data, tmp_path / "run", "adapter=lora", "training.steps=6")
    llmnorm("train", base, "training.steps=14", "checkpoint.keep=4")
    llmnorm("train", path, "training.steps=7")
    named = read_checkpoint(path / "checkpoints" / "step_00000007").meta["base"]["path"]
    assert named == str(base / "checkpoints" / "step_00000012")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=lora", "model.pretrained=null"], "add model.pretrained"),
        (["training.trainable=adapter"], "there is no adapter; add adapter=lora"),
        (["adapter=lora", "training.trainable=all"], "'all' trains the weights"),
        (["adapter=lora", "optimizer.lr=auto"], "optimizer.lr: auto: the Step Law"),
        (["adapter=lora", "adapter.b_lr_ratio=4", "optimizer=muon"], "'muon' sets the size"),
        (["adapter=lora", "optimizer.nap=true", "optimizer.weight_decay=0"], "never be trained"),
        (["adapter=lora", "adapter.targets=[lm_head]"], "'lm_head' is the embedding"),
        (["adapter=lora", "adapter.targets=[q_porj]"], "'q_porj'; did you mean 'q_proj'"),
        (["adapter=lora", "adapter.targets=[]"], "expected 1 values"),
        (["adapter=lora", "adapter.from=nowhere"], "adapter.from: there is no directory nowhere"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Path,
    smoke_data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """Oracle: one line that names the key."""
    places = [f"data.dir={smoke_data}", f"run_dir={tmp_path}/run", f"model.pretrained={run}"]
    error = said(capfd, str(SMOKE), *places, "training.device=cpu", *words)
    lines = [line for line in error.splitlines() if line.startswith("llmnorm: error:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_frozen_weights_are_stored_for_their_products(
    exported: Path, smoke_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: half the bytes of the base's matrices; the line that the log has of them."""
    sizes = []
    for precision in ("fp32", "bf16"):
        words = settings(exported, smoke_data, tmp_path / precision, "adapter=lora", "--dry-run")
        llmnorm("train", *words, f"training.precision={precision}")
        (line,) = [x for x in capfd.readouterr().err.splitlines() if "a process holds" in x]
        sizes.append(float(line.partition("holds ")[2].partition(" MiB of weights")[0]))
    numbers = sum(t.numel() for t in load_file(exported / "model.safetensors").values())
    assert sizes[0] - sizes[1] == pytest.approx(2 * numbers / 2**20, abs=0.1)
