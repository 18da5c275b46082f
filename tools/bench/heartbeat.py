"""Measure what the heartbeat and the clocks of a step cost a process.

usage: python tools/bench/heartbeat.py [--rounds 300] [--out docs/results/heartbeat.json]

The store is torch's TCPStore in a process of its own, as a launcher has it. A second of a heartbeat
is 2 beats and 2 looks at the clock, in threads beside the main one. A step's part is measured in
the main thread: phases of one micro-batch, and the processes' own seconds in the step's reduction.
All figures are processor time: a thread that waits for the store holds nothing up.
"""

import argparse
import faulthandler
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from report import RESULTS, Table, publish

from llmnorm.config.tree import ParallelSettings
from llmnorm.machine.phases import LOOP, Phases
from llmnorm.parallel.beats import Beat
from llmnorm.parallel.heartbeat import BEAT, Heartbeat
from llmnorm.training.stragglers import Stragglers

WORLDS = (2, 8, 64, 512)
STEP = 0.1  # seconds of the step whose share is printed


def serve(port: "multiprocessing.Queue[int]") -> None:
    """Be the store, for ever."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    time.sleep(1e6)


def microseconds(work: Callable[[], object], rounds: int) -> float:
    """The median processor time of a call."""
    taken = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return 1e6 * statistics.median(taken)


def beating(world: int, port: int, rounds: int) -> dict[str, float]:
    """Microseconds of a beat of the main process and of another, and of a look at the clock."""
    store = dist.PrefixStore(str(world), dist.TCPStore("localhost", port))
    for rank in range(world):
        store.set(f"llmnorm/heartbeat/{rank}", Beat(rank, "a-host-of-a-cluster", 123456).text())
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, rank in (("main", 0), ("other", 1)):
            heartbeat = Heartbeat(
                rank=rank,
                world=world,
                store=store.clone(),  # type: ignore[attr-defined]
                calls=lambda: (0, 0),
                phases=Phases(),
                settings=ParallelSettings(),
                directory=Path(directory),
                gpu=lambda: "",
            )
            heartbeat.close()
            found[name] = microseconds(heartbeat._exchange, rounds)

            def look(heartbeat: Heartbeat = heartbeat) -> None:
                faulthandler.dump_traceback_later(100, exit=True)
                heartbeat._found()

            found[f"{name} looks"] = microseconds(look, rounds)
            faulthandler.cancel_dump_traceback_later()
    return found


def pause(beat: float) -> float:
    """Seconds between two beats that take so long (heartbeat.py)."""
    return min(max(BEAT, 1000 * beat), 4 * BEAT)


def stepping(world: int, rounds: int) -> float:
    """Microseconds that phases and own seconds add to a step of one micro-batch."""
    phases = Phases()
    parallel = SimpleNamespace(phases=phases, world=world, rank=0, heartbeat=None)
    stragglers = Stragglers(parallel)  # type: ignore[arg-type]
    loss, step = torch.zeros(()), 0

    def one() -> None:
        nonlocal step
        step += 1
        for phase in ("data", "forward", "backward", "exchange"):
            phases.enter(phase)
        for _ in range(4):  # loss, clip, exchange to and from the owners
            with phases.waiting():
                pass
        read = torch.cat([torch.zeros(2), stragglers.slots(loss)])
        _, _, *seconds = read.tolist()
        stragglers.hear(seconds, step)
        phases.enter(LOOP)
        phases.end_step(step)

    return microseconds(one, rounds)


def main() -> int:
    """Measure, print and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS / "heartbeat.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    port: multiprocessing.Queue[int] = context.Queue()
    server = context.Process(target=serve, args=(port,), daemon=True)
    server.start()
    number = port.get()
    rows, figures = [], {}
    for world in WORLDS:
        beats, step = beating(world, number, given.rounds), stepping(world, given.rounds)
        second = {
            name: (beats[name] + beats[f"{name} looks"]) / 1e6 / pause(beats[name] / 1e6)
            for name in ("main", "other")
        }
        share = {name: second[name] + step / 1e6 / STEP for name in second}
        figures[str(world)] = {**beats, "step": step, "share": share}
        rows.append(
            [
                str(world),
                f"{beats['main']:.0f}",
                f"{beats['other']:.0f}",
                f"{beats['main looks']:.0f}",
                f"{beats['other looks']:.0f}",
                f"{step:.0f}",
                f"{share['main']:.3%}",
                f"{share['other']:.3%}",
            ]
        )
    server.terminate()
    columns = ["processes", "beat of process 0, us", "of another, us", "look of process 0, us"]
    columns += ["of another, us", "in a step, us"]
    columns += [f"share of {1000 * STEP:.0f} ms steps, process 0", "of another"]
    title = "The heartbeat and the clocks of a step (limit 0.2 %)"
    publish(given.out, "What watching the processes costs", [Table(title, columns, rows)], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
