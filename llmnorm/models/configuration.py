"""LlmNormConfig: the model's settings as Hugging Face's configuration.

`ModelSettings` (llmnorm/nn/settings.py) is the only list of fields; this class stores its plain
JSON values as attributes and derives `layer_types`. Hugging Face's own bookkeeping keys pass. A key
of another tool becomes an attribute that nothing reads, with one warning; a key that is nearly one
of ours is refused. What can be saved can be loaded: both are checked before anything is written.

Traps of transformers 5 that are handled here: after loading with trust_remote_code it would copy
the class's source file beside everything that is saved later (`register_for_auto_class`); configs
are dataclasses whose generated `__eq__` looks at their annotated fields only, so that all of ours
would be equal; `from_pretrained(d, hidden_size=8)` sets attributes after `__init__`, past any
validation; rotary keys of older checkpoints (`rope_theta`, `rope_scaling`) stand beside
`rope_parameters`.
"""

import difflib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError, explain, nearest, one_line

_OURS = frozenset(ModelSettings.model_fields)
# Of difflib: `num_layers` and `hiden_size` are nearly ours, `hidden_act` and `tokenizer_class` not.
_NEARLY = 0.7
# Hugging Face's keys that a bare PreTrainedConfig does not have but its tools read, pass or save.
_THEIRS = frozenset(
    {
        *("_attn_implementation", "_commit_hash", "_name_or_path", "attn_implementation"),
        *("auto_map", "layer_types"),  # written by this class
        *("bos_token_id", "eos_token_id", "experts_implementation", "model_type"),
        *("name_or_path", "num_labels", "output_attentions", "pad_token_id"),
        *("quantization_config", "torch_dtype", "use_cache"),
    }
)
# What a saved directory tells the Auto classes: three lines that import the installed package.
_MODULE = "modeling_llmnorm"
_AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.LlmNormConfig",
    "AutoModel": f"{_MODULE}.LlmNormModel",
    "AutoModelForCausalLM": f"{_MODULE}.LlmNormForCausalLM",
    "AutoModelForMaskedLM": f"{_MODULE}.LlmNormForMaskedLM",
    "AutoModelForSequenceClassification": f"{_MODULE}.LlmNormForSequenceClassification",
}
_SOURCE = '''"""The classes of the installed package llmnorm (Auto classes, trust_remote_code)."""
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.encoders import LlmNormForMaskedLM, LlmNormForSequenceClassification
from llmnorm.models.modeling import LlmNormForCausalLM, LlmNormModel
'''


class LlmNormConfig(PreTrainedConfig):
    """Configuration of an llmnorm model; see `llmnorm parts model` for the fields.

    Raises:
        InputError: a value that does not fit, or a key that is nearly one of ours.
    """

    model_type = "llmnorm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **keys: Any) -> None:
        _fold_legacy_rope(keys)
        ours = {k: keys.pop(k) for k in list(keys) if k in _OURS}
        for written in ("layer_types", "auto_map"):  # by this class, see below and to_dict
            keys.pop(written, None)
        others = _others(keys)
        if others:
            warnings.warn(
                f"model configuration: {', '.join(others)}: kept, and read by nothing in llmnorm",
                stacklevel=2,
            )
        settings = _validated({"vocab_size": 32768} | ours)
        self.__dict__.update(_json(settings))
        self.layer_types = [mixer.layer_type for mixer in settings.mixers()]
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, token, keys.pop(token, None))
        self.use_cache = keys.pop("use_cache", True)
        super().__init__(**keys)

    @classmethod
    def from_settings(cls, settings: ModelSettings, **keys: Any) -> "LlmNormConfig":
        """The configuration of a run's model; `keys`: vocab_size for `auto`, token ids and the
        like."""
        return cls(**(_json(settings) | keys))

    def settings(self) -> ModelSettings:
        """The settings as they are now (tools may have set attributes since)."""
        return _validated({key: getattr(self, key) for key in _OURS if hasattr(self, key)})

    def to_dict(self) -> dict[str, Any]:
        """As Hugging Face's, with the `auto_map` by which Auto classes find the package."""
        return super().to_dict() | {"auto_map": dict(_AUTO_MAP)}

    @property
    def auto_map(self) -> dict[str, str]:
        """Empty: this object's classes are imported already, so that nobody need fetch them.

        What config.json tells the Auto classes is written by `to_dict`. TRL asks every
        configuration of a class that transformers does not bring.
        """
        return {}

    @property
    def output_attentions(self) -> bool | None:  # type: ignore[override]
        """Whether a forward pass gives the mixers' matrices.

        Setting it sets `attn_implementation` to `eager`, without which Hugging Face's checks refuse
        it. To an llmnorm model that is the same as `sdpa`.
        """
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        if value:
            self._attn_implementation = "eager"
        self._output_attentions = value

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As Hugging Face's; beside config.json stands the module that `auto_map` names.

        Raises:
            InputError: attributes that were set since could not be loaded again.
        """
        self.settings()
        for key in _others(vars(self)):
            try:
                json.dumps(getattr(self, key))
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"model configuration: {key}: cannot be written as JSON: {error}"
                ) from None
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers would copy this file beside what is saved."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Hugging Face's, but keys of ours among `kwargs` are validated with the rest."""
        ours = {k: kwargs.pop(k) for k in list(kwargs) if k in _OURS}
        return super().from_dict(_without_derived(config_dict, ours) | ours, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlmNormConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _validated(values: dict[str, Any]) -> ModelSettings:
    try:
        settings = ModelSettings.model_validate(values)
    except ValidationError as error:
        errors = explain(error, ModelSettings)
        raise InputError(f"model configuration: {one_line(errors)}") from None
    if settings.vocab_size == "auto":
        raise InputError("model configuration: vocab_size: 'auto' needs a tokenizer; give a number")
    return settings


def _others(keys: Any) -> list[str]:
    """Those of `keys` that neither side knows.

    Raises:
        InputError: one is nearly one of ours.
    """
    others = sorted(set(keys) - _OURS - _their_keys())
    for key in others:
        if difflib.get_close_matches(key, _OURS, n=1, cutoff=_NEARLY):
            hint = nearest(key, sorted(_OURS))
            raise InputError(f"model configuration: {key}: unknown key; {hint}")
    return others


def _json(settings: ModelSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_none=True, include=set(_OURS))


def _fold_legacy_rope(keys: dict[str, Any]) -> None:
    """`rope_theta` and `rope_scaling` {type, ...} of older checkpoints into `rope_parameters`."""
    scaling, theta = keys.pop("rope_scaling", None), keys.pop("rope_theta", None)
    if scaling is None and theta is None:
        return
    rope = {**(scaling or {}), **(keys.get("rope_parameters") or {})}
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    keys["rope_parameters"] = rope


def _without_derived(saved: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`saved` less the values that would follow a change: hidden_size=8 must move head_dim along.

    A saved value is dropped only where it is what the saved settings would have derived.
    """
    if not changed:
        return saved
    derived = {k for k in _OURS if ModelSettings.model_fields[k].default_factory is not None}
    ours = {k: v for k, v in saved.items() if k in _OURS}
    bare = _json(_validated({k: v for k, v in ours.items() if k not in derived}))
    return {k: v for k, v in saved.items() if k not in derived or v != bare[k]}


@cache
def _their_keys() -> frozenset[str]:
    bare = PreTrainedConfig()
    return _THEIRS | frozenset(bare.to_dict()) | frozenset(vars(bare))
