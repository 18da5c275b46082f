"""A run on a disk that is really full, and on one that is read-only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm.runs.account import read_account
from llmnorm.runs.directory import RunDirectory
from tests.checkpoints.test_crash import own_mounts
from tests.running import ROOT, SMOKE, assert_same_run, llmnorm

STEPS = ["training.steps=8", "checkpoint.every=2", "evaluation.every=null", "evaluation.samples=0"]
SCRIPT = """
import contextlib, io, json, os, shutil, subprocess, sys
from pathlib import Path
from llmnorm import cli

disk, out, *words = sys.argv[1:]

def train(*command):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        code = cli.main(["train", *command])
    said = [line for line in err.getvalue().splitlines() if line.startswith("llmnorm: error: ")]
    print(json.dumps([code, said, sorted(os.listdir(Path(disk, "run", "checkpoints")))]))

def remount(options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)

train(*words)
remount("size=64m")
train(*words)
shutil.copytree(Path(disk, "run"), out)
remount("ro")
train(f"{disk}/run", "training.steps=9")
"""


def test_a_run_ends_with_a_line_and_goes_on_when_there_is_room(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: a file system of 4 MB, on which the third checkpoint of 1.4 MB has no room; the run
    that always had room, to the bit; the same file system, mounted read-only."""
    command = own_mounts()
    if command is None:
        pytest.skip("needs user namespaces to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "code.py").write_text(SCRIPT)
    words = [str(SMOKE), f"data.dir={smoke_data}", *STEPS]
    llmnorm("train", *words, f"run_dir={tmp_path}/whole")
    mount = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'
    script = [sys.executable, tmp_path / "code.py", disk, tmp_path / "copy", *words]
    done = subprocess.run(
        [*command, "sh", "-c", mount, "sh", disk, *script, f"run_dir={disk}/run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    full, again, read_only = (json.loads(line) for line in done.stdout.splitlines())
    there = ["latest", "step_00000002", "step_00000004"]
    assert full[0] == 2 and full[2] == there and len(full[1]) == 1
    assert full[1][0].endswith(
        "the checkpoint of step 6 was not saved: No space left on device; "
        "the ones before it are as they were"
    )
    assert again == [0, [], ["latest", "step_00000006", "step_00000008"]]
    assert_same_run(tmp_path / "copy", tmp_path / "whole", 8)
    assert read_account(RunDirectory(tmp_path / "copy")).restarts == 1
    assert (
        read_only[0] == 2 and len(read_only[1]) == 1 and "Read-only file system" in read_only[1][0]
    )
