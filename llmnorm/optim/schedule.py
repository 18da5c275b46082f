"""Schedules of learning rate (parts) and momentum: pure functions of the step, counted from 0.

Nothing of a schedule is in a checkpoint: a resumed run computes the values again from the step.

A learning-rate schedule is built for a run of `steps` steps and maps a step s to the factor on the
peak learning rate. Warm-up gives (s + 1) / warmup, never 0. The last step has exactly the final
factor (the decay divides by steps - 1 - warmup). Steps past the end keep the final factor.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from llmnorm.config.mistakes import shown
from llmnorm.config.values import Count
from llmnorm.part import Part, Settings

Multiplier = Callable[[int], float]
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class HyperparameterSchedule:
    """The hyperparameters of every step of a run, and how an optimizer gets them.

    Attributes:
        lr: kind of param group ("matrices" or "auxiliary") -> factor on its peak learning rate.
        momentum: the value at a step; read for param groups that have a `momentum`.
    """

    lr: Mapping[str, Multiplier]
    momentum: Callable[[int], float]

    def set(self, param_groups: Iterable[dict[str, Any]], step: int) -> None:
        """Write the values of a step (from 0) into an optimizer's param groups.

        The training loop calls it before `optimizer.step()`. The values depend on `step` alone, so
        a resumed run has those of one that was never stopped, and all processes have the same.
        """
        for group in param_groups:
            group["lr"] = group["peak_lr"] * self.lr[group["kind"]](step)
            if "momentum" in group:
                group["momentum"] = self.momentum(step)


class MomentumWarmup(Settings):
    """Momentum in a straight line from `from` at the first step to `to` at step `steps`.

    Source: Jordan et al., modded-nanogpt, train_gpt.py (.85 to .95 in 300 steps).
    """

    # What is written out again has the key `from`, which cannot be the name of a Python attribute.
    model_config = ConfigDict(serialize_by_alias=True)

    start: Beta = Field(alias="from")
    """Momentum of the first step; at least 0, less than 1."""
    to: Beta
    """Momentum from step `steps` on; at least 0, less than 1."""
    steps: Count
    """Steps that it takes; at least 1."""

    def at(self, step: int) -> float:
        """The momentum of a step (from 0)."""
        share = min(step / self.steps, 1.0)
        return (1 - share) * self.start + share * self.to


def _number_or_warmup(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, dict | MomentumWarmup) or (number and 0 <= value < 1):
        return value
    raise PydanticCustomError(
        "momentum",
        "expected a number of at least 0 and less than 1, or a warm-up like "
        "{from: 0.85, to: 0.95, steps: 300}; got {value}",
        {"value": shown(value)},
    )


def _branch(value: Any) -> str:
    """What a value is meant to be, so that a message is about that alone."""
    return "dict" if isinstance(value, dict | MomentumWarmup) else "float"


Momentum = Annotated[
    Annotated[Beta, Tag("float")] | Annotated[MomentumWarmup, Tag("dict")],
    Discriminator(_branch),
    BeforeValidator(_number_or_warmup),
]


def _steps_or_share(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 <= value < 1 or (1 <= value <= 10**12 and float(value).is_integer())):
        return value
    raise PydanticCustomError(
        "warmup",
        "expected 0 or a whole number of steps, or a share of all steps that is less than 1; "
        "got {value}",
        {"value": shown(value)},
    )


def _decay_steps_or_share(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 < value <= 1 or (2 <= value <= 10**12 and float(value).is_integer())):
        return float(value) if value <= 1 else value
    raise PydanticCustomError(
        "decay",
        "expected a share of all steps, above 0 and at most 1, or a whole number of at least 2 "
        "steps; got {value}",
        {"value": shown(value)},
    )


Decay = Annotated[
    Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=2)],
    BeforeValidator(_decay_steps_or_share),
]
Warmup = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)],
    BeforeValidator(_steps_or_share),
]


class ScheduleSettings(Settings):
    """What every schedule's settings can do; base class of a schedule of your own."""

    @abstractmethod
    def build(self, steps: int) -> Multiplier:
        """The schedule of a run of `steps` steps: step (from 0) -> factor on the peak rate."""


class WarmupSettings(ScheduleSettings):
    """Linear warm-up: step s (from 0) has the factor (s + 1) / warmup, never 0."""

    warmup: Warmup = 0.05
    """Steps until the peak is reached; below 1 it is a share of all steps."""

    def build(self, steps: int) -> Multiplier:
        """The schedule of a run of `steps` steps: step (from 0) -> factor on the peak rate."""
        warmup = self.warmup_steps(steps)
        after = self.after(warmup, steps)
        return lambda s: (s + 1) / warmup if s < warmup else after(s)

    def warmup_steps(self, steps: int) -> int:
        """Length of the warm-up in a run of `steps` steps, in steps."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)

    @abstractmethod
    def after(self, warmup: int, steps: int) -> Multiplier:
        """The schedule after a warm-up of `warmup` steps; called for later steps only."""


class ConstantSettings(WarmupSettings):
    """Warm-up, then the peak to the end."""

    name: Literal["constant"] = "constant"

    def after(self, warmup: int, steps: int) -> Multiplier:
        """1."""
        return lambda s: 1.0


class CosineSettings(WarmupSettings):
    """Warm-up, then half a cosine from the peak to `final` of it.

    Source: Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts.
    """

    name: Literal["cosine"] = "cosine"
    final: float = Field(default=0.1, ge=0, le=1)
    """The last step's factor."""

    def after(self, warmup: int, steps: int) -> Multiplier:
        """final + (1 - final) (1 + cos(pi u)) / 2 with u from 0 to 1."""
        share = _share(warmup, steps)
        return lambda s: self.final + (1 - self.final) * (1 + math.cos(math.pi * share(s))) / 2


class LinearSettings(WarmupSettings):
    """Warm-up, then a straight line from the peak to `final` of it (decay to zero by default).

    Source: Bergsma et al., "Straight to Zero", arXiv 2502.15938.
    """

    name: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0, le=1)
    """The last step's factor."""

    def after(self, warmup: int, steps: int) -> Multiplier:
        """1 - (1 - final) u with u from 0 to 1."""
        share = _share(warmup, steps)
        return lambda s: 1 - (1 - self.final) * share(s)


class WSDSettings(WarmupSettings):
    """Warm-up, stable at the peak, then a decay over the last part of the run.

    Source: Hu et al., MiniCPM, arXiv 2404.06395; shape `sqrt`: Haegele et al., arXiv 2405.18392.
    """

    name: Literal["wsd"] = "wsd"
    decay: Decay = 0.2
    """Share of all steps that the decay takes; from 2 on a number of steps."""
    shape: Literal["linear", "sqrt"] = "linear"
    """`linear`: 1 - (1 - final) u; `sqrt`: final + (1 - final) (1 - sqrt(u)), u from 0 to 1."""
    final: float = Field(default=0.0, ge=0, le=1)
    """The last step's factor."""

    def decay_steps(self, steps: int) -> int:
        """Length of the decay in a run of `steps` steps, in steps."""
        return self.decay if isinstance(self.decay, int) else round(self.decay * steps)

    def after(self, warmup: int, steps: int) -> Multiplier:
        """1, and over the last `decay_steps` steps down to `final`."""
        # The last stable step is where u = 0, so the decay itself has `decay_steps` steps.
        start = max(warmup, steps - 1 - self.decay_steps(steps))
        share = _share(start, steps)
        if self.shape == "linear":
            return lambda s: 1 - (1 - self.final) * share(s)
        return lambda s: self.final + (1 - self.final) * (1 - math.sqrt(share(s)))


class SameSettings(Settings):
    """As the learning rate of the hidden matrices: by the run's `schedule`."""

    name: Literal["same"] = "same"


Schedule = Annotated[
    CosineSettings | LinearSettings | WSDSettings | ConstantSettings,
    Part(ScheduleSettings, default="cosine"),
]
AuxiliarySchedule = Annotated[
    SameSettings | CosineSettings | LinearSettings | WSDSettings | ConstantSettings,
    Part(ScheduleSettings, default="same"),
]


def _share(start: int, steps: int) -> Multiplier:
    """How far a step is on the way from `start` (0) to the last step (1)."""
    return lambda s: min(max(s - start, 0) / max(steps - 1 - start, 1), 1.0)
