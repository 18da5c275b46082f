"""Processes, device and the layout of the model: recompute, compile, shard, in this order.

`accelerate launch` starts the processes and accelerate makes the process group; everything after
that is here, the same code on gloo and nccl. `fsdp2` makes each block a unit of torch's
`fully_shard` and the rest (embedding, final norm, head) one more; `hsdp` repeats that in groups of
processes that hold the same. Accumulation is ours: replicas reduce gradients with the last
micro-batch, shards with every one (so that no process holds all gradients). Gradients are summed:
the loss comes divided by the tokens of all processes, so that a gradient inside the backward pass
(norms keep statistics of it) is what it is on one process.

What would surprise: weights are float32 and gathered so: precision is autocast's, the same under
every sharding. What is really there is looked at in `layout.py`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmnorm.config import ParallelSettings, TrainingSettings
from llmnorm.optim.sharded import Exchange
from llmnorm.part import InputError
from llmnorm.training.launch import accelerator, agreed_sharding, launch_file

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM

Modules = Mapping[str, nn.Module]
Fill = Callable[[Modules], None]


class Parallel:
    """One process of a run: who it is, and how it works together with the others.

    Attributes:
        rank, world: this process and the number of processes.
        device: where this process computes.
        backend: what the processes talk over.
        sharding: how the model is laid out over them (`parallel.sharding`, never `auto`).
        accelerator: accelerate's handle on the process group.
    """

    def __init__(self, parallel: ParallelSettings, training: TrainingSettings) -> None:
        """Join the process group that the launcher has prepared, if any.

        Raises:
            InputError: launch file, environment and configuration ask for different things.
        """
        self.settings = parallel
        self.precision = training.precision
        self.sharding = agreed_sharding(parallel, training)
        cuda = training.device != "cpu" and torch.cuda.is_available()
        if training.device == "cuda" and not cuda:
            raise InputError(
                "training.device: 'cuda' is asked for, but torch sees no GPU; `llmnorm doctor` "
                "tells why, training.device=cpu runs on the CPU"
            )
        if training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        self.accelerator = accelerator(cuda)
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device = self.accelerator.device
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world:
            raise InputError(
                f"the launcher started {asked} processes, but {self.world} are connected; launch "
                f"with `accelerate launch --config_file {launch_file(self.sharding)}`"
            )
        self._mesh: DeviceMesh | None = None  # of the processes over which a tensor is spread
        if self.sharding in ("fsdp2", "hsdp"):
            if not dist.is_initialized():  # one process, started without a launcher
                backend = "nccl" if cuda else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            shape = (parallel.replicas, self.world // parallel.replicas)
            names = ("replicate", "shard")
            self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.backend = dist.get_backend() if dist.is_initialized() else "no process group"
        self._model: nn.Module | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def spread(self) -> bool:
        """Whether a process holds only a part of every tensor."""
        return self._mesh is not None

    def prepare(self, model: "LlmNormForCausalLM", fill: Fill) -> nn.Module:
        """Lay the model out for training; returns what to call (same parameters, names).

        Args:
            model: on the meta device; its blocks are the unit of recomputation, compilation and
                sharding.
            fill: gives the tensors that belong to the modules that it is passed, by name, their
                values, on this process's device.
        """
        for block in model.model.layers:
            if self.settings.activation_checkpointing:
                block.forward = partial(  # type: ignore[method-assign]
                    torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
                )
            if self.settings.compile:
                block.compile()
        if self.settings.compile:
            model.model.fixed_shapes = True
        self._model = self.lay_out(model, fill)
        if self.sharding == "ddp":
            self._model = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # running statistics are sums over processes already
            )
            self._model.register_comm_hook(None, _sum)
        return self._model

    def lay_out(self, model: "LlmNormForCausalLM", fill: Fill) -> nn.Module:
        """Give the model on the meta device its values, and each process its shards of them.

        A block is filled and sharded before the next is, so that no process ever holds the whole.
        """
        blocks = {id(block) for block in model.model.layers}
        modules = dict(model.named_modules())
        for name, block in modules.items():
            if id(block) in blocks and self._mesh is not None:
                inside = {f"{name}.{n}".removesuffix("."): m for n, m in block.named_modules()}
                self._materialize(inside)
                fill(inside)
                fully_shard(block, mesh=self._shards())
                modules = {n: m for n, m in modules.items() if n not in inside}
        self._materialize(modules)
        model.tie_weights()  # the head was given memory of its own
        fill(modules)
        if self._mesh is not None:
            # Resharded too: evaluation may be followed by a change of the weights (ema.py).
            fully_shard(model, mesh=self._shards(), reshard_after_forward=True)
            for unit in [model, *model.model.layers]:  # sums, where torch's default are means
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
        return model

    def _materialize(self, modules: Modules) -> None:
        for module in modules.values():
            module.to_empty(device=self.device, recurse=False)

    def _shards(self) -> DeviceMesh:
        assert self._mesh is not None
        return self._mesh if self.sharding == "hsdp" else self._mesh["shard"]

    def found(self) -> str:
        """The sharding that the model really has, whatever was asked for."""
        if isinstance(self._model, FSDPModule):
            return "hsdp" if self._mesh is not None and self._mesh.size(0) > 1 else "fsdp2"
        return "ddp" if isinstance(self._model, DistributedDataParallel) else "none"

    def exchange(self) -> Exchange | None:
        """How matrix optimizers share their work; None where there is one process."""
        if self.world == 1 and not self.spread:
            return None
        group = self._mesh.get_group("shard") if self._mesh is not None else dist.group.WORLD
        assert group is not None
        payload = torch.bfloat16 if self.settings.exchange == "bf16" else None
        return Exchange(group, spread=self.spread, payload=payload)

    def autocast(self) -> Any:
        """The context of a forward pass under this run's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around the forward pass of one micro-batch; what it says holds for its backward pass."""
        model = self._model
        quiet: Any = nullcontext()
        if isinstance(model, DistributedDataParallel) and not last:
            quiet = model.no_sync()
        elif isinstance(model, FSDPModule):
            model.set_requires_all_reduce(last)
            model.set_is_last_backward(last)
        with quiet, self.autocast():
            yield

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them); returns their global norm.

        The norm is a 0-dim float32 tensor over all gradients of the model, the same everywhere.
        """
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._mesh is not None:
            square = norm.square()
            dist.all_reduce(square, group=self._mesh.get_group("shard"))
            norm = square.sqrt()
        if max_norm > 0:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gather(self, values: Tensor) -> Tensor:
        """The `values` (n,) of all processes, (world * n,)."""
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def reduce(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place where there is more than one."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def on_main(self, work: Callable[[], None]) -> None:
        """Do `work` on the main process while the others wait; its InputError stops them all."""
        error: InputError | None = None
        if self.is_main:
            try:
                work()
            except InputError as found:
                error = found
        if self.reduce(torch.tensor(float(error is not None), device=self.device)):
            raise error or InputError("the main process stopped; its message says why")

    def close(self) -> None:
        """Leave the process group together: leaving alone can abort the others."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; in-place changes reach the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Replicas' gradients, summed where torch's default is their mean."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
