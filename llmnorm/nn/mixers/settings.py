"""Settings of the sequence mixers: the registry of `model.mixer`.

A mixer gets its shape (hidden_size, num_attention_heads, num_key_value_heads, head_dim) from the
model's settings; only what belongs to its own kind stands here.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.nn.mixers.contract import Mixer as MixerModule
    from llmnorm.nn.mixers.softmax import SoftmaxAttention
    from llmnorm.nn.settings import ModelSettings


class MixerSettings(Settings):
    """What every mixer's settings say about it before torch is loaded."""

    causal: ClassVar[bool] = True
    """Whether it can serve a causal language model."""
    layer_type: ClassVar[str] = "full_attention"
    """Hugging Face's name for what its cache holds (`config.layer_types`)."""

    def build(self, model: "ModelSettings", layer: int) -> "MixerModule":
        """The mixer of one layer (counted from 0) of `model`."""
        raise NotImplementedError


class SoftmaxSettings(MixerSettings):
    """Softmax attention with grouped query heads and rotary positions (Vaswani et al. 2017, arXiv
    1706.03762; Ainslie et al. 2023, arXiv 2305.13245; Su et al. 2021, arXiv 2104.09864)."""

    name: Literal["softmax"] = "softmax"
    attention_bias: bool | Literal["qkv"] = False
    """Offsets on all four projections (`true`), or on query, key and value (`qkv`, as Qwen2)."""
    qk_norm: bool = False
    """RMS norm of each head's query and key before the rotation, as in Qwen3."""
    qk_norm_eps: float = Field(1e-6, ge=0)
    """Added to the mean square in that norm."""

    def build(self, model: "ModelSettings", layer: int) -> "SoftmaxAttention":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.softmax import SoftmaxAttention

        return SoftmaxAttention(
            model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            qkv_bias=bool(self.attention_bias),
            output_bias=self.attention_bias is True,
            qk_norm_eps=self.qk_norm_eps if self.qk_norm else None,
        )


Mixer = Annotated[SoftmaxSettings, Part(default="softmax", many=True)]
