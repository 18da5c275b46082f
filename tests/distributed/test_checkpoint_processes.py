"""Checkpoints of several processes: real ones, over gloo; what they write one process reads.

A scenario runs on every process and returns what JSON can say; the tests judge what comes back.
"""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmnorm.checkpoints import checkpoints as module
from llmnorm.checkpoints.checkpoints import Checkpoints, Interval
from llmnorm.part import InputError
from tests.distributed.processes import run

FULL = {
    "model.weight": torch.arange(35.0).reshape(7, 5),
    "model.norm": torch.arange(3.0).bfloat16(),
    "model.one_row": torch.arange(4.0).reshape(1, 4),
    "model.nothing": torch.zeros(0, 4),
    "optimizer.weight.momentum": torch.arange(35.0).reshape(7, 5) / 3,
    "optimizer.weight.step": torch.tensor(9.0),
}
SHARDED = ("model.weight", "model.norm", "model.one_row", "model.nothing")


def rows(count: int, rank: int, world: int) -> tuple[int, int]:
    """As `Shard(0)` cuts: blocks of equal size, the last ones short or empty."""
    block = -(-count // world)
    return min(rank * block, count), min((rank + 1) * block, count)


def mine(rank: int, world: int, step: int = 0) -> dict[str, torch.Tensor | Interval]:
    """This process's part: shards of the model; its momentum by the last, the step by the first."""
    parts: dict[str, torch.Tensor | Interval] = {}
    for name, full in FULL.items():
        full = full + step
        if name in SHARDED:
            start, stop = rows(full.shape[0], rank, world)
            parts[name] = Interval(full[start:stop].clone(), start, tuple(full.shape))
        elif rank == (world - 1 if "momentum" in name else 0):
            parts[name] = full
    return parts


def emptied(parts: dict[str, torch.Tensor | Interval]) -> dict[str, torch.Tensor | Interval]:
    return {
        name: part._replace(tensor=torch.full_like(part.tensor, -1))
        if isinstance(part, Interval)
        else torch.full_like(part, -1)
        for name, part in parts.items()
    }


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = [
        [value.tensor if isinstance(value, Interval) else value for value in parts.values()]
        for parts in (one, other)
    ]
    return all(a.equal(b) for a, b in zip(*tensors, strict=True))


def failure(call: Callable[..., object], *arguments: Any) -> str:
    """The error that `call` raises, or that it raises none."""
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# Writing and reading


def save_and_read_back(directory: Path, rank: int, world: int) -> bool:
    """Saves synchronously and in the background, reads both back by the same cut."""
    good = True
    for step, asynchronous in ((1, False), (2, True)):
        checkpoints = Checkpoints(directory, asynchronous=asynchronous, rank=rank, world=world)
        parts = mine(rank, world, step)
        checkpoints.save(step, parts, {"tokens": step})
        for part in parts.values():
            (part.tensor if isinstance(part, Interval) else part).zero_()
        path = checkpoints.find(step)
        into = emptied(mine(rank, world))
        good &= checkpoints.load(path, into)["tokens"] == step
        good &= equal(into, mine(rank, world, step))
    return good


def read_by_this_cut(directory: Path, rank: int, world: int) -> bool:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    into = emptied(mine(rank, world))
    checkpoints.load(checkpoints.find("latest"), into)
    return equal(into, mine(rank, world, 2))


@pytest.mark.parametrize("world", [2, 3])
def test_what_several_processes_write_one_process_reads(tmp_path: Path, world: int) -> None:
    """Oracle: the full tensors, that no process ever held (synchronous mode passes live memory)."""
    assert run(save_and_read_back, tmp_path, world) == [True] * world
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        into = {name: torch.full_like(tensor, -1) for name, tensor in FULL.items()}
        checkpoints.load(checkpoints.find(step), into)
        assert all(into[name].equal(tensor + step) for name, tensor in FULL.items())
    files = sorted(os.listdir(tmp_path / "checkpoints" / "step_00000002"))
    assert files == ["MANIFEST.json", *(f"rank_{r:05d}.safetensors" for r in range(world))]
    other = 5 - world
    assert run(read_by_this_cut, tmp_path, other) == [True] * other


def only_the_first_writes(directory: Path, rank: int, world: int) -> Any:
    """Plain data parallelism: everybody holds everything, one passes it, all read it."""
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    checkpoints.save(1, FULL if rank == 0 else {}, {"tokens": 5} if rank == 0 else {})
    into = {name: torch.full_like(tensor, -1) for name, tensor in FULL.items()}
    meta = checkpoints.load(checkpoints.find("latest"), into)
    return [meta["tokens"], all(into[name].equal(tensor) for name, tensor in FULL.items())]


def test_replicas_write_once_and_read_alike(tmp_path: Path) -> None:
    """Oracle: the full tensors; one file."""
    assert run(only_the_first_writes, tmp_path) == [[5, True], [5, True]]
    assert len(os.listdir(tmp_path / "checkpoints" / "step_00000001")) == 2


def pass_copies(directory: Path, rank: int, world: int) -> str:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    return failure(checkpoints.save, 1, FULL, {})


def test_copies_that_all_pass_are_refused(tmp_path: Path) -> None:
    """Oracle: both processes pass the same rows."""
    first, second = run(pass_copies, tmp_path)
    assert "ValueError: checkpoint key" in first and "two processes gave" in first
    assert "another process failed" in second and "two processes gave" in second
    assert os.listdir(tmp_path / "checkpoints") == []


# Failing


def one_disk_is_full(directory: Path, rank: int, world: int) -> Any:
    """The second process cannot write its file once, in each mode."""
    said = []
    real = module.write_file

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for asynchronous in (False, True):
        checkpoints = Checkpoints(directory, asynchronous=asynchronous, rank=rank, world=world)
        checkpoints.save(1, mine(rank, world, 1), {})
        checkpoints.wait()
        module.write_file = full if rank == 1 else real
        if asynchronous:
            checkpoints.save(2, mine(rank, world, 2), {})
            said.append(failure(checkpoints.save, 3, mine(rank, world, 3), {}))
        else:
            said.append(failure(checkpoints.save, 2, mine(rank, world, 2), {}))
        module.write_file = real
        said.append(checkpoints.find("latest").path.name)
        dist.barrier()
        said.append(sorted(os.listdir(directory)))
        dist.barrier()
    checkpoints.save(2, mine(rank, world, 2), {})
    return [*said, checkpoints.find("latest").path.name]


def test_a_full_disk_on_one_process_is_an_error_on_all(tmp_path: Path) -> None:
    """Oracle: the same line on both, nothing changed, and the next save works."""
    first, second = run(one_disk_is_full, tmp_path)
    assert first == second
    text = "the checkpoint of step 2 was not saved: No space left on device; the ones before it"
    for said in (first[0], first[3]):
        assert said.startswith("InputError: ") and text in said
    assert first[1:3] == first[4:6] == ["step_00000001", ["latest", "step_00000001"]]
    assert first[6] == "step_00000002"


def a_mistake_of_ours(directory: Path, rank: int, world: int) -> str:
    def mistake(*_: Any) -> Any:
        raise KeyError("oops")

    if rank == 1:
        module.write_file = mistake
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    return failure(checkpoints.save, 1, mine(rank, world), {})


def test_a_mistake_on_one_process_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Oracle: an error that no one foresaw, on the second process."""
    first, second = run(a_mistake_of_ours, tmp_path)
    assert first == "RuntimeError: another process failed: KeyError('oops')"
    assert second == "KeyError: 'oops'"


def asks_for_what_is_not_there(directory: Path, rank: int, world: int) -> Any:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    checkpoints.save(1, mine(rank, world), {})
    into = emptied(mine(rank, world))
    before = emptied(mine(rank, world))
    more = {**into, "model.bias": torch.zeros(2)} if rank == 1 else into
    said = failure(checkpoints.load, checkpoints.find("latest"), more)
    fewer = {name: part for name, part in into.items() if "norm" not in name or rank == 0}
    fewest = {name: part for name, part in fewer.items() if "norm" not in name}
    return [
        said,
        equal(into, before),
        failure(checkpoints.load, checkpoints.find("latest"), fewest),
        equal(into, before),
        failure(checkpoints.load, checkpoints.find("latest"), fewer),
        failure(checkpoints.find, 7),
    ]


def test_a_name_that_one_process_asks_for_in_vain_changes_nothing_anywhere(tmp_path: Path) -> None:
    """Oracle: the tensors before the call; names count as asked for when any process asks."""
    first, second = run(asks_for_what_is_not_there, tmp_path)
    assert first == second
    assert "holds no tensor 'model.bias'" in first[0] and first[1]
    assert "1 tensors have no place here: model.norm" in first[2] and first[3]
    assert first[4] == "no error"
    assert "no checkpoint of step 7; nearest: 1" in first[5]


# Verifying


def find_and_count(directory: Path, rank: int, world: int) -> Any:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    for step in (1, 2):
        checkpoints.save(step, mine(rank, world, step), {})
    from llmnorm.checkpoints import format

    read: list[str] = []
    real = format.checksum

    def checksum(file: Path) -> str:
        read.append(f"{file.parent.name}/{file.name}")
        return real(file)

    format.checksum = checksum
    whole = checkpoints.find("latest").path.name
    dist.barrier()
    if rank == 0:
        file = directory / "step_00000002" / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    return [whole, read[:], checkpoints.find("latest").path.name, failure(checkpoints.find, 2)]


def test_each_file_is_verified_by_one_process_and_all_know(tmp_path: Path) -> None:
    """Oracle: the files that each process read; damage done by hand to the second one's."""
    first, second = run(find_and_count, tmp_path)
    assert first[0] == second[0] == "step_00000002"
    assert first[1] == ["step_00000002/rank_00000.safetensors"]
    assert second[1] == ["step_00000002/rank_00001.safetensors"]
    assert first[2] == second[2] == "step_00000001"
    assert first[3] == second[3]
    assert "step_00000002/rank_00001.safetensors is damaged" in first[3]


# Dying


def one_dies(directory: Path, rank: int, world: int) -> Any:
    """The second process is killed in the middle of its file."""
    real = module.write_file

    def die(path: Path, parts: Any) -> Any:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = Checkpoints(directory, rank=rank, world=world)
    checkpoints.save(1, mine(rank, world, 1), {})
    module.write_file = die if rank == 1 else real
    return failure(checkpoints.save, 2, mine(rank, world, 2), {})


def test_a_killed_process_is_an_error_for_the_other_and_the_previous_one_stays(
    tmp_path: Path,
) -> None:
    """Oracle: kill -9 of the second process; the state of step 1."""
    first, second = run(one_dies, tmp_path)
    assert second == -signal.SIGKILL and first.startswith(("RuntimeError", "DistBackendError"))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.clean()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000001"]
    into = {name: torch.full_like(tensor, -1) for name, tensor in FULL.items()}
    checkpoints.load(checkpoints.find("latest"), into)
    assert all(into[name].equal(tensor + 1) for name, tensor in FULL.items())
    with pytest.raises(InputError):
        checkpoints.find(2)
