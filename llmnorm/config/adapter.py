"""Settings of the adapters: the registry of `adapter`, what is trained beside frozen weights.

An adapter of these kinds belongs to a linear layer y = W x of a loaded model. W is left as it is,
and two narrow matrices A (rank, in) and B (out, rank) are trained:

    lora    y = W x + s B A x                         s = alpha / rank; rsLoRA: alpha / sqrt(rank)
    dora    y = m (W + s B A) x / |W + s B A|         m (out,) is trained too; the norms are those
                                                      of the rows

Experts that a class of transformers keeps as a stack have such matrices each (`parameters`).

The classes hold data alone, since this file is on the ground floor; `models/adapters.py` puts the
layers into a model, by PEFT.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from llmnorm.config.values import LocalPath, Width
from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig

ALL_LINEAR = "all-linear"


class AdapterSettings(Settings):
    """What is known of an adapter before torch is loaded."""

    def refusal(self, config: "RunConfig") -> str | None:
        """Why a run with this configuration cannot have the adapter; None if it can."""
        return None


class NoAdapterSettings(AdapterSettings):
    """No adapter: the weights themselves are trained."""

    name: Literal["none"] = "none"


class LowRankSettings(AdapterSettings):
    """What the adapters of two narrow matrices have; base class of one of your own."""

    # What is written out again has the key `from`, which cannot be the name of a Python attribute.
    model_config = ConfigDict(serialize_by_alias=True)

    rank: Width = 16
    """Rows of A and columns of B."""
    alpha: Annotated[int, Field(ge=1, le=2**20)] = 32
    """The product of the two matrices is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped in training."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear", "none"] = (
        "all-linear"
    )
    """The linear layers that get an adapter, by their last names, e.g. [q_proj, v_proj];
    `all-linear`: all of the blocks, whatever the mixer; experts in stacks and most routers are no
    linear layers. `none`: none, where `parameters` names stacks."""
    parameters: Annotated[list[str], Field(min_length=1)] | None = None
    """The stacks of experts that get an adapter beside that (PEFT's `target_parameters`), by the
    ends of their names, e.g. [gate_up_proj, experts.down_proj]; LoRA without dropout alone, and
    only in a class of transformers. Left out, none."""
    b_lr_ratio: float = Field(default=1.0, gt=0, le=1e6)
    """How many times A's learning rate B's is, AdamW only (LoRA+: Hayou et al. 2024,
    arXiv 2402.12354, which recommends 16)."""
    start: LocalPath | None = Field(default=None, alias="from")
    """Begin with the adapter in this directory, as PEFT or `llmnorm export` writes it."""

    @property
    @abstractmethod
    def magnitude(self) -> bool:
        """Whether the length of every row is trained apart from its direction."""

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def peft_keys(self) -> dict[str, Any]:
        """The keywords of peft.LoraConfig that these settings are."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.magnitude,
        }

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse an optimizer that cannot train it, and targets that cannot have it."""
        from llmnorm.optim.settings import AdamWSettings

        if (why := self._refusal_of_stacks(config.model.foreign)) is not None:
            return why

        if self.b_lr_ratio != 1 and not isinstance(config.optimizer, AdamWSettings):
            label = getattr(config.optimizer, "name", "this one")
            return (
                f"adapter.b_lr_ratio is for optimizer 'adamw': the rule of '{label}' sets the size "
                "of a step itself; leave it out"
            )
        if getattr(config.optimizer, "nap", False):
            return (
                "optimizer.nap scales every matrix back to its initial norm, and that of an "
                "adapter's B is 0, so that it would never be trained; leave optimizer.nap out"
            )
        if "lm_head" in self.targets and config.model.tie_word_embeddings:
            return (
                "adapter.targets: 'lm_head' is the embedding in a model with "
                "model.tie_word_embeddings, and an adapter would part them; leave it out"
            )
        return None

    def _refusal_of_stacks(self, foreign: bool) -> str | None:
        """Why `parameters` cannot be had, or `targets: none` not without it; None if it can."""
        if self.parameters is None:
            if self.targets == "none":
                return (
                    "adapter.targets: 'none' leaves nothing with an adapter; add "
                    "adapter.parameters, or leave it out"
                )
            return None
        if not foreign:
            return (
                "adapter.parameters: names stacks of experts, which llmnorm's own classes do not "
                "have; leave it out"
            )
        if self.magnitude:
            return (
                "adapter.parameters: PEFT puts LoRA alone around stacks of experts, and the "
                "adapter trains magnitudes too (DoRA); give adapter.name=lora, or leave it out"
            )
        if self.dropout:
            return (
                f"adapter.parameters: adapter.dropout is {self.dropout:g}, and an adapter of a "
                "stack of experts has no inputs of its own to drop; give 0, or leave it out"
            )
        return None


class LoraSettings(LowRankSettings):
    """Low-rank adaptation: W + s B A with W frozen.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; B begins as 0.
    """

    name: Literal["lora"] = "lora"
    magnitude: ClassVar[bool] = False


class DoraSettings(LowRankSettings):
    """Weight-decomposed adaptation: the direction of every row of W + s B A, times a length that is
    trained too.

    Source: Liu et al. 2024, arXiv 2402.09353, equation 5; the norm is a constant in the backward
    pass (section 4.3).
    """

    name: Literal["dora"] = "dora"
    magnitude: ClassVar[bool] = True


Adapter = Annotated[
    NoAdapterSettings | LoraSettings | DoraSettings, Part(LowRankSettings, default="none")
]


def frozen_refusal(config: "RunConfig") -> str | None:
    """Why what a run freezes contradicts another of its settings; None if it does not."""
    asked = config.training.trainable
    if asked == "adapter" and not config.has_adapter:
        return "training.trainable: there is no adapter; add adapter=lora, or leave it out"
    if asked == "all" and config.has_adapter:
        return (
            "training.trainable: 'all' trains the weights that an adapter is there to leave alone; "
            "leave it out, or the adapter"
        )
    if config.model.quantize is not None:
        name = config.model.quantize
        if not config.has_adapter:
            return (
                f"model.quantize: '{name}' stores weights that an adapter is trained beside; add "
                "adapter=lora, or leave it out"
            )
        if config.parallel.sharding not in ("auto", "none"):
            return quantized_refusal(name, config.parallel.sharding)
    if not config.freezes:
        return None
    key = "adapter.name" if config.has_adapter else "training.trainable"
    if config.model.pretrained is None:
        return f"{key}: is trained beside weights that are there already; add model.pretrained"
    if automatic := config.automatic():
        return (
            f"{automatic[0]}: auto: the Step Law is about training all weights and says nothing of "
            f"{key}; give a number"
        )
    return None


def quantized_refusal(name: str, sharding: str) -> str:
    """Why a run whose weights are stored in few bits cannot have a sharding but `none`."""
    return (
        f"model.quantize: '{name}' is for one process, whose weights are all its own, and "
        f"parallel.sharding is '{sharding}'; start one process with parallel.sharding=none, or "
        "leave model.quantize out"
    )
