"""Settings of the optimizers and the learning-rate schedules (parts)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.optim.adamw import AdamW
    from llmnorm.optim.groups import Groups

Beta = Annotated[float, Field(ge=0, lt=1)]


class AuxiliarySettings(Settings):
    """The parameters that are not hidden matrices: embeddings, head, norms, biases, scalars."""

    lr: Annotated[float, Field(ge=0)] | None = None
    """Their peak learning rate; left out, it is `optimizer.lr`."""


class AdamWSettings(Settings):
    """AdamW with decoupled weight decay on hidden matrices only (torch's fused kernel).

    Source: Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2; torch.optim.AdamW.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, ge=0)
    """Peak learning rate of the hidden matrices."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the bias-corrected root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of the hidden matrices, times the learning rate; nothing else decays."""
    auxiliary: AuxiliarySettings = AuxiliarySettings()
    """Embeddings, head, norms, biases and scalars."""

    def build(self, groups: "Groups") -> "AdamW":
        """The optimizer over `groups`, its state allocated."""
        from llmnorm.optim.adamw import AdamW

        return AdamW(groups, self)


Optimizer = Annotated[AdamWSettings, Part(default="adamw")]

Multiplier = Callable[[int], float]


class WarmupSettings(Settings):
    """Linear warm-up: step s (from 0) has the factor (s + 1) / warmup, never 0."""

    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Steps until the peak is reached; below 1 it is a share of all steps."""

    def warmup_steps(self, steps: int) -> int:
        """The warm-up of a run of `steps` steps, in steps."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)


class ConstantSettings(WarmupSettings):
    """Warm-up, then the peak to the end."""

    name: Literal["constant"] = "constant"

    def build(self, steps: int) -> Multiplier:
        """Step (from 0) -> factor on the peak learning rate."""
        from llmnorm.optim import schedule

        return schedule.constant(steps, self.warmup_steps(steps))


class CosineSettings(WarmupSettings):
    """Warm-up, then half a cosine from the peak to `final` of it.

    Source: Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts.
    """

    name: Literal["cosine"] = "cosine"
    final: float = Field(default=0.1, ge=0, le=1)
    """The last step's factor."""

    def build(self, steps: int) -> Multiplier:
        """Step (from 0) -> factor on the peak learning rate."""
        from llmnorm.optim import schedule

        return schedule.cosine(steps, self.warmup_steps(steps), self.final)


class LinearSettings(WarmupSettings):
    """Warm-up, then a straight line from the peak to `final` of it (decay to zero by default).

    Source: Bergsma et al., "Straight to Zero", arXiv 2502.15938.
    """

    name: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0, le=1)
    """The last step's factor."""

    def build(self, steps: int) -> Multiplier:
        """Step (from 0) -> factor on the peak learning rate."""
        from llmnorm.optim import schedule

        return schedule.linear(steps, self.warmup_steps(steps), self.final)


class WSDSettings(WarmupSettings):
    """Warm-up, stable at the peak, then a decay over the last part of the run.

    Source: Hu et al., MiniCPM, arXiv 2404.06395; shape `sqrt`: Haegele et al., arXiv 2405.18392.
    """

    name: Literal["wsd"] = "wsd"
    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps that the decay takes."""
    shape: Literal["linear", "sqrt"] = "linear"
    """`linear`: 1 - (1 - final) u; `sqrt`: final + (1 - final) (1 - sqrt(u)), u from 0 to 1."""
    final: float = Field(default=0.0, ge=0, le=1)
    """The last step's factor."""

    def build(self, steps: int) -> Multiplier:
        """Step (from 0) -> factor on the peak learning rate."""
        from llmnorm.optim import schedule

        return schedule.wsd(steps, self.warmup_steps(steps), self.decay, self.shape, self.final)


Schedule = Annotated[
    CosineSettings | LinearSettings | WSDSettings | ConstantSettings, Part(default="cosine")
]
