"""A run that is killed at any moment goes on to the same numbers; oracle: the uninterrupted run."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from llmnorm.runs.account import read_account
from llmnorm.runs.directory import RunDirectory
from tests.running import SMOKE, Child, assert_same_run, metrics_of

STEPS = 64
LENGTH = [f"training.steps={STEPS}", "checkpoint.every=2", "evaluation.every=16"]
LENGTH += ["evaluation.sample_tokens=4"]


def lines_in(run: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:

    directory = tmp_path_factory.mktemp("whole")
    run = directory / "run"
    words = ["train", str(SMOKE), f"run_dir={run}", f"data.dir={smoke_data}", *LENGTH]
    child = Child(words, directory / "log.txt")
    assert child.finish() == 0, child.log.read_text()
    return run


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_twenty_kills_and_then_to_the_end(start, tmp_path, uninterrupted, asynchronous) -> None:
    run = tmp_path / "run"
    chance = random.Random(asynchronous)
    words = ["train", SMOKE, f"run_dir={run}", *LENGTH]
    if asynchronous:
        words.append("checkpoint.asynchronous=true")
    kills = 0
    while kills < 20:
        child = start(*words)
        # Some die while they start or save, the others after 0, 1 or 2 steps of their own.
        goal = lines_in(run) + chance.randrange(3)
        while child.process.is_alive() and lines_in(run) < goal:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1 if goal else 1.0))
        os.kill(child.process.pid, signal.SIGKILL)
        assert child.finish() == -signal.SIGKILL, child.log.read_text()
        kills += 1
    child = start(*words)
    assert child.finish() == 0, child.log.read_text()
    assert_same_run(run, uninterrupted, STEPS)
    leftovers = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == []
    assert_times_add_up(run)


def set_back() -> None:
    """The time of day is an hour less than it was."""
    real = time.time
    time.time = lambda: real() - 3600


def test_a_clock_that_is_set_back_an_hour_changes_nothing(
    tmp_path, uninterrupted, smoke_data
) -> None:
    """Oracle: the uninterrupted run, and the monotonic clock; the time of day decides nothing."""
    run = tmp_path / "run"
    words = ["train", str(SMOKE), f"run_dir={run}", f"data.dir={smoke_data}", *LENGTH]
    child = Child(words, tmp_path / "log.txt")
    while lines_in(run) < 5:
        assert child.process.is_alive(), child.log.read_text()
        time.sleep(0.005)
    child.process.kill()
    child.finish()
    assert Child(words, tmp_path / "log.txt", before=set_back).finish() == 0
    assert_same_run(run, uninterrupted, STEPS)
    assert_times_add_up(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["clock"]["unix"] < lines[0]["clock"]["unix"] - 3000


def assert_times_add_up(run: Path) -> None:
    """What the lines of a killed run say of its time is what the monotonic clock says."""
    lines = []
    for name in ("metrics.jsonl", "metrics.repeated.jsonl"):
        if (run / name).exists():
            lines += [json.loads(line) for line in (run / name).read_text().splitlines()]
    first, *_, last = sorted(lines, key=lambda line: line["wall"])
    passed = last["clock"]["monotonic"] - first["clock"]["monotonic"]
    assert last["wall"] - first["wall"] == pytest.approx(passed, rel=0.05)
    assert sum(sum(line["spent"].values()) for line in lines) == pytest.approx(last["wall"])
    account = read_account(RunDirectory(run))
    assert account.wall == pytest.approx(last["wall"]) and account.restarts >= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_numbers(
    start, tmp_path, uninterrupted, number, code
) -> None:
    run = tmp_path / "run"
    words = ["train", SMOKE, f"run_dir={run}", *LENGTH, "checkpoint.every=1000"]
    child = start(*words)
    while not (run / "metrics.jsonl").exists() or len(metrics_of(run)) < 3:
        assert child.process.is_alive(), child.log.read_text()
        time.sleep(0.02)
    os.kill(child.process.pid, number)
    assert child.finish() == code, child.log.read_text()
    stopped = int((run / "PREEMPT").read_text())
    assert metrics_of(run)[-1]["step"] == stopped < STEPS
    assert start("train", run).finish() == 0
    assert (run / "DONE").read_text() == f"{STEPS}\n" and not (run / "PREEMPT").exists()
    assert_same_run(run, uninterrupted, STEPS)


def test_a_torn_line_of_metrics_is_cut(start, tmp_path, uninterrupted) -> None:
    run = tmp_path / "run"
    words = ["train", SMOKE, f"run_dir={run}", *LENGTH]
    assert start(*words, "training.steps=12", "schedule=constant").finish() == 0
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "loss": 1.0}) + '\n{"step": 14, "lo')
    assert start("train", run, "training.steps=13").finish() == 0
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == list(range(1, 14))


def test_longer_after_the_end_and_finished_said(start, tmp_path) -> None:
    run = tmp_path / "run"
    words = ["train", SMOKE, f"run_dir={run}", "training.steps=6", "schedule=constant"]
    assert start(*words).finish() == 0
    child = start(*words)
    assert child.finish() == 0
    assert "is finished (step 6)" in child.log.read_text()
    assert start("train", run, "training.steps=9").finish() == 0
    straight = tmp_path / "straight"
    words = ["train", SMOKE, f"run_dir={straight}", "training.steps=9", "schedule=constant"]
    assert start(*words).finish() == 0
    trained = [line for line in metrics_of(run) if "loss" in line]
    assert trained == [line for line in metrics_of(straight) if "loss" in line]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(start, tmp_path, damage) -> None:
    run = tmp_path / "run"
    words = ["train", SMOKE, f"run_dir={run}", *LENGTH, "training.steps=12", "checkpoint.every=4"]
    assert start(*words).finish() == 0
    file = next((run / "checkpoints" / "step_00000012").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[:-7]
    else:
        content[len(content) // 2] ^= 4
    file.write_bytes(content)
    child = start("train", run, "training.steps=13")
    assert child.finish() == 0
    said = child.log.read_text()
    assert str(file.relative_to(run)) in said or file.name in said
    assert "going on from" in said and "step_00000008" in said
