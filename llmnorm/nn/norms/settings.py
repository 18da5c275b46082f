"""Settings of the norms and of where they stand in the block: `model.norm`, `model.placement`.

A norm acts on the last axis of (..., hidden) and keeps shape and dtype; its `build(hidden_size)`
gives the module. A placement says where the norms of a block stand; its `build(model, layer)` gives
the block.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmnorm.config.values import Width
from llmnorm.part import InputError, Part, Settings

if TYPE_CHECKING:
    from llmnorm.nn.block import Block
    from llmnorm.nn.norms.crms import CRMSNorm
    from llmnorm.nn.norms.dyt import DyT
    from llmnorm.nn.norms.identity import Identity
    from llmnorm.nn.norms.layer import LayerNorm
    from llmnorm.nn.norms.power import PowerNorm
    from llmnorm.nn.norms.rms import RMSNorm
    from llmnorm.nn.norms.unified import UnifiedNorm
    from llmnorm.nn.settings import ModelSettings


class NormSettings(Settings):
    """What a norm's settings say about it before torch is loaded; base of a norm of your own."""

    @abstractmethod
    def build(self, hidden_size: int) -> Any:
        """The norm (a torch module) over a last axis of `hidden_size`."""

    def refusal(self, hidden_size: int, *, causal: bool = True) -> str | None:
        """Why a model of this width, which looks back only if `causal`, cannot have it, or None."""
        return None

    def check(self, hidden_size: int) -> None:
        """What a norm's class calls, so that it refuses what its settings refuse.

        Raises:
            InputError: the norm cannot have this width.
        """
        if why := self.refusal(hidden_size, causal=False):
            raise InputError(why)


class RMSNormSettings(NormSettings):
    """Root mean square norm without centring (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    name: Literal["rms"] = "rms"
    eps: float = Field(1e-6, ge=0)
    """Added to the mean square, inside the root."""
    cast_mode: Literal["fp32_affine", "llama"] = "fp32_affine"
    """Where bf16 and fp16 are rounded: `fp32_affine` once, after the gain, as torch's rms_norm;
    `llama` before the gain, as Hugging Face's Llama, to which it is equal to the bit (for comparing
    exported models)."""
    bias: bool = False
    """Learn an offset beside the gain; a converted layer norm has one."""

    @model_validator(mode="after")
    def _no_offset_in_llama(self) -> "RMSNormSettings":
        if self.bias and self.cast_mode == "llama":
            raise ValueError("cast_mode 'llama' has no offset; leave bias out")
        return self

    def build(self, hidden_size: int) -> "RMSNorm":
        """The norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.rms import RMSNorm

        return RMSNorm(hidden_size, eps=self.eps, cast_mode=self.cast_mode, bias=self.bias)


class LayerNormSettings(NormSettings):
    """Layer norm: centred, biased variance (Ba et al. 2016, arXiv 1607.06450)."""

    name: Literal["layer"] = "layer"
    eps: float = Field(1e-5, ge=0)
    """Added to the variance, inside the root."""
    bias: bool = True
    """Learn an offset beside the gain."""

    def build(self, hidden_size: int) -> "LayerNorm":
        """The norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.layer import LayerNorm

        return LayerNorm(hidden_size, eps=self.eps, bias=self.bias)


class CRMSNormSettings(NormSettings):
    """Compressed RMS norm: the RMS norm of a vector of mean zero whose last entry is not stored
    (Jiang et al. 2023, arXiv 2305.14858). It has no gain."""

    name: Literal["crms"] = "crms"
    eps: float = Field(1e-6, ge=0)
    """Added to the mean square over hidden_size + 1 entries, inside the root."""

    def build(self, hidden_size: int) -> "CRMSNorm":
        """The norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.crms import CRMSNorm

        return CRMSNorm(hidden_size, eps=self.eps)


class DyTSettings(NormSettings):
    """Dynamic tanh: gain * tanh(alpha x) + bias, no statistics (Zhu et al. 2025, arXiv
    2503.10622)."""

    name: Literal["dyt"] = "dyt"
    alpha: float = Field(0.5, gt=0)
    """Initial value of the learned factor inside."""
    bias: bool = True
    """Learn an offset beside the gain."""

    def build(self, hidden_size: int) -> "DyT":
        """The stand-in for a norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.dyt import DyT

        return DyT(hidden_size, alpha=self.alpha, bias=self.bias)


class PowerNormSettings(NormSettings):
    """PowerNorm: each channel divided by the root of its running mean square, with an approximate
    backward pass (Shen et al. 2020, arXiv 2003.07845)."""

    name: Literal["power"] = "power"
    eps: float = Field(1e-5, ge=0)
    """Added to the running mean square, inside the root."""
    forward_decay: float = Field(0.9, ge=0, lt=1)
    """Of the running mean square, a step."""
    backward_decay: float = Field(0.9, ge=0, lt=1)
    """Of the running mean that stands for the statistic's gradient, a step."""
    warmup: int = Field(0, ge=0, le=10**12)
    """Steps that divide by their own batch's mean square instead of the former steps'. A causal
    model then sees later tokens in training (`allow_leak`)."""
    groups: Width = 1
    """Groups of channels that are divided by their own root mean square first, token by token."""
    backward: Literal["official", "paper"] = "official"
    """What the backward pass divides by: the batch's own statistic (the authors' code) or the
    running one (algorithm 2)."""
    count_padding: bool = False
    """Take the backward pass's means over padding too, as the authors' code does."""
    allow_leak: bool = False
    """Train a causal model although the warm-up shows it later tokens."""

    def refusal(self, hidden_size: int, *, causal: bool = True) -> str | None:
        """Groups that do not divide the width; a causal model's warm-up without `allow_leak`."""
        if hidden_size % self.groups:
            return f"norm.groups {self.groups} does not divide hidden_size {hidden_size}"
        if self.warmup and causal and not self.allow_leak:
            return (
                "norm.warmup: in its warm-up 'power' normalises by statistics of the batch, later "
                "tokens included; take warmup 0 or norm.allow_leak=true"
            )
        return None

    def build(self, hidden_size: int) -> "PowerNorm":
        """The norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.power import PowerNorm

        return PowerNorm(hidden_size, **self.model_dump(exclude={"name", "allow_leak"}))


class UnifiedNormSettings(NormSettings):
    """Unified Normalization: each channel divided by the root of its mean square, smoothed over a
    window of steps; one factor a channel in evaluation (Yang et al. 2022, arXiv 2208.01313)."""

    name: Literal["unified"] = "unified"
    eps: float = Field(1e-5, ge=0)
    """Added to the mean square, inside the root."""
    window: int = Field(4, ge=1, le=10_000)
    """Steps over which the statistics are averaged. With 1 every step takes its own batch's alone,
    as the authors' code does."""
    warmup: int = Field(4000, ge=0, le=10**12)
    """Steps that divide by their own batch's mean square."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the running means, a step."""
    filter: Literal["off", "official", "paper"] = "off"
    """Leave batches with outliers out of the window: by one threshold over all channels (the
    authors' code) or channel by channel (the paper)."""
    count_padding: bool = False
    """Take the backward pass's means over padding too, as the authors' code does."""
    allow_leak: bool = False
    """Train a causal model although this norm shows it later tokens."""

    def refusal(self, hidden_size: int, *, causal: bool = True) -> str | None:
        """A causal model without `allow_leak`: the norm looks at the whole batch."""
        if self.allow_leak or not causal:
            return None
        return (
            "norm 'unified' normalises by statistics of the batch, later tokens included, and "
            "cannot serve a causal language model unless norm.allow_leak=true"
        )

    def build(self, hidden_size: int) -> "UnifiedNorm":
        """The norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.unified import UnifiedNorm

        return UnifiedNorm(hidden_size, **self.model_dump(exclude={"name", "allow_leak"}))


class IdentitySettings(NormSettings):
    """No norm: what is left of `unified` when `llmnorm convert --to identity` has folded it into
    the next linear layers."""

    name: Literal["identity"] = "identity"

    def build(self, hidden_size: int) -> "Identity":
        """Returns its input."""
        from llmnorm.nn.norms.identity import Identity

        return Identity()


Norm = Annotated[
    RMSNormSettings
    | LayerNormSettings
    | CRMSNormSettings
    | PowerNormSettings
    | UnifiedNormSettings
    | DyTSettings
    | IdentitySettings,
    Part(NormSettings, default="rms"),
]


class PlacementSettings(Settings):
    """What every placement's settings say about it before torch is loaded."""

    scales_with_depth: ClassVar[bool] = False
    """Whether `model.depth_scaling` is defined for it."""
    own_initialization: ClassVar[bool] = False
    """Whether it sets the standard deviations of the block's weights."""

    @abstractmethod
    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""


class PreSettings(PlacementSettings):
    """x + f(norm(x)) (Xiong et al. 2020, arXiv 2002.04745)."""

    name: Literal["pre"] = "pre"
    scales_with_depth = True

    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""
        from llmnorm.nn.block import PreBlock

        return PreBlock(model, layer)


class PostSettings(PlacementSettings):
    """norm(x + f(x)) (Vaswani et al. 2017, arXiv 1706.03762)."""

    name: Literal["post"] = "post"

    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""
        from llmnorm.nn.block import PostBlock

        return PostBlock(model, layer)


class SandwichSettings(PlacementSettings):
    """x + norm(f(norm(x))) (Ding et al. 2021, CogView, arXiv 2105.13290)."""

    name: Literal["sandwich"] = "sandwich"

    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""
        from llmnorm.nn.block import SandwichBlock

        return SandwichBlock(model, layer)


class PeriSettings(SandwichSettings):
    """Peri-LN, another name of sandwich (Kim et al. 2025, arXiv 2502.02732)."""

    name: Literal["peri"] = "peri"  # type: ignore[assignment]


class ReorderedSettings(PlacementSettings):
    """x + norm(f(x)) (OLMo 2, arXiv 2501.00656)."""

    name: Literal["reordered"] = "reordered"

    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""
        from llmnorm.nn.block import ReorderedBlock

        return ReorderedBlock(model, layer)


class DeepNormSettings(PlacementSettings):
    """norm(alpha x + f(x)), alpha = (2N)^1/4 for N layers, with initial weights of its own
    (Wang et al. 2022, arXiv 2203.00555)."""

    name: Literal["deepnorm"] = "deepnorm"
    own_initialization = True

    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""
        from llmnorm.nn.block import DeepNormBlock

        return DeepNormBlock(model, layer)


class MixSettings(PlacementSettings):
    """Mix-LN: post in the first layers, pre in the others (Li et al. 2024, arXiv 2412.13795)."""

    name: Literal["mix"] = "mix"
    post: float = Field(0.25, ge=0, le=1)
    """Share of the layers that are post-norm, rounded down to whole layers."""

    def build(self, model: "ModelSettings", layer: int) -> "Block":
        """The block of one layer (counted from 0) of `model`."""
        from llmnorm.nn.block import PostBlock, PreBlock

        post = layer < int(self.post * model.num_hidden_layers + 1e-9)
        return (PostBlock if post else PreBlock)(model, layer)


Placement = Annotated[
    PreSettings
    | PostSettings
    | SandwichSettings
    | PeriSettings
    | ReorderedSettings
    | DeepNormSettings
    | MixSettings,
    Part(PlacementSettings, default="pre"),
]
