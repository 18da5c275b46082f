"""--profile: a trace of a few steps, of a run whose numbers it does not change."""

import json
from pathlib import Path

import pytest

from tests.running import SMOKE, assert_same_run, llmnorm


@pytest.fixture(scope="module")
def settings(smoke_data: Path) -> list[str]:
    return [
        "training.steps=6",
        "evaluation.every=6",
        "checkpoint.every=6",
        f"data.dir={smoke_data}",
    ]


@pytest.fixture(scope="module")
def plain(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a profile."""
    run = tmp_path_factory.mktemp("plain") / "run"
    llmnorm("train", SMOKE, *settings, f"run_dir={run}")
    return run


@pytest.mark.parametrize("kind", ["time", "memory"])
def test_a_profiled_run_is_the_same_run(
    kind: str, settings: list[str], plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run without a profile, to the bit; the trace holds its three steps."""
    run = tmp_path / "run"
    llmnorm("train", SMOKE, *settings, f"run_dir={run}", "--profile", kind)
    assert_same_run(plain, run, 6)
    said = capfd.readouterr().err
    (trace,) = (run / "profile").iterdir()
    assert trace.name == ("steps_3-5.json" if kind == "time" else "memory_steps_3-5.json")
    assert f"profile of steps 3 to 5: {trace}" in said and "Self CPU" in said
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    # The fused AdamW is called once a step and parameter group.
    assert sum(name == "aten::_fused_adamw_" for name in names) == 3 * 2
    assert ("[memory]" in names) == (kind == "memory")


def test_a_run_that_is_too_short_is_refused(
    settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message, and that nothing was trained."""
    from llmnorm import cli

    run = tmp_path / "run"
    words = ["train", str(SMOKE), *settings, "training.steps=4", f"run_dir={run}", "--profile"]
    assert cli.main(words) == 2
    assert "--profile: takes 5 steps, the run has 4 left" in capfd.readouterr().err
    assert not list(run.glob("checkpoints/step_*"))
