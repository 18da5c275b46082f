"""Checkpoints of several processes: real ones, over gloo; what they write one process reads.

A scenario runs on every process and returns what JSON can express; the tests judge the answers. All
scenarios of two processes share one launch, but for the one in which a process is killed. A process
that waits in vain fails after `PATIENCE`, not after an hour.
"""

import errno
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from llmnorm.checkpoints import agreement, format, store
from llmnorm.checkpoints import checkpoints as module
from llmnorm.checkpoints.checkpoints import Checkpoints, Interval, own_rows
from llmnorm.optim.fragments import Fragment
from llmnorm.part import InputError
from tests.distributed.processes import Scenario, run

PATIENCE = timedelta(minutes=2)

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
        found = checkpoints.find(step)
        into = emptied(mine(rank, world))
        checkpoints.load(found, into)
        good &= found.meta["tokens"] == step and equal(into, mine(rank, world, step))
    return good


def read_by_this_cut(directory: Path, rank: int, world: int) -> bool:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    into = emptied(mine(rank, world))
    checkpoints.load(checkpoints.find("latest"), into)
    return equal(into, mine(rank, world, 2))


def only_the_first_writes(directory: Path, rank: int, world: int) -> Any:
    """Plain data parallelism: every process has everything, one passes it, all read it."""
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    checkpoints.save(1, FULL if rank == 0 else {}, {"tokens": 5} if rank == 0 else {})
    into = {name: torch.full_like(tensor, -1) for name, tensor in FULL.items()}
    found = checkpoints.find("latest")
    checkpoints.load(found, into)
    return [found.meta["tokens"], all(into[name].equal(tensor) for name, tensor in FULL.items())]


def pass_copies(directory: Path, rank: int, world: int) -> str:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    return failure(checkpoints.save, 1, FULL, {})


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


def refuse(*_: Any, **__: Any) -> Any:
    """An error that no one foresaw."""
    raise KeyError("oops")


# What fails on one process alone: the rank, and what is replaced there by `refuse`.
FAILURES: dict[str, tuple[int, Any, str]] = {
    "begin": (0, store.Store, "begin"),
    "write": (1, module, "write_file"),
    "manifest": (0, module, "make_manifest"),
    "commit": (0, store.Store, "commit"),
    "keeping": (0, store.Store, "_superfluous"),
    "search": (0, store.Store, "find"),
    "checksums": (1, module, "check_files"),
    "memory to write": (1, module, "_new_buffer"),
    "memory to read": (1, module, "touched_rows"),
    "names": (1, module, "check_names"),
    "reading": (1, module, "copy_into"),
    "fragments": (1, module, "fill"),
}
MODES = {"synchronous": False, "asynchronous": True}
CASES = [
    *(f"{failure}, {mode}" for failure in [*FAILURES, "meta"] for mode in MODES),
    "thread, asynchronous",
]


def with_a_fragment(rank: int, world: int, step: int = 0) -> dict[str, torch.Tensor | Interval]:
    """As `mine`, and a fragment that ends within a row."""
    whole = torch.arange(20.0) + step
    cuts = (0, 7, 20)
    data = whole[cuts[rank] : cuts[rank + 1]].clone()
    fragment = Fragment.of(data, torch.Size((5, 4)), cuts, rank)
    return {**mine(rank, world, step), "model.fragment": fragment}


def each_part_fails(directory: Path, rank: int, world: int) -> Any:
    """In each case: the error of a save and a load, then what the next save and load give."""
    return {case: one_part_fails(directory / case, rank, world, case) for case in CASES}


def one_part_fails(directory: Path, rank: int, world: int, case: str) -> list[Any]:
    part, mode = case.split(", ")
    checkpoints = Checkpoints(directory, asynchronous=MODES[mode], rank=rank, world=world)
    checkpoints.save(1, with_a_fragment(rank, world, 1), {})
    checkpoints.wait()
    checkpoints._buffers.clear()  # of the second save, as of the first, there is none yet
    into = with_a_fragment(rank, world)

    def save_and_load() -> None:
        meta = {"path": Path()} if part == "meta" and rank == 1 else {}
        checkpoints.save(2, with_a_fragment(rank, world, 2), meta)
        checkpoints.wait()
        checkpoints.load(checkpoints.find("latest"), into)

    with pytest.MonkeyPatch.context() as patch:
        if part == "thread" and rank == 1:
            patch.setattr(checkpoints._thread, "submit", refuse)
        elif part in FAILURES and FAILURES[part][0] == rank:
            patch.setattr(*FAILURES[part][1:], refuse)
        error = failure(save_and_load)
    checkpoints.save(3, with_a_fragment(rank, world, 3), {})
    found = checkpoints.find("latest")
    checkpoints.load(found, into)
    good = equal(into, with_a_fragment(rank, world, 3))
    hidden = [name for name in os.listdir(directory) if name.startswith(".")]
    return [error, found.path.name, good, hidden, len(checkpoints.steps())]


def both_fail(_: Path, rank: int, world: int) -> str:
    """The first has found damage, which a search would pass over; the second makes a mistake."""

    def fail() -> None:
        raise KeyError("oops") if rank else format.Damaged("a file is missing")

    return failure(agreement.Processes(rank, world).every, fail)


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


# Verifying


def find_and_count(directory: Path, rank: int, world: int) -> Any:
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    for step in (1, 2):
        checkpoints.save(step, mine(rank, world, step), {})
    read: list[str] = []
    manifests: list[str] = []
    checksum, read_checkpoint = format.checksum, store.read_checkpoint

    def count_checksum(file: Path) -> str:
        read.append(f"{file.parent.name}/{file.name}")
        return checksum(file)

    def count_manifest(path: Path) -> Any:
        manifests.append(path.name)
        return read_checkpoint(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "checksum", count_checksum)
        patch.setattr(store, "read_checkpoint", count_manifest)
        whole = checkpoints.find("latest")
        checkpoints.load(whole, emptied(mine(rank, world)))
        counted = [read[:], manifests[:]]
    dist.barrier()
    if rank == 0:
        file = directory / "step_00000002" / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    back = checkpoints.find("latest").path.name
    return [whole.path.name, *counted, back, failure(checkpoints.find, 2)]


# Placements


def placements(_: Path, rank: int, world: int) -> dict[str, Any]:
    """What becomes of a matrix of 3 rows, by its placement."""
    matrix = torch.arange(6.0).view(3, 2)
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (1, world))
    tensors = {
        "Shard(1)": distribute_tensor(matrix, line, [Shard(1)]),
        "Partial": DTensor.from_local(matrix, line, [Partial()]),
        "two axes": distribute_tensor(matrix, grid, [Shard(0), Shard(0)]),
        "Shard(0)": distribute_tensor(matrix, line, [Shard(0)]),
        "Shard(0) of replicas": distribute_tensor(matrix, grid, [Replicate(), Shard(0)]),
        "Replicate": distribute_tensor(matrix, line, [Replicate()]),
    }
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        try:
            part = format.as_interval(own_rows("model.weight", tensor))
            found[name] = [part.start, part.tensor.tolist(), part.global_shape]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# The launches

TWO: list[Scenario] = [
    save_and_read_back,
    only_the_first_writes,
    pass_copies,
    one_disk_is_full,
    each_part_fails,
    both_fail,
    asks_for_what_is_not_there,
    find_and_count,
    placements,
]


def all_of_two(directory: Path, rank: int, world: int) -> Any:
    """Every scenario of two processes in a directory of its own, and what three have written."""
    agreement.PATIENCE = PATIENCE
    answers = {each.__name__: each(directory / each.__name__, rank, world) for each in TWO}
    return answers | {"read_by_this_cut": read_by_this_cut(directory / "three", rank, world)}


def save_by_three(directory: Path, rank: int, world: int) -> Any:
    return save_and_read_back(directory / "three", rank, world)


def read_by_three(directory: Path, rank: int, world: int) -> Any:
    return read_by_this_cut(directory / "save_and_read_back", rank, world)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def launched(place: Path) -> dict[str, Any]:
    """By scenario: what every process answers."""
    found: dict[str, Any] = {"save_by_three": run(save_by_three, place, 3)}
    answers = run(all_of_two, place)
    assert all(isinstance(answer, dict) for answer in answers), answers
    for name in answers[0]:
        found[name] = [answer[name] for answer in answers]
    return found | {"read_by_three": run(read_by_three, place, 3)}


@pytest.mark.parametrize("written_by", ["save_and_read_back", "three"])
def test_what_several_processes_write_any_number_reads(launched, place, written_by) -> None:
    """Oracle: the full tensors, which no process ever held; what is saved is zeroed afterwards."""
    assert launched["save_and_read_back"] == launched["read_by_this_cut"] == [True] * 2
    assert launched["save_by_three"] == launched["read_by_three"] == [True] * 3
    directory = place / "checkpoints" / written_by
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        into = {name: torch.full_like(tensor, -1) for name, tensor in FULL.items()}
        checkpoints.load(checkpoints.find(step), into)
        assert all(into[name].equal(tensor + step) for name, tensor in FULL.items())
    files = sorted(os.listdir(directory / "step_00000002"))
    world = 3 if written_by == "three" else 2
    assert files == ["MANIFEST.json", *(f"rank_{r:05d}.safetensors" for r in range(world))]


def test_replicas_write_once_and_read_alike(launched, place) -> None:
    """Oracle: the full tensors; one file."""
    assert launched["only_the_first_writes"] == [[5, True], [5, True]]
    directory = place / "checkpoints" / "only_the_first_writes" / "step_00000001"
    assert len(os.listdir(directory)) == 2


def test_copies_that_all_pass_are_refused(launched, place) -> None:
    """Oracle: both processes pass the same rows."""
    first, second = launched["pass_copies"]
    assert "ValueError: checkpoint key" in first and "two processes gave" in first
    assert "another process failed" in second and "two processes gave" in second
    assert os.listdir(place / "checkpoints" / "pass_copies") == []


def test_a_full_disk_on_one_process_is_an_error_on_all(launched) -> None:
    """Oracle: the same line on both, nothing changed, and the next save works."""
    first, second = launched["one_disk_is_full"]
    assert first == second
    text = "the checkpoint of step 2 was not saved: No space left on device; the ones before it"
    for said in (first[0], first[3]):
        assert said.startswith("InputError: ") and text in said
    assert first[1:3] == first[4:6] == ["step_00000001", ["latest", "step_00000001"]]
    assert first[6] == "step_00000002"


@pytest.mark.parametrize("case", CASES)
def test_whatever_fails_on_one_process_is_an_error_on_all(launched, case) -> None:
    """Oracle: the error that one process raised; an older checkpoint, and the save after it."""
    part = case.split(", ")[0]
    answers = [answer[case] for answer in launched["each_part_fails"]]
    own, quoted = ("KeyError: 'oops'", "KeyError('oops')")
    if part == "meta":
        own = "TypeError: Object of type PosixPath is not JSON serializable"
        quoted = "TypeError('Object of type PosixPath is not JSON serializable')"
    failing = FAILURES[part][0] if part in FAILURES else 1
    assert answers[failing][0] == own
    assert answers[1 - failing][0] == f"RuntimeError: another process failed: {quoted}"
    for answer in answers:
        assert answer[1:] == ["step_00000003", True, [], 2]


def test_processes_that_fail_differently_act_on_the_same_error(launched) -> None:
    """Oracle: the error of the process of the lowest rank."""
    assert launched["both_fail"] == ["Damaged: a file is missing"] * 2


def test_a_name_that_one_process_asks_for_in_vain_changes_nothing_anywhere(launched) -> None:
    """Oracle: the tensors before the call; names count as asked for when any process asks."""
    first, second = launched["asks_for_what_is_not_there"]
    assert first == second
    assert "holds no tensor 'model.bias'" in first[0] and first[1]
    assert "1 tensors that are not loaded: model.norm" in first[2] and first[3]
    assert first[4] == "no error"
    assert "no checkpoint of step 7; nearest: 1" in first[5]


def test_each_file_is_verified_by_one_process_and_all_know(launched) -> None:
    """Oracle: the files that each process read; damage done by hand to the second one's."""
    first, second = launched["find_and_count"]
    assert first[0] == second[0] == "step_00000002"
    assert first[1] == ["step_00000002/rank_00000.safetensors"]
    assert second[1] == ["step_00000002/rank_00001.safetensors"]
    assert first[3] == second[3] == "step_00000001"
    assert first[4] == second[4]
    assert "step_00000002/rank_00001.safetensors is damaged" in first[4]


def test_the_manifest_is_read_once_to_find_and_load(launched) -> None:
    """Oracle: the manifests that each process has opened."""
    first, second = launched["find_and_count"]
    assert first[2] == ["step_00000002"] and second[2] == []


@pytest.mark.parametrize("name", ["Shard(1)", "Partial", "two axes"])
def test_a_placement_that_is_no_rows_is_refused_by_name(launched, name) -> None:
    """Oracle: placements of which no process holds an interval of rows that the format knows."""
    quoted = {
        "Shard(1)": "Shard(dim=1)",
        "Partial": "Partial(sum)",
        "two axes": "mesh of shape (1, 2)",
    }
    for answer in launched["placements"]:
        assert answer[name].startswith("InputError: 'model.weight' cannot be saved: ")
        assert quoted[name] in answer[name] and "Shard(dim=0)" in answer[name]


def test_a_placement_of_rows_becomes_their_interval(launched) -> None:
    """Oracle: `torch.chunk` of the matrix [[0, 1], [2, 3], [4, 5]]."""
    rows = [[0, [[0.0, 1.0], [2.0, 3.0]], [3, 2]], [2, [[4.0, 5.0]], [3, 2]]]
    whole = [0, [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], [3, 2]]
    for answer, expected in zip(launched["placements"], rows, strict=True):
        assert answer["Shard(0)"] == answer["Shard(0) of replicas"] == expected
        assert answer["Replicate"] == whole


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
