"""Settings of the sequence mixers, the registry of `model.mixer`; sizes are the model's."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from llmnorm.config.values import Positions, Width
from llmnorm.nn.mixers.matrix.settings import (
    Family,
    FamilySettings,
    OddKernel,
    QuasiseparableSettings,
)
from llmnorm.part import Part, Settings, part_name

if TYPE_CHECKING:
    from llmnorm.nn.mixers.contract import Mixer as MixerModule
    from llmnorm.nn.mixers.gated_delta import GatedDeltaNet
    from llmnorm.nn.mixers.gla import GatedLinearAttention
    from llmnorm.nn.mixers.hydra import Hydra
    from llmnorm.nn.mixers.linear import LinearAttention, LinearBlock
    from llmnorm.nn.mixers.matrix.mixer import MatrixMixer
    from llmnorm.nn.mixers.nala import NaLa
    from llmnorm.nn.mixers.softmax import SoftmaxAttention
    from llmnorm.nn.mixers.ssd import SSD, StateSpaceBlock
    from llmnorm.nn.settings import ModelSettings


class MixerSettings(Settings):
    """What every mixer's settings say about it before torch is loaded."""

    @property
    def causal(self) -> bool:
        """Whether it can serve a causal language model."""
        return True

    @property
    def layer_type(self) -> str:
        """Hugging Face's name for what its cache holds (`config.layer_types`)."""
        return "full_attention"

    def check(self, model: "ModelSettings") -> None:
        """Raise a ValueError if it cannot be built for `model`."""

    @abstractmethod
    def build(self, model: "ModelSettings", layer: int) -> "MixerModule":
        """The mixer of one layer (counted from 0) of `model`."""


class RecurrentSettings(MixerSettings):
    """Settings of the mixers whose cache holds a state of constant size."""

    @property
    def layer_type(self) -> str:
        """Hugging Face's name for what its cache holds."""
        return "linear_attention"


def _whole_heads(mixer: MixerSettings, head_dim: int, inner: int) -> int:
    if inner % head_dim:
        raise ValueError(
            f"mixer '{part_name(type(mixer))}': head_dim {head_dim} does not divide expand * "
            f"hidden_size = {inner}"
        )
    return inner // head_dim


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
    sliding_window: Positions | None = None
    """Tokens that a query sees, itself included; all before it if not given (Mistral)."""
    bidirectional: bool = False
    """Look at later tokens too, as an encoder does."""

    @property
    def causal(self) -> bool:
        """Whether it can serve a causal language model."""
        return not self.bidirectional

    @model_validator(mode="after")
    def _windows_look_back(self) -> Self:
        if self.bidirectional and self.sliding_window is not None:
            raise ValueError("sliding_window covers tokens before; leave it or bidirectional out")
        return self

    @property
    def layer_type(self) -> str:
        """Hugging Face's name for what its cache holds."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"

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
            sliding_window=self.sliding_window,
            causal=self.causal,
        )


class LinearSettings(RecurrentSettings):
    """Linear attention, phi(x) = elu(x) + 1, with its normaliser and rotary positions in the
    numerator (Katharopoulos et al. 2020, arXiv 2006.16236): the plain baseline of `nala`, whose
    block it can take on."""

    name: Literal["linear"] = "linear"
    bidirectional: bool = False
    """Look at later tokens too, as an encoder does."""
    bias: bool = False
    """Offsets on the projections."""
    rotary: bool = True
    """Rotary positions."""
    gate: bool = False
    """Multiply by silu of one more projection after the norm."""
    conv_kernel: int = Field(0, ge=0, le=2**20)
    """Width of the depthwise convolution of the values that is added after mixing; 0: none."""
    norm: Literal["none", "rms", "layer"] = "none"
    """The norm after mixing: RMS norm of each head, or layer norm of all heads together."""
    norm_eps: float = Field(1e-6, ge=0)
    """Added inside that norm."""
    eps: float = Field(1e-6, ge=0)
    """Added to the mean weight in the normaliser."""

    @property
    def causal(self) -> bool:
        """Whether it can serve a causal language model."""
        return not self.bidirectional

    @model_validator(mode="after")
    def _has_a_middle(self) -> Self:
        width = self.conv_kernel
        if self.bidirectional and width and not width % 2:
            raise ValueError(f"conv_kernel {width} must be odd if bidirectional, e.g. {width + 1}")
        return self

    def build(self, model: "ModelSettings", layer: int) -> "LinearAttention":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.linear import LinearAttention

        return LinearAttention(model.hidden_size, **self._block(model))

    def _block(self, model: "ModelSettings") -> "LinearBlock":
        return {
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_key_value_heads,
            "head_dim": model.head_dim,
            "causal": self.causal,
            "bias": self.bias,
            "rotary": self.rotary,
            "gate": self.gate,
            "conv_kernel": self.conv_kernel,
            "norm": self.norm,
            "norm_eps": self.norm_eps,
            "eps": self.eps,
        }


class NaLaSettings(LinearSettings):
    """Norm-aware linear attention: the query's norm sets the power of its features (NaLaFormer,
    arXiv 2506.21137). Causal NaLa is our derivation: on every prefix the last row equals the
    official module's."""

    name: Literal["nala"] = "nala"  # type: ignore[assignment]
    lam: float = Field(3.0, gt=0)
    """lambda: the power of the keys, and the factor of the queries'."""
    tau: float = Field(0.5, gt=0)
    """The query's power is lam * (tau + tanh(|q| / norm_scale))."""
    norm_scale: float = Field(1.0, gt=0)
    """Norm of the query around which its power changes (1: the official code's)."""
    direction: Literal["sign", "cosine"] = "sign"
    """How features of opposite directions are kept apart: by sign (official code) or by cosine and
    sine of an angle (paper)."""
    alpha: float = Field(20.0, gt=0)
    """cosine: steepness of the angle; the larger, the nearer to the sign."""
    query_eps: float = Field(1e-3, ge=0)
    """Added, squared, to the square of the query's norm, which may be 0."""
    gate: bool = True
    """Multiply by silu of one more projection after the norm."""
    conv_kernel: int = Field(4, ge=0, le=2**20)
    """Width of the depthwise convolution of the values that is added after mixing; 0: none."""
    norm: Literal["rms", "layer"] = "rms"  # type: ignore[assignment]
    """The norm after mixing: RMS norm of each head, or layer norm of all heads together."""

    @model_validator(mode="after")
    def _gradients_are_finite(self) -> Self:
        if self.lam * self.tau < 1 or self.lam < 1:
            raise ValueError(
                f"lam {self.lam} and lam * tau {self.lam * self.tau:g} are the smallest powers "
                "and must be at least 1"
            )
        return self

    def build(self, model: "ModelSettings", layer: int) -> "NaLa":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.nala import NaLa

        return NaLa(
            model.hidden_size,
            lam=self.lam,
            tau=self.tau,
            norm_scale=self.norm_scale,
            direction=self.direction,
            alpha=self.alpha,
            query_eps=self.query_eps,
            **self._block(model),
        )


class _StateSpaceSettings(RecurrentSettings):
    """What the two state-space mixers share: expand * hidden_size / head_dim heads."""

    expand: int = Field(2, ge=1, le=1024)
    """Inner width over hidden_size."""
    head_dim: Width = 64
    """Width of a head's values."""
    n_groups: Width = 1
    """Groups of heads that share keys and queries (B and C)."""
    use_bias: bool = False
    """Offsets on the two projections."""
    norm_eps: float = Field(1e-5, ge=0)
    """Added inside the norm after mixing."""
    time_step_limit: tuple[float, float] | None = None
    """Clamp the time steps to this range."""
    time_step_min: float = Field(1e-3, gt=0)
    """Smallest initial time step."""
    time_step_max: float = Field(0.1, gt=0)
    """Largest initial time step."""
    time_step_floor: float = Field(1e-4, gt=0)
    """Initial time steps are clamped at it."""

    def check(self, model: "ModelSettings") -> None:
        """Whole heads, whole groups."""
        heads = _whole_heads(self, self.head_dim, self.expand * model.hidden_size)
        if heads % self.n_groups:
            raise ValueError(
                f"mixer '{part_name(type(self))}': n_groups {self.n_groups} does not divide the "
                f"{heads} heads"
            )

    def _shape(self) -> "StateSpaceBlock":
        return {
            "expand": self.expand,
            "head_dim": self.head_dim,
            "n_groups": self.n_groups,
            "use_bias": self.use_bias,
            "norm_eps": self.norm_eps,
            "dt_limit": self.time_step_limit,
            "dt_range": (self.time_step_min, self.time_step_max),
            "dt_floor": self.time_step_floor,
        }


class SSDSettings(_StateSpaceSettings):
    """The mixer of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): one decay a head, made from the
    token. It has heads of its own, expand * hidden_size / head_dim of them."""

    name: Literal["ssd"] = "ssd"
    state_size: Width = 128
    """Width of keys and queries (B and C)."""
    conv_kernel: Width = 4
    """Width of the causal convolution of x, B and C."""
    use_conv_bias: bool = True
    """Offsets in the convolution."""

    def build(self, model: "ModelSettings", layer: int) -> "SSD":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.ssd import SSD

        return SSD(
            model.hidden_size,
            state_size=self.state_size,
            conv_kernel=self.conv_kernel,
            use_conv_bias=self.use_conv_bias,
            **self._shape(),
        )


class HydraSettings(_StateSpaceSettings):
    """Hydra: SSD in both directions and a free diagonal, for encoders (Hwang et al. 2024, arXiv
    2407.09941). It has heads of its own, expand * hidden_size / head_dim of them."""

    name: Literal["hydra"] = "hydra"
    state_size: Width = 64
    """Width of keys and queries (B and C)."""
    conv_kernel: OddKernel = 7
    """Width, odd, of the symmetric convolution of x, B and C."""
    use_conv_bias: bool = True
    """Offsets in the convolution."""
    combination: Literal["quasiseparable", "add", "concat"] = "quasiseparable"
    """How the two directions come together: `add` and `concat` are the paper's ablations (table 3),
    which sum both scans, or project them side by side, without shift and free diagonal."""

    @property
    def causal(self) -> bool:
        """Whether it can serve a causal language model."""
        return False

    def build(self, model: "ModelSettings", layer: int) -> "Hydra":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.hydra import Hydra

        return Hydra(
            model.hidden_size,
            state_size=self.state_size,
            conv_kernel=self.conv_kernel,
            use_conv_bias=self.use_conv_bias,
            combination=self.combination,
            **self._shape(),
        )


class MatrixSettings(MixerSettings):
    """A mixing matrix of any family of the Hydra paper in one block, for encoders (Hwang et al.
    2024, arXiv 2407.09941, table 1). It has heads of its own, expand * hidden_size / head_dim
    of them."""

    name: Literal["matrix"] = "matrix"
    family: Family = QuasiseparableSettings()
    """What the matrix is made of."""
    expand: int = Field(2, ge=1, le=1024)
    """Inner width over hidden_size."""
    head_dim: Width = 128
    """Width of a head's values."""
    conv_kernel: OddKernel = 7
    """Width, odd, of the symmetric convolution of all that is projected but the gate."""
    use_bias: bool = False
    """Offsets on the two projections."""
    norm_eps: float = Field(1e-5, ge=0)
    """Added inside the norm after mixing."""

    @property
    def causal(self) -> bool:
        """Whether it can serve a causal language model."""
        return False

    def check(self, model: "ModelSettings") -> None:
        """Whole heads."""
        _whole_heads(self, self.head_dim, self.expand * model.hidden_size)

    def build(self, model: "ModelSettings", layer: int) -> "MatrixMixer":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.matrix.mixer import MatrixMixer

        assert isinstance(self.family, FamilySettings)
        heads = self.expand * model.hidden_size // self.head_dim
        family = self.family.build(heads, self.head_dim, model.max_position_embeddings)
        return MatrixMixer(
            model.hidden_size,
            family,
            heads=heads,
            head_dim=self.head_dim,
            conv_kernel=self.conv_kernel,
            use_bias=self.use_bias,
            norm_eps=self.norm_eps,
        )


class GLASettings(RecurrentSettings):
    """Gated linear attention: a decay for each channel of the key (Yang et al. 2023, arXiv
    2312.06635). It has heads of its own."""

    name: Literal["gla"] = "gla"
    num_heads: Width = 4
    """Heads."""
    expand_k: float = Field(0.5, gt=0, le=1024)
    """Width of all keys over hidden_size."""
    expand_v: float = Field(1.0, gt=0, le=1024)
    """Width of all values over hidden_size."""
    gate_rank: Width = 16
    """Inner width of the map to the decays."""
    gate_logit_normalizer: float = Field(16.0, gt=0)
    """Log decays are logsigmoid of the map's output, divided by this."""
    norm_eps: float = Field(1e-5, ge=0)
    """Added inside the norm after mixing."""

    def check(self, model: "ModelSettings") -> None:
        """Whole heads."""
        for key, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = expand * model.hidden_size
            if width % self.num_heads:
                raise ValueError(
                    f"mixer 'gla': {key} * hidden_size = {width:g} is not a multiple of num_heads "
                    f"{self.num_heads}"
                )

    def build(self, model: "ModelSettings", layer: int) -> "GatedLinearAttention":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.gla import GatedLinearAttention

        return GatedLinearAttention(
            model.hidden_size,
            num_heads=self.num_heads,
            key_dim=int(self.expand_k * model.hidden_size) // self.num_heads,
            value_dim=int(self.expand_v * model.hidden_size) // self.num_heads,
            gate_rank=self.gate_rank,
            gate_logit_normalizer=self.gate_logit_normalizer,
            norm_eps=self.norm_eps,
        )


class GatedDeltaSettings(RecurrentSettings):
    """The gated delta rule: what is stored under a key is replaced, not added to (Yang et al. 2024,
    arXiv 2412.06464), as the layer of Qwen3-Next."""

    name: Literal["gated_delta"] = "gated_delta"
    num_key_heads: Width | None = None
    """Heads of queries and keys; the model's num_attention_heads if not given."""
    num_value_heads: Width | None = None
    """Heads of values, a multiple; as many as of keys if not given."""
    key_head_dim: Width | None = None
    """Width of a head's queries and keys; the model's head_dim if not given."""
    value_head_dim: Width | None = None
    """Width of a head's values; key_head_dim if not given."""
    conv_kernel: Width = 4
    """Width of the causal convolution of queries, keys and values."""
    norm_eps: float = Field(1e-6, ge=0)
    """Added inside the norm after mixing."""

    def check(self, model: "ModelSettings") -> None:
        """Whole groups."""
        shape = self._shape(model)
        if shape["num_value_heads"] % shape["num_key_heads"]:
            raise ValueError(
                f"mixer 'gated_delta': num_value_heads {shape['num_value_heads']} is not a "
                f"multiple of num_key_heads {shape['num_key_heads']}"
            )

    def _shape(self, model: "ModelSettings") -> dict[str, int]:
        keys = self.num_key_heads or model.num_attention_heads
        width = self.key_head_dim or model.head_dim
        return {
            "num_key_heads": keys,
            "num_value_heads": self.num_value_heads or keys,
            "key_head_dim": width,
            "value_head_dim": self.value_head_dim or width,
        }

    def build(self, model: "ModelSettings", layer: int) -> "GatedDeltaNet":
        """The mixer of one layer (counted from 0) of `model`."""
        from llmnorm.nn.mixers.gated_delta import GatedDeltaNet

        return GatedDeltaNet(
            model.hidden_size,
            **self._shape(model),
            conv_kernel=self.conv_kernel,
            norm_eps=self.norm_eps,
        )


Mixer = Annotated[
    SoftmaxSettings
    | LinearSettings
    | NaLaSettings
    | SSDSettings
    | HydraSettings
    | MatrixSettings
    | GLASettings
    | GatedDeltaSettings,
    Part(MixerSettings, default="softmax", many=True),
]
