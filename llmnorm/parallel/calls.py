"""How many collective calls this process has begun, which tells who is behind the others."""

from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Of a process group whose processes are watched (heartbeat.py): its own timeout decides nothing.
PATIENT = timedelta(days=7)


class Calls:
    """Counts the calls in all process groups of this process, those that are still to come too.

    Attributes:
        background: the group of a thread beside training, which is counted by itself.
    """

    def __init__(self) -> None:
        self.background: dist.ProcessGroup | None = None
        self._patient: set[dist.ProcessGroup] = set()

    def __call__(self) -> tuple[int, int]:
        """The calls in training and in the background; any thread may ask, it takes microseconds.

        A group that is seen for the first time gets a timeout of a week.
        """
        calls = [0, 0]
        for group in [*distributed_c10d._world.pg_map]:
            if group not in self._patient:
                distributed_c10d._set_pg_timeout(PATIENT, group)
                self._patient.add(group)
            for device in group._device_types:
                backend = group._get_backend(device)
                with suppress(RuntimeError):  # a backend that does not count its calls
                    calls[group is self.background] += backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
        return calls[0], calls[1]
