"""Several processes of one run, forked from this one: what a launcher does, without its imports.

    python -m tools.campaigns.ranks.launcher 2 train run.yaml run_dir=run parallel.sharding=fsdp2

It ends when all of them have ended, with the first exit code that is not 0, as a launcher does (1
where a signal has killed a process). In the working directory, `pids/RANK` holds a process's
number, and `codes.json` their exit codes. With KILL_AT in the environment, a process kills at a
named moment (moments.py); with STRIKE something happens to one (tools/campaigns/ranks/victim.py).
"""

import importlib
import json
import os
import socket
import sys
from pathlib import Path

from llmnorm.machine.files import write_whole

PIDS = Path("pids")
CODES = Path("codes.json")


def main(words: list[str]) -> int:
    """Run `llmnorm WORDS[1:]` on as many processes as the first word says."""
    importlib.import_module("llmnorm.training.loop")  # once, before the processes are forked
    if any(word.startswith("parallel.sharding=zero") for word in words):
        importlib.import_module("torch._inductor.compile_fx")  # seconds of what DeepSpeed imports
    world = int(words[0])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    PIDS.mkdir(exist_ok=True)
    children = [_fork(rank, world, port, words[1:]) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    write_whole(CODES, json.dumps(codes))
    return next((code if code > 0 else 1 for code in codes if code), 0)


def _fork(rank: int, world: int, port: int, words: list[str]) -> int:
    """One process of the run; returns its number."""
    child = os.fork()
    if child:
        write_whole(PIDS / str(rank), str(child))
        return child
    code = 1
    try:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_RUN_ID"] = "none"  # as torchrun and accelerate launch have it
        if moment := os.environ.get("KILL_AT"):
            importlib.import_module("tools.campaigns.ranks.moments").arm(moment, rank)
        if stroke := os.environ.get("STRIKE"):
            importlib.import_module("tools.campaigns.ranks.victim").arm_one(stroke, rank)
        code = importlib.import_module("llmnorm.cli").main(words)
        sys.stdout.flush()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
