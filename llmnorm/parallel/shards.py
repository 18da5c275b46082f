"""torch's layouts of a model over processes: replicas (DDP), shards (FSDP2), and both (HSDP).

Under FSDP2 each block is a unit: its weights are gathered for its forward pass and again for its
backward pass. Embedding, final norm and head are one more unit.

What would surprise: gradients are summed over the processes, where torch's default is the mean.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from llmnorm.models.foreign import Foreign
    from llmnorm.models.pretrained_model import LlmNormPreTrainedModel

# Gives values to the tensors of some modules, passed as {name: module}; not to those of submodules.
Fill = Callable[[Mapping[str, nn.Module]], None]
# Entered while this process waits for others.
Waiting = Callable[[], AbstractContextManager[None]]
# Shards the parameters of a module that are not sharded yet: this process keeps its part.
Unit = Callable[[nn.Module], None]


def make_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """The processes as a mesh of shape (replicas, shards)."""
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(unit: nn.Module, mesh: DeviceMesh, waiting: Waiting) -> None:
    """Shard a unit, or what is left of a model: of each parameter this process keeps some rows.

    Args:
        waiting: entered while this process waits for others; on a GPU its host does not.
    """
    spread = mesh if mesh.size(0) > 1 else mesh["shard"]
    # The root is resharded too: ema.py may change weights whose gathered copies would stay old.
    sharded = fully_shard(unit, mesh=spread, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        sharded.set_custom_all_gather(_Gather(waiting))
        sharded.set_custom_reduce_scatter(_Scatter(waiting))


def fill_and_shard(
    model: "LlmNormPreTrainedModel | Foreign", fill: Fill, device: torch.device, unit: Unit | None
) -> None:
    """Allocate the model, which is on the meta device, and give it its values.

    A block is filled and sharded before the next one is allocated, so that no process holds the
    whole model.

    Args:
        model: its parameters are on the meta device. Buffers may have values (those of a class of
            transformers), which they keep.
        fill: called with the modules of each block, and with those outside of blocks.
        unit: called with each block, and then with the model; None: nothing is sharded.
    """
    rest = dict(model.named_modules())
    if unit is not None:
        for name, block in model.units().items():
            inside = {n: rest.pop(n) for n in [*rest] if n == name or n.startswith(f"{name}.")}
            _allocate(inside, device)
            fill(inside)
            unit(block)
    _allocate(rest, device)
    model.tie_weights()  # `to_empty` gave a tied head memory of its own
    fill(rest)
    if unit is not None:
        unit(model)


class Buckets:
    """When DDP began to reduce the last bucket of a backward pass: what follows it is a wait.

    On a GPU nothing is noted, since the host does not wait there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begun: float | None = None

    def note(self) -> None:
        """A bucket of gradients is whole on this process and is reduced now."""
        if self.device.type == "cpu":
            self._begun = time.monotonic()

    def waited(self) -> float:
        """Seconds since the last bucket of the backward pass that has just ended; 0 without one."""
        begun, self._begun = self._begun, None
        return 0.0 if begun is None else time.monotonic() - begun


def replicate(model: nn.Module, buckets: Buckets) -> DistributedDataParallel:
    """Wrap the model in DDP, with gradients summed over the replicas."""
    device = buckets.device
    device_ids = [device.index] if device.type == "cuda" else None
    replica = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # running statistics are sums over processes already
    replica.register_comm_hook(buckets, _sum)
    return replica


class _Gather(DefaultAllGather):
    """FSDP2's all-gather of weights, told apart from this process's own work."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def __call__(self, *args: Any, **kwargs: Any) -> dist.Work | None:
        with self._waiting():
            return super().__call__(*args, **kwargs)


class _Scatter(DefaultReduceScatter):
    """The same of FSDP2's reduce-scatter of gradients."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def __call__(self, *args: Any, **kwargs: Any) -> dist.Work:
        with self._waiting():
            return super().__call__(*args, **kwargs)


def _sum(buckets: Buckets, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    buckets.note()
    buffer = bucket.buffer()  # summed in place
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda _: buffer)


def _allocate(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    def place(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    for module in modules.values():
        module._apply(place, recurse=False)
