"""Processes, device and the layout of the model: recompute, compile, shard, in this order.

`accelerate launch` starts the processes and accelerate makes the process group; everything after
that is here, the same code on gloo and nccl. `ddp`, `fsdp2` and `hsdp` are torch's (shards.py),
`zero1` to `zero3` DeepSpeed's (zero.py). Accumulation is ours: replicas reduce gradients with the
last micro-batch, shards with every one (so that no process holds all gradients). They are summed:
the loss comes divided by the tokens of all processes, so that a gradient inside the backward pass
(norms keep statistics of it) is what it is on one process.

What would surprise: weights are float32 and gathered so: precision is autocast's, the same under
every sharding. What is really there is looked at in `check.py`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.nn.loss import LanguageHead
from llmnorm.optim.sharded import Exchange
from llmnorm.parallel.launch import accelerator, agreed_sharding, launch_file
from llmnorm.parallel.shards import Fill, Unit, fill_and_shard, make_mesh, replicate, shard
from llmnorm.parallel.zero import Zero
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM


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
        self._mesh: DeviceMesh | None = None
        self.zero: Zero | None = None
        self._group: dist.ProcessGroup | None = None  # over which a master is spread
        if self.sharding not in ("none", "ddp"):
            if not dist.is_initialized():  # one process, started without a launcher
                backend = "nccl" if cuda else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            if self.sharding.startswith("zero"):
                self.zero = Zero(int(self.sharding[-1]), self.precision, self.device)
                self._group = dist.group.WORLD
            else:
                self._mesh = make_mesh(self.device, parallel.replicas)
                self._group = self._mesh.get_group("shard")
        self.backend = dist.get_backend() if dist.is_initialized() else "no process group"
        self._model: nn.Module | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def spread(self) -> bool:
        """Whether a forward pass needs all processes, each of which holds a part of the model."""
        return self._mesh is not None or self.sharding == "zero3"

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
                # block.compile() would leave a checkpointed forward uncompiled, without a word.
                block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        model.model.fixed_shapes |= self.settings.compile
        for module in model.modules():
            if isinstance(module, LanguageHead):
                module.compiled = self.settings.compile
        self._model = self.lay_out(model, fill, trained=True)
        if self.sharding == "ddp":
            self._model = replicate(model, self.device)
        return self._model

    def lay_out(
        self, model: "LlmNormForCausalLM", fill: Fill, *, trained: bool = False
    ) -> nn.Module:
        """Give the model on the meta device its values, and each process its part of them.

        Args:
            trained: weights will change; else it is only evaluated.
        """
        unit: Unit | None = partial(shard, mesh=self._mesh) if self._mesh is not None else None
        if self.zero is not None and self.spread:
            unit = self.zero.partition
        fill_and_shard(model, fill, self.device, unit)
        return self.zero.wrap(model, trained=trained) if self.zero is not None else model

    def found(self) -> str:
        """The sharding that the model really has, whatever was asked for."""
        if self.zero is not None:
            return self.zero.found(self._model)
        if isinstance(self._model, FSDPModule):
            return "hsdp" if self._mesh is not None and self._mesh.size(0) > 1 else "fsdp2"
        return "ddp" if isinstance(self._model, DistributedDataParallel) else "none"

    def exchange(self) -> Exchange | None:
        """How matrix optimizers share their work; None where there is one process."""
        group = self._group or (dist.group.WORLD if self.world > 1 else None)
        if group is None:
            return None
        payload = torch.bfloat16 if self.settings.exchange == "bf16" else None
        return Exchange(group, spread=self._group is not None, payload=payload)

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
        elif self.zero is not None:
            self.zero.accumulate(last=last)
        with quiet, self.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def collect_gradients(self) -> None:
        """After the step's last backward pass: `grad` of what the optimizer steps is whole.

        ZeRO keeps reduced gradients in buffers of its own and hands them to its master weights
        here; under any other sharding backward passes have put them in place already.
        """
        if self.zero is not None:
            self.zero.collect()

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them); returns their norm before that.

        The norm is a 0-dim float32 tensor over all gradients of the model, the same on every
        process. It stays on the device: nothing here waits for it.
        """
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._group is not None:
            square = norm.square()
            dist.all_reduce(square, group=self._group)
            norm = square.sqrt()
        if max_norm > 0:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def end_step(self) -> None:
        """Close a step, updated or skipped, once its gradients are set to None.

        Under ZeRO the optimizer has changed master weights, which become the model's weights here,
        and DeepSpeed's gradient buffers are emptied. Without this call the next step would compute
        with old weights and add to old gradients. Under any other sharding nothing is left to do.
        """
        if self.zero is not None:
            self.zero.step()

    def weights_changed(self) -> None:
        """Call after weights were changed outside of a step: loaded, or swapped with averages.

        Under ZeRO such a change reaches the master weights only; this copies them into the model's.
        """
        if self.zero is not None:
            self.zero.publish()

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

    def say(self, text: str) -> None:
        """Print a text on stderr, on the main process alone."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

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
