"""`plan --calibrate RUN`: a run's own speed, and runs that say nothing of it."""

import json
import shutil
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.analysis.plan.calibration import calibrate, refuse_another, step_seconds
from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.time import step_time, step_work
from llmnorm.config.file import load
from llmnorm.part import InputError


def test_a_run_is_planned_as_long_as_it_was(run: Path) -> None:
    """Oracle: the run's own lines; another size is planned with the same efficiency."""
    config, cpu = load(run).config, gpu_named("cpu")
    found = calibrate(run, config, cpu)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    seconds = sorted(
        (line["tokens"] - before["tokens"]) / line["tokens_per_second"]
        for before, line in zip(steps, steps[1:], strict=False)
    )
    assert found.lines == len(seconds)
    assert seconds[0] <= found.seconds <= seconds[-1]
    layout = layout_of(config, cpu, 1)
    work = step_work(layout, record(config, layout.micro_batch, "cpu"))
    assert step_time(work, found.efficiency).seconds == pytest.approx(found.seconds, rel=0.01)
    larger = load(run, ["model.hidden_size=128", "model.num_hidden_layers=4"]).config
    assert calibrate(run, larger, cpu) == found


def test_a_run_of_another_kind_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the messages."""
    config, cpu = load(run).config, gpu_named("cpu")
    for words, message in (
        (["model.mixer=ssd"], "another model: model.mixer.name is 'softmax' there and 'ssd' here"),
        (["model.norm=layer"], "another model: model.norm.name"),
        (["training.precision=bf16"], "another model: training.precision is 'fp32' there"),
        (["parallel.compile=true"], "another model: parallel.compile is False there and True here"),
    ):
        with pytest.raises(InputError, match=message):
            refuse_another(config, load(run, words).config, run)
    with pytest.raises(InputError, match="was computed on cpu, and the plan is for h100"):
        calibrate(run, config, gpu_named("h100"))
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("step_*"))
    with pytest.raises(InputError, match="has no checkpoint, which says on how many processes"):
        calibrate(bare, config, cpu)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (bare / "metrics.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(InputError, match="2 lines of metrics behind the first, too few"):
        step_seconds(bare)
    words = ["plan", str(run), "--gpu", "cpu", "--calibrate", str(run), "model.norm=layer"]
    assert cli.main(words) == 2
    assert "give a run of the same parts, in any size" in capsys.readouterr().err


def test_a_plan_says_what_it_was_calibrated_by(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the printed line."""
    words = ["plan", str(run), "--gpu", "cpu", "--calibrate", str(run)]
    assert cli.main(words) == 0
    assert f"measured: {run}, " in capsys.readouterr().out
