"""Three points of every campaign, and a harness that finds what it is there to find."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.campaigns.trials import Result, Trial, judge

ROOT = Path(__file__).parents[2]
CAMPAIGNS = sorted(p.stem for p in (ROOT / "tools/campaigns").glob("*.py") if p.stem != "trials")


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_three_points_of_a_campaign(name: str, tmp_path: Path) -> None:
    """Oracle: the campaign's own judgement; what it has finished is not run again."""
    script, out = ROOT / "tools/campaigns" / f"{name}.py", tmp_path / "trials.jsonl"
    words = [sys.executable, str(script), "--trials", "3", "--seconds", "300", "--out", str(out)]
    for again in (False, True):
        found = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
        assert found.returncode == 0, found.stdout + found.stderr
        first, *_, last = found.stdout.splitlines()
        assert first.endswith(f"{3 * again} of them done before")
        assert last.startswith(f"{name}: seed 1: 3 trials (1 real commands)")
        assert last.endswith("0 failed")
    assert len(out.read_text().splitlines()) == 3


FINE = Result(2, "", "llmnorm: error: a.yaml:1: x: no\n", 0.5, 10**6, False)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"code": 1}, "exit code 1"),
        ({"code": -11}, "exit code -11"),
        ({"timed_out": True}, "did not end"),
        ({"err": "Traceback (most recent call last):\n" + FINE.err}, "a traceback"),
        ({"err": "llmnorm: error: no\n"}, "names no file or key"),
        ({"err": ""}, "0 lines of errors"),
        ({"err": FINE.err * 22}, "22 lines of errors"),
        ({"memory": 2 * 10**9}, "2.0 GB for a refusal"),
        ({"out": "lost"}, "what was whole is gone"),
    ],
)
def test_what_is_wrong_is_found(changed: dict, complaint: str | None) -> None:
    """Oracle: results with one fault each."""
    trial = Trial(
        "x",
        ["train"],
        Path(),
        names=["a.yaml"],
        check=lambda result: ["what was whole is gone"] if result.out else [],
    )
    wrong = judge(trial, FINE._replace(**changed))
    assert wrong == [] if complaint is None else complaint in "; ".join(wrong)
