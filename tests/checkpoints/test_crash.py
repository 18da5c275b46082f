"""kill -9 and full disks, for real: there is always a whole checkpoint, and no promise is broken.

A saving process saves steps 1, 2, 3, ... (a state that is a function of its step) and notes each
save that has returned. It is killed at a random moment, or by itself at the n-th call that touches
the disk.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmnorm.checkpoints import format
from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.part import InputError
from tests.running import CHILDREN, ROOT


def state(step: int, size: int = 300) -> dict[str, torch.Tensor]:
    weight = torch.arange(size * size, dtype=torch.float32).reshape(size, size) * step
    return {
        "model.weight": weight,
        "optimizer.weight.momentum": weight + 1,
        "t": torch.tensor(step),
    }


def save_for_ever(directory: Path, acknowledged: Path, asynchronous: bool) -> None:
    """What a run does, without the training: go on from what is there, save step by step."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(directory, keep_every=10, asynchronous=asynchronous)
    checkpoints.clean()
    step = 0
    if (found := checkpoints.newest()) is not None:
        into = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
        checkpoints.load(found, into)
        step = found.meta["step"]
    while True:
        step += 1
        checkpoints.save(step, state(step), {})
        done = step - 1 if asynchronous else step  # this call has waited for the one before
        acknowledged.with_suffix(".tmp").write_text(str(done))
        os.replace(acknowledged.with_suffix(".tmp"), acknowledged)


def newest(directory: Path) -> int:
    """The step that a reader finds; its bits and what `latest` names are checked."""
    checkpoints = Checkpoints(directory)
    found = checkpoints.newest()
    if found is None:
        assert not (directory / "latest").exists()
        return 0
    into = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
    checkpoints.load(found, into)
    step = int(found.meta["step"])
    assert all(into[name].equal(tensor) for name, tensor in state(step).items())
    if (directory / "latest").exists():
        named = int((directory / "latest").read_text().strip().removeprefix("step_"))
        assert named in (step, step - 1)
        checkpoints.find(named)
    else:
        assert step == 1  # killed between the first rename and the first `latest`
    return step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kills_at_random_moments(tmp_path: Path, asynchronous: bool) -> None:
    """Oracle: the steps whose save had returned, and the state of the step that is found."""
    directory, acknowledged = tmp_path / "checkpoints", tmp_path / "acknowledged"
    moments = random.Random(int(asynchronous))
    reached, caught = 0, 0
    for _ in range(12):
        arguments = (directory, acknowledged, asynchronous)
        process = CHILDREN.Process(target=save_for_ever, args=arguments)
        process.start()
        while not _text(acknowledged) or int(_text(acknowledged)) <= reached:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        promised, found = int(acknowledged.read_text()), newest(directory)
        assert found >= promised > reached
        reached = found
        caught += any(name.startswith(".tmp-step") for name in os.listdir(directory))
    assert caught > 0, "no kill fell into a save: the test saw nothing"
    Checkpoints(directory).clean()
    milestones = {step for step in range(1, reached + 1) if step % 10 == 0}
    assert {*Checkpoints(directory).steps()} <= milestones | {reached - 2, reached - 1, reached}
    assert not [name for name in os.listdir(directory) if name.startswith(".")]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def killer(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps functions so that this process is killed right after the n-th call of any of them."""
    counted = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal counted
            result = real(*arguments, **settings)
            counted += 1
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    return deadly


def die_at_call(directory: Path, number: int) -> None:
    """Save steps 1, 2 and 3, then be killed right after the n-th call during the save of step 4."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(directory)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {})
    deadly = killer(number)
    for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    format.save_file = deadly(_write_half)
    if number > 2:  # after the directory (1) and half of the file (2): the whole file
        format.save_file = deadly(save_file)
    checkpoints.save(4, state(4), {})
    os._exit(0)


def _write_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


def test_a_kill_after_every_single_call(tmp_path: Path) -> None:
    """Oracle: before the rename the previous step is found, after it the new one, never less."""
    found, code, number = [], -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        number += 1
        directory = tmp_path / str(number)
        process = CHILDREN.Process(target=die_at_call, args=(directory, number))
        process.start()
        process.join()
        code = process.exitcode
        found.append(newest(directory))
        assert len(Checkpoints(directory).steps()) >= 2
        save_once(directory, found[-1] + 1)
    assert code == 0
    assert found == sorted(found) and {*found} == {3, 4}
    assert found.count(3) >= 6 and found.count(4) >= 6


def die_at_call_of_a_second_save(directory: Path, number: int) -> None:
    """Save steps 1 and 2; be killed right after the n-th call while step 2 gets its loss."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, state(step), {}, validation_loss=2.0)
    deadly = killer(number)
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, deadly(getattr(os, name)))
    checkpoints.save(2, state(2), {}, validation_loss=1.0)
    os._exit(0)


def test_a_kill_while_a_loss_is_recorded(tmp_path: Path) -> None:
    """Oracle: the whole step 2 after every call, with its old loss and then with its new one."""
    losses, code, number = [], -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        number += 1
        directory = tmp_path / str(number)
        process = CHILDREN.Process(target=die_at_call_of_a_second_save, args=(directory, number))
        process.start()
        process.join()
        code = process.exitcode
        assert newest(directory) == 2
        losses.append(Checkpoints(directory).find(2).meta["validation_loss"])
        Checkpoints(directory).clean()
        assert {*os.listdir(directory)} == {"latest", "step_00000001", "step_00000002"}
    assert code == 0
    assert losses == sorted(losses, reverse=True) and {*losses} == {2.0, 1.0}
    assert losses.count(2.0) >= 1 and losses.count(1.0) >= 4


def save_once(directory: Path, step: int) -> None:
    """The next process goes on and leaves the directory tidy."""
    checkpoints = Checkpoints(directory)
    checkpoints.clean()
    checkpoints.save(step, state(step), {})
    assert newest(directory) == step
    names = {"latest", f"step_{step:08d}", f"step_{step - 1:08d}"}
    assert {*os.listdir(directory)} == names


def save_with_small_files(directory: Path, answer: Path, asynchronous: bool) -> None:
    """Saves on a system that lets no file grow beyond 1 MB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    checkpoints = Checkpoints(directory, asynchronous=asynchronous)
    try:
        checkpoints.save(2, state(2, size=600), {})
        checkpoints.wait()
    except InputError as error:
        answer.write_text(str(error))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_system_that_refuses_to_write_on(tmp_path: Path, asynchronous: bool) -> None:
    """Oracle: the kernel's own refusal, in the middle of a file."""
    directory, answer = tmp_path / "checkpoints", tmp_path / "answer"
    Checkpoints(directory).save(1, state(1), {})
    arguments = (directory, answer, asynchronous)
    process = CHILDREN.Process(target=save_with_small_files, args=arguments)
    process.start()
    process.join()
    assert "the checkpoint of step 2 was not saved: File too large; the ones" in answer.read_text()
    assert "\n" not in answer.read_text()
    assert sorted(os.listdir(directory)) == ["latest", "step_00000001"]
    assert newest(directory) == 1


FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
import torch
from llmnorm.part import InputError
from llmnorm.checkpoints.checkpoints import Checkpoints
directory = Path(sys.argv[1])
for asynchronous in (False, True):
    checkpoints = Checkpoints(directory / "checkpoints", asynchronous=asynchronous)
    checkpoints.save(1, {"x": torch.ones(100_000)}, {})
    try:
        checkpoints.save(2, {"x": torch.ones(1_000_000)}, {})
        checkpoints.wait()
    except InputError as error:
        print(error)
    print(checkpoints.newest().path.name, *sorted(os.listdir(directory / "checkpoints")))
subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
try:
    checkpoints.save(3, {"x": torch.ones(10)}, {})
    checkpoints.wait()
except InputError as error:
    print(error)
"""


def own_mounts() -> list[str] | None:
    """The start of a command that may mount what it likes; None where the system has no such."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None:
        return None
    probe = "mount -t tmpfs none /mnt"
    done = subprocess.run([*command, "sh", "-c", probe], capture_output=True, check=False)
    return command if done.returncode == 0 else None


def test_a_disk_that_is_really_full_and_one_that_is_read_only(tmp_path: Path) -> None:
    """Oracle: a file system of 3 MB, and 4 MB to save; then the same mounted read-only."""
    command = own_mounts()
    if command is None:
        pytest.skip("needs user namespaces to mount a small file system")
    (tmp_path / "code.py").write_text(FULL_DISK)
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=3m none "$1" && exec "$2" "$3" "$1"'
    done = subprocess.run(
        [
            *command,
            "sh",
            "-c",
            script,
            "sh",
            tmp_path / "disk",
            sys.executable,
            tmp_path / "code.py",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    where = tmp_path / "disk" / "checkpoints"
    full = (
        f"{where}: the checkpoint of step 2 was not saved: No space left on device; "
        "the ones before it are as they were"
    )
    intact = "step_00000001 latest step_00000001"
    read_only = full.replace("step 2", "step 3").replace(
        "No space left on device", "Read-only file system"
    )
    assert done.stdout.splitlines() == [full, intact, full, intact, read_only]
