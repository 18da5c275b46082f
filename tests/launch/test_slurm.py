"""launch/slurm/train.sbatch under a stand-in for Slurm (slurm.py).

tools/slurm_here.sh tries the script on a Slurm of this machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from tests.distributed.launchers import steps_in, wait_until
from tests.launch.slurm import hostnames
from tests.running import ROOT, SMOKE, assert_same_run, metrics_of

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"


class Cluster:
    """A machine with the stand-in's commands first on its path."""

    def __init__(self, place: Path) -> None:
        self.place = place
        commands = place / "bin"
        commands.mkdir()
        for name in ("sbatch", "srun", "scontrol"):
            command = commands / name
            words = f'"{sys.executable}" -S "{ROOT}/tests/launch/slurm.py" {name} "$@"'
            command.write_text(f"#!/bin/sh\nexec {words}\n")
            command.chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "SLURM_STANDIN": str(place),
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "LOG_DIR": str(place / "logs"),
        }

    def submit(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sbatch", "--nodes=1", SCRIPT, *words],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
        )

    @property
    def log(self) -> list[dict[str, Any]]:
        file = self.place / "log.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, holds: Callable[[], object]) -> None:
        wait_until(holds, next(self.place.glob("slurm-*.out"), Path(os.devnull)))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_preempted_three_times_and_finished_in_one_unbroken_curve(
    cluster: Cluster, smoke_data: Path
) -> None:
    """Oracle: the run that was not preempted, to the bit; the stand-in's list of events."""
    steps = 400
    words = ["schedule=constant", f"training.steps={steps}", "evaluation.every=null"]
    words += [
        "evaluation.samples=0",
        f"data.dir={smoke_data}",
        "checkpoint.every=5000",
        "model.num_hidden_layers=1",
    ]
    run, whole = cluster.place / "run", cluster.place / "whole"
    done = cluster.submit(run, SMOKE, *words)
    assert done.stdout == "Submitted batch job 4000\n", done.stderr
    stopped = []
    for preemption in range(3):
        cluster.wait(lambda: steps_in(run) >= 20 + sum(stopped[-1:]))  # noqa: B023
        (cluster.place / "warn").touch()
        cluster.wait(
            lambda: sum(e["what"] == "started" for e in cluster.log) > preemption + 1  # noqa: B023
        )
        stopped.append(int((run / "PREEMPT").read_text()))
    cluster.wait(lambda: cluster.log[-1]["what"] == "ended")
    said = (cluster.place / "slurm-4000.out").read_text()
    assert [event["what"] for event in cluster.log] == [
        *("started", "warned", "requeued") * 3,
        *("started", "ended"),
    ], said
    assert cluster.log[-1]["code"] == 0, said
    assert all(event["tasks"] == 0 for event in cluster.log if event["what"] == "requeued")
    assert 0 < stopped[0] < stopped[1] < stopped[2] < steps
    for step in stopped:
        assert f"stopped by SIGUSR1 at step {step} of {steps}, saved" in said
    assert said.count("job 4000 goes back into the queue") == 3
    logs = sorted(path.parent.parent.parent.name for path in cluster.place.rglob("0/stderr.log"))
    assert [name[:6] for name in logs] == ["4000.0", "4000.1", "4000.2", "4000.3"]

    assert cli.main(["train", str(SMOKE), f"run_dir={whole}", *words]) == 0
    assert [line["step"] for line in metrics_of(run) if "lr" in line] == [*range(1, steps + 1)]
    assert_same_run(run, whole, steps)


def test_a_run_that_is_refused_fails_the_job(cluster: Cluster) -> None:
    """Oracle: the job's exit code and output; nothing is requeued."""
    assert cluster.submit(cluster.place / "run", SMOKE, "seed=x").returncode == 0
    cluster.wait(lambda: cluster.log and cluster.log[-1]["what"] == "ended")
    said = (cluster.place / "slurm-4000.out").read_text()
    assert cluster.log[-1]["code"] == 1 and "seed: " in said
    assert [event["what"] for event in cluster.log] == ["started", "ended"]


def test_a_job_without_a_configuration_is_told_what_to_give(cluster: Cluster) -> None:
    """Oracle: exit code 2 and one line."""
    cluster.submit(cluster.place / "run")
    cluster.wait(lambda: cluster.log and cluster.log[-1]["what"] == "ended")
    said = (cluster.place / "slurm-4000.out").read_text()
    assert cluster.log[-1]["code"] == 2 and said.startswith("give RUN_DIR and CONFIG: sbatch ")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("tux[1-3]", ["tux1", "tux2", "tux3"]),
        ("a[1,4-5],b", ["a1", "a4", "a5", "b"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_the_stand_in_expands_lists_of_hosts(text: str, names: list[str]) -> None:
    """Oracle: by hand; `tux[1-3]` is scontrol's own example."""
    assert hostnames(text) == names
