"""Stock directories of classes that are not loaded as ours, as transformers' own model.

    if is_foreign(path):
        model, tokenizer = load_foreign(path)   # GPT-2, GPT-NeoX, OPT, Gemma, Mixtral, ...
        step = ForeignStep(model)

Local files alone are read: no network, no pickle (safetensors only) and no code that lies in the
directory. Whether rows can be generated with the class is answered from its config.json, before
weights are read (models/foreign_decoding.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmnorm.config.pretrained import is_stock
from llmnorm.config.stock import all_tokens, from_stock
from llmnorm.exchange.foreign_class import foreign_class
from llmnorm.generation.prompts import open_tokenizer
from llmnorm.machine import reading
from llmnorm.models.convert import Weights
from llmnorm.models.foreign_decoding import refuse_foreign
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_foreign(path: Path) -> bool:
    """Whether `path` holds a stock model that `loading.load_model` would not take as ours."""
    if not is_stock(path):
        return False
    try:
        from_stock(reading.read_object(path / "config.json"), str(path))
    except InputError:
        return True
    return False


def load_foreign(path: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A stock decoder in evaluation mode, on the GPU if there is one, and its tokenizer.

    The model is in the dtype of its files. Its configuration's `eos_token_id` holds the end tokens
    of generation_config.json too.

    Raises:
        InputError: the class is not served, its weights are not whole, or there is no tokenizer.
    """
    config, kind, quantization = foreign_class(path)
    if quantization:
        raise InputError(
            f"{path / 'config.json'}: quantization_config: only models with plain weights are "
            "served"
        )
    refuse_foreign(config, kind, str(path))
    tokenizer = open_tokenizer(path)
    Weights(path)  # whole safetensors files, or a message of ours
    try:
        model, loaded = kind.from_pretrained(
            path,
            config=config,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are told below
            output_loading_info=True,
        )
    except Exception as error:  # of any kind: it is the class's own code
        raise InputError(f"{path}: {_reason(error)}") from None
    lacking = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"{path}: holds no tensor of the right shape for '{lacking[0]}'{more}, which "
            f"{kind.__name__} has"
        )
    ends = [config.get_text_config(decoder=True).eos_token_id]
    if model.generation_config is not None:
        ends.append(model.generation_config.eos_token_id)
    model.config.eos_token_id = all_tokens(*ends)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
