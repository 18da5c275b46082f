"""Settings of learning rates and decays beside those of the hidden matrices, for settings.py."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmnorm.optim.schedule import AuxiliarySchedule, Beta, SameSettings
from llmnorm.part import Settings, nearest

Rate = Annotated[float, Field(ge=0)] | Literal["auto"]


class AuxiliarySettings(Settings):
    """The parameters that are not hidden matrices: embeddings, head, norms, biases, scalars."""

    lr: Annotated[float, Field(ge=0)] | None = None
    """Their peak learning rate; left out, the rate at which AdamW's steps are as large as those of
    the hidden matrices (for `adamw` itself `optimizer.lr`)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Their decay, times their learning rate."""
    schedule: AuxiliarySchedule = SameSettings()
    """How their learning rate moves over the run; left out, as the run's `schedule` says."""


class AuxiliaryAdamWSettings(AuxiliarySettings):
    """The auxiliary parameters of an optimizer with a matrix rule: AdamW updates them."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the bias-corrected root of the second moment."""


class GroupSettings(Settings):
    """What the parameters have whose names match a pattern; at least one of the other keys."""

    match: str
    """Pattern of names (as in a shell: `*`, `?`, `[abc]`), of whole ones or from any dot on:
    `*.mlp.*`, `layers.0.*`, `lm_head.weight`. `train CONFIG --print-groups` lists the names."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Factor on the learning rate that they would have."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Their decay in place of the one that they would have; times their learning rate."""
    rule: str | None = None
    """`adamw`: hidden matrices go to the auxiliary parameters, with their rate, decay and schedule.
    The optimizer's own name: auxiliary parameters of two axes, such as an embedding, are updated as
    hidden matrices are."""

    @model_validator(mode="after")
    def _gives_something(self) -> "GroupSettings":
        if self.lr is None and self.weight_decay is None and self.rule is None:
            raise ValueError(f"'{self.match}' is given nothing; give lr, weight_decay or rule")
        return self


def check_rules(groups: Sequence[GroupSettings], optimizer: str) -> None:
    """Refuse a group's rule that the optimizer of this name does not have.

    Raises:
        ValueError: names the group.
    """
    for number, group in enumerate(groups):
        key = f"optimizer.groups.{number}.rule"
        if group.rule is None:
            continue
        if optimizer == "adamw":
            raise ValueError(f"{key}: 'adamw' updates every parameter here; leave it out")
        if group.rule not in ("adamw", optimizer):
            hint = nearest(group.rule, ["adamw", optimizer])
            raise ValueError(f"{key}: '{group.rule}' is no rule of this optimizer; {hint}")
