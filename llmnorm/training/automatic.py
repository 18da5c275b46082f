"""Numbers for `optimizer.lr: auto` and `training.global_batch: auto`, before a run begins.

Both come from the Step Law (optim/step_law.py). The run's saved settings hold the numbers, so that
a resumed run keeps them. How they were derived is printed, and saved beside them. `llmnorm plan`
shows the same numbers beside those that were given.
"""

import math
from typing import Any, NamedTuple

from llmnorm.config.tree import RunConfig
from llmnorm.optim import step_law
from llmnorm.part import InputError
from llmnorm.training.outline import parameters_outside_the_embedding


class Resolved(NamedTuple):
    """A configuration without `auto`, and a line for each number on how it was derived."""

    config: RunConfig
    notes: list[str]


class Advice(NamedTuple):
    """What the Step Law says of a run.

    Attributes:
        batch: tokens a step.
        law: AdamW's learning rate at that batch.
        smaller: factor on the rate at the run's own batch.
        adamw: the product of the two, with three digits.
        lr: the rate of the run's own optimizer that makes steps as good.
        fitted: whether the model is of a size that the law was fitted to.
    """

    batch: float
    law: float
    smaller: float
    adamw: float
    lr: float
    fitted: bool


def advice(config: RunConfig, parameters: int, tokens: float) -> Advice:
    """The Step Law's batch and learning rate.

    Args:
        config: its batch is a number.
        parameters: outside of embedding and head.
        tokens: the run's length.
    """
    optimizer = config.optimizer
    best, law = step_law.batch_tokens(tokens), step_law.learning_rate(parameters, tokens)
    smaller = min(1.0, math.sqrt(config.training.rows * config.data.context_length / best))
    adamw = _rounded(law * smaller)
    lr = adamw * optimizer.over_adamw / optimizer.adamw_lr(1.0, config.model.hidden_size)
    low, high = step_law.FITTED
    return Advice(best, law, smaller, adamw, lr, low <= parameters <= high)


def resolve(config: RunConfig) -> Resolved:
    """Replace every `auto` by the Step Law's number.

    Raises:
        InputError: the model is too small for the law, or the run's length in tokens is unknown.
    """
    if not config.automatic():
        return Resolved(config, [])
    key = config.automatic()[0]
    parameters = parameters_outside_the_embedding(config)
    if parameters < step_law.SMALLEST:
        raise InputError(
            f"{key}: auto: the Step Law was fitted to models of 0.2 to 1.1 billion parameters; "
            f"this one has {parameters / 1e6:.2f} million outside the embedding, and it says "
            "nothing below 10 million; give a number"
        )
    training, optimizer, context = config.training, config.optimizer, config.data.context_length
    if training.tokens is not None:
        tokens = training.tokens
    elif training.steps is not None and training.global_batch != "auto":
        tokens = training.steps * training.global_batch * context
    else:
        needed = (
            "training.tokens" if training.global_batch == "auto" else "training.tokens or steps"
        )
        raise InputError(f"{key}: auto: the Step Law needs the run's length as {needed}")
    sizes = f"N = {parameters / 1e6:.1f}M parameters outside the embedding, D = {tokens:.4g} tokens"
    notes = []

    best = step_law.batch_tokens(tokens)
    if training.global_batch == "auto":
        grid = training.micro_batch or (8 if best >= 16 * context else 1)
        rows = grid * max(1, round(best / context / grid))
        training = training.model_copy(update={"global_batch": rows})
        notes.append(
            f"training.global_batch = {rows}: Step Law (arXiv 2503.04715), 0.58 D^0.571 = "
            f"{best:.4g} tokens, rows of {context}; {sizes}"
        )
    if optimizer.lr == "auto":
        batch = training.rows * context
        found = advice(config.model_copy(update={"training": training}), parameters, tokens)
        _, law, smaller, adamw, lr, _ = found
        update: dict[str, Any] = {"lr": _rounded(lr)}
        if optimizer.auxiliary.lr is None:
            auxiliary = optimizer.auxiliary.model_copy(update={"lr": adamw})
            update["auxiliary"] = auxiliary
        optimizer = optimizer.model_copy(update=update)
        notes.append(
            f"optimizer.lr = {optimizer.lr:g}, "
            f"optimizer.auxiliary.lr = {optimizer.auxiliary.lr:g}: Step Law (arXiv 2503.04715), "
            f"AdamW's 1.79 N^-0.713 D^0.307 = {law:.3g}, times {smaller:.3g} = "
            f"min(1, sqrt(batch / B*)) for {batch} of B* = {best:.4g} tokens, "
            f"for {optimizer.label} times {lr / adamw:.3g}; {sizes}"
        )
    low, high = step_law.FITTED
    if not low <= parameters <= high:
        notes.append(
            f"the Step Law was fitted to 0.2 to 1.1 billion parameters: at {parameters / 1e6:.1f}M "
            "this is an extrapolation, good to a factor of 2"
        )
    return Resolved(config.model_copy(update={"training": training, "optimizer": optimizer}), notes)


def _rounded(value: float) -> float:
    """The value with three significant digits."""
    return float(f"{value:.3g}")
