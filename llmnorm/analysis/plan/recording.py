"""What a forward and a backward pass keep in memory, by running one block of each kind.

    recording = record(config, micro_batch=4, device="cuda")
    recording.forward[recording.kinds[7]]      what block 7's forward pass needs and leaves

The run's model is made on the meta device, so a base directory needs no weights (the files of a
teacher say in which numbers they are). Of its blocks one of each kind stays, and one step of that
model runs on fake tensors (storages.py) twice: without gradients before, and with those of an
earlier micro-batch. The bytes are noted where one part ends and the next begins; the plan of the
whole model is put together of these parts (timeline.py), so a deep model costs no more than a flat
one.

What would surprise:
- The step runs as on a CPU whatever the machine, since torch without CUDA cannot run a backward
  pass of fake CUDA tensors. Attention is counted as its fused kernels keep it: queries, keys,
  values, output and a normaliser for each query. The logits' chunk is that of the run's device.
- Every token counts as a label, and a row as one document.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from llmnorm.analysis.plan.storages import Storages, fused_attention, give_storages, whole_norms
from llmnorm.config.tree import RunConfig
from llmnorm.models import nf4
from llmnorm.models.frozen import narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import chunk_size, linear_cross_entropy
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.objectives.teacher import Teacher
from llmnorm.optim.groups import Groups, assign, split
from llmnorm.optim.settings import MatrixSettings
from llmnorm.part import InputError
from llmnorm.training.outline import outline
from llmnorm.training.teacher import outline_of_teacher


class Part(NamedTuple):
    """Bytes of one part of a pass.

    Attributes:
        rise: the most that it needs beside what is live when it begins.
        left: what is live when it ends, less what was live when it began.
        gradients: of `left`, gradients of weights.
        cast: of `left`, weights in bfloat16 that autocast keeps until the forward pass is over,
            and that nothing else keeps.
    """

    rise: int = 0
    left: int = 0
    gradients: int = 0
    cast: int = 0


class Weight(NamedTuple):
    """A parameter.

    Attributes:
        shape: of the whole.
        itemsize: bytes of a number.
        trained: whether it gets a gradient.
    """

    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def numel(self) -> int:
        """Numbers."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Recording:
    """A model, and what its parts need.

    Attributes:
        reduced: the model with one block of each kind, on the meta device.
        trained: its trained parameters in the model's order, on the meta device.
        groups: the same as the optimizer gets them.
        kinds: the kind of every block, an index into `weights`.
        weights: the parameters of a block of each kind.
        rest: the parameters outside of blocks.
        in_bits: bytes of weights in four bits.
        buffers: bytes of the other buffers.
        teacher: bytes of the weights that are learned from.
        first: the parts by name, "embedding", "forward 0", ..., "backward 0", ..., of a pass
            before which no weight has a gradient; the numbers are those of kinds.
        again: the same where all have one.
    """

    reduced: LlmNormForCausalLM
    trained: list[nn.Parameter]
    groups: Groups
    kinds: tuple[int, ...]
    weights: tuple[tuple[Weight, ...], ...]
    rest: tuple[Weight, ...]
    in_bits: int
    buffers: int
    teacher: int
    first: dict[str, Part]
    again: dict[str, Part]

    @property
    def all_weights(self) -> list[Weight]:
        """Every parameter, those outside of blocks first."""
        return [*self.rest, *(weight for kind in self.kinds for weight in self.weights[kind])]


def refuse_uncounted(config: RunConfig, asked: str) -> None:
    """Refuse a run whose step is not counted.

    Args:
        asked: what the message begins with: the command or option.

    Raises:
        InputError: the model is no causal language model of llmnorm's own classes.
    """
    if config.objective.architecture != "LlmNormForCausalLM":
        raise InputError(
            f"{asked}: objective '{config.objective.name}' trains another class of model; "
            "only causal language models are counted"
        )
    if config.model.foreign:
        raise InputError(
            f"{asked}: counts the step of llmnorm's own classes, and model.pretrained is of "
            "one of transformers"
        )


def record(
    config: RunConfig, micro_batch: int, device: str, like: Recording | None = None
) -> Recording:
    """Run the parts of a step of `config` and note their bytes.

    Args:
        config: of a run that `refuse_uncounted` lets pass.
        micro_batch: rows at once.
        device: where the run is planned for, "cpu" or "cuda".
        like: a recording of the same model, which is then not made again.

    Raises:
        InputError: the teacher is not there.
    """
    found = like or _outline(config)
    model, learned_from = copy.deepcopy(found.reduced), outline_of_teacher(config)
    if config.parallel.activation_checkpointing:
        for block in model.model.layers:
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
    with FakeTensorMode(), Storages() as storages, fused_attention(), whole_norms(device):
        give_storages(model)
        teacher = None
        if learned_from is not None:
            give_storages(learned_from)
            teacher = Teacher(learned_from, nullcontext)
        cached = config.training.precision == "bf16"
        passes = [
            _Pass(model, teacher, config, micro_batch, device, storages, cached=c).run()
            for c in ([True, True, False] if cached else [False, False])
        ]
    if cached:  # the last is there to be compared with
        passes = [_with_casts(these, passes[2]) for these in passes[:2]]
    size = 0 if learned_from is None else sum(p.nbytes for p in learned_from.parameters())
    return replace(found, teacher=size, first=passes[0], again=passes[1])


def _with_casts(parts: dict[str, Part], without: dict[str, Part]) -> dict[str, Part]:
    """Parts with what autocast's cache keeps in them, found by a pass without that cache."""
    found = {
        name: part._replace(cast=max(0, part.left - without[name].left))
        if name == "embedding" or name.startswith("forward ")
        else part
        for name, part in parts.items()
    }
    # They go together, at the end of the forward pass.
    total = sum(part.cast for part in found.values())
    last = found["head backward"]
    return found | {"head backward": last._replace(left=last.left + total)}


def _outline(config: RunConfig) -> Recording:
    """The model, of which no part has run yet."""
    model = outline(config).train()
    if config.freezes and config.training.precision == "bf16":
        narrow(model)
    kinds, kept = _kinds(model, config)
    blocks = {id(p) for block in model.model.layers for p in block.parameters()}
    rest = tuple(_weight(p) for p in model.parameters() if id(p) not in blocks)
    trained, groups = [p for p in model.parameters() if p.requires_grad], split(model)
    if isinstance(config.optimizer, MatrixSettings):
        groups = assign(groups, config.optimizer).groups
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    in_bits = sum(t.nbytes for layer in nf4.layers(model).values() for t in layer.four_bits)
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in kept)
    model.model.running_norms = [m for m in model.modules() if isinstance(m, RunningNorm)]
    return Recording(
        reduced=model,
        trained=trained,
        groups=groups,
        kinds=kinds,
        weights=tuple(
            tuple(_weight(p) for p in block.parameters()) for block in model.model.layers
        ),
        rest=rest,
        in_bits=in_bits,
        buffers=buffers - in_bits,
        teacher=0,
        first={},
        again={},
    )


def _kinds(model: LlmNormForCausalLM, config: RunConfig) -> tuple[tuple[int, ...], list[int]]:
    """The kind of every block, and the first block of each kind."""
    found: dict[Any, int] = {}
    kept: list[int] = []
    kinds: list[int] = []
    for number, (block, mixer) in enumerate(
        zip(model.model.layers, config.model.mixers(), strict=True)
    ):
        tensors = [*block.named_parameters(), *block.named_buffers()]
        looks = (
            repr(mixer),
            tuple((name, type(module)) for name, module in block.named_modules()),
            tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in tensors),
        )
        if looks not in found:
            found[looks] = len(kept)
            kept.append(number)
        kinds.append(found[looks])
    return tuple(kinds), kept


def _weight(parameter: nn.Parameter) -> Weight:
    return Weight(tuple(parameter.shape), parameter.itemsize, parameter.requires_grad)


class _Pass:
    """One micro-batch of the model, cut into parts."""

    def __init__(
        self,
        model: LlmNormForCausalLM,
        teacher: Teacher | None,
        config: RunConfig,
        rows: int,
        device: str,
        storages: Storages,
        *,
        cached: bool,
    ) -> None:
        self.model, self.teacher, self.config = model, teacher, config
        self.shape, self.device = (rows, config.data.context_length), device
        self.storages, self.cached = storages, cached
        self.parts: dict[str, Part] = {}
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._begin()

    def _begin(self) -> None:
        self.storages.peak = self._live = self.storages.live
        self._gradients = self._of_gradients()

    def _of_gradients(self) -> int:
        return sum(p.grad.nbytes for p in self._trained if p.grad is not None)

    def cut(self, name: str, more: int = 0) -> None:
        """End a part; the next one begins.

        Args:
            name: of the part.
            more: bytes that it needs at its highest moment and that were not counted.
        """
        rise = self.storages.peak - self._live + more
        left, gradients = self.storages.live - self._live, self._of_gradients() - self._gradients
        self.parts[name] = Part(rise, left, gradients)
        self._begin()

    def run(self) -> dict[str, Part]:
        """The forward and the backward pass; returns the parts by name."""
        ids = torch.zeros(self.shape, dtype=torch.long)
        labels = torch.zeros(self.shape, dtype=torch.long)
        model, blocks = self.model, self.model.model.layers
        bf16 = self.config.training.precision == "bf16"
        handles = [
            block.register_forward_pre_hook(partial(self._enter, number))
            for number, block in enumerate(blocks)
        ]
        handles.append(blocks[-1].register_forward_hook(partial(self._leave_last, len(blocks) - 1)))
        self._last = "embedding backward"
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=self.cached)
            if bf16
            else nullcontext()
        ):
            soft = None if self.teacher is None else self.teacher.soft_targets({"input_ids": ids})
            self.cut("teacher")
            hidden = model.model(input_ids=ids).last_hidden_state
            self.cut("norm")
            head = model.lm_head
            assert isinstance(head, LanguageHead)
            chunk = chunk_size(head.weight, self.device)
            loss = linear_cross_entropy(
                hidden.detach().requires_grad_().flatten(0, -2),
                head.weight,
                labels.flatten(),
                1.0,
                bias=head.bias,
                soft_targets=soft,
                chunk=chunk,
            )
        # A CPU puts probabilities in the logits' place; soft targets have needed as much before.
        apart = not bf16 and self.device != "cpu" and soft is None
        logits = 4 * min(chunk, labels.numel()) * len(head.weight)
        self.cut("head", logits if apart else 0)
        scaled = 0
        if self.device != "cpu":  # the loss's own gradient multiplies what the loss has kept
            scaled = hidden.nbytes + (head.weight.numel() * 4 if head.weight.requires_grad else 0)
        del loss, soft
        for parameter in head.parameters():
            if parameter.requires_grad and parameter.grad is None:  # the loss has made it
                parameter.grad = torch.zeros_like(parameter)
        above = _Head.apply(hidden)
        del hidden
        self.cut("head backward", scaled)
        above.backward()
        self.cut(self._last)
        for handle in handles:
            handle.remove()
        return self.parts

    def _enter(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a block's forward pass; when its input's gradient is there, its backward ends."""
        self.cut("embedding" if number == 0 else f"forward {number - 1}")
        if args[0].requires_grad:
            args[0].register_hook(lambda _: self.cut(f"backward {number}"))
        else:  # nothing is trained below
            self._last = f"backward {number}"

    def _leave_last(self, number: int, _: nn.Module, __: Any, hidden: Tensor) -> None:
        self.cut(f"forward {number}")
        hidden.register_hook(lambda _: self.cut("norm backward"))


class _Head(torch.autograd.Function):
    """Stands for the loss, which has been computed apart: its gradient has the hidden's shape."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)
