"""Settings of the selectors: the registry of `selection`, which rows of a pool are trained on.

A step reads `selection.pool` rows and trains on `training.global_batch` of them. Each settings
class says what its selector is told of the rows (`reads`), refuses configurations that it cannot
serve, and builds the selector (selection/contract.py).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmnorm.config.values import Rows
from llmnorm.part import InputError, Part, Settings, nearest

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig
    from llmnorm.selection.colm import CoLM
    from llmnorm.selection.contract import Selector
    from llmnorm.selection.controls import KeptRows, LargestLoss, Stratified, Uniform


class NoSelectionSettings(Settings):
    """Every row that is read is trained on."""

    name: Literal["none"] = "none"


class SelectionSettings(Settings):
    """What every selection has; base class of one of your own."""

    pool: Rows
    """Rows read a step, over all processes, of which `training.global_batch` are trained on."""
    reads: ClassVar[Literal["numbers", "losses", "features"]] = "numbers"
    """What the selector is told of the rows beside their numbers and sources: nothing; their mean
    losses; or these and their features (`FeatureSettings`)."""

    def refusal(self, config: "RunConfig") -> str | None:
        """Why a run with this configuration cannot select; None if it can."""
        if not getattr(config.objective, "selects", False):
            name = getattr(config.objective, "name", "this objective")
            return (
                f"selection: the rows of objective '{name}' cannot be selected; choose causal_lm "
                "or sft, or leave it out"
            )
        batch = config.training.global_batch
        if batch != "auto" and self.pool < batch:
            return (
                f"selection.pool {self.pool} is less than the training.global_batch {batch} that "
                f"are chosen from it; give at least {batch}"
            )
        return None

    @abstractmethod
    def build(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> "Selector":
        """The selector of a run.

        Args:
            names, sizes: of the run's sources, and their training rows.
            seed: of the run.

        Raises:
            InputError: the settings do not fit the sources.
        """


class KeepSettings(SelectionSettings):
    """What selections have that keep all rows of some sources."""

    keep: Literal["auto", "none"] | list[str] = "auto"
    """Sources all of whose rows in the pool are trained on: `auto`, those with fewer rows than the
    mean source; a list of names; `none`. Where they alone fill the batch it is shared out over
    them."""

    def kept(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> "KeptRows":
        """The kept rows of a run.

        Raises:
            InputError: there is one source, a name is none of a source, or all sources are named.
        """
        from llmnorm.selection.colm import small_sources
        from llmnorm.selection.controls import KeptRows

        if self.keep == "none":
            return KeptRows(set(), seed)
        if self.keep == "auto":
            if len(names) == 1:
                raise InputError(
                    f"selection.keep: 'auto' keeps the small ones of several sources, and "
                    f"'{names[0]}' is the only one; set selection.keep=none"
                )
            return KeptRows(small_sources(sizes), seed)
        for name in self.keep:
            if name not in names:
                near = nearest(name, [*names])
                raise InputError(f"selection.keep: no source is called '{name}'; {near}")
        if set(self.keep) == set(names):
            raise InputError(
                "selection.keep: names all sources, so that nothing is left to choose from; leave "
                "one out, or set selection=stratified selection.keep=none"
            )
        return KeptRows({names.index(name) for name in self.keep}, seed)


class FeatureSettings(SelectionSettings):
    """What selections have that see features of the rows."""

    reads = "features"
    feature: Literal["zeroth_order", "gradient", "hidden"] = "zeroth_order"
    """What is measured of a row at the last layer's values: `zeroth_order`, the loss's difference
    along random directions, two forward passes of the last layer for each; `gradient`, the exact
    gradient on random directions, by one short backward pass; `hidden`, the mean of the last hidden
    states."""
    probes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Directions of `zeroth_order`; 1 is the paper's, drawn once for the run."""
    sketch: Annotated[int, Field(ge=1, le=4096)] = 64
    """Directions of `gradient`, drawn once for the run; each has the size of the weight."""
    eps: float = Field(default=1e-3, gt=0, le=1)
    """How far `zeroth_order` moves the weight along a direction."""

    @property
    def width(self) -> int | None:
        """Numbers of a feature; None: the model's width."""
        widths = {"zeroth_order": self.probes, "gradient": self.sketch, "hidden": None}
        return widths[self.feature]

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse what does not belong to the feature, and gradients under ZeRO 3."""
        fields = type(self).model_fields
        owners = {"probes": "zeroth_order", "eps": "zeroth_order", "sketch": "gradient"}
        for key, owner in owners.items():
            # A run's saved configuration holds every default, so a default counts as left out.
            if self.feature != owner and getattr(self, key) != fields[key].default:
                return (
                    f"selection.{key} belongs to selection.feature '{owner}', not to "
                    f"'{self.feature}'; leave it out"
                )
        if self.feature == "gradient" and config.parallel.sharding == "zero3":
            return zero3_refusal()
        return super().refusal(config)


def zero3_refusal() -> str:
    """Why there are no gradients of rows under ZeRO 3."""
    return (
        "selection.feature: 'gradient' needs a backward pass inside the forward pass, which "
        "DeepSpeed's ZeRO 3 cannot have; choose zeroth_order, or parallel.sharding=fsdp2"
    )


class RandomSettings(SelectionSettings):
    """Uniform rows of the pool: a control, which is plain training on other rows."""

    name: Literal["random"] = "random"

    def build(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> "Uniform":
        """The selector of a run."""
        from llmnorm.selection.controls import Uniform

        return Uniform(seed)


class StratifiedSettings(KeepSettings):
    """The sources kept and the budgets of CoLM, and uniform rows inside the others: its control."""

    name: Literal["stratified"] = "stratified"

    def build(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> "Stratified":
        """The selector of a run."""
        from llmnorm.selection.controls import Stratified

        return Stratified(self.kept(names, sizes, seed))


class LossSettings(SelectionSettings):
    """The rows with the largest loss: a control that costs a forward pass of the pool."""

    name: Literal["loss"] = "loss"
    reads = "losses"

    def build(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> "LargestLoss":
        """The selector of a run."""
        from llmnorm.selection.controls import LargestLoss

        return LargestLoss()


class ColmSettings(KeepSettings, FeatureSettings):
    """CoLM: the small sources' rows, and the coreset of the others (Nguyen et al. 2024,
    arXiv 2407.19580)."""

    name: Literal["colm"] = "colm"
    metric: Literal["l1", "l2", "cosine"] | None = None
    """How features are compared; left out, `l1` for `zeroth_order`, as in the paper, else `l2`."""
    dimensions: Rows = 2560
    """Coordinates of a feature that are compared: of each source those with the largest mean."""

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse angles of single numbers too."""
        if self.metric == "cosine" and self.width == 1:
            key = "probes" if self.feature == "zeroth_order" else "sketch"
            return (
                "selection.metric: 'cosine' compares angles, and a feature of one number has none; "
                f"choose l1, or give more selection.{key}"
            )
        return super().refusal(config)

    def build(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> "CoLM":
        """The selector of a run."""
        from llmnorm.selection.colm import CoLM

        one = self.feature == "zeroth_order" and self.probes == 1
        return CoLM(
            self.kept(names, sizes, seed),
            metric=self.metric or ("l1" if self.feature == "zeroth_order" else "l2"),
            dimensions=self.dimensions,
            normalise=one,
        )


Selection = Annotated[
    NoSelectionSettings | RandomSettings | StratifiedSettings | LossSettings | ColmSettings,
    Part(SelectionSettings, default="none"),
]
