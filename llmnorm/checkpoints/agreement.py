"""Work that several processes do together: where one of them fails, all of them raise.

Without this, a process that fails on its own (a full disk, no memory) would leave the others
waiting in the next collective call. So every step of a save or a load that can fail runs inside
`every` or `first`, which tell the others of the error.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from llmnorm.checkpoints.fragments import Ends
from llmnorm.part import InputError

T = TypeVar("T")
# How long a process waits for one that is alive but busy: a file of many gigabytes takes minutes.
PATIENCE = timedelta(hours=1)


class Processes:
    """The processes of a run, over a gloo group of their own; one process needs no group.

    Where several fail, the error of the lowest rank is raised, so that all act on the same one. The
    process that failed raises its own error. The others raise the same if a user can mend it, else
    a RuntimeError that quotes it.

    Args:
        rank, world: this process and how many there are.
        advance: called on a process each time that it has done some work.
    """

    def __init__(self, rank: int, world: int, advance: Callable[[], None] = lambda: None) -> None:
        self._advance = advance
        self.rank, self.world = rank, world
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None

    def every(self, work: Callable[[], T]) -> T:
        """`work()` on every process; each gets its own result."""
        result, error = self._attempt(work)
        for rank, sent in enumerate(self.gather(_to_send(error))):
            if sent is not None:
                raise error if error is not None and rank == self.rank else sent
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """`work()` on process 0; all get its result."""
        result, error = self._attempt(work) if self.rank == 0 else (None, None)
        if self.world > 1:
            shared: list[Any] = [result, _to_send(error)]
            dist.broadcast_object_list(shared, src=0, group=self.group)
            result, error = shared[0], error or shared[1]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every process's small value, in the order of ranks."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_on_first(self, value: T) -> list[T]:
        """As `gather` on process 0, an empty list on the others, to spare their memory."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world if self.rank == 0 else []
        dist.gather_object(value, values or None, group=self.group)
        return values

    def exchange(self, ends: Ends | None) -> None:
        """Send and receive the ends of rows, and put them in place."""
        if ends is not None and self.world > 1:
            dist.all_to_all_single(
                ends.received, ends.sent, ends.received_counts, ends.sent_counts, group=self.group
            )
            ends.put_in_place()

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as error:  # of any kind: the other processes must hear of it
            return None, error
        finally:
            self._advance()


def _to_send(error: Exception | None) -> Exception | None:
    """The error as the other processes raise it: of a kind that pickles."""
    expected = error is None or isinstance(error, InputError | OSError)
    return error if expected else RuntimeError(f"another process failed: {error!r}")
