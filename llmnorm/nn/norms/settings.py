"""Settings of the norms: the registry of `model.norm`.

A norm acts on the last axis of (..., hidden) and keeps the shape and the dtype; where it stands in
the block is the block's business. `build(hidden_size)` gives the module.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.nn.norms.layer import LayerNorm
    from llmnorm.nn.norms.rms import RMSNorm


class RMSNormSettings(Settings):
    """Root mean square norm without centring (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    name: Literal["rms"] = "rms"
    eps: float = Field(1e-6, ge=0)
    """Added to the mean square, inside the root."""
    cast_mode: Literal["fp32_affine", "llama"] = "fp32_affine"
    """Where bf16 is rounded: `fp32_affine` once, after the gain (as torch's rms_norm); `llama`
    before the gain, as Hugging Face's Llama does (bit-equal to it, for comparing exported
    models)."""

    def build(self, hidden_size: int) -> "RMSNorm":
        """The norm over a last axis of `hidden_size`."""
        from llmnorm.nn.norms.rms import RMSNorm

        return RMSNorm(hidden_size, eps=self.eps, cast_mode=self.cast_mode)


class LayerNormSettings(Settings):
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


Norm = Annotated[RMSNormSettings | LayerNormSettings, Part(default="rms")]
