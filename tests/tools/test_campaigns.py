"""Three points of every campaign, and a harness that finds what it is there to find."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import CHILDREN, PATIENCE, ROOT
from tools.campaigns import trials
from tools.campaigns.trials import Result, Trial, judge

CAMPAIGNS = sorted(p.stem for p in (ROOT / "tools/campaigns").glob("*.py") if p.stem != "trials")


def _script(script: Path, words: list[str], place: Path) -> None:
    out = os.open(place / "printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(place)
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_three_points_of_a_campaign(name: str, tmp_path: Path) -> None:
    """Oracle: the campaign's own judgement; what it has finished is not run again.

    It runs in a process that has torch imported, and once more as the script that it is.
    """
    script, out = ROOT / "tools/campaigns" / f"{name}.py", tmp_path / "trials.jsonl"
    words = ["--trials", "3", "--seconds", "300", "--out", str(out)]
    process = CHILDREN.Process(target=_script, args=(script, words, tmp_path))
    process.start()
    process.join(PATIENCE)
    first = (tmp_path / "printed").read_text()
    assert process.exitcode == 0, first
    command = [sys.executable, str(script), *words]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE)
    assert found.returncode == 0, found.stdout + found.stderr
    for again, printed in enumerate((first, found.stdout)):
        head, *_, last = printed.splitlines()
        assert head.endswith(f"{3 * again} of them done before")
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
        ({"hung": True}, "hung"),
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


def test_a_process_that_waits_or_works_for_too_long_is_killed(tmp_path: Path) -> None:
    """Oracle: one that reads a pipe nobody writes to, and one that counts without end."""
    for work in ("import os; os.read(os.pipe()[0], 1)", "while True: pass"):
        child = subprocess.Popen([sys.executable, "-c", work], start_new_session=True).pid
        status, usage, hung = trials._wait(child, 0.5)
        assert hung and os.waitstatus_to_exitcode(status) == -9
        assert (usage.ru_utime > 0.4) == work.startswith("while")
