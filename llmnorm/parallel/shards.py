"""torch's own layouts of a model over processes: replicas (DDP), shards (FSDP2) and both (HSDP).

A unit of sharding is gathered as a whole for its forward and its backward pass: each block is one,
what is left (embedding, final norm, head) one more. Gradients are summed where torch's defaults are
means.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM

# Gives the tensors that belong to modules themselves, which are passed by name, their values.
Fill = Callable[[Mapping[str, nn.Module]], None]
# Leaves this process its part of the parameters of a module that are whole still.
Unit = Callable[[nn.Module], None]


def make_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """The processes as (replicas, shards)."""
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this process its rows of the parameters of a unit, or of what is left of a model."""
    spread = mesh if mesh.size(0) > 1 else mesh["shard"]
    # The root is resharded too: evaluation may be followed by a change of the weights (ema.py).
    sharded = fully_shard(unit, mesh=spread, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def fill_and_shard(
    model: "LlmNormForCausalLM", fill: Fill, device: torch.device, unit: Unit | None
) -> None:
    """Give the model on the meta device its values.

    A block is filled and sharded before the next is, so that no process ever holds the whole.

    Args:
        unit: called with each block and then the model; None leaves it whole.
    """
    rest = dict(model.named_modules())
    if unit is not None:
        for number, block in enumerate(model.model.layers):
            name = f"model.layers.{number}"
            inside = {n: rest.pop(n) for n in [*rest] if n == name or n.startswith(f"{name}.")}
            _allocate(inside, device)
            fill(inside)
            unit(block)
    _allocate(rest, device)
    model.tie_weights()  # the head was given memory of its own
    fill(rest)
    if unit is not None:
        unit(model)


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model as one of several replicas."""
    device_ids = [device.index] if device.type == "cuda" else None
    replica = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # running statistics are sums over processes already
    replica.register_comm_hook(None, _sum)
    return replica


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _allocate(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    for module in modules.values():
        module.to_empty(device=device, recurse=False)
