"""torch's layouts of a model over processes: replicas (DDP), shards (FSDP2), and both (HSDP).

Under FSDP2 each block is a unit: its weights are gathered for its forward pass and again for its
backward pass. Embedding, final norm and head are one more unit.

What would surprise: gradients are summed over the processes, where torch's default is the mean.
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
    from llmnorm.models.foreign import Foreign
    from llmnorm.models.pretrained_model import LlmNormPreTrainedModel

# Gives values to the tensors of some modules, passed as {name: module}; not to those of submodules.
Fill = Callable[[Mapping[str, nn.Module]], None]
# Shards the parameters of a module that are not sharded yet: this process keeps its part.
Unit = Callable[[nn.Module], None]


def make_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """The processes as a mesh of shape (replicas, shards)."""
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a unit, or what is left of a model: of each parameter this process keeps some rows."""
    spread = mesh if mesh.size(0) > 1 else mesh["shard"]
    # The root is resharded too: ema.py may change weights whose gathered copies would stay old.
    sharded = fully_shard(unit, mesh=spread, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


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


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap the model in DDP, with gradients summed over the replicas."""
    device_ids = [device.index] if device.type == "cuda" else None
    replica = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # running statistics are sums over processes already
    replica.register_comm_hook(None, _sum)
    return replica


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _allocate(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    def place(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    for module in modules.values():
        module._apply(place, recurse=False)
