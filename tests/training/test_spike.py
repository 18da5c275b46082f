"""A step that is a spike is left out, counted and said; the window is state and survives a stop."""

import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.config.tree import SpikeSettings
from llmnorm.parallel.processes import Parallel
from llmnorm.training import loop
from llmnorm.training.prepare import Prepared
from llmnorm.training.spike import look
from llmnorm.training.state import Progress
from tests.running import SMOKE, llmnorm, metrics_of, state_of

# Judged from the fifth step on.
WORDS = ["schedule=constant", "evaluation.samples=0", "training.spike={sigma: 50, window: 8}"]
USUAL = [[2.0, 1.0], [2.1, 1.2], [1.9, 0.9], [2.0, 1.1]]


@contextmanager
def larger(factors: Mapping[int, float]) -> Iterator[None]:
    """Inside, the gradient norm of these steps (from 1) is so many times what it is."""
    real_step, real_clip, factor = loop.step, Parallel.clip, [1.0]

    def step(run: Prepared, *args: Any) -> Any:
        factor[0] = factors.get(run.progress.step + 1, 1.0)
        try:
            return real_step(run, *args)
        finally:
            factor[0] = 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", step)
        patch.setattr(Parallel, "clip", lambda self, *args: real_clip(self, *args) * factor[0])
        yield


def meta(run: Path, step: int) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints" / f"step_{step:08d}").meta


def test_a_spike_is_what_lies_above_the_mean_and_so_many_deviations() -> None:
    """Oracle: Python's statistics; values just above and just below the limit."""
    settings = SpikeSettings(sigma=3, window=8)
    for place, name in enumerate(("loss", "gradient norm")):
        values = [pair[place] for pair in USUAL]
        limit = statistics.mean(values) + 3 * statistics.pstdev(values)
        for share, found in ((0.999, False), (1.001, True)):
            progress = Progress(window=[*USUAL])
            given = [2.0, 1.0]
            given[place] = share * limit
            spike = look(progress, settings, *given)
            assert (spike is not None) == found
            if spike is not None:
                assert (spike.name, spike.value, spike.steps) == (name, share * limit, 4)
                assert spike.limit == pytest.approx(limit)
            assert progress.window == [*USUAL, given]  # a spike enters too


def test_the_window_acts_from_half_full_and_keeps_the_last_steps() -> None:
    """Oracle: the numbers written out."""
    settings, progress = SpikeSettings(window=8), Progress()
    for step in range(4):
        assert look(progress, settings, 10.0**step, 1.0) is None
    for step in range(4, 12):
        look(progress, settings, float(step), 1.0)
    assert progress.window == [[float(step), 1.0] for step in range(4, 12)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """10 steps without a stop; the seventh is a spike."""
    run = tmp_path_factory.mktemp("whole") / "run"
    words = [*WORDS, f"run_dir={run}", f"data.dir={smoke_data}", "checkpoint.every=1"]
    with larger({7: 1000}):
        llmnorm("train", SMOKE, *words, "training.steps=10", "checkpoint.keep=10")
    return run


def test_a_spike_leaves_the_weights_and_is_counted(
    whole: Path, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracles: the checkpoint of the step before; the norm that a run without it has logged."""
    before, after = state_of(whole, 6), state_of(whole, 7)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    following = state_of(whole, 8)
    assert not all(tensor.equal(before[name]) for name, tensor in following.items())
    counts = [line["skipped_spikes"] for line in metrics_of(whole) if "loss" in line]
    assert counts == [0] * 6 + [1] * 4
    assert [line["skipped_steps"] for line in metrics_of(whole) if "loss" in line] == [0] * 10
    found = meta(whole, 10)
    assert (found["skipped_spikes"], found["spikes_in_a_row"], found["skipped_steps"]) == (1, 0, 0)
    lines = [line for line in metrics_of(whole) if "loss" in line]
    assert found["window"] == [[line["loss"], line["grad_norm"]] for line in lines[2:]]


def test_a_run_that_was_stopped_judges_as_one_that_was_not(
    whole: Path, tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run without a stop, to the bit; two stops, one of them right before the spike."""
    run = tmp_path / "run"
    words = [*WORDS, f"run_dir={run}", f"data.dir={smoke_data}", "checkpoint.every=1"]
    words += ["checkpoint.keep=10"]
    llmnorm("train", SMOKE, *words, "training.steps=3")
    llmnorm("train", run, "training.steps=6")
    capsys.readouterr()
    with larger({7: 1000}):
        llmnorm("train", run, "training.steps=10")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 7: g")]
    assert len(said) == 1 and "50 deviations above the mean of 6 steps before it" in said[0]
    assert "the step was skipped and the weights are as before it (1 since" in said[0]
    ours, theirs = state_of(run, 10), state_of(whole, 10)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    assert meta(run, 10)["window"] == meta(whole, 10)["window"]


def test_after_so_many_in_a_row_the_update_is_made(
    tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the equality of checkpoints; norms that grow faster than the window's mean."""
    run = tmp_path / "run"
    words = [*WORDS, f"run_dir={run}", f"data.dir={smoke_data}", "checkpoint.every=1"]
    words += ["training.steps=10", "checkpoint.keep=10", "training.max_skipped_steps=3"]
    with larger({step: 1000.0 ** (step - 5) for step in range(6, 10)}):
        llmnorm("train", SMOKE, *words)
    states = {step: state_of(run, step) for step in range(5, 11)}
    same = [
        all(tensor.equal(states[step - 1][name]) for name, tensor in states[step].items())
        for step in range(6, 11)
    ]
    assert same == [True, True, True, False, False]
    assert "step 9: gradient norm" in (said := capsys.readouterr().err)
    assert "the update was made all the same, after 3 skipped steps" in said
    assert (run / "DONE").exists() and not (run / "DIVERGED").exists()
    assert meta(run, 10)["skipped_spikes"] == 3


def test_a_branch_begins_with_an_empty_window(
    whole: Path, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: a spike in the branch's fourth step, which its parent's window would have found."""
    run = tmp_path / "run"
    words = [*WORDS, f"run_dir={run}", f"data.dir={smoke_data}", "training.steps=12"]
    parent = whole / "checkpoints" / "step_00000008"
    with larger({12: 1000}):
        llmnorm("train", SMOKE, *words, f"training.branch_from={parent}")
    found = meta(run, 12)
    assert found["skipped_spikes"] == 1 and len(found["window"]) == 4  # the parent's
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    assert steps == [9, 10, 11, 12]


def test_the_window_is_emptied_where_a_stage_begins(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the steps of 16 rows; the stage begins in the fifth, and the spike in its third."""
    run = tmp_path / "run"
    words = [*WORDS, f"run_dir={run}", f"data.dir={smoke_data}", "training.steps=9"]
    words += ["data.stages=[{rows: 72, weights: {prose: 2, notes: 1}}, {weights: {notes: 1}}]"]
    with larger({7: 1000}):
        llmnorm("train", SMOKE, *words)
    found = meta(run, 9)
    norms = [line["grad_norm"] for line in metrics_of(run) if "loss" in line]
    assert [norm for _, norm in found["window"]] == norms[4:] and len(norms) == 9
    assert found["skipped_spikes"] == 0


def test_a_run_without_the_setting_keeps_no_window(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: its meta and its lines."""
    run = tmp_path / "run"
    words = ["schedule=constant", "evaluation.samples=0", f"run_dir={run}"]
    with larger({6: 1000}):
        llmnorm("train", SMOKE, *words, f"data.dir={smoke_data}", "training.steps=6")
    assert meta(run, 6)["window"] == [] and meta(run, 6)["skipped_spikes"] == 0
    assert not any("skipped_spikes" in line for line in metrics_of(run))
