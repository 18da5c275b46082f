"""One step of one process among any number, run on shapes alone: `llmnorm plan CONFIG --trace`.

    found = trace(layout, rank=1023)
    found.collectives       what the process would send, by kind, beside what is planned

The run's own code is run: the layout of llmnorm/parallel, the model, the loss, clipping and the
optimizer with its owners. Tensors are fake (torch's FakeTensorMode) and so is the process group
(parallel/pretended.py), so a laptop does for 1,024 processes. What a plan derives from sizes is
thereby seen to happen: every parameter is cut as it should be and gets a gradient, every exchange
fits together, and as many bytes travel as are planned.

What would surprise:
- The step has two micro-batches at most, and so has the plan that it is held against.
- DeepSpeed's stages cannot be traced: they read numbers while they lay the model out.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.storages import fused_attention, whole_norms
from llmnorm.analysis.plan.traffic import Transfer
from llmnorm.config.tree import RunConfig
from llmnorm.models.frozen import narrow
from llmnorm.objectives.contract import MicroBatch
from llmnorm.optim.groups import Groups, split
from llmnorm.optim.sharded import ShardedRuleOptimizer
from llmnorm.parallel.pretended import Collective, Collectives, pretended
from llmnorm.parallel.processes import Parallel, local
from llmnorm.part import InputError
from llmnorm.training.outline import outline
from llmnorm.training.step import forward_backward

TRACED = ("none", "ddp", "fsdp2", "hsdp")
SMALL = 4096  # bytes of a collective that carries single numbers: counts, losses, norms
TOLERANCE = 0.01  # of the planned bytes


class Row(NamedTuple):
    """All collectives of one kind and group.

    Attributes:
        how: the collective.
        group: how many processes take part.
        calls, sent: of the process in the traced step.
        planned: bytes that the plan has for them; None for an exchange with owners, in which every
            process sends another number of bytes.
    """

    how: str
    group: int
    calls: int
    sent: float
    planned: float | None


@dataclass(frozen=True)
class Trace:
    """What one process did in a step.

    Attributes:
        layout: the run on its processes; its `accumulation` is that of the traced step.
        rank: of the process.
        collectives: what it would have sent.
        empty: the names of parameters of which it has no row.
        matrices: how many matrices it owns; None without owners.
        balance: work of the busiest owner over the mean; None without owners.
        seconds: that the trace took.
    """

    layout: Layout
    rank: int
    collectives: list[Row]
    empty: list[str]
    matrices: int | None
    balance: float | None
    seconds: float


def refuse_untraced(layout: Layout) -> None:
    """Refuse a sharding whose step cannot be traced.

    Raises:
        InputError: it is one of DeepSpeed's.
    """
    if layout.sharding not in TRACED:
        raise InputError(
            f"--trace: {layout.sharding} is DeepSpeed's, which reads numbers while it lays a model "
            f"out; nearest: --sharding fsdp2 (traced are {', '.join(TRACED)})"
        )


def trace(layout: Layout, rank: int, planned: Sequence[Transfer]) -> Trace:
    """Take a step of process `rank` without numbers.

    Args:
        layout: with two micro-batches at most (`shortened`).
        planned: what the plan says that a process sends.

    Raises:
        InputError: the process cannot take the step, holds another part of a parameter than it
            should, or sends other bytes than planned; the message says where.
    """
    refuse_untraced(layout)
    if not 0 <= rank < layout.world:
        raise InputError(
            f"--trace: there is no process {rank} among {layout.world}; the last is "
            f"{layout.world - 1}"
        )
    began = time.monotonic()
    who = f"--trace: process {rank} of {layout.world} ({layout.sharding})"
    config = _settings(layout)
    model = outline(config).train()
    if config.freezes and config.training.precision == "bf16":
        narrow(model)
    doing = "joins the others"
    with pretended(rank, layout.world), ExitStack() as stack:
        try:
            parallel = Parallel(config.parallel, config.training)
            parallel.device = torch.device(
                "cpu"
            )  # accelerate's has a number, fake tensors have none
            # Only now, since a mesh is made of real numbers.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            calls = stack.enter_context(Collectives())
            stack.enter_context(fused_attention())
            stack.enter_context(whole_norms("cuda"))  # a CPU's pieces are many operations
            doing = "lays the model out"
            replica = parallel.prepare(model, lambda modules: None)
            groups = split(model)
            optimizer = config.optimizer.build(groups, parallel.exchange())
            parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
            calls.found.clear()
            doing = "computes gradients"
            batches = [_micro_batch(layout)] * layout.accumulation
            forward_backward(replica, batches, torch.ones((), dtype=torch.long), parallel)
            parallel.clip(parameters, config.training.max_grad_norm)
            faults = [*_faults(layout, rank, parallel, model, groups)]
            doing = "updates weights"
            optimizer.step()
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{who} fails while it {doing}: {_first_line(error)}") from error
    rows = _rows(calls.found, planned)
    faults += _different(rows)
    if faults:
        raise InputError(f"{who}: {faults[0]}")
    owners = optimizer if isinstance(optimizer, ShardedRuleOptimizer) else None
    return Trace(
        layout=layout,
        rank=rank,
        collectives=rows,
        empty=[n for n, p in model.named_parameters() if not local(p).numel()],
        matrices=None if owners is None else sum(len(b.owned[owners.rank]) for b in owners.buckets),
        balance=None if owners is None else owners.balance,
        seconds=time.monotonic() - began,
    )


def shortened(layout: Layout) -> Layout:
    """The layout with two micro-batches a step at most: a middle one is like the first."""
    return replace(layout, accumulation=min(2, layout.accumulation))


def _settings(layout: Layout) -> RunConfig:
    """The run's settings as a launcher would find them, for CPUs."""
    config = layout.config
    replicas = layout.replicas if layout.sharding == "hsdp" else 1
    parallel = config.parallel.model_copy(
        # A compiler would want numbers.
        update={"sharding": layout.sharding, "replicas": replicas, "compile": False}
    )
    training = config.training.model_copy(update={"device": "cpu", "deterministic": False})
    return config.model_copy(update={"parallel": parallel, "training": training})


def _micro_batch(layout: Layout) -> MicroBatch:
    shape = (layout.micro_batch, layout.config.data.context_length)
    ids, rows = torch.zeros(shape, dtype=torch.long), torch.zeros(shape[0], dtype=torch.long)
    inputs: dict[str, Tensor | int] = {"input_ids": ids, "shift_labels": ids, "loss_only": True}
    return MicroBatch(inputs, layout.tokens, layout.tokens, rows)


def _faults(
    layout: Layout, rank: int, parallel: Parallel, model: nn.Module, groups: Groups
) -> Iterator[str]:
    """What is wrong with the process's part of the model and with its gradients."""
    if parallel.found() != layout.sharding:
        yield f"the model is laid out as '{parallel.found()}'"
    for name, parameter in model.named_parameters():
        whole, part = tuple(parameter.shape), tuple(local(parameter).shape)
        due = _part(whole, layout, rank)
        if part != due:
            yield (
                f"holds {_shape(part)} of {name}, which is {_shape(whole)} and of which it should "
                f"hold {_shape(due)}"
            )
    for members in groups[:2]:
        for name, parameter in members.items():
            gradient = parameter.grad
            if gradient is None:
                yield f"{name} has no gradient"
            elif local(gradient).shape != local(parameter).shape:
                yield (
                    f"has a gradient of {_shape(tuple(local(gradient).shape))} for "
                    f"{_shape(tuple(local(parameter).shape))} of {name}"
                )


def _part(whole: tuple[int, ...], layout: Layout, rank: int) -> tuple[int, ...]:
    """The shape of what a process should hold of a parameter: rows, as torch.chunk cuts them."""
    if not layout.spread:
        return whole
    block = -(-whole[0] // layout.shards)
    first = min(block * (rank % layout.shards), whole[0])
    return (min(block, whole[0] - first), *whole[1:])


def _rows(found: Sequence[Collective], planned: Sequence[Transfer]) -> list[Row]:
    """The collectives by kind and group, in the order of their first call."""
    rows: dict[tuple[str, int], Row] = {}
    for call in found:
        if call.sent < SMALL or call.group == 1:
            continue
        key = (call.how, call.group)
        before = rows.get(key, Row(*key, 0, 0.0, None))
        rows[key] = before._replace(calls=before.calls + 1, sent=before.sent + call.sent)
    for transfer in planned:
        key = (transfer.how, transfer.group.size)
        if transfer.how == "all-to-all" or transfer.group.size == 1:
            continue
        row = rows.get(key, Row(*key, 0, 0.0, None))
        rows[key] = row._replace(planned=(row.planned or 0.0) + transfer.sent)
    return [*rows.values()]


def _different(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.planned is None and row.how != "all-to-all":
            yield f"sends {row.sent:,.0f} bytes by {row.how} that are not planned"
        elif row.planned is not None and abs(row.sent - row.planned) > (
            TOLERANCE * row.planned + SMALL * max(1, row.calls)
        ):
            yield (
                f"sends {row.sent:,.0f} bytes by {row.how} among {row.group}, where "
                f"{row.planned:,.0f} are planned"
            )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
