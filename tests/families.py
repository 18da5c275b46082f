"""Tiny random models of families of transformers, each layer kind at least twice.

Windows and chunks are shorter than a test's documents. Weights are scaled so that logits reach
about +-20, since a cap is invisible in small ones.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmnorm.data.loader import document_bounds
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import Foreign, empty_foreign
from llmnorm.objectives.contract import MicroBatch
from llmnorm.parallel.shards import fill_and_shard

VOCABULARY, CONTEXT = 96, 128
_SAME: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWS = {"sliding_window": 6, "num_hidden_layers": 4}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": _WINDOWS | {"layer_types": _SLIDING, "query_pre_attn_scalar": 8},
    "gemma2": _WINDOWS | {"layer_types": _SLIDING, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 48},
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "granite": {
        **{"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7},
        "attention_multiplier": 0.3,
    },
    "cohere2": _WINDOWS | {"layer_types": _SLIDING, "logit_scale": 0.5},
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {
        **_WINDOWS,
        **{"layer_types": _SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "qwen3_next": {
        **_EXPERTS,
        **{"num_hidden_layers": 4, "shared_expert_intermediate_size": 24},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5},
    "mamba2": {
        **{"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        "expand": 2,
    },
    "lfm2": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        **{"block_multiple_of": 16, "block_ff_dim": 48, "block_dim": 32, "conv_dim": 32},
    },
    "bamba": _MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_chunk_size": 8},
}


def configuration(family: str, **other: Any) -> PreTrainedConfig:
    """Of a tiny model of a family."""
    made = type(AutoConfig.for_model(family))
    known = {key: value for key, value in _SAME.items() if family != "gpt2" or "_id" in key}
    return made(**(known | FAMILIES.get(family, {}) | {"vocab_size": VOCABULARY} | other))


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Its causal language model."""
    kind: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    return kind


def tiny(family: str, seed: int = 0, **other: Any) -> PreTrainedModel:
    """A tiny model of a family in evaluation mode, float32, always with the same weights."""
    torch.manual_seed(seed)
    config = configuration(family, **other)
    model = class_of(config)(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.normal_(std=0.2)
        ids = torch.randint(3, VOCABULARY, (1, 24))
        largest = float(model(input_ids=ids, use_cache=False).logits.abs().max())
        head = model.get_output_embeddings().weight
        head.mul_(20 / largest)
    return model


LENGTHS = (11, 20, 9)  # of a row's documents: one longer than any window and chunk


def packed_rows(count: int, first: int = 0) -> MicroBatch:
    """Rows of three documents from number `first` on, as causal_lm gives them to a model."""
    ids = torch.stack(
        [
            torch.randint(
                3, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(number)
            )
            for number in range(first, first + count)
        ]
    )
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).repeat(count, 1)
    labels = torch.roll(ids, -1, 1)
    labels[torch.roll(positions, -1, 1) == 0] = -100
    inputs = {"input_ids": ids, "position_ids": positions, "shift_labels": labels}
    bounds = document_bounds(positions)
    counted = int((labels != -100).sum())
    length = sum(LENGTHS)
    spans = [(start, start + length) for start in range(0, count * length, length)]
    return MicroBatch(
        {**inputs, **bounds, "loss_only": True},
        counted,
        counted,
        torch.arange(first, first + count),
        spans,
    )


def filling(model: PreTrainedModel) -> Callable[[Mapping[str, nn.Module]], None]:
    """Gives the modules that it is passed the values of `model`'s."""
    values = model.state_dict()

    def fill(modules: Mapping[str, nn.Module]) -> None:
        with torch.no_grad():
            for name, tensor in named_weights(modules).items():
                tensor.copy_(values[name])

    return fill


def with_weights(model: PreTrainedModel) -> Foreign:
    """The same model as the training loop has it, in training mode, not looked at yet."""
    foreign = empty_foreign(type(model), model.config)
    fill_and_shard(foreign, filling(model), torch.device("cpu"), None)
    return foreign.train()


def directory_of(family: str, directory: Path, tokenizer: Path, **other: Any) -> Path:
    """A directory of a tiny model, with the files of a tokenizer."""
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    tiny(family, **({"vocab_size": vocabulary + 32} | other)).save_pretrained(directory)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return directory
