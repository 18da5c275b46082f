"""From settings and groups to an optimizer, and the table that `--print-groups` prints."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmnorm.optim import nap
from llmnorm.optim.adamw import AdamW
from llmnorm.optim.fragments import whole_shape
from llmnorm.optim.groups import Groups, check_gradients, matrices, width
from llmnorm.optim.settings import AdamWSettings, MatrixSettings, OptimizerSettings
from llmnorm.optim.stacks import Hyperparameters, RuleOptimizer
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.optim.sharded import Exchange


def adamw(settings: AdamWSettings, groups: Groups, exchange: "Exchange | None" = None) -> AdamW:
    """AdamW on everything."""
    kinds = {"matrices": groups.matrices, "auxiliary": groups.auxiliary}
    param_groups = [
        _param_group(kind, members.values(), *_rates(settings, groups)[kind])
        for kind, members in kinds.items()
        if members
    ]
    optimizer = AdamW(param_groups, betas=settings.betas, eps=settings.eps)
    optimizer.register_step_pre_hook(lambda *_: check_gradients(groups.matrices))
    if settings.nap:
        nap.attach(optimizer, groups.matrices, exchange)
    return optimizer


def with_rule(
    settings: MatrixSettings, groups: Groups, exchange: "Exchange | None" = None
) -> RuleOptimizer:
    """A rule on the hidden matrices, AdamW on the rest.

    Raises:
        InputError: there is no hidden matrix to train, or `split_sizes` do not fit.
    """
    if not groups.matrices:
        raise InputError(
            f"optimizer: {settings.label} has no hidden matrix to train here; use adamw"
        )
    rates = _rates(settings, groups)
    auxiliary = None
    if groups.auxiliary:
        auxiliary = AdamW(
            [_param_group("auxiliary", groups.auxiliary.values(), *rates["auxiliary"])],
            betas=settings.auxiliary.betas,
            eps=settings.auxiliary.eps,
        )
    pieces, rule = matrices(groups, settings.split_sizes), settings.rule()
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
    by_factor: dict[float, set[int]] = {}
    for members in (groups.matrices, groups.auxiliary):
        for name, parameter in members.items():
            if name in factors:
                by_factor.setdefault(factors[name], set()).add(id(parameter))
    for factor, chosen in by_factor.items():
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in chosen]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                peak = factor * group["peak_lr"]
                optimizer.param_groups.append(
                    group | {"params": moved, "lr": peak, "peak_lr": peak}
                )


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
    layouts = groups.layouts if own else {}
    found = matrices(groups._replace(layouts=layouts), getattr(settings, "split_sizes", {}))
    rows: list[tuple[str, ...]] = [("parameter", "shape", "rule", "lr", "weight decay", "")]
    for matrix in found:
        lr, decay = rates["matrices"]
        lr *= factors.get(matrix.name, 1.0)
        shape = f"{matrix.rows} x {matrix.columns}"
        if len(whole_shape(matrix.parameter)) == 3:
            shape = f"{matrix.count} of {shape}"
        notes = ["transposed"] if matrix.transposed else []
        if not matrix.suffix and matrix.name in layouts and layouts[matrix.name].note:
            notes.append(f"one matrix: {layouts[matrix.name].note}")
        name, note = matrix.name + matrix.suffix, "; ".join(notes)
        rows.append((name, shape, settings.label, _number(lr), _number(decay), note))
    for name, parameter in groups.auxiliary.items():
        lr, decay = rates["auxiliary"]
        lr *= factors.get(name, 1.0)
        shape = " x ".join(map(str, parameter.shape)) or "scalar"
        rows.append((name, shape, "adamw", _number(lr), _number(decay), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    counts = [sum(p.numel() for p in members.values()) for members in groups[:2]]
    lines.append(
        f"{counts[0]} numbers in {sum(matrix.count for matrix in found)} hidden matrices, "
        f"{counts[1]} in {len(groups.auxiliary)} auxiliary parameters"
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
