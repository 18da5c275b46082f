"""One process of a group that is not there: collectives send nothing, and give shapes at once.

    with pretended(rank=1023, world=1024):
        parallel = Parallel(...)        joins the group as if a launcher had started 1,024 processes
        with Collectives() as calls:
            ...                         calls.found: what would have been sent

Source: torch's fake process group (torch/testing/_internal/distributed/fake_pg.py), by which
torchtitan tries out meshes without a cluster too. What arrives from another process has the right
shape and no meaningful number, so it is for tensors without numbers (torch's FakeTensorMode).

What would surprise:
- accelerate keeps what it was told of processes for as long as Python runs. So it is made to forget
  it before and afterwards.
- DDP compares shapes between processes, and copies the first one's weights, when it is made. Both
  read numbers, so they are left out.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import distributed as ddp
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def pretended(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is number `rank` of `world` processes on CPUs, none of which runs."""
    from accelerate.state import AcceleratorState
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized() and 0 <= rank < world
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    told = {name: str(number) for name, number in numbers.items()}
    # accelerate asks for an address and connects to nothing, since the group is there.
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    own = {n: v for n, v in os.environ.items() if not n.startswith(("TORCHELASTIC", "ACCELERATE"))}
    with (
        patch.dict(os.environ, own | told, clear=True),
        patch.object(ddp, "_verify_param_shape_across_processes", _nothing),
        patch.object(ddp, "_sync_module_states", _nothing),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


class Collective(NamedTuple):
    """One call.

    Attributes:
        how: "all-gather", "reduce-scatter", "all-reduce" or "all-to-all".
        group: how many processes take part.
        sent: bytes that this process sends, around a ring or, in an all-to-all, to each.
    """

    how: str
    group: int
    sent: float


class Collectives(TorchDispatchMode):
    """Notes every collective call inside.

    Attributes:
        found: the calls in their order.
        number: what a program is told that reads a number of a tensor, which has none; one that
            reads a condition is told that it holds.
    """

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.found: list[Collective] = []
        self.number = number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation, noted if it is a collective."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or self.number
        if func.namespace == "c10d" and func._overloadpacket in _CALLS:
            self.found.append(_CALLS[func._overloadpacket](*args))
        return func(*args, **(kwargs or {}))


def _size(group: Any) -> int:
    return dist.ProcessGroup.unbox(group).size()


def _gathered(_: Any, given: Tensor | list[Tensor], group: Any, *__: Any) -> Collective:
    given = given if isinstance(given, Tensor) else given[0]
    return Collective("all-gather", _size(group), float(given.nbytes * (_size(group) - 1)))


def _scattered(result: Tensor, _: Tensor, group: Any, *__: Any) -> Collective:
    return Collective("reduce-scatter", _size(group), float(result.nbytes * (_size(group) - 1)))


def _reduced(given: list[Tensor], group: Any, *_: Any) -> Collective:
    size = _size(group)
    return Collective("all-reduce", size, 2.0 * sum(t.nbytes for t in given) * (size - 1) / size)


def _exchanged(
    _: Tensor, given: Tensor, group: Any, __: list[int], counts: list[int], *___: Any
) -> Collective:
    kept = counts[dist.ProcessGroup.unbox(group).rank()] * given.itemsize
    return Collective("all-to-all", _size(group), float(given.nbytes - kept))


_CALLS: dict[Any, Callable[..., Collective]] = {
    torch.ops.c10d._allgather_base_: _gathered,
    torch.ops.c10d.allgather_: _gathered,
    torch.ops.c10d._reduce_scatter_base_: _scattered,
    torch.ops.c10d.allreduce_: _reduced,
    torch.ops.c10d.alltoall_base_: _exchanged,
}


def _nothing(*_: object, **__: object) -> None:
    """Takes the place of what would wait for another process's numbers."""
