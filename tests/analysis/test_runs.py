"""The table of run directories."""

import json
import signal
import textwrap
import time
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.analysis.runs import describe_runs, differing
from llmnorm.part import InputError
from tests.running import SMOKE

CONFIG = """run_dir: {name}
data: {{sources: [{{name: prose, path: prose.txt}}], context_length: 64}}
model: {{norm: {{name: {norm}, eps: {eps}}}}}
optimizer: {{name: adamw, lr: {lr}}}
training: {{{length}, global_batch: 16}}
"""


def make(
    directory: Path,
    name: str,
    *,
    steps: int = 0,
    losses: list[float] | None = None,
    sign: str | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    lr: float = 0.003,
    length: str = "steps: 30",
) -> None:
    run = directory / name
    run.mkdir(parents=True)
    text = CONFIG.format(name=name, norm=norm, eps=eps, lr=lr, length=length)
    (run / "config.yaml").write_text(text)
    lines = [{"step": step, "loss": 1.0} for step in range(1, steps + 1)]
    lines += [{"step": steps, "validation": {"loss": loss}} for loss in losses or []]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if sign:
        (run / sign).write_text("1\n")


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_runs_are_listed_with_what_differs_and_how_they_stand(tmp_path: Path) -> None:
    """Oracle: worked out by hand."""
    make(tmp_path, "a", steps=30, losses=[2.0, 1.5, 1.75], sign="DONE")
    make(tmp_path, "b", steps=12, sign="PREEMPT", lr=0.01)
    make(tmp_path, "d", steps=9, sign="DIVERGED", lr=0.01)
    make(tmp_path, "deep/c", steps=7, losses=[3.0], length="tokens: 20480")
    inside = tmp_path / "a" / "wandb" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("a: 1\n")  # a tracker's: no run
    with (tmp_path / "deep" / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    expected = """
        run     steps  loss    best    state        optimizer.lr  training.steps  training.tokens
        a       30/30  1.7500  1.5000  finished     0.003         30              -
        b       12/30  -       -       stopped      0.01          30              -
        d       9/30   -       -       diverged     0.01          30              -
        deep/c  7/20   3.0000  3.0000  interrupted  0.003         -               20480
    """
    assert describe_runs(tmp_path) == textwrap.dedent(expected).strip()


def test_a_part_that_differs_shows_what_its_kinds_share() -> None:
    """Oracle: by hand; `betas` has no counterpart, `lr` has."""
    one = {"optimizer": {"name": "adamw", "lr": 1, "betas": [0.9, 0.99]}, "seed": 1}
    other = {"optimizer": {"name": "muon", "lr": 2, "momentum": 0.95}, "seed": 1}
    assert differing([one, other]) == ["optimizer.name", "optimizer.lr"]
    assert differing([one, one]) == []


def test_a_run_that_trains_is_running(tmp_path: Path, start) -> None:
    """Oracle: a real process, and then its end by a signal."""
    run = tmp_path / "runs" / "live"
    child = start("train", SMOKE, f"run_dir={run}", "training.steps=100000", "evaluation.every=20")
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert child.process.is_alive(), child.log.read_text()
        time.sleep(0.02)
    row = cells(describe_runs(tmp_path / "runs"))[1]
    assert row[0] == "live" and row[1].endswith("/100000") and row[4] == "running"
    child.process.kill()
    assert child.finish() == -signal.SIGKILL
    assert cells(describe_runs(tmp_path / "runs"))[1][4] == "interrupted"
    assert cells(describe_runs(run))[1][0] == str(run)


def test_a_directory_without_runs_is_one_line(tmp_path: Path, capsys) -> None:
    """Oracle: the message names the directory."""
    with pytest.raises(InputError, match="holds no run directory"):
        describe_runs(tmp_path)
    assert cli.main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such directory" in capsys.readouterr().err


def test_a_damaged_run_is_listed_with_a_word(tmp_path: Path) -> None:
    """Oracle: by hand; the other runs, and a line for each problem."""
    for name in "abcd":
        make(tmp_path, name, steps=3, losses=[2.0], sign="DONE")
    (tmp_path / "b" / "config.yaml").write_text("a: [")
    (tmp_path / "c" / "metrics.jsonl").unlink()
    (tmp_path / "c" / "metrics.jsonl").mkdir()
    metrics = tmp_path / "d" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b'{"step": 2,', b'{"step": \x00,'))
    (tmp_path / "loop").symlink_to(tmp_path)
    table = describe_runs(tmp_path).split("\n")
    assert [line.split()[0] for line in table[1:5]] == list("abcd")
    assert [line.split()[4] for line in table[1:5]] == [
        "finished",
        "damaged",
        "damaged",
        "finished",
    ]
    assert table[5].startswith(f"{tmp_path}/b/config.yaml")
    assert table[6] == f"{tmp_path}/c/metrics.jsonl: is a directory, not a file"
    assert table[7] == f"{metrics}: line 2 is damaged and left out"
    assert table[4].split()[1:4] == ["3/30", "2.0000", "2.0000"]


def test_a_loss_that_is_not_finite_is_no_best(tmp_path: Path) -> None:
    """Oracle: by hand; null, and NaN as older versions wrote it."""
    make(tmp_path, "a", steps=3, losses=[float("nan"), 2.5])
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "validation": {"loss": null}}\n')
    assert describe_runs(tmp_path).split("\n")[1].split()[1:4] == ["3/30", "2.5000", "2.5000"]


def test_a_second_table_says_what_the_time_was_spent_on(tmp_path: Path) -> None:
    """Oracle: by hand; steps 2 and 3 were done twice, and an older version's run has no times."""
    make(tmp_path, "old", steps=3)
    make(tmp_path, "run", steps=0)
    first = {"step": 1, "spent": {"starting": 10, "training": 60, "data": 4}}
    again = [{"step": 2, "spent": {"training": 50}}, {"step": 3, "spent": {"saving": 6}}]
    last = {"step": 2, "spent": {"restarting": 30, "training": 36, "evaluation": 4}}
    (tmp_path / "run" / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n")
    lines = "".join(f"{json.dumps(line)}\n" for line in again)
    (tmp_path / "run" / "metrics.repeated.jsonl").write_text(lines)
    expected = """
        time in %  restarts  wall     training  data  waiting  evaluation  saving  starting  restarting  twice  goodput
        run        1         3.3 min  48.0      2.0   0.0      2.0         0.0     5.0       15.0        28.0   50.0
    """  # noqa: E501
    table = describe_runs(tmp_path).split("\n\n")[1]
    assert table == textwrap.dedent(expected).strip()
