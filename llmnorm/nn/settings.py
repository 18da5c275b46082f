"""The model's settings: the only list of its fields, with Hugging Face's names.

Derived defaults (head_dim, intermediate_size, ...) are computed from the fields before them and are
not part of a run's own YAML unless written there, so that `model.hidden_size=512` moves them along.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llmnorm.config.values import Layers, Positions, Vocabulary, Width
from llmnorm.nn.mixers.settings import Mixer, MixerSettings, SoftmaxSettings
from llmnorm.nn.norms.settings import (
    Norm,
    NormSettings,
    Placement,
    PlacementSettings,
    PreSettings,
    RMSNormSettings,
)
from llmnorm.part import Part, Settings, part_name

if TYPE_CHECKING:
    from llmnorm.nn.mlp import GELU, SwiGLU


class MLPSettings(Settings):
    """What every MLP's settings say about it; base class of an MLP of your own."""

    @abstractmethod
    def default_intermediate_size(self, hidden_size: int) -> int:
        """The inner width where the model's settings give none."""

    @abstractmethod
    def build(self, hidden_size: int, intermediate_size: int) -> Any:
        """The MLP (a torch module) from and to `hidden_size`; None for none."""


class SwiGLUSettings(MLPSettings):
    """Gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    name: Literal["swiglu"] = "swiglu"
    bias: bool = False
    """Offsets on the three projections."""

    def default_intermediate_size(self, hidden_size: int) -> int:
        """8/3 of the width, rounded up to a multiple of 64: as many weights as a plain MLP of 4."""
        return -(-8 * hidden_size // (3 * 64)) * 64

    def build(self, hidden_size: int, intermediate_size: int) -> "SwiGLU":
        """The MLP from and to `hidden_size`."""
        from llmnorm.nn.mlp import SwiGLU

        return SwiGLU(hidden_size, intermediate_size, bias=self.bias)


class GELUSettings(MLPSettings):
    """Plain MLP: down(gelu(up(x))) (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

    name: Literal["gelu"] = "gelu"
    bias: bool = False
    """Offsets on the two projections."""

    def default_intermediate_size(self, hidden_size: int) -> int:
        """Four times the width."""
        return 4 * hidden_size

    def build(self, hidden_size: int, intermediate_size: int) -> "GELU":
        """The MLP from and to `hidden_size`."""
        from llmnorm.nn.mlp import GELU

        return GELU(hidden_size, intermediate_size, bias=self.bias)


class NoMLPSettings(MLPSettings):
    """Nothing: a block is its mixer alone, as in Mamba and Hydra-BERT."""

    name: Literal["none"] = "none"

    def default_intermediate_size(self, hidden_size: int) -> int:
        """1, which nothing reads."""
        return 1

    def build(self, hidden_size: int, intermediate_size: int) -> None:
        """No module."""


Mlp = Annotated[SwiGLUSettings | GELUSettings | NoMLPSettings, Part(MLPSettings, default="swiglu")]

# What each kind of rotary scaling needs and may have besides rope_type and rope_theta, as in
# transformers' modeling_rope_utils.
_ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    # The first three do not read the original context, which transformers lets them have.
    "default": (set(), {"original_max_position_embeddings"}),
    "linear": ({"factor"}, {"original_max_position_embeddings"}),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": (
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
        set(),
    ),
    "longrope": (
        {"short_factor", "long_factor", "original_max_position_embeddings"},
        {"factor", "attention_factor"},
    ),
}


class RopeParameters(Settings):
    """Rotary positions and how they are stretched, in Hugging Face's keys."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    """The kind of scaling; `default` is none."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the wavelengths."""
    factor: float | None = Field(None, ge=1)
    """How many times the original context is stretched (all kinds but `default`)."""
    original_max_position_embeddings: Positions | None = None
    """Context of the original training (yarn, llama3, longrope)."""
    attention_factor: float | None = Field(None, gt=0)
    """Multiplies cos and sin (yarn, longrope); the paper's value if not given."""
    beta_fast: float | None = Field(None, gt=0)
    """yarn: rotations above which a frequency stays as it is (32 if not given)."""
    beta_slow: float | None = Field(None, gt=0)
    """yarn: rotations below which a frequency is stretched in full (1 if not given)."""
    mscale: float | None = Field(None, ge=0)
    """yarn: weight of log(factor) in the numerator of attention_factor."""
    mscale_all_dim: float | None = Field(None, ge=0)
    """yarn: the same in its denominator."""
    truncate: bool | None = None
    """yarn: round the range of the ramp to whole dimensions (true if not given)."""
    low_freq_factor: float | None = Field(None, gt=0)
    """llama3: wavelengths above original context / this are stretched in full."""
    high_freq_factor: float | None = Field(None, gt=0)
    """llama3: wavelengths below original context / this stay as they are."""
    short_factor: list[float] | None = None
    """longrope: divisor of each frequency up to the original context, head_dim/2 numbers."""
    long_factor: list[float] | None = None
    """longrope: the same beyond it."""

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "RopeParameters":
        required, optional = _ROPE_KEYS[self.rope_type]
        given = {k for k, v in self if v is not None} - {"rope_type", "rope_theta"}
        if missing := sorted(required - given):
            raise ValueError(f"rope_type '{self.rope_type}' needs {', '.join(missing)}")
        if excess := sorted(given - required - optional):
            raise ValueError(f"rope_type '{self.rope_type}' does not take {', '.join(excess)}")
        if self.rope_type == "llama3":
            assert self.low_freq_factor is not None and self.high_freq_factor is not None
            if self.high_freq_factor <= self.low_freq_factor:
                raise ValueError("high_freq_factor must be greater than low_freq_factor")
        return self


def _inner_width(mlp: Any, hidden_size: int) -> int:
    """An MLP's own multiple of the width; anything for one that is not imported yet."""
    return mlp.default_intermediate_size(hidden_size) if isinstance(mlp, MLPSettings) else 1


class ModelSettings(Settings):
    """A transformer: decoder or, where its mixers look at later tokens too, encoder."""

    vocab_size: Vocabulary | Literal["auto"] = "auto"
    """Rows of the embedding; `auto` takes the tokenizer's."""
    hidden_size: Width = 512
    """Width of the residual stream."""
    num_hidden_layers: Layers = 8
    """Number of blocks."""
    num_attention_heads: Width = 8
    """Query heads."""
    num_key_value_heads: Width = Field(default_factory=lambda data: data["num_attention_heads"])
    """Key and value heads, each shared by a group of query heads; all heads if not given."""
    head_dim: Width = Field(
        default_factory=lambda data: data["hidden_size"] // data["num_attention_heads"]
    )
    """Width of a head; hidden_size / num_attention_heads if not given."""
    norm: Norm = RMSNormSettings()
    """The norm in the blocks and at the end."""
    placement: Placement = PreSettings()
    """Where the norms stand in the blocks."""
    depth_scaling: Literal["none", "lns"] = "none"
    """`lns`: the output of the norms of layer l = 1, 2, ... is divided by sqrt(l) (LayerNorm
    Scaling, arXiv 2502.05795); not that of the final norm."""
    mixer: Mixer = SoftmaxSettings()
    """What mixes positions; a list repeats over the layers."""
    mlp: Mlp = SwiGLUSettings()
    """What follows the mixer in each block."""
    intermediate_size: int = Field(
        default_factory=lambda data: _inner_width(data["mlp"], data["hidden_size"]),
        ge=1,
        le=2**24,
    )
    """Inner width of the MLP; the part's own multiple of hidden_size if not given."""
    max_position_embeddings: Positions = 2048
    """Longest context the model is meant for; some rotary kinds scale with it."""
    rope_parameters: RopeParameters = RopeParameters()
    """Rotary positions."""
    type_vocab_size: int = Field(0, ge=0, le=2**24)
    """Rows of a second embedding, which tells the first sentence's tokens from the second's (BERT:
    2); 0: none."""
    embedding_norm: bool = False
    """A norm of the embeddings, before the first block, as in BERT."""
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the embeddings (and of what a classifier reads) that is dropped in training."""
    final_norm: bool = True
    """A norm after the last block; BERT, whose blocks end with one, has none."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head."""
    initializer_range: float = Field(0.02, ge=0)
    """Standard deviation of the initial weights."""
    initialization: Literal["normal", "scaled"] = "normal"
    """`scaled`: initial weights that write to the residual stream are divided by sqrt(2 layers)
    (GPT-2)."""
    embedding_std: float = Field(default_factory=lambda data: data["initializer_range"], ge=0)
    """The embedding's own standard deviation; initializer_range if not given."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of each mixer's and MLP's output that is dropped in training."""
    export_as: Literal["llama", "mistral", "qwen2", "qwen3"] | None = None
    """The stock architecture of `llmnorm export --stock`; the one that fits if not given. A stock
    model loaded by `model.pretrained` brings its own."""

    @model_validator(mode="after")
    def _possible(self) -> "ModelSettings":
        width, heads = self.hidden_size, self.num_attention_heads
        if "head_dim" not in self.model_fields_set and width % heads:
            raise ValueError(
                f"hidden_size {width} is not a multiple of num_attention_heads {heads}; "
                "change one of them or give head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        rope = self.rope_parameters
        for key, factors in (
            ("short_factor", rope.short_factor),
            ("long_factor", rope.long_factor),
        ):
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rope_parameters.{key} has {len(factors)} numbers, "
                    f"head_dim {self.head_dim} needs {self.head_dim // 2}"
                )
        if isinstance(self.norm, NormSettings):
            why = self.norm.refusal(self.hidden_size, causal=self.causal)
            if why is not None:
                raise ValueError(why)
        if isinstance(self.placement, PlacementSettings):
            if self.depth_scaling != "none" and not self.placement.scales_with_depth:
                raise ValueError(
                    f"depth_scaling '{self.depth_scaling}' is defined for placement 'pre', not for "
                    f"'{part_name(type(self.placement))}'"
                )
            if self.initialization != "normal" and self.placement.own_initialization:
                raise ValueError(
                    f"placement '{part_name(type(self.placement))}' has initial weights of its "
                    "own; leave initialization out"
                )
        mixers = self.mixer if isinstance(self.mixer, list) else [self.mixer]
        if len(mixers) > self.num_hidden_layers:
            raise ValueError(
                f"mixer lists {len(mixers)} parts, num_hidden_layers is {self.num_hidden_layers}"
            )
        for part in mixers:
            if isinstance(part, MixerSettings):
                part.check(self)
        known = [part for part in mixers if isinstance(part, MixerSettings)]
        causal = [part_name(type(part)) for part in known if part.causal]
        if causal and len(causal) < len(known):
            (other, *_) = (part_name(type(part)) for part in known if not part.causal)
            raise ValueError(
                f"mixer lists '{other}', which looks at later tokens, beside '{causal[0]}', which "
                "does not; all layers look the same way"
            )
        return self

    @property
    def causal(self) -> bool:
        """Whether every token sees only itself and what is before it."""
        return all(mixer.causal for mixer in self.mixers() if isinstance(mixer, MixerSettings))

    def notes(self) -> list[str]:
        """What can be meant but rarely is."""
        if self.depth_scaling == "none" or self.initialization == "normal":
            return []
        return [
            f"model.depth_scaling '{self.depth_scaling}' and model.initialization "
            f"'{self.initialization}' both shrink the branches; the paper trains with one of them"
        ]

    def mixers(self) -> list[MixerSettings]:
        """The mixer of every layer, the list repeated."""
        parts = self.mixer if isinstance(self.mixer, list) else [self.mixer]
        return [parts[layer % len(parts)] for layer in range(self.num_hidden_layers)]
