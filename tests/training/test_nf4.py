"""Runs beside weights in NF4: what they hold, how they go on, what is refused."""

from pathlib import Path

import pytest

from llmnorm import cli
from tests.running import SMOKE, llmnorm, state_of

pytest.importorskip("peft", reason="needs the extra finetune")
pytest.importorskip("bitsandbytes", reason="needs the extra quant")


def settings(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    """What trains a small adapter beside `base` in NF4 on the smoke data, on one CPU."""
    words = [f"model.pretrained={base}", f"data.dir={data}", f"run_dir={run}"]
    words += ["training.device=cpu", "training.steps=2", "evaluation.every=null"]
    return [str(SMOKE), *words, "adapter=lora", "model.quantize=nf4", *more]


def said(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command that the user can mend."""
    capfd.readouterr()
    assert cli.main(["train", *words]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("llmnorm: error:")]
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=none"], "model.quantize: 'nf4' stores weights that an adapter is trained"),
        (["adapter=none", "training.trainable=norms"], "add adapter=lora, or leave it out"),
        (["model.pretrained=null"], "add model.pretrained"),
        (["model.quantize=nf3"], "model.quantize"),
        (["parallel.sharding=fsdp2"], "model.quantize: 'nf4' is for one process"),
        (["parallel.sharding=ddp"], "start one process with parallel.sharding=none"),
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
    """Oracle: one line that names the key; nothing is written."""
    assert message in said(capfd, *settings(run, smoke_data, tmp_path / "run", *words))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_launch_that_would_shard_is_refused(
    run: Path,
    smoke_data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the message; what accelerate exports for its FSDP file, which no key names."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    error = said(capfd, *settings(run, smoke_data, tmp_path / "run"))
    assert "'nf4' is for one process" in error and "parallel.sharding is 'fsdp2'" in error


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_line_before_the_first_step_counts_the_stored_bytes(
    run: Path, smoke_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], precision: str
) -> None:
    """Oracle: the smoke shape by hand: blocks in 4.127 bits and a table each, the rest as usual."""
    words = settings(run, smoke_data, tmp_path / "run", f"training.precision={precision}")
    llmnorm("train", *words, "--dry-run")
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "a process holds" in x]
    found = float(line.partition("holds ")[2].partition(" MiB of weights")[0])
    sizes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    sizes |= {"gate": (172, 64), "up": (172, 64), "down": (64, 172)}
    numbers = sum(rows * columns for rows, columns in sizes.values())
    stored = sum(
        r * c / 2 + r * c / 64 + 4 * (-(-r * c // 16_384) + 257) for r, c in sizes.values()
    )
    adapter = sum(16 * (rows + columns) for rows, columns in sizes.values())
    embedding, norms = 512 * 64, 5 * 64 + 4 * 16
    total = 2 * (stored + 4 * adapter) + embedding * (2 if precision == "bf16" else 4) + 4 * norms
    assert found == pytest.approx(total / 2**20, abs=0.051)
    assert f"{(2 * (numbers + adapter) + embedding + norms) / 1e6:.2f}M parameters" in line


def test_recomputed_blocks_train_every_b(run: Path, smoke_data: Path, tmp_path: Path) -> None:
    """Oracle: zeros before the first step; the run without recomputation, to the bit."""
    states = []
    for name, recompute in (("plain", "false"), ("recomputed", "true")):
        path = tmp_path / name
        words = settings(run, smoke_data, path, f"parallel.activation_checkpointing={recompute}")
        llmnorm("train", *words, "training.precision=bf16")
        states.append(state_of(path, 2))
    names = [n for n in states[0] if n.startswith("model.")]
    assert len(names) == 28 and all(states[0][n].equal(states[1][n]) for n in names)
    assert all(states[0][n].any() for n in names if ".lora_B." in n)


def test_a_new_head_is_trained_beside_it(run: Path, tmp_path: Path) -> None:
    """Oracle: the names of the tensors in the checkpoint; an evaluation of what was trained."""
    path = tmp_path / "run"
    words = [f"model.pretrained={run}", "adapter=lora", "model.quantize=nf4", f"run_dir={path}"]
    words += ["training.epochs=null", "training.steps=2", "evaluation.every=2"]
    llmnorm("train", "configs/finetune/smoke.yaml", *words, "training.device=cpu")
    whole = {n for n in state_of(path, 2) if n.startswith("model.") and ".lora_" not in n}
    assert whole == {f"model.{m}.{p}" for m in ("pooler", "score") for p in ("weight", "bias")}
    llmnorm("eval", path)
