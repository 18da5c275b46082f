"""The process group of one life of a run, under a launcher that may start it again.

torchrun and accelerate launch keep one store for all lives of a run (torch 2.13: static and c10d
rendezvous alike), and torch puts the addresses of all processes into it under the same keys each
time. So a second life finds the addresses of processes that are gone, and gloo cannot connect to
them: without this file no restart succeeds.

Here each life agrees on a name for itself, and the group's keys stand below it. Process 0 chooses
the name. Another process may read the name of an earlier life, so it does not believe one before
process 0 has answered, below that name, with a number that the process has just drawn.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

WAIT = timedelta(minutes=5)  # for all processes to come, as torch's own rendezvous waits
POLL = 0.02  # seconds between two looks at the store


def make_group(backend: str) -> None:
    """Make the process group of this life, where the launcher keeps a store for several.

    Raises:
        RuntimeError: some process has not come in time.
    """
    if dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=WAIT)
    own = dist.PrefixStore(agreed_name(store, rank, world, WAIT), store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def agreed_name(store: dist.Store, rank: int, world: int, wait: timedelta) -> str:
    """A name that the processes of this life have and none before; each of them calls this.

    Raises:
        RuntimeError: some process has not come in time.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("llmnorm/life", own)
        for other in range(1, world):
            store.set(f"{own}/answer/{other}", store.get(f"{own}/{other}").decode())
        return own
    until = time.monotonic() + wait.total_seconds()
    while time.monotonic() < until:
        name = store.get("llmnorm/life").decode()
        store.set(f"{name}/{rank}", own)
        answer = f"{name}/answer/{rank}"
        if store.check([answer]) and store.get(answer).decode() == own:
            return name
        time.sleep(POLL)
    raise RuntimeError(f"process 0 of {world} has not come in {wait.total_seconds():g} s")
