"""From settings and groups to an optimizer, and the table that `--print-groups` prints."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmnorm.optim import nap
from llmnorm.optim.adamw import AdamW
from llmnorm.optim.fragments import whole_shape
from llmnorm.optim.groups import (
    Groups,
    assign,
    check_gradients,
    matrices,
    width,
)
from llmnorm.optim.matrix import AS_ITS_GROUP, Rates
from llmnorm.optim.settings import AdamWSettings, MatrixSettings, OptimizerSettings
from llmnorm.optim.stacks import Hyperparameters, RuleOptimizer
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.optim.sharded import Exchange


def adamw(settings: AdamWSettings, groups: Groups, exchange: "Exchange | None" = None) -> AdamW:
    """AdamW on everything.

    Raises:
        InputError: `optimizer.groups` do not fit.
    """
    rates = assign(groups, settings).rates
    kinds = {"matrices": groups.matrices, "auxiliary": groups.auxiliary}
    param_groups = [
        _param_group(kind, members.values(), *_rates(settings, groups)[kind])
        for kind, members in kinds.items()
        if members
    ]
    optimizer = AdamW(param_groups, betas=settings.betas, eps=settings.eps)
    _set_apart(optimizer, groups, rates)
    optimizer.register_step_pre_hook(lambda *_: check_gradients(groups.matrices))
    if settings.nap:
        nap.attach(optimizer, groups.matrices, exchange)
    return optimizer


def with_rule(
    settings: MatrixSettings, groups: Groups, exchange: "Exchange | None" = None
) -> RuleOptimizer:
    """A rule on the hidden matrices, AdamW on the rest.

    Raises:
        InputError: there is no hidden matrix to train, or `split_sizes` or `groups` do not fit.
    """
    chosen, own_rates = assign(groups, settings)
    if not chosen.matrices:
        raise InputError(
            f"optimizer: {settings.label} has no hidden matrix to train here; use adamw"
        )
    rates = _rates(settings, groups)
    auxiliary = None
    if chosen.auxiliary:
        auxiliary = AdamW(
            [_param_group("auxiliary", chosen.auxiliary.values(), *rates["auxiliary"])],
            betas=settings.auxiliary.betas,
            eps=settings.auxiliary.eps,
        )
        _set_apart(auxiliary, chosen, own_rates)
    pieces, rule = matrices(chosen, settings.split_sizes, own_rates), settings.rule()
    first = Hyperparameters(*rates["matrices"], momentum=settings.momentum_at(0))
    optimizer: RuleOptimizer
    if exchange is None:
        optimizer = RuleOptimizer(pieces, auxiliary, rule, first)
    else:
        from llmnorm.optim.sharded import ShardedRuleOptimizer

        optimizer = ShardedRuleOptimizer(pieces, auxiliary, rule, first, exchange)
    if settings.nap:
        nap.attach(optimizer, groups.matrices, exchange)
    return optimizer


def raise_rates(
    optimizer: torch.optim.Optimizer, groups: Groups, factors: Mapping[str, float]
) -> None:
    """Multiply the learning rates of some parameters, in param groups of their own.

    Args:
        optimizer: over `groups`; AdamW, since a matrix rule has one rate for all matrices.
        factors: parameter's name -> factor on the rate of its group.
    """
    _set_apart(optimizer, groups, {name: Rates(lr=factor) for name, factor in factors.items()})


def _set_apart(
    optimizer: torch.optim.Optimizer, groups: Groups, rates: Mapping[str, Rates]
) -> None:
    """Put the parameters of an optimizer that have rates of their own into groups of their own.

    The first param group stays the first, with the rate of all others, though it may be empty then.
    """
    by_rates: dict[Rates, set[int]] = {}
    for members in (groups.matrices, groups.auxiliary):
        for name, parameter in members.items():
            if rates.get(name, AS_ITS_GROUP) != AS_ITS_GROUP:
                by_rates.setdefault(rates[name], set()).add(id(parameter))
    for own, apart in by_rates.items():
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in apart]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in apart]
                lr, decay = own.of(group["peak_lr"], group["weight_decay"])
                new = {"params": moved, "lr": lr, "peak_lr": lr, "weight_decay": decay}
                optimizer.param_groups.append(group | new)


def describe(
    settings: OptimizerSettings, groups: Groups, factors: Mapping[str, float] | None = None
) -> str:
    """A line for every matrix and auxiliary parameter: name, shape, rule, lr, weight decay, a note.

    The experts of a stack are one line, `8 of 48 x 32`. AdamW cuts and transposes nothing.

    Args:
        factors: as in `raise_rates`.
    """
    factors = factors or {}
    rates = _rates(settings, groups)
    own = isinstance(settings, MatrixSettings)
    chosen, own_rates = assign(groups, settings)
    layouts = chosen.layouts if own else {}
    found = matrices(chosen._replace(layouts=layouts), getattr(settings, "split_sizes", {}))

    def row(name: str, suffix: str, shape: str, kind: str, note: str = "") -> tuple[str, ...]:
        lr, decay = own_rates.get(name, AS_ITS_GROUP).of(*rates[kind])
        rule = settings.label if kind == "matrices" else "adamw"
        lr *= factors.get(name, 1.0)
        return (name + suffix, shape, rule, _number(lr), _number(decay), note)

    rows: list[tuple[str, ...]] = [("parameter", "shape", "rule", "lr", "weight decay", "")]
    for matrix in found:
        shape = f"{matrix.rows} x {matrix.columns}"
        if len(whole_shape(matrix.parameter)) == 3:
            shape = f"{matrix.count} of {shape}"
        notes = ["transposed"] if matrix.transposed else []
        if not matrix.suffix and matrix.name in layouts and layouts[matrix.name].note:
            notes.append(f"one matrix: {layouts[matrix.name].note}")
        rows.append(row(matrix.name, matrix.suffix, shape, "matrices", "; ".join(notes)))
    for name, parameter in chosen.auxiliary.items():
        shape = " x ".join(map(str, parameter.shape)) or "scalar"
        rows.append(row(name, "", shape, "auxiliary"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    counts = [sum(p.numel() for p in members.values()) for members in chosen[:2]]
    lines.append(
        f"{counts[0]} numbers in {sum(matrix.count for matrix in found)} hidden matrices, "
        f"{counts[1]} in {len(chosen.auxiliary)} auxiliary parameters"
    )
    return "\n".join(line.rstrip() for line in lines)


def describe_matrices(groups: Groups) -> str:
    """What the matrices of a rule are found in, and how many numbers AdamW trains: a line."""
    of = groups.layouts
    experts = [p for p in groups.matrices.values() if len(whole_shape(p)) == 3]
    cut = sum(1 for name, p in groups.matrices.items() if name in of and of[name].pieces)
    notes = Counter(layout.note for layout in of.values() if layout.note)
    parts = [f"{_millions(groups.matrices)} numbers in hidden matrices"]
    if experts:
        size = sum(whole_shape(p).numel() for p in experts)
        parts.append(f"{size / 1e6:.2f}M of them in {len(experts)} stacks of experts")
    if cut:
        parts.append(f"{cut} parameters are cut into projections")
    parts += [f"{count} are one matrix each: {note}" for note, count in notes.items()]
    return f"{', '.join(parts)}; AdamW trains {_millions(groups.auxiliary)}"


def _millions(members: Mapping[str, nn.Parameter]) -> str:
    return f"{sum(whole_shape(p).numel() for p in members.values()) / 1e6:.2f}M"


def _rates(settings: OptimizerSettings, groups: Groups) -> dict[str, tuple[float, float]]:
    """Peak learning rate and weight decay of every kind of param group."""
    assert settings.lr != "auto", "resolved before a run begins"
    auxiliary_lr = settings.auxiliary_lr(width(groups)) if groups.matrices else settings.lr
    return {
        "matrices": (settings.lr, settings.weight_decay),
        "auxiliary": (auxiliary_lr, settings.auxiliary.weight_decay),
    }


def _param_group(
    kind: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> dict[str, Any]:
    group = {"params": list(parameters), "kind": kind, "lr": lr, "peak_lr": lr}
    return group | {"weight_decay": weight_decay}


def _number(value: float) -> str:
    return f"{value:.4g}"
