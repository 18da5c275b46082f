"""One process of a run: its device, its part of the model, and what it does with the others.

`accelerate launch` starts the processes and accelerate makes the process group. Everything after
that is here, and is the same code on gloo and nccl. The model is prepared in a fixed order:
recompute, compile, shard. `ddp`, `fsdp2` and `hsdp` are torch's (shards.py), `zero1` to `zero3`
DeepSpeed's (zero.py); check.py verifies the result before the first step.

What would surprise:
- Gradients are summed over processes, not averaged. The loss is already divided by the labels of
  all processes, so a gradient inside the backward pass (some norms keep statistics of it) is the
  same number as on one process.
- llmnorm accumulates micro-batches itself. Replicas reduce gradients with the last micro-batch;
  shards reduce with every one, so that no process holds all gradients.
- Weights are float32 and are gathered in float32, under every sharding. `training.precision` is
  that of autocast alone.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.machine.gpus import own_serial
from llmnorm.machine.phases import Phases
from llmnorm.nn.head import LanguageHead
from llmnorm.optim.sharded import Exchange
from llmnorm.parallel.calls import Calls
from llmnorm.parallel.heartbeat import Heartbeat
from llmnorm.parallel.launch import accelerator, agreed_sharding, file_for
from llmnorm.parallel.leaving import leave
from llmnorm.parallel.shards import Buckets, Fill, Unit, fill_and_shard, make_mesh, replicate, shard
from llmnorm.parallel.zero import Zero
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.models.foreign import Foreign
    from llmnorm.models.pretrained_model import LlmNormPreTrainedModel


POLLED = 8  # batches of an evaluation between two reductions of who was asked to stop


class Interrupted(Exception):
    """An evaluation was left, on every process after the same batch, since one was asked to stop.

    Attributes:
        asked: the sum over all processes of what `Parallel.asked` gave.
    """

    def __init__(self, asked: int) -> None:
        super().__init__(asked)
        self.asked = asked


class Parallel:
    """One process of a run. All processes make the same calls in the same order.

    Attributes:
        rank, world: this process's number and the number of processes.
        device: where this process computes.
        backend: of the process group, e.g. "gloo".
        sharding: the resolved `parallel.sharding`, not `auto`.
        accelerator: accelerate's object, which has made the process group.
        zero: DeepSpeed's part, under `zero1` to `zero3`.
        asked: what `poll` asks; not 0 where this process is to stop.
        phases: what this process is doing; an evaluation advances with every `poll`.
        calls: how many collective calls it has begun.
        heartbeat: the watch over all processes, where there are several, from `watch` on.
    """

    def __init__(self, parallel: ParallelSettings, training: TrainingSettings) -> None:
        """Join the launcher's process group, where there is one.

        Raises:
            InputError: launch file, environment and configuration contradict each other; a GPU is
                asked for and torch sees none.
        """
        self.phases = Phases()
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
                f"with `accelerate launch --config_file {file_for(self.sharding)}`"
            )
        self._mesh: DeviceMesh | None = None
        self.zero: Zero | None = None
        self._group: dist.ProcessGroup | None = None  # whose processes share out one weight
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
        self._buckets = Buckets(self.device)
        self.heartbeat: Heartbeat | None = None
        self.calls = Calls()
        self.asked: Callable[[], int] = lambda: 0
        self._polls = 0

    @property
    def is_main(self) -> bool:
        """Whether this process, the first, writes files and prints."""
        return self.rank == 0

    @property
    def spread(self) -> bool:
        """Whether a forward pass needs all processes, because each holds a part of the model."""
        return self._mesh is not None or self.sharding == "zero3"

    def prepare(self, model: "LlmNormPreTrainedModel | Foreign", fill: Fill) -> nn.Module:
        """Prepare the model for training; returns what to call for a forward pass.

        Args:
            model: on the meta device; it is recomputed, compiled and sharded block by block.
            fill: gives values to the tensors of the modules that it is passed (shards.py).

        Returns:
            The model itself, or a wrapper around it with the same parameters.
        """
        for block in model.units().values():
            if self.settings.activation_checkpointing:
                block.forward = partial(  # type: ignore[method-assign]
                    torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
                )
            if self.settings.compile:
                # block.compile() would leave the forward that recomputes uncompiled, silently.
                block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if self.settings.compile:
            model.base_model.fixed_shapes = True  # of our classes: others are not compiled
        for module in model.modules():
            if isinstance(module, LanguageHead):
                module.compiled = self.settings.compile
        self._model = self.lay_out(model, fill, trained=True)
        if self.sharding == "ddp":
            self._model = replicate(model, self._buckets)
        return self._model

    def lay_out(
        self, model: "LlmNormPreTrainedModel | Foreign", fill: Fill, *, trained: bool = False
    ) -> nn.Module:
        """Give the model, which is on the meta device, its values, and each process its part.

        Args:
            fill: as in `prepare`.
            trained: whether its weights will change; a model that is only evaluated has no
                gradients and, under ZeRO, no master weights.
        """
        unit: Unit | None = (
            partial(shard, mesh=self._mesh, waiting=self.phases.waiting)
            if self._mesh is not None
            else None
        )
        if self.zero is not None and self.spread:
            unit = self.zero.partition
        fill_and_shard(model, fill, self.device, unit)
        return self.zero.wrap(model, trained=trained) if self.zero is not None else model

    def found(self) -> str:
        """The sharding of the model as it is found in the model itself, for check.py."""
        if self.zero is not None:
            return self.zero.found(self._model)
        if isinstance(self._model, FSDPModule):
            return "hsdp" if self._mesh is not None and self._mesh.size(0) > 1 else "fsdp2"
        return "ddp" if isinstance(self._model, DistributedDataParallel) else "none"

    def exchange(self) -> Exchange | None:
        """How matrix optimizers exchange gradients and updates; None on one process."""
        group = self._group or (dist.group.WORLD if self.world > 1 else None)
        if group is None:
            return None
        payload = torch.bfloat16 if self.settings.exchange == "bf16" else None
        return Exchange(group, self._group is not None, payload, self.phases.waiting)

    def autocast(self) -> Any:
        """The context manager for a forward pass under `training.precision`."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Context manager around the forward pass of one micro-batch.

        Args:
            last: whether it is the step's last. The backward pass that follows then reduces
                gradients over the replicas.
        """
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
        """The backward pass of a micro-batch; gradients are added up until the step ends."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            self.phases.waited(self._buckets.waited())

    def gradient(self, loss: Tensor, tensor: Tensor) -> Tensor:
        """The gradient of a loss by a tensor that it was computed from, outside of a step.

        Weights are left without a gradient.

        Args:
            tensor: requires a gradient, and was made by no operation that autograd knows.
        """
        if self.zero is not None and self.spread:
            return self.zero.gradient(loss, tensor)
        (found,) = torch.autograd.grad(loss, tensor)
        return found

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
            with self.phases.waiting():
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
        """The `values` (n,) of all processes in the order of their ranks, (world * n,)."""
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        with self.phases.waiting():
            dist.all_gather(parts, values)
        return torch.cat(parts)

    def reduce(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes. With several processes `values` is changed."""
        if self.world > 1:
            with self.phases.waiting():
                dist.all_reduce(values)
        return values

    def say(self, text: str) -> None:
        """Print a text on stderr, on the main process alone."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def on_main(self, work: Callable[[], None]) -> None:
        """Call `work` on the main process while the others wait.

        Raises:
            InputError: `work` has raised one; it is raised on every process.
        """
        error: InputError | None = None
        if self.is_main:
            try:
                work()
            except InputError as found:
                error = found
        if self.reduce(torch.tensor(float(error is not None), device=self.device)):
            raise error or InputError("the main process stopped; its message says why")

    def poll(self) -> None:
        """Leave an evaluation where a process was asked to stop.

        Every process calls it as often as the others, before each batch. With several processes it
        looks with every 8th call, which costs one reduction of a number.

        Raises:
            Interrupted: some process was asked to; it is raised on all of them, by the same call.
        """
        self._polls += 1
        self.phases.advance()
        if self.world > 1 and self._polls % POLLED:
            return
        asked = self.asked()
        if self.world > 1:
            asked = int(self.reduce(torch.tensor(float(asked), device=self.device)))
        if asked:
            raise Interrupted(asked)

    def watch(self, directory: Path) -> None:
        """Let the processes watch each other (heartbeat.py); every process calls it.

        Args:
            directory: where stacks are written when a process is lost.
        """
        if self.world == 1:
            return
        self.heartbeat = Heartbeat(
            rank=self.rank,
            world=self.world,
            store=dist.distributed_c10d._get_default_store().clone(),  # type: ignore[attr-defined]
            calls=self.calls,
            phases=self.phases,
            settings=self.settings,
            directory=directory,
            gpu=own_serial if self.device.type == "cuda" else lambda: "",
        )

    def close(self) -> None:
        """Leave the process group (leaving.py).

        Raises:
            Lost: another process was lost.
        """
        leave(self.heartbeat, self.backend, self.world)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
