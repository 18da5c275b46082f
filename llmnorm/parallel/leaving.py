"""How a process leaves the process group: with the others, or after an error.

Leaving alone can abort the others, so a process waits until all are ready to. One that leaves
because of an error waits for those that have the same error, but not for long. One that waits for
it in another call then learns that this process is gone.
"""

import sys
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from llmnorm.parallel.heartbeat import Heartbeat

LEAVING = timedelta(seconds=10)  # for the others to fail too, before a failed process leaves


def leave(heartbeat: Heartbeat | None, backend: str, world: int) -> None:
    """Leave the default process group, if there is one; called in the handling of an error too.

    Args:
        heartbeat: the watch over the processes, which ends with it.
        backend: of the group.
        world: its processes.

    Raises:
        Lost: another process was lost.
    """
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    if error is None:
        try:
            dist.barrier()
        except RuntimeError as found:
            if heartbeat is None:
                raise
            error = found
    if heartbeat is not None:
        verdict = None if error is None else heartbeat.leave(error)
        heartbeat.close()
        if verdict is not None:
            raise heartbeat.lost(verdict) from error
        if error is not None:
            if sys.exc_info()[1] is None:
                raise error
            return
    if error is None or world == 1:
        dist.destroy_process_group()
    elif backend == "gloo" and dist.group.WORLD is not None:
        options = dist.BarrierOptions()
        options.timeout = LEAVING
        with suppress(RuntimeError):  # another process is gone, or waits elsewhere
            dist.group.WORLD.barrier(options).wait()
