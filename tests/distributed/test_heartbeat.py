"""Two real processes, to one of which something happens: the other ends soon, and names it.

Most runs of the file are made at once, since they mostly wait.
"""

import json
import os
import re
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from llmnorm.parallel.calls import Calls
from tests.distributed.processes import run as run_processes
from tests.running import PATIENCE, ROOT, SMOKE, Child
from tests.test_mistakes import says
from tools.campaigns.ranks.victim import arm, slow

TIMEOUT = 6.0
STEP = 3
# What happens, to which process, under which sharding; phase.
STRUCK = [
    ("dead", 1, "ddp", "backward"),
    ("stopped", 0, "fsdp2", "forward"),
    ("looping", 1, "fsdp2", "data"),
    ("looping", 0, "ddp", "save"),
    ("holding", 1, "ddp", "exchange"),
    ("raising", 1, "ddp", "forward"),
    ("mistake", 1, "fsdp2", "forward"),
]
SLOWED = ["ddp", "fsdp2"]


class Ended(NamedTuple):
    """A run of two processes that has ended.

    Attributes:
        codes: exit codes by rank.
        seconds: from the stroke to the end, by rank.
        printed: by rank.
        run: its directory.
    """

    codes: list[int]
    seconds: list[float]
    printed: list[str]
    run: Path


class Pair:
    """Two processes that train, as a launcher would start them."""

    def __init__(self, directory: Path, data: Path, words: list[str], before: list[Any]) -> None:
        self.directory, self.run = directory, directory / "run"
        directory.mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        words = ["train", str(SMOKE), f"run_dir={self.run}", f"data.dir={data}", *words]
        words += ["training.device=cpu", "evaluation.every=null", "training.global_batch=4"]
        launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        launcher |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self.children = [
            Child(
                words,
                directory / f"log_{rank}",
                {**launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                before[rank],
            )
            for rank in range(2)
        ]

    def end(self, stopped: int | None) -> Ended:
        """Wait for both; a stopped one is killed when the other has ended."""
        until = time.monotonic() + PATIENCE
        ends: dict[int, float] = {}
        while len(ends) < 2:
            assert time.monotonic() < until, [c.log.read_text() for c in self.children]
            for rank, child in enumerate(self.children):
                if rank not in ends and child.process.exitcode is not None:
                    ends[rank] = time.monotonic()
            if stopped is not None and ends.keys() == {1 - stopped}:
                os.kill(self.children[stopped].process.pid or 0, signal.SIGKILL)
            time.sleep(0.02)
        struck = self.directory / "struck"
        at = float(struck.read_text()) if struck.exists() else 0.0
        return Ended(
            [child.finish() for child in self.children],
            [ends[rank] - at for rank in range(2)],
            [child.log.read_text() for child in self.children],
            self.run,
        )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> dict[Any, Ended]:
    """Runs to one of whose processes something happens, by what and to which."""
    root = tmp_path_factory.mktemp("heartbeat")
    pairs: dict[Any, Pair] = {}
    for kind, victim, sharding, phase in STRUCK:
        directory = root / f"{kind}_{victim}"
        hit = partial(arm, kind, STEP, phase, directory / "struck")
        words = [f"parallel.sharding={sharding}", f"parallel.timeout={TIMEOUT}"]
        words += ["training.steps=1000", f"checkpoint.every={STEP}"]
        before = [hit if rank == victim else None for rank in range(2)]
        pairs[kind, victim] = Pair(directory, smoke_data, words, before)
    directory = root / "both"
    both = [partial(arm, "mistake", STEP, "data", directory / f"struck_{r}") for r in range(2)]
    pairs["mistake", 2] = Pair(directory, smoke_data, ["training.steps=1000"], both)
    stopped = {key: key[1] for key in pairs if key[0] == "stopped"}
    return {key: pair.end(stopped.get(key)) for key, pair in pairs.items()}


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> dict[str, Ended]:
    """Runs whose second process takes twice as long for its own work, by their sharding."""
    root = tmp_path_factory.mktemp("slowed")
    pairs = {}
    for sharding in SLOWED:
        words = [f"parallel.sharding={sharding}", "training.steps=6"]
        before = [partial(slow, twofold=rank == 1, steps=4) for rank in range(2)]
        pairs[sharding] = Pair(root / sharding, smoke_data, words, before)
    return {sharding: pair.end(None) for sharding, pair in pairs.items()}


@pytest.mark.parametrize(("kind", "victim", "sharding", "phase"), STRUCK)
def test_the_other_process_ends_and_names_the_lost_one(
    ended: dict[Any, Ended], kind: str, victim: int, sharding: str, phase: str
) -> None:
    """Oracle: exit code 74, and one line with rank, host, step and `--exclude`."""
    found, other = ended[kind, victim], 1 - victim
    assert found.codes[other] == 74, found.printed
    # The bound of timeout + 5 s is measured on a quiet machine; no busy one needs minutes.
    assert found.seconds[other] < TIMEOUT + 120
    lines = [text for text in found.printed[other].splitlines() if "llmnorm: error" in text]
    assert len(lines) == 1 and "Traceback" not in found.printed[other]
    reason = "failed process" if kind in ("raising", "mistake") else "silent process"
    reason = "stuck process" if kind == "looping" else reason
    line = str(says(reason, lines[0]))
    host = socket.gethostname()
    assert line.startswith(f"rank {victim} (host {host}, process ")
    assert f"; last step {STEP}, in phase " in line and f"--exclude={host};" in line
    assert line.endswith(f"llmnorm train {found.run}")
    assert kind != "raising" or "): RuntimeError: planted for a test; last step" in line
    assert kind != "mistake" or "): data: planted for a test; last step" in line


def test_where_each_thread_was_is_written_into_the_run(ended: dict[Any, Ended]) -> None:
    """Oracle: the function in which the victim loops, and the call in which the other waits."""
    ranks = ended["looping", 1].run / "ranks"
    looping, waiting = ((ranks / f"rank_0000{rank}.txt").read_text() for rank in (1, 0))
    assert looping.startswith("rank 1 (") and "last step 3, in phase data" in looping
    assert "in strike" in looping and "in strike" not in waiting
    assert "in step" in waiting
    assert ended["looping", 1].codes[1] == 74


def test_a_process_that_holds_pythons_lock_is_ended_too(ended: dict[Any, Ended]) -> None:
    """Oracle: faulthandler's exit code, and the stack that it prints."""
    found = ended["holding", 1]
    assert found.codes[1] == 1
    assert "Timeout (0:00:08" in found.printed[1] and "in strike" in found.printed[1]


def test_a_failed_process_says_what_failed(ended: dict[Any, Ended]) -> None:
    """Oracle: its own line, which begins with who it is and ends with its host; its report."""
    found = ended["raising", 1]
    assert found.codes[1] == 70
    (line,) = [text for text in found.printed[1].splitlines() if "llmnorm: error" in text]
    assert says("one of several fails", line)
    assert line.startswith("llmnorm: error: rank 1 (host ")
    assert "): RuntimeError: planted for a test; llmnorm train" in line
    (report,) = re.findall(r"details in (\S+);", line)
    assert "in strike" in (ROOT / report).read_text()
    (ROOT / report).unlink()
    assert line.endswith(f"--exclude={socket.gethostname()}")


def test_a_mistake_is_said_by_one_process_that_has_found_it(ended: dict[Any, Ended]) -> None:
    """Oracle: one line, of process 1 where it is alone, of process 0 where all have found it."""
    alone, both = ended["mistake", 1], ended["mistake", 2]
    assert (alone.codes[1], both.codes) == (2, [2, 2])
    line = "llmnorm: error: data: planted for a test"
    assert [line in alone.printed[1].splitlines(), *(line in p for p in both.printed)] == [
        *(True, True, False)
    ]


@pytest.mark.parametrize("sharding", SLOWED)
def test_a_slow_process_is_named_once_and_counted(slowed: dict[str, Ended], sharding: str) -> None:
    """Oracle: process 1 takes twice as long for all that it does itself."""
    found = slowed[sharding]
    assert found.codes == [0, 0], found.printed
    notes = [text for text in found.printed[0].splitlines() if " is slow" in text]
    assert len(notes) == 1 and str(says("slow process", notes[0])).startswith("rank 1 (host ")
    lines = [json.loads(line) for line in (found.run / "metrics.jsonl").read_text().splitlines()]
    counted = [line.get("stragglers") for line in lines if "loss" in line]
    assert counted == [None] * 4 + [{"1": 1}] * 2  # after the first step and four more


def calls(directory: Path, rank: int, world: int) -> Any:
    """Counts before and after collective calls, and the seconds after which a group gives up."""
    counter, ones = Calls(), torch.ones(2)
    counter.background = dist.new_group(backend="gloo")
    assert dist.group.WORLD is not None and counter.background is not None
    found = [counter()]
    for _ in range(3):
        dist.all_reduce(ones)
    found.append(counter())
    dist.all_reduce(ones, group=counter.background)
    found.append(counter())
    backends = [
        group._get_backend(torch.device("cpu")) for group in (dist.group.WORLD, counter.background)
    ]
    return found, [backend.options._timeout.total_seconds() for backend in backends]


def test_collective_calls_are_counted_and_groups_have_no_limit_of_their_own(tmp_path: Path) -> None:
    """Oracle: the calls written out, by group; a week, far above `parallel.timeout`."""
    for found, timeouts in run_processes(calls, tmp_path):
        (training, background), *later = found
        assert later == [[training + 3, background], [training + 3, background + 1]]
        assert timeouts == [7 * 24 * 3600.0] * 2
