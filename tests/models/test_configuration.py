"""LlmNormConfig: validation, saving, and the traps of transformers' configuration class."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.nn.norms.settings import NormSettings
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_attention_heads": 4}


class OutsideNormSettings(NormSettings):
    """A norm from outside the package."""

    name: Literal["outside"] = "outside"
    eps: float = 1e-3

    def build(self, hidden_size: int) -> Any:
        from llmnorm.nn.norms.rms import RMSNorm

        return RMSNorm(hidden_size, eps=self.eps)


def test_attributes_are_the_settings() -> None:
    """Oracle: ModelSettings itself, dumped."""
    config = LlmNormConfig(**SMALL, norm="layer", mixer=["softmax"] * 2, num_hidden_layers=3)
    settings = ModelSettings.model_validate(
        SMALL | {"norm": "layer", "mixer": ["softmax"] * 2, "num_hidden_layers": 3}
    )
    assert config.settings() == settings
    for key, value in settings.model_dump(mode="json", exclude_none=True).items():
        assert getattr(config, key) == value
    assert config.layer_types == ["full_attention"] * 3
    assert LlmNormConfig.from_settings(settings) == config


def test_save_and_load(tmp_path: Path) -> None:
    """Oracle: equality of every key, through JSON, AutoConfig, deepcopy and pickle."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = LlmNormConfig(
        **SMALL, rope_parameters=rope, bos_token_id=1, eos_token_id=[2, 3], use_cache=False
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["head_dim"] == 6 and saved["norm"]["name"] == "rms"
    loaded = AutoConfig.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(other, LlmNormConfig)
        assert other.settings() == config.settings()
        assert (other.bos_token_id, other.eos_token_id) == (1, [2, 3])
        assert (other.pad_token_id, other.use_cache) == (None, False)
    assert LlmNormConfig(**config.to_dict()) == config


@pytest.mark.parametrize("trusted", [None, True])
def test_what_tools_ask_of_classes_from_outside_transformers(trusted: bool | None) -> None:
    """Oracle: TRL's question, and the class that transformers makes of the answer."""
    config = LlmNormConfig(**SMALL)
    assert "AutoModelForCausalLM" not in (config.auto_map or {})
    assert "AutoModelForCausalLM" in config.to_dict()["auto_map"]
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    assert type(model) is LlmNormForCausalLM


def test_equality_looks_at_our_fields() -> None:
    """Oracle: two sizes differ; the dataclass that transformers generates would call them equal."""
    assert LlmNormConfig(**SMALL) == LlmNormConfig(**SMALL)
    assert LlmNormConfig(**SMALL) != LlmNormConfig(**SMALL | {"hidden_size": 48})
    assert LlmNormConfig(**SMALL) != PreTrainedConfig()


def test_overrides_on_loading_are_validated_and_move_derived_sizes(tmp_path: Path) -> None:
    """Oracle: the configuration built with the override from the start."""
    LlmNormConfig(**SMALL).save_pretrained(tmp_path)
    loaded = LlmNormConfig.from_pretrained(tmp_path, hidden_size=48, num_hidden_layers=3)
    expected = LlmNormConfig(**SMALL | {"hidden_size": 48, "num_hidden_layers": 3})
    assert loaded.settings() == expected.settings() and loaded.head_dim == 12
    assert loaded.layer_types == expected.layer_types
    with pytest.raises(InputError, match="hidden_size 50"):
        LlmNormConfig.from_pretrained(tmp_path, hidden_size=50)
    LlmNormConfig(**SMALL, head_dim=8).save_pretrained(tmp_path)
    assert LlmNormConfig.from_pretrained(tmp_path, hidden_size=48).head_dim == 8


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hiden_size": 1}, "hiden_size: unknown key; did you mean 'hidden_size'"),
        ({"num_layers": 1}, "num_layers: unknown key; did you mean 'num_hidden_layers'"),
        ({"hidden_size": 25}, "hidden_size 25"),
        ({"norm": "rmss"}, "did you mean 'rms'"),
        ({"norm": "nowhere.to.be:Found"}, "import nowhere.to.be"),
        ({"vocab_size": "auto"}, "vocab_size"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_type"),
    ],
)
def test_mistakes_are_refused(keys: dict[str, Any], words: str) -> None:
    """Oracle: the key and the nearest choice; transformers itself takes any keyword in silence."""
    with pytest.raises(InputError, match=words) as caught:
        LlmNormConfig(**SMALL | keys)
    assert "\n" not in str(caught.value)


def test_legacy_rotary_keys_are_folded() -> None:
    """Oracle: rope_parameters as transformers 5 writes them."""
    config = LlmNormConfig(**SMALL, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    assert LlmNormConfig(**SMALL, rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    assert LlmNormConfig(**SMALL, rope_scaling=None).rope_parameters["rope_type"] == "default"


def test_attributes_set_later_count(tmp_path: Path) -> None:
    """Oracle: resizing the vocabulary sets an attribute."""
    config = LlmNormConfig(**SMALL)
    config.vocab_size = 64
    assert config.settings().vocab_size == 64
    config.save_pretrained(tmp_path)
    assert LlmNormConfig.from_pretrained(tmp_path).vocab_size == 64


def test_keys_of_other_tools_are_kept_with_one_warning(tmp_path: Path) -> None:
    """Oracle: the values after loading; one warning that names the keys; none for ours."""
    keys: dict[str, Any] = {
        "my_note": "x",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "is_decoder": True,
        "torchscript": False,
        "use_bfloat16": False,
        "task_specific_params": {"a": [1, None]},
        "classifier_dropout": 0.1,
        "unsloth_version": "2026.1",
        "hidden_act": "silu",
        "_private": 3,
    }
    config = LlmNormConfig(**SMALL)
    for key, value in keys.items():
        setattr(config, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="my_note") as caught:
        loaded = AutoConfig.from_pretrained(tmp_path)
    ours = [str(one.message) for one in caught if "model configuration" in str(one.message)]
    assert len(ours) == 1 and all(key in ours[0] for key in keys)
    assert {key: getattr(loaded, key) for key in keys} == keys
    assert loaded.settings() == config.settings()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hiden_size", 8, "hiden_size: unknown key; did you mean 'hidden_size'"),
        ("hidden_size", "wide", "hidden_size"),
        ("norm", "rmss", "did you mean 'rms'"),
        ("my_note", {1, 2}, "my_note: cannot be written as JSON"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    key: str, value: Any, words: str, tmp_path: Path
) -> None:
    """Oracle: the key, and no file."""
    config = LlmNormConfig(**SMALL)
    setattr(config, key, value)
    with pytest.raises(InputError, match=words):
        config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_part_from_outside_is_used_when_its_module_is_imported() -> None:
    """Oracle: the import path and its keys come back from the configuration."""
    path = f"{__name__}:OutsideNormSettings"
    config = LlmNormConfig(**SMALL, norm={"name": path, "eps": 0.5})
    assert config.norm == {"name": path, "eps": 0.5}
    assert config.settings().norm == OutsideNormSettings(eps=0.5)


def test_settings_do_not_load_torch() -> None:
    """Oracle: sys.modules of a fresh process."""
    code = "import llmnorm.nn.settings, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
