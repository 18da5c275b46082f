"""lm-eval's tasks are scored while a run trains; the run is otherwise that of one without."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.objectives.lockstep import Lockstep
from llmnorm.training.signals import EXIT_CODES
from tests.benchmarks import WEATHER, write_tasks
from tests.running import SMOKE, assert_same_run, llmnorm, metrics_of, state_of

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

WORDS = ["training.steps=6", "evaluation.every=2", "training.ema=0.9", "checkpoint.every=4"]
# At 0.02 all logits of so small a model are alike, and the scores with them.
WORDS += ["model.initializer_range=0.1", "optimizer.lr=1e-2"]


def scored(run: Path) -> dict[int, dict[str, Any]]:
    """By step, the scores in metrics.jsonl."""
    keys = ("tasks", "ema_tasks")
    lines = [line for line in metrics_of(run) if "tasks" in line]
    return {line["step"]: {key: line[key] for key in keys if key in line} for line in lines}


def evaluated(run: Path, tasks: list[str], *words: str) -> dict[str, dict[str, float]]:
    """What `llmnorm eval` writes of the same tasks, in the form of metrics.jsonl."""
    llmnorm("eval", run, "--tasks", ",".join(tasks), *words)
    name = "step_00000006-ema.json" if "--ema" in words else "step_00000006.json"
    found = json.loads((run / "eval" / name).read_text())["tasks"]["results"]
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if key.endswith(",none") and isinstance(value, float)
        }
        for task, values in found.items()
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path, tasks: list[str]) -> Path:
    """6 steps, evaluated every second, the tasks scored after the fourth and at the end."""
    directory = tmp_path_factory.mktemp("scored") / "run"
    words = [*WORDS, f"run_dir={directory}", f"data.dir={smoke_data}", "evaluation.tasks_every=4"]
    llmnorm("train", SMOKE, *words, f"evaluation.tasks={json.dumps(tasks)}")
    return directory


def test_a_run_with_tasks_is_otherwise_one_without(
    run: Path, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: weights, optimizer state, average and metrics of a run without tasks, to the bit."""
    plain = tmp_path / "run"
    llmnorm("train", SMOKE, *WORDS, f"run_dir={plain}", f"data.dir={smoke_data}")
    ours, theirs = state_of(run, 6), state_of(plain, 6)
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    lines = [
        {key: value for key, value in line.items() if key not in ("tasks", "ema_tasks")}
        for line in metrics_of(run)
    ]
    assert lines == metrics_of(plain)
    assert (run / "samples.jsonl").read_text() == (plain / "samples.jsonl").read_text()


def test_scores_are_those_of_llmnorm_eval(run: Path, tasks: list[str]) -> None:
    """Oracle: `llmnorm eval` of the same weights, and of their average, to the last digit."""
    assert scored(run).keys() == {4, 6}
    found = scored(run)[6]
    assert found["tasks"].keys() == {"weather", "tides", "winds"}
    assert found["tasks"] == evaluated(run, tasks)
    assert found["ema_tasks"] == evaluated(run, tasks, "--ema")
    assert (
        found["tasks"]["tides"] != found["ema_tasks"]["tides"] != scored(run)[4]["tasks"]["tides"]
    )


def test_a_run_that_is_stopped_in_its_scores_takes_them_when_it_goes_on(
    run: Path, tmp_path: Path, smoke_data: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run that was not stopped; the signal comes at the tenth pass of the scores.

    Their time is that of evaluations (runs/account.py), since that is their phase.
    """
    cut, passes = tmp_path / "run", [0]
    words = [*WORDS, f"run_dir={cut}", f"data.dir={smoke_data}", "evaluation.tasks_every=4"]
    real = Lockstep._before_a_pass

    def before_a_pass(self: Lockstep, *given: Any) -> None:
        passes[0] += 1
        assert self._parallel.phases.phase == "evaluation"
        if passes[0] == 10:
            signal.raise_signal(signal.SIGTERM)
        real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "_before_a_pass", before_a_pass)
        command = ["train", str(SMOKE), *words, f"evaluation.tasks={json.dumps(tasks)}"]
        assert cli.main(command) == EXIT_CODES[signal.SIGTERM]
    assert passes == [10] and (cut / "PREEMPT").read_text().split() == ["4"]
    assert scored(cut) == {}
    llmnorm("train", cut)
    assert_same_run(cut, run, 6)


def test_tasks_that_cannot_be_scored_end_a_run_before_its_first_step(
    tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the lines, and no checkpoint."""

    def refused(*words: str) -> str:
        capsys.readouterr()
        places = [f"run_dir={tmp_path}/run", f"data.dir={smoke_data}"]
        assert cli.main(["train", str(SMOKE), *places, *words]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "llmnorm: error" in x]
        return line

    assert "evaluation.tasks: there is no file no.yaml" in refused("evaluation.tasks=[no.yaml]")
    task = tmp_path / "task.yaml"
    task.write_text(Path(WEATHER).read_text().replace("weather.jsonl", "gone.jsonl"))
    assert "evaluation.tasks: " in (said := refused(f"evaluation.tasks=[{task}]"))
    assert "gone.jsonl" in said
    assert not (tmp_path / "run" / "checkpoints").exists()
