"""Stock directories of classes that are not ours, loaded as transformers' own models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.exchange.foreign import is_foreign, load_foreign
from llmnorm.models.foreign_decoding import ForeignStep
from llmnorm.part import InputError
from tests.running import SMOKE

SMALL: dict[str, Any] = {"vocab_size": 512, "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A random GPT-2 with the smoke tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("stock") / "gpt2"
    config = transformers.GPT2Config(**SMALL, n_positions=64, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    settings = load(SMOKE, [f"data.dir={smoke_data}"]).config
    found = packing.find(settings.data, settings.tokenizer)
    assert found is not None
    shutil.copytree(found.tokenizer_directory, directory, dirs_exist_ok=True)
    return directory


def changed(directory: Path, to: Path, file: str = "config.json", **keys: Any) -> Path:
    """A copy of a directory with other keys in a JSON file; None: without the key."""
    shutil.copytree(directory, to)
    tree = json.loads((to / file).read_text()) | keys
    (to / file).write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    return to


def test_a_stock_directory_is_loaded_and_decodes(gpt2: Path, tmp_path: Path) -> None:
    """Oracle: GPT2LMHeadModel's own weights and greedy tokens; end tokens of both files."""
    several = changed(gpt2, tmp_path / "ends", "generation_config.json", eos_token_id=[1, 7])
    assert is_foreign(several)
    model, tokenizer = load_foreign(several)
    assert type(model) is transformers.GPT2LMHeadModel and not model.training
    assert model.config.eos_token_id == [1, 7] and len(tokenizer) == 512
    step, ids = ForeignStep(model), [5, 6, 7]
    cache, new = step.new_cache(), [5, 6, 7]
    for _ in range(8):
        logits = step.step(torch.tensor([new], device=model.device), cache, last=True)
        new = [int(logits.argmax())]
        ids += new
    for end in range(3, 11):
        whole = model(torch.tensor([ids[:end]], device=model.device)).logits
        assert int(whole[0, -1].argmax()) == ids[end]


def test_which_directories_are_foreign(gpt2: Path, tmp_path: Path) -> None:
    """Oracle: Llamas are loaded as ours, except where a key asks for what ours does not compute."""
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config.save_pretrained(tmp_path / "llama")
    assert not is_foreign(tmp_path / "llama")
    assert is_foreign(changed(tmp_path / "llama", tmp_path / "gelu", hidden_act="gelu"))
    assert not is_foreign(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model_type": "gtp2"}, r"model_type: transformers .* has no 'gtp2'; did you mean 'gpt2'"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, "auto_map.* is not run"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "is no causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is no"),
        ({"n_layer": "many"}, "config.json: .*"),
        ({"n_layer": 2}, r"holds no tensor of the right shape for 'transformer.h.1.* and 11 more"),
        ({"vocab_size": 500}, "holds no tensor of the right shape for 'transformer.wte.weight'"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "recurrent"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    gpt2: Path, tmp_path: Path, keys: dict[str, Any], why: str
) -> None:
    """Oracle: one line that begins with the directory or the file."""
    directory = changed(gpt2, tmp_path / "it", **keys)
    with pytest.raises(InputError, match=why) as told:
        load_foreign(directory)
    assert str(told.value).startswith(str(directory)) and "\n" not in str(told.value)


def test_pickled_weights_and_a_missing_tokenizer_are_refused(gpt2: Path, tmp_path: Path) -> None:
    """Oracle: nothing is unpickled: the file there would fail otherwise; the messages."""
    pickled, mute = tmp_path / "pickled", tmp_path / "mute"
    shutil.copytree(gpt2, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    shutil.copytree(gpt2, mute, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InputError, match="safetensors"):
        load_foreign(pickled)
    with pytest.raises(InputError, match="has no tokenizer"):
        load_foreign(mute)
