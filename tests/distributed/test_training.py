"""Two real processes under `accelerate launch`, against one process on the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import MASKED, ROOT, SMOKE, llmnorm, metrics_of, state_of

COMMON = ["schedule=constant", "evaluation.every=5", "checkpoint.every=5", "training.ema=0.9"]
SHARDINGS = ["ddp", "fsdp2"]


def launch(sharding: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with the launch file of that name, two processes."""
    file = f"launch/accelerate/{sharding}.yaml"
    words = ["--config_file", file, "--num_processes", "2", "-m", "llmnorm", *map(str, arguments)]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module", params=SHARDINGS)
def two(request, tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A run of 5 steps of 2 processes, each accumulating over 2 micro-batches."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    words = [f"run_dir={run}", f"data.dir={smoke_data}", "training.steps=5", *COMMON]
    done = launch(request.param, "train", SMOKE, *words, "training.micro_batch=4")
    assert done.returncode == 0, done.stderr
    assert f"2 process(es) on cpu (gloo), sharding {request.param}, precision" in done.stderr
    weights, state = ("0.5", "0.9") if request.param == "ddp" else ("0.2", "0.5")
    assert f"holds {weights} MiB of weights, {weights} MiB of gradients, {state}" in done.stderr
    return run


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """8 steps of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    llmnorm("train", SMOKE, f"run_dir={run}", f"data.dir={smoke_data}", "training.steps=8", *COMMON)
    return run


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """5 steps of one process in 4 micro-batches."""
    run, more = (
        tmp_path_factory.mktemp("cut") / "run",
        ["training.steps=5", "training.micro_batch=4"],
    )
    llmnorm("train", SMOKE, f"run_dir={run}", f"data.dir={smoke_data}", *more, *COMMON)
    return run


def test_two_processes_compute_the_same_steps_as_one(two, one, cut) -> None:
    """Oracle: one process on the same rows."""
    ours = metrics_of(two)
    theirs = [line for line in metrics_of(one) if line["step"] <= 5]
    assert len(ours) == len(theirs) == 6
    for found, other in zip(ours, theirs, strict=True):
        assert found["tokens"] == other["tokens"]
        if "loss" in found:
            for key in ("loss", "grad_norm"):
                assert found[key] == pytest.approx(other[key], rel=1e-6)
            continue
        pairs = [(found["validation"], other["validation"])]
        pairs.append((pairs[0][0]["ema"], pairs[0][1]["ema"]))
        for figures, expected in pairs:
            for key in ("loss", "bits_per_byte"):
                assert figures[key] == pytest.approx(expected[key], rel=1e-6)
    # Adam divides by the root of a second moment that may be nearly 0: the yardstick is what the
    # same rows in other micro-batches do to one process.
    assert difference(two, one) <= 3 * difference(cut, one)


def difference(run: Path, other: Path) -> float:
    """The largest relative difference of a weight or average after step 5."""
    first, second = state_of(run, 5), state_of(other, 5)
    assert first.keys() == second.keys()
    return max(
        float((tensor - second[name]).norm() / second[name].norm())
        for name, tensor in first.items()
        if name.startswith(("model.", "ema."))
    )


def test_two_processes_generate_what_one_does(two, one) -> None:
    """Oracle: the samples of one process, whose logits differ in the last bits."""
    found, expected = ((run / "samples.jsonl").read_text().splitlines() for run in (two, one))
    assert found[0] == expected[0]


def test_eval_under_the_same_file_gives_the_last_validation_again(two) -> None:
    """Oracle: the line of metrics.jsonl that the run itself wrote."""
    if "fsdp2" in str(two):
        done = launch("fsdp2", "eval", two)
        assert done.returncode == 0, done.stderr
        found = json.loads((two / "eval" / "step_00000005.json").read_text())["validation"]
        (line,) = [line for line in metrics_of(two) if "validation" in line]
        assert found["loss"] == line["validation"]["loss"]


def test_a_run_of_two_goes_on_with_one(two, one, start) -> None:
    child = start("train", two, "training.steps=8", "training.micro_batch=16")
    assert child.finish() == 0, child.log.read_text()
    assert "processes 2 -> 1" in child.log.read_text()
    for found, other in zip(metrics_of(two), metrics_of(one), strict=True):
        if "loss" in found:
            assert found["loss"] == pytest.approx(other["loss"], rel=5e-6)


def test_masks_and_their_loss_are_those_of_one_process(start, tmp_path, smoke_data) -> None:
    """Oracle: one process, which masks and averages over the whole batch at once."""
    words = [*MASKED, f"data.dir={smoke_data}", "training.steps=3", "evaluation.every=3"]
    one, two = (f"run_dir={tmp_path}/{name}" for name in ("one", "two"))
    assert start("train", SMOKE, one, *words).finish() == 0
    done = launch("ddp", "train", SMOKE, two, *words, "training.micro_batch=4")
    assert done.returncode == 0, done.stderr
    alone, together = (metrics_of(tmp_path / name) for name in ("one", "two"))
    for line, other in zip(alone, together, strict=True):
        assert line["tokens"] == other["tokens"]
        found = [line, other] if "loss" in line else [line["validation"], other["validation"]]
        for key in ("loss", "grad_norm", "accuracy"):
            if key in found[0]:
                assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)


def test_what_several_processes_cannot_do_is_said_once(tmp_path) -> None:
    # One launch answers for missing data; the batch that does not divide is tested in one process.
    done = launch("ddp", "train", SMOKE, f"run_dir={tmp_path}/r", f"data.dir={tmp_path}/none")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("llmnorm: error:")]
    assert said == [
        f"llmnorm: error: data: not prepared yet; run once, by itself: llmnorm data {SMOKE} "
        f"run_dir={tmp_path}/r data.dir={tmp_path}/none"
    ]
