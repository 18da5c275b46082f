"""The settings of stock models (Llama, Mistral, Qwen2, Qwen3) translated to ours, and back.

Both directions work on plain JSON values, so that a mistake is answered before torch is loaded.
Weights need no translation: our parameters carry the stock names.

What would surprise: a `config.json` leaves out the keys that have their default, so the defaults of
the four classes are written here (a test compares them with transformers'). Keys that the stock
class does not read (`pretraining_tp`, another tool's notes) are ignored, as there. A key that the
stock class reads and that our model cannot follow is refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from pydantic import ConfigDict, Field

from llmnorm.machine import reading
from llmnorm.nn.mixers.settings import SoftmaxSettings
from llmnorm.nn.norms.settings import PreSettings, RMSNormSettings
from llmnorm.nn.settings import ModelSettings, SwiGLUSettings
from llmnorm.part import InputError, Settings, nearest


class DoesNotFit(InputError):
    """A stock model that our classes cannot compute; transformers' own class may."""


class Kind(NamedTuple):
    """A stock architecture: its class, and what a key that is left out means."""

    architecture: str
    defaults: dict[str, Any]


_SAME = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "pad_token_id": None,
}
_QWEN = _SAME | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = {
    "llama": Kind(
        "LlamaForCausalLM",
        _SAME
        | {
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mistral": Kind(
        "MistralForCausalLM",
        _SAME
        | {
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "head_dim": None,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Kind("Qwen2ForCausalLM", _QWEN | {"head_dim": None}),
    "qwen3": Kind("Qwen3ForCausalLM", _QWEN | {"head_dim": 128, "attention_bias": False}),
}
Tokens = int | list[int] | None  # a token's id, or several that end a text


def all_tokens(*given: Tokens) -> Tokens:
    """Every token of `given` once, in that order: a number where it is one, None where none is."""
    lists = [[ids] if isinstance(ids, int) else ids for ids in given if ids is not None]
    several = list(dict.fromkeys(token for ids in lists for token in ids))
    return several if len(several) > 1 else several[0] if several else None


class _Keys(Settings):
    """The keys of a stock config.json that are read; others are of no meaning to us."""

    model_config = ConfigDict(extra="ignore")

    architectures: list[str] | None = None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None
    head_dim: int | None
    max_position_embeddings: int
    hidden_act: str
    initializer_range: float
    rms_norm_eps: float
    attention_dropout: float
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    bos_token_id: Tokens
    eos_token_id: Tokens
    pad_token_id: Tokens


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ORIGINAL = "original_max_position_embeddings"


def from_stock(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate a stock `config.json` into our keys (those of `ModelSettings` and the token ids).

    Args:
        config: the file's values.
        where: the file, for messages.

    Raises:
        DoesNotFit: the architecture is not one of the four, or a key asks for something that our
            model does not compute.
        InputError: it is no causal language model, or a value is not valid.
    """

    def refuse(key: str, why: str) -> NoReturn:
        raise DoesNotFit(f"{where}: {key}: {why}")

    name = config.get("model_type")
    if not isinstance(name, str) or name not in KINDS:
        hint = nearest(str(name), [*KINDS, "llmnorm"])
        refuse("model_type", f"'{name}' cannot be loaded as an llmnorm model; {hint}")
    kind = KINDS[name]
    given = kind.defaults | dict(config)
    reading.checked(given, _Keys, where)
    classes = config.get("architectures") or [kind.architecture]
    if kind.architecture not in classes:
        raise InputError(
            f"{where}: architectures: {classes[0]} is no causal language model "
            f"({kind.architecture})"
        )
    for key in ("quantization_config", "per_layer_config"):
        if config.get(key):
            refuse(key, "only models with plain weights and the same layers throughout are loaded")
    if given["hidden_act"] != "silu":
        refuse("hidden_act", f"'{given['hidden_act']}'; our gated MLP has silu only")
    if given["attention_dropout"]:
        refuse("attention_dropout", f"{given['attention_dropout']}; our mixer has none (set it 0)")
    _refuse_windows(name, given, refuse)

    heads = given["num_attention_heads"]
    eps = given["rms_norm_eps"]
    mixer: dict[str, Any] = {"name": "softmax"}
    mixer["attention_bias"] = "qkv" if name == "qwen2" else given.get("attention_bias", False)
    if name == "mistral" and given["sliding_window"] is not None:
        mixer["sliding_window"] = given["sliding_window"]
    if name == "qwen3":
        mixer |= {"qk_norm": True, "qk_norm_eps": eps}
    return {
        **{k: given[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        "num_attention_heads": heads,
        "num_key_value_heads": given["num_key_value_heads"] or heads,
        "head_dim": given["head_dim"] or given["hidden_size"] // heads,
        "norm": {"name": "rms", "eps": eps},
        "mixer": mixer,
        "mlp": {"name": "swiglu", "bias": given.get("mlp_bias", False)},
        **{k: given[k] for k in ("intermediate_size", "max_position_embeddings")},
        "rope_parameters": _rope(given, refuse),
        **{k: given[k] for k in ("tie_word_embeddings", "initializer_range")},
        "export_as": name,
        **{k: given[k] for k in _TOKENS},
    }


def to_stock(
    settings: ModelSettings, who: str = "--stock", cure: str = "export without --stock"
) -> tuple[str, dict[str, Any]]:
    """Find the stock architecture that computes what this model computes.

    Where two do (Llama and Mistral), `export_as` chooses. Dropout is left out, since it does
    nothing outside training. Depth scaling has no key in a stock configuration: the caller must
    multiply it into the gains when it writes the weights.

    Args:
        settings: of the model.
        who, cure: how a refusal begins and ends.

    Returns:
        The name of transformers' model class, e.g. "LlamaForCausalLM", and the keys of its
        configuration (without token ids).

    Raises:
        InputError: no stock architecture computes this model; the key is named.
    """

    def refuse(key: str, why: str) -> NoReturn:
        raise InputError(f"{who}: model.{key}: {why}; {cure}")

    if not settings.causal:
        refuse("mixer", "this is an encoder; the stock architectures only look at earlier tokens")
    for key, plain in (("type_vocab_size", 0), ("embedding_norm", False), ("final_norm", True)):
        if getattr(settings, key) != plain:
            refuse(key, f"{getattr(settings, key)} is what no stock architecture has")
    if not isinstance(settings.placement, PreSettings):
        refuse("placement", f"no stock architecture has {_called(settings.placement)}, only pre")
    norm, mlp, mixers = settings.norm, settings.mlp, settings.mixers()
    if not isinstance(norm, RMSNormSettings):
        refuse("norm", f"no stock architecture has {_called(norm)}, only rms")
    if norm.bias:
        refuse("norm.bias", "no stock architecture has an offset in its norms")
    if not isinstance(mlp, SwiGLUSettings):
        refuse("mlp", f"no stock architecture has {_called(mlp)}, only swiglu")
    mixer = mixers[0]
    if any(other != mixer for other in mixers):
        refuse("mixer", "no stock architecture mixes several")
    if not isinstance(mixer, SoftmaxSettings):
        refuse("mixer", f"no stock architecture has {_called(mixer)}, only softmax")
    fitting = "llama" if mixer.sliding_window is None else "mistral"
    if mixer.attention_bias == "qkv":
        fitting = "qwen2"
    if mixer.qk_norm:
        fitting = "qwen3"
    name = settings.export_as or fitting
    architecture = KINDS[name].architecture

    if mixer.qk_norm != (name == "qwen3"):
        has = "has no" if mixer.qk_norm else "always has a"
        refuse("mixer.qk_norm", f"{architecture} {has} norm of queries and keys")
    if mixer.qk_norm and mixer.qk_norm_eps != norm.eps:
        refuse("mixer.qk_norm_eps", f"differs from model.norm.eps; {architecture} has one for both")
    biases = {"qwen2": ("qkv",), "mistral": (False,)}.get(name, (False, True))
    if mixer.attention_bias not in biases:
        refuse("mixer.attention_bias", f"{mixer.attention_bias} is not what {architecture} has")
    if mixer.sliding_window is not None and name != "mistral":
        refuse("mixer.sliding_window", f"{architecture} has none for all of its layers")
    if mlp.bias and name != "llama":
        refuse("mlp.bias", f"{architecture} has none")
    if name == "llama" and settings.hidden_size % settings.num_attention_heads:
        refuse("hidden_size", f"{architecture} wants a multiple of num_attention_heads")

    keys = {
        key: getattr(settings, key)
        for key in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
            *("initializer_range", "tie_word_embeddings"),
        )
    }
    keys["rms_norm_eps"] = norm.eps
    keys["rope_parameters"] = settings.rope_parameters.model_dump(mode="json", exclude_none=True)
    if name in ("llama", "qwen3"):
        keys["attention_bias"] = mixer.attention_bias
    if name == "llama":
        keys["mlp_bias"] = mlp.bias
    if name == "mistral":
        keys["sliding_window"] = mixer.sliding_window
    if name == "qwen2" and settings.head_dim * settings.num_attention_heads == settings.hidden_size:
        del keys["head_dim"]  # Qwen2 has the key only where it is not derived
    return architecture, keys


def _refuse_windows(name: str, given: Mapping[str, Any], refuse: Any) -> None:
    """Refuse a Qwen whose layers do not all have the same window; Mistral's layers always do."""
    layers, window = given["num_hidden_layers"], given.get("sliding_window")
    why = "a model with windows in some of its layers cannot be loaded"
    if name.startswith("qwen"):
        types = given.get("layer_types")
        if types is None:
            windowed = bool(given["use_sliding_window"]) and window is not None
            windowed = windowed and given["max_window_layers"] < layers
            if windowed:
                refuse("use_sliding_window", f"true; {why}")
        elif foreign := [t for t in types if t != "full_attention"]:
            refuse("layer_types", f"{foreign[0]}; {why}")


def _rope(given: Mapping[str, Any], refuse: Any) -> dict[str, Any]:
    """Our `rope_parameters`; up to transformers 4 theta and scaling were two keys of the file."""
    found = given.get("rope_scaling") or given.get("rope_parameters") or {}
    rope = {key: value for key, value in found.items() if value is not None}
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    rope.setdefault("rope_theta", given.get("rope_theta") or 10_000.0)
    partial = rope.pop("partial_rotary_factor", given.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        refuse("partial_rotary_factor", f"{partial}; our rotary positions rotate whole heads")
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        if given.get(_ORIGINAL) is not None:
            rope[_ORIGINAL] = given[_ORIGINAL]
        rope.setdefault(_ORIGINAL, given["max_position_embeddings"])
    return rope


def _called(part: Any) -> str:
    return f"'{getattr(part, 'name', type(part).__name__)}'"
