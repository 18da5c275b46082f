"""What another length does to the learning rate of a run that goes on."""

import json
from pathlib import Path

import pytest

from llmnorm import cli
from tests.running import SMOKE

WORDS = ["evaluation.samples=0", "schedule.warmup=2", "optimizer.lr=0.01", "training.steps=10"]


def train(run: Path, data: Path, *words: str) -> int:
    given = [str(run)] if run.exists() else [str(SMOKE), f"run_dir={run}", f"data.dir={data}"]
    return cli.main(["train", *given, *words])


@pytest.mark.parametrize(
    ("schedule", "every", "says", "instead"),
    [
        ("wsd", "2", "from 0 at step 10 to 0.01 at step 11", "branch_from={}/step_00000008"),
        ("wsd", "10", "from 0 at step 10 to 0.01 at step 11", "none is kept"),
        ("linear", "2", "from 0 at step 10 to", "schedule=linear decays from the start"),
        ("constant", "2", None, None),
    ],
)
def test_a_stretched_schedule_is_told_with_both_rates(
    tmp_path: Path,
    smoke_data: Path,
    capsys: pytest.CaptureFixture[str],
    schedule: str,
    every: str,
    says: str | None,
    instead: str | None,
) -> None:
    """Oracle: the rates in metrics.jsonl; a run that only goes on says nothing."""
    run = tmp_path / "run"
    words = [f"schedule={schedule}", *WORDS, f"checkpoint.every={every}", "checkpoint.keep=9"]
    assert train(run, smoke_data, *words) == 0
    capsys.readouterr()
    assert train(run, smoke_data, "training.steps=20") == 0
    notes = [x for x in capsys.readouterr().err.split("\n") if "schedule is" in x]
    if says is None:
        assert notes == []
        return
    assert len(notes) == 1 and says in notes[0] and "from 10 to 20 steps" in notes[0]
    assert str(instead).format(run / "checkpoints") in notes[0]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().split("\n") if '"lr"' in x]
    rates = {line["step"]: f"{line['lr']:.3g}" for line in lines}
    assert f"from {rates[10]} at step 10 to {rates[11]} at step 11" in notes[0]
    if "branch_from" in str(instead):  # the command of the note
        command = notes[0].partition("llmnorm train ")[2].split()
        assert cli.main(["train", *command]) == 0
        (line, *_) = [json.loads(x) for x in (tmp_path / "run-2/metrics.jsonl").open()]
        assert (line["step"], line["lr"]) == (9, 0.01)
