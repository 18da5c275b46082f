"""From settings and groups to an optimizer, and the table that `--print-groups` prints."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmnorm.optim import nap
from llmnorm.optim.adamw import AdamW
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
    for members in groups:
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
    """A line for every matrix and auxiliary parameter: name, shape, rule, lr, weight decay.

    Args:
        factors: as in `raise_rates`.
    """
    factors = factors or {}
    rates = _rates(settings, groups)
    sizes = getattr(settings, "split_sizes", {})
    rows: list[tuple[str, ...]] = [("parameter", "shape", "rule", "lr", "weight decay")]
    for matrix in matrices(groups, sizes):
        lr, decay = rates["matrices"]
        lr *= factors.get(matrix.name, 1.0)
        shape = f"{matrix.rows} x {matrix.columns}"
        name = matrix.name + matrix.suffix
        rows.append((name, shape, settings.label, _number(lr), _number(decay)))
    for name, parameter in groups.auxiliary.items():
        lr, decay = rates["auxiliary"]
        lr *= factors.get(name, 1.0)
        shape = " x ".join(map(str, parameter.shape)) or "scalar"
        rows.append((name, shape, "adamw", _number(lr), _number(decay)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    counts = [sum(p.numel() for p in members.values()) for members in groups]
    lines.append(
        f"{counts[0]} numbers in {len(groups.matrices)} hidden matrices, "
        f"{counts[1]} in {len(groups.auxiliary)} auxiliary parameters"
    )
    return "\n".join(line.rstrip() for line in lines)


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
