"""What a process computes in a step: the operations of a micro-batch, and of an optimizer's rule.

    found = passes(config, 8, "cuda", kinds)           one micro-batch, forward and backward
    rule_work(config, 4096, 11008, device="cuda")      one update of a matrix, by its rule
    seconds_of(found.blocks_forward, rates)            how long a machine takes for it

Blocks are run on fake tensors (torch's FakeTensorMode), which have shapes and no numbers, and each
operation is noted: its products' operations, and the bytes that it reads and writes. Blocks that
are alike are run once. So whatever a mixer, a norm or a rule does is counted by the code that does
it. An operation takes as long as its products or its bytes, whichever is longer: a roofline
(Williams et al. 2009).

What would surprise:
- A row counts as one document. Packed rows of short ones need less attention on a GPU.
- Attention is counted as fused kernels compute it: half of the scores where it is causal, and five
  products in the backward pass, one more than its forward pass has been credited with in the MFU.
- A decomposition (singular values, eigenvectors, QR) is counted by the textbook (Golub and Van Loan
  2013, sections 5.2.1, 8.3.3 and 8.6.3) and runs at a hundredth of the speed of products.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llmnorm.analysis.plan.storages import give_storages, whole_norms
from llmnorm.config.tree import RunConfig
from llmnorm.models.flops import flops_per_token
from llmnorm.models.frozen import narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import chunk_size, linear_cross_entropy
from llmnorm.nn.mixers import softmax
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.optim.settings import MatrixSettings, OrthogonalizedSettings
from llmnorm.optim.stacks import Hyperparameters, Rule
from llmnorm.training.outline import outline
from llmnorm.training.teacher import outline_of_teacher

aten = torch.ops.aten
# Of these nothing is read or written; all other views are known by `is_view`.
_FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten._unsafe_view}
_FREE |= {aten.detach, aten.new_empty_strided, aten._local_scalar_dense}
# Of these as much is read as is written, whatever the first argument's size.
_PICKING = {aten.embedding, aten.index, aten.index_select, aten.gather}
# What is written was not read before.
_WRITING = {aten.copy_, aten.fill_, aten.zero_}
# Products that are added to what is there, of which torch's table has the others alone.
_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
DECOMPOSITION_SHARE = 0.01  # of the speed of products


class Operation(NamedTuple):
    """What one operation needs.

    Attributes:
        flops: of its products.
        bf16: whether these are products of bf16.
        moved: bytes that it reads and writes.
    """

    flops: float
    bf16: bool
    moved: float


Work = Counter[Operation]


class Rates(NamedTuple):
    """What a machine does in a second at its best.

    Attributes:
        bf16, float32: operations of products.
        moved: bytes of its memory.
        started: operations that are begun one after the other on a CPU, which also computes them;
            on a GPU, whose host runs ahead, they do not count here.
    """

    bf16: float
    float32: float
    moved: float
    started: float


def seconds_of(work: Work, rates: Rates) -> float:
    """Seconds that a machine takes for work at its best."""
    return sum(
        count
        * (
            max(each.flops / (rates.bf16 if each.bf16 else rates.float32), each.moved / rates.moved)
            + 1 / rates.started
        )
        for each, count in work.items()
    )


def times(work: Work, factor: float) -> Work:
    """So many times the work."""
    return Counter({each: count * factor for each, count in work.items()})


@dataclass(frozen=True)
class Passes:
    """The work of a micro-batch.

    Attributes:
        forward, backward: of all blocks.
        ends: both passes of what is outside of the blocks: embedding, final norm, head and loss.
    """

    forward: Work
    backward: Work
    ends: Work

    def whole(self, *, recompute: bool) -> Work:
        """All of it; recomputed blocks run forward twice."""
        return self.forward + self.backward + self.ends + (self.forward if recompute else Counter())


def passes(config: RunConfig, rows: int, device: str, kinds: Sequence[int]) -> Passes:
    """Run a block of each kind and the ends of the model on fake tensors, and count.

    Args:
        config: of a causal language model of our own classes.
        rows: of `data.context_length` tokens, that are run at once.
        device: "cpu" or "cuda", which the kernels are chosen for.
        kinds: the kind of every block, as a recording has them.
    """
    model = outline(config).train()
    if config.freezes and config.training.precision == "bf16":
        narrow(model)
    blocks = [*model.model.layers]
    before, after = _measured(model, [], config, rows, device)
    forward, backward = Work(), Work()
    for kind, count in Counter(kinds).items():
        first, last = _measured(model, [blocks[kinds.index(kind)]], config, rows, device)
        forward += times(first - before, count)
        backward += times(last - after, count)
    return Passes(forward, backward, before + after + _of_teacher(config, rows))


def rule_work(config: RunConfig, rows: int, columns: int, device: str) -> Work:
    """The update of one matrix by the rule of `config.optimizer`; what is done at intervals is
    spread over their steps.

    Args:
        device: "cpu" or "cuda"; a GPU multiplies in bf16 where the rule leaves the choice.
    """
    settings = config.optimizer
    assert isinstance(settings, MatrixSettings)
    if isinstance(settings, OrthogonalizedSettings) and device == "cuda":
        free = settings.precision == "auto" and settings.orthogonalize == "standard"
        settings = settings.model_copy(update={"precision": "bf16"} if free else {})
    return _rule_work(_Hashed(settings.rule(), repr(settings)), rows, columns)


@dataclass(frozen=True)
class _Hashed:
    """A rule, known by its settings."""

    rule: Rule = field(compare=False)
    settings: str


@cache
def _rule_work(known: _Hashed, rows: int, columns: int) -> Work:
    rule = known.rule

    def update(step: int) -> Work:
        with FakeTensorMode(), Counting(step) as counting:
            shapes = rule.fields(rows, columns)
            state = {name: torch.empty(1, *shape) for name, shape in shapes.items()}
            state |= {"step": torch.empty(()), "phase": torch.empty(1)}
            weight = torch.empty(1, rows, columns) if rule.decay == "inside" else None
            rule.update(
                torch.empty(1, rows, columns), state, Hyperparameters(1.0, 0.1, 0.9), weight
            )
        return counting.work

    usual = update(1)
    # The shortest interval at which the rule does more than in most steps.
    for interval in sorted(n for n in vars(rule).values() if type(n) is int and n > 1):
        more = update(interval) - usual
        if more:
            return usual + times(more, 1 / interval)
    return usual


class Counting(TorchDispatchMode):
    """Inside, the work of all operations is counted.

    Args:
        number: what a program is told that reads a number of a tensor; one that reads a condition
            is told that it holds.
    """

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.number = number
        self.work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation, counted."""
        if func is aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or self.number
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if not (func.is_view or packet in _FREE or func.namespace == "prim"):
            self._count(func, packet, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        changed = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
        written = _nbytes(changed if changed else result)
        if packet in _PICKING:
            read = written
        else:
            unread = packet in _WRITING
            read = _nbytes([v for a, v in given if not (unread and a.alias_info is not None)])
        flops = 0.0
        formula = flop_registry.get(_IN_PLACE.get(packet, packet))
        if formula is not None:
            flops = float(formula(*args, **kwargs, out_val=result))
        elif packet in _DECOMPOSITIONS:
            flops = _DECOMPOSITIONS[packet](*args[0].shape) / DECOMPOSITION_SHARE
        self.add(flops, _tensors(args), read + written)

    def add(self, flops: float, factors: list[Tensor], moved: float) -> None:
        """Count one operation; its products are in the dtype of the last of its factors."""
        bf16 = bool(flops) and factors[-1].dtype == torch.bfloat16
        self.work[Operation(flops, bf16, moved)] += 1


def _svd(batch: int, rows: int, columns: int) -> float:
    long, short = max(rows, columns), min(rows, columns)
    return batch * (6.0 * long * short**2 + 20.0 * short**3)


_DECOMPOSITIONS: dict[Any, Callable[..., float]] = {
    aten._linalg_svd: _svd,
    aten._linalg_eigh: lambda batch, rows, _: 9.0 * batch * rows**3,
    aten.linalg_qr: lambda batch, rows, columns: 4.0 * batch * columns**2 * (rows - columns / 3),
}


def _measured(
    model: LlmNormForCausalLM, blocks: list[nn.Module], config: RunConfig, rows: int, device: str
) -> tuple[Work, Work]:
    """The work of the forward and of the backward pass of the model with these blocks alone."""
    model.model.layers = nn.ModuleList(blocks)
    model.model.running_norms = [m for m in model.modules() if isinstance(m, RunningNorm)]
    shape = (rows, config.data.context_length)
    bf16 = config.training.precision == "bf16"
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        counting = stack.enter_context(Counting())
        stack.enter_context(_fused_attention(counting, device))
        stack.enter_context(whole_norms(device))
        give_storages(model)
        ids = torch.empty(shape, dtype=torch.long)
        counting.work.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            hidden = model.model(input_ids=ids).last_hidden_state
            head, below = model.lm_head, hidden.detach().requires_grad_()
            assert isinstance(head, LanguageHead)
            loss = linear_cross_entropy(
                below.flatten(0, -2),
                head.weight,
                ids.flatten(),
                1.0,
                bias=head.bias,
                chunk=chunk_size(head.weight, device),
            )
        forward = Work(counting.work)
        counting.work.clear()
        loss.backward()  # type: ignore[no-untyped-call]
        if hidden.requires_grad:  # else nothing is trained below the head
            hidden.backward(below.grad)  # type: ignore[no-untyped-call]
        return forward, Work(counting.work)


def _of_teacher(config: RunConfig, rows: int) -> Work:
    """The forward pass of the model that is learned from, where there is one: its products."""
    teacher = outline_of_teacher(config)
    if teacher is None:
        return Work()
    tokens = rows * config.data.context_length
    a_pass = flops_per_token(teacher, config.data.context_length) / 3
    return Work({Operation(tokens * a_pass, config.training.precision == "bf16", 0.0): 1})


@contextmanager
def _fused_attention(counting: Counting, device: str) -> Iterator[None]:
    """Inside, attention is counted as a fused kernel; without numbers torch takes another.

    On a CPU llmnorm computes causal rows in blocks, which then are run (causal.py).
    """

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        mixed: Tensor = _Attention.apply(q, k, v, counting, 0.5 if is_causal else 1.0)
        return mixed

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        if device == "cuda":
            stack.enter_context(patch.object(softmax, "halves_are_faster", lambda *_: False))
        yield


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, counting: Counting, share: float) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.counting, ctx.flops = counting, 2.0 * share * q.numel() * k.shape[-2]
        counting.add(2 * ctx.flops, [q], _nbytes([q, k, v, q]))
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        ctx.counting.add(5 * ctx.flops, [q], _nbytes([q, k, v, q, q, q, k, v]))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tree: Any) -> int:
    """Bytes of tensors, an expanded one's counted once for each number that it has in memory."""
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in _tensors(tree))
