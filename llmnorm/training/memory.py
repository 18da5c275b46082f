"""What a training step needs in memory, by running it without numbers: `--print-memory`.

    needed = memory(config)
    needed.peak          bytes at the step's worst moment

The run's model is made on the meta device, so a base directory needs no weights (the files of a
teacher say in which numbers they are). Then one step runs
on fake tensors (torch's FakeTensorMode), which have shapes and no numbers, and every storage is
counted from its making to its end. So whatever a mixer, a norm, an adapter or recomputation keeps
for the backward pass is counted by the code that keeps it; there is no second list of it here.

What would surprise:
- The step runs as on a CPU whatever the machine, since torch without CUDA cannot run a backward
  pass of fake CUDA tensors. Attention is counted as its fused kernels keep it: queries, keys,
  values, output and a normaliser for each query. The logits' chunk is that of the run's device.
- Every token counts as a label, and a row as one document.
- A rule that multiplies in bf16 where the hardware does (Muon) is counted in the dtype that it
  takes on this machine's CPU.
- Not counted: what CUDA's context, the allocator's gaps and the work space inside of a library's
  call take.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llmnorm.config.tree import RunConfig
from llmnorm.models import nf4
from llmnorm.models.frozen import narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import chunk_size, linear_cross_entropy
from llmnorm.nn.precision import wide_dtype
from llmnorm.objectives.teacher import Teacher
from llmnorm.optim.groups import split
from llmnorm.optim.stacks import CHUNK_BYTES, RuleOptimizer
from llmnorm.part import InputError
from llmnorm.training.outline import outline
from llmnorm.training.teacher import outline_of_teacher


class Memory(NamedTuple):
    """Bytes that one process with the whole model needs for a training step.

    Attributes:
        frozen: weights that are not trained, in the dtype or the bits that they are stored in.
        teacher: weights of the model that is learned from, 0 where there is none.
        trained: weights that are trained: float32 masters.
        gradients: of those.
        state: of the optimizer, and the weights' moving average where there is one.
        activations: what the forward pass keeps for the backward pass, before the head.
        logits: what the head and the loss take beside that.
        scratch: what the optimizer needs for a moment, when activations are gone.
        checkpoint: of a checkpoint: what is trained, and the state.
        peak: at the step's worst moment. That is less than the sum of the others where gradients
            come as activations go, and more where a block needs room while it is recomputed.
    """

    frozen: int
    teacher: int
    trained: int
    gradients: int
    state: int
    activations: int
    logits: int
    scratch: int
    checkpoint: int
    peak: int


def memory(config: RunConfig) -> Memory:
    """Run a step of `config` on fake tensors and count their bytes.

    Raises:
        InputError: the objective is not one of a causal language model, or how many rows it has at
            once depends on the data; its teacher is not there.
    """
    if config.objective.architecture != "LlmNormForCausalLM":
        raise InputError(
            f"--print-memory: objective '{config.objective.name}' trains another class of model; "
            "only causal language models are counted"
        )
    if config.model.foreign:
        raise InputError(
            "--print-memory: counts the step of llmnorm's own classes, and model.pretrained is of "
            "one of transformers"
        )
    model = outline(config).train()
    if config.freezes and config.training.precision == "bf16":
        narrow(model)
    for block in model.model.layers if config.parallel.activation_checkpointing else ():
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    micro_batch, learned_from = _rows_at_once(config), outline_of_teacher(config)
    with FakeTensorMode(), Storages() as storages, fused_attention():
        give_storages(model)
        teacher = None
        if learned_from is not None:
            give_storages(learned_from)
            teacher = Teacher(learned_from, nullcontext)
        before = storages.live
        groups = split(model)
        # Kept alive until the end, as in a run.
        optimizer = config.optimizer.build(groups)
        parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
        averages = [p.detach().clone() for p in parameters] if config.training.ema else []
        state = storages.live - before
        activations, logits = 0, 0
        # A later micro-batch of a step finds the gradients of the first in memory.
        for _ in range(2 if config.training.rows > micro_batch else 1):
            activations, logits = _forward_backward(model, teacher, config, micro_batch, storages)
        scratch = scratch_of(optimizer, storages, _device(config))
        peak = storages.peak
        del optimizer, averages
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    everything = _bytes(model.parameters())
    everything += sum(_bytes(layer.four_bits) for layer in nf4.layers(model).values())
    gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
    return Memory(
        frozen=everything - trained,
        teacher=0 if learned_from is None else _bytes(learned_from.parameters()),
        trained=trained,
        gradients=gradients,
        state=state,
        activations=activations,
        logits=logits,
        scratch=scratch,
        checkpoint=trained + state,
        peak=peak,
    )


def memory_table(config: RunConfig) -> str:
    """The table that `--print-memory` prints."""
    needed = memory(config)
    rows = [
        ("weights, frozen", needed.frozen),
        *([("weights, teacher", needed.teacher)] if needed.teacher else []),
        ("weights, trained", needed.trained),
        ("gradients", needed.gradients),
        ("optimizer state", needed.state),
        ("activations", needed.activations),
        ("logits", needed.logits),
        ("optimizer's step", needed.scratch),
        ("peak of a step", needed.peak),
        ("a checkpoint", needed.checkpoint),
    ]
    training = config.training
    how = [f"precision {training.precision}"]
    if config.parallel.activation_checkpointing:
        how.append("blocks recomputed")
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {size / 2**30:9.3f} GiB  {size:>16,}" for name, size in rows]
    count = _rows_at_once(config)
    return "\n".join(
        [
            f"{count} {'row' if count == 1 else 'rows'} of {config.data.context_length} tokens at "
            f"once, {', '.join(how)}; a process that holds the whole model on {_device(config)}",
            *lines,
        ]
    )


class Storages(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, for as long as it lives.

    Attributes:
        live: bytes now.
        peak: the most that were live.
        number: what a program is told that reads a number of a tensor; it fails if None, since the
            tensors have no numbers. One that reads a condition is told that it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.number: int | None = None
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation, its results counted."""
        if func is torch.ops.aten._local_scalar_dense.default and self.number is not None:
            return args[0].dtype == torch.bool or self.number
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)


def scratch_of(optimizer: torch.optim.Optimizer, storages: Storages, device: str) -> int:
    """Take the optimizer's greatest steps; returns the bytes that they need beside what is live.

    A rule reads the number of its step. The first step makes bases, which others renew every so
    many steps: all of that is done at a common multiple of the rule's whole numbers.

    Args:
        optimizer: its parameters have gradients.
        storages: counts.
        device: where the step is planned for; a GPU's rules get more matrices at once.
    """
    numbers = [0]
    if isinstance(optimizer, RuleOptimizer):
        chunk = CHUNK_BYTES[device]
        optimizer.stacks = [replace(stack, chunk_bytes=chunk) for stack in optimizer.stacks]
        numbers.append(math.lcm(*(n for n in vars(optimizer.rule).values() if type(n) is int)))
    live, before = storages.live, storages.peak
    storages.peak = live
    for storages.number in numbers:
        optimizer.step()
    scratch = storages.peak - live
    storages.number, storages.peak = None, max(before, storages.peak)
    return scratch


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention keeps what fused kernels keep; without numbers torch would take another.

    torch's function is replaced, since its modes for functions do not reach what is recomputed in a
    backward pass.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: _Attention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q)
        normaliser = q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype))
        ctx.save_for_backward(q, k, v, mixed, normaliser)
        return mixed

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def give_storages(model: nn.Module) -> None:
    """Fake tensors in the place of those on the meta device; tied ones stay one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    new = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(new, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _forward_backward(
    model: LlmNormForCausalLM,
    teacher: Teacher | None,
    config: RunConfig,
    rows: int,
    storages: Storages,
) -> tuple[int, int]:
    """A micro-batch; returns what is kept before the head, and what the head takes beside it."""
    shape = (rows, config.data.context_length)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    bf16 = config.training.precision == "bf16"
    before = storages.live
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
        soft_targets = None if teacher is None else teacher.soft_targets({"input_ids": ids})
        hidden = model.model(input_ids=ids).last_hidden_state
        kept = storages.live - before
        highest, storages.peak = storages.peak, storages.live
        head, below = model.lm_head, hidden.detach().requires_grad_()
        assert isinstance(head, LanguageHead)
        chunk = chunk_size(head.weight, _device(config))
        loss = linear_cross_entropy(
            below.flatten(0, -2),
            head.weight,
            labels.flatten(),
            1.0,
            bias=head.bias,
            soft_targets=soft_targets,
            chunk=chunk,
        )
    # A CPU puts probabilities in the logits' place; soft targets have needed as much room before.
    if not bf16 and _device(config) != "cpu" and teacher is None:
        storages.peak += 4 * min(chunk, labels.numel()) * len(head.weight)
    logits = storages.peak - storages.live
    storages.peak = max(highest, storages.peak)
    del loss, soft_targets
    if head.weight.requires_grad and head.weight.grad is None:  # the loss has made it
        head.weight.grad = torch.zeros_like(head.weight)
    hidden.backward(torch.empty_like(hidden))  # type: ignore[no-untyped-call]
    return kept, logits


def _rows_at_once(config: RunConfig) -> int:
    """Rows of a micro-batch on one process."""
    training = config.training
    if training.micro_batch is None and not config.objective.even_batches:
        raise InputError(
            "--print-memory: how many rows the examples of a step fill depends on the data; give "
            "training.micro_batch"
        )
    return training.micro_batch or training.rows


def _device(config: RunConfig) -> str:
    """Where the run is planned for: a GPU unless it asks for the CPU."""
    return "cpu" if config.training.device == "cpu" else "cuda"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
