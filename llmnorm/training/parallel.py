"""Processes, device and the layout of the model: recompute, compile, replicate, in this order.

`accelerate launch` starts the processes and accelerate makes the process group; everything after
that is here. Accumulation is ours: gradients are summed over micro-batches and reduced with the
last one. The loss must come divided by the tokens of a process (global tokens / processes),
since replicas average their gradients.

What would surprise: what a launch file asks for can silently become something else (two unconnected
trainings, one process where four were meant); `check` looks at what is really there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmnorm.config import ParallelSettings, TrainingSettings
from llmnorm.part import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmnorm.models.modeling import LlmNormForCausalLM


class Parallel:
    """One process of a run: who it is, and how it works together with the others.

    Attributes:
        rank, world: this process and the number of processes.
        device: where this process computes.
        accelerator: accelerate's handle on the process group.
    """

    def __init__(self, parallel: ParallelSettings, training: TrainingSettings) -> None:
        """Join the process group that the launcher has prepared, if any.

        Raises:
            InputError: launch file, environment and configuration ask for different things.
        """
        self.settings = parallel
        self.precision = training.precision
        _agree_with_launch_file(parallel, training)
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
        self.accelerator = _accelerator(cuda)
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device = self.accelerator.device
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world:
            raise InputError(
                f"the launcher started {asked} processes, but {self.world} are connected; launch "
                "with `accelerate launch --config_file launch/accelerate/ddp.yaml`"
            )
        if parallel.sharding == "none" and self.world > 1:
            raise InputError(
                f"parallel.sharding: 'none' is one process, but {self.world} were launched; "
                "did you mean 'ddp'?"
            )
        self._replica: nn.Module | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def prepare(self, model: "LlmNormForCausalLM") -> nn.Module:
        """Lay the model out, in place; returns what to call in training (same parameters, names).

        Args:
            model: on its device, initialised; its blocks are the unit of recomputation and
                compilation.
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
        if self.world == 1:
            self._replica = model
        else:
            self._replica = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # running statistics are sums over processes already
            )
        return self._replica

    def check(self) -> None:
        """Look at what is really there before the first step; a mismatch is an error of ours."""
        assert self._replica is not None
        if self.world > 1:
            assert isinstance(self._replica, DistributedDataParallel)
            assert torch.distributed.get_world_size() == self.world
        for name, parameter in self._replica.named_parameters():
            assert parameter.device.type == self.device.type, f"{name} is on {parameter.device}"
            assert parameter.dtype in (torch.float32, torch.float64), f"{name} is no master weight"

    def describe(self) -> str:
        """One line for the run's log: backend, world size, sharding, bytes a process."""
        assert self._replica is not None
        parameters = sum(p.numel() * p.element_size() for p in self._replica.parameters())
        backend = torch.distributed.get_backend() if self.world > 1 else "no process group"
        layout = "ddp" if self.world > 1 else "none"
        return (
            f"{self.world} process(es) on {self.device.type} ({backend}), sharding {layout}, "
            f"precision {self.precision}, weights {parameters / 2**20:.1f} MiB a process"
        )

    def autocast(self) -> Any:
        """The context of a forward pass under this run's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch; the last one reduces."""
        replica = self._replica
        quiet = isinstance(replica, DistributedDataParallel) and not last
        with replica.no_sync() if quiet else nullcontext(), self.autocast():  # type: ignore[union-attr,operator]
            yield

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradients down to `max_norm` (0: leave them); returns their global norm.

        The norm is a 0-dim float32 tensor over all gradients of the model, the same everywhere.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, in place where there is more than one."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
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
        if self.world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def _agree_with_launch_file(parallel: ParallelSettings, training: TrainingSettings) -> None:
    """Refuse what the launcher's environment asks for and this run would not do."""
    for variable, what in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"the launch file asks for {what}, which parallel.sharding does not offer; "
                "valid: auto, none, ddp (launch/accelerate/ddp.yaml)"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = {"fp32": "no", "bf16": "bf16"}[training.precision]
    if asked not in ("no", ours):
        raise InputError(
            f"the launch file asks for mixed precision '{asked}', training.precision is "
            f"'{training.precision}'; leave it out of the launch file"
        )


def _accelerator(cuda: bool) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # Without the variable accelerate warns of a mixed precision that is not its business here.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if not cuda:
        return Accelerator(cpu=True)
    # Checkpoints are written over gloo beside the GPUs' own backend.
    group = InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")
    return Accelerator(kwargs_handlers=[group])
