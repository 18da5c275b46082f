"""Which class of transformers a stock directory is of, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from llmnorm.exchange.foreign_class import foreign_class
from llmnorm.exchange.loading import open_source
from llmnorm.part import InputError
from tests.families import tiny

NEWER = "99.1.0"


def configured(directory: Path, **keys: Any) -> Path:
    """A directory that holds a config.json alone."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model_type": "t5"}, "t5 has an encoder beside its decoder"),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "Gemma3ForConditionalGeneration reads pictures beside text, and transformers has no",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "BertForMaskedLM is no causal language model, which predicts the next token",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is no causal language model",
        ),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "ViTModel is no causal language"),
        ({"model_type": "gtp2"}, r"model_type: transformers .* has no 'gtp2'; did you mean 'gpt2'"),
        (
            {"model_type": "novel", "transformers_version": NEWER},
            rf"has no 'novel'; its file was written by transformers {NEWER}: "
            rf'pip install "transformers>={NEWER}"',
        ),
        ({"model_type": "novel", "transformers_version": "4.1"}, "has no 'novel'; "),
        (
            {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "novel.NovelLM"}},
            "code that lies beside it .* is not run unless model.trust_remote_code=true",
        ),
        ({"model_type": "novel", "auto_map": {"AutoModel": "novel.It"}}, "auto_map.* is not run"),
        ({"model_type": "gpt2", "n_layer": "many"}, "n_layer"),
        ({}, "model_type: transformers .* has no 'None'"),
    ],
)
def test_what_is_no_causal_language_model_here_is_said(
    keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """Oracle: one line that begins with what named the directory, and its file."""
    directory = configured(tmp_path / "it", **keys)
    with pytest.raises(InputError, match=why) as told:
        foreign_class(directory, "model.pretrained")
    assert str(told.value).startswith(f"model.pretrained: {directory / 'config.json'}: ")
    assert "\n" not in str(told.value)


def test_an_image_text_directory_is_that_of_its_text_model_where_there_is_a_class(
    tmp_path: Path,
) -> None:
    """Oracle: transformers' own choice of class and configuration for the same directory."""
    names = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    found = foreign_class(configured(tmp_path / "it", **names))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "it")
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    assert found.kind is kind and kind.__name__ == "Qwen3_5ForCausalLM"
    assert type(found.config) is kind.config_class is type(config.get_text_config())


def test_a_directory_without_weights_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    """Oracle: one line that begins with the directory or the file."""
    model = tiny("qwen3_moe")
    model.config.save_pretrained(tmp_path / "empty")
    with pytest.raises(InputError, match="holds neither model.safetensors nor model") as told:
        open_source(tmp_path / "empty", classes="transformers")
    assert str(told.value).startswith(f"{tmp_path / 'empty'}: ")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match="there is no such file") as told:
        open_source(tmp_path / "shards", classes="transformers")
    assert str(told.value).startswith(f"{lost}: ")


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class NovelConfig(LlamaConfig):
    model_type = "novel"


class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig
"""


def test_code_in_a_directory_runs_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """Oracle: the class that the file defines; its module is not imported otherwise."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "novel.py").write_text(REMOTE)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    tree["auto_map"] = {"AutoConfig": "novel.NovelConfig"}
    tree["auto_map"]["AutoModelForCausalLM"] = "novel.NovelForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="is not run unless model.trust_remote_code=true"):
        open_source(tmp_path)
    source = open_source(tmp_path, trust_remote_code=True)
    assert source.kind is not None and source.kind.__name__ == "NovelForCausalLM"
    assert source.tensors.keys() == model.state_dict().keys()
