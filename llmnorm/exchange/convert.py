"""`llmnorm convert`: rewrite a model with another norm so that it computes the same function.

models/equivalence.py has the algebra. This file reads a run, an exported or a stock directory into
memory in float64, and writes the result as `llmnorm export` does, in the dtype of the source.

What would surprise: a stock GPT-2 stays a GPT-2, since our models have no learned positions, and
`centred` is the only target for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmnorm.config.pretrained import refuse_encoder
from llmnorm.exchange.directories import check_empty
from llmnorm.exchange.export import write_directory
from llmnorm.exchange.loading import open_source
from llmnorm.exchange.model_card import model_card
from llmnorm.machine import reading
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import Stored
from llmnorm.models.convert import Weights as StoredWeights
from llmnorm.models.equivalence import TARGETS, Weights, centre_gpt2, convert
from llmnorm.part import InputError


def convert_directory(
    path: Path, directory: Path, *, target: str, untie: bool = False, checkpoint: str = "latest"
) -> None:
    """Write the model at `path` with another norm to the new or empty `directory`.

    Args:
        path: a run, or a directory that was exported before or holds a stock model.
        target: one of `TARGETS`.
        untie: let the algebra give a tied head a matrix of its own.
        checkpoint: of a run: `latest`, `best` or a step.

    Raises:
        InputError: the directory is not empty, the weights are not there, the algebra does not hold
            for this model (the message says why); nothing has been written.
    """
    check_empty(directory)
    assert target in TARGETS
    if _model_type(path) == "gpt2":
        _convert_gpt2(path, directory, target, untie)
        return
    source = open_source(path, checkpoint=checkpoint)
    source.refuse_foreign(f"convert: {path}")
    refuse_encoder(source.config.architectures, f"convert: {path}", "the algebra is that of")
    before = _read(source.tensors, source.read_into)
    settings, tensors = convert(Weights(source.own.settings(), before), target, untie=untie)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(source.config, name) for name in names}
    config = LlmNormConfig.from_settings(settings, **tokens)
    config.architectures = ["LlmNormForCausalLM"]
    stored = _stored(tensors, source.tensors)
    card = model_card(
        directory.name,
        source._replace(config=config, tensors=stored),
        "LlmNormForCausalLM",
        steps=[source.meta["step"]] if source.meta else [],
        ema=False,
    )
    write_directory(
        directory,
        config,
        stored,
        _writer(tensors),
        tokenizer_directory=source.tokenizer,
        first_token=source.first_token,
        card=f"{card}\nConverted from {path.name}: `llmnorm convert --to {target}`.\n",
    )


def _convert_gpt2(path: Path, directory: Path, target: str, untie: bool) -> None:
    """Write a GPT-2 whose layer norms are replaced by RMS norms."""
    if target != "centred":
        raise InputError(
            f"--to {target}: {path} is a GPT-2, whose learned positions no llmnorm model has; "
            "`--to centred` writes a GPT-2 whose layer norms are RMS norms"
        )
    try:
        config = transformers.GPT2Config.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of any kind: transformers' checks of its own keys
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"convert: {path / 'config.json'}: {reason}") from None
    if config.tie_word_embeddings and not untie:
        raise InputError(
            "--to centred: the tied head would lose what the final norm's offset adds along the "
            "mean (tie_word_embeddings); --untie gives the head its own"
        )
    weights = StoredWeights(path)
    masks = (".attn.bias", ".attn.masked_bias")  # old files hold causal masks beside the weights
    kept = {name: stored for name, stored in weights.tensors.items() if not name.endswith(masks)}
    try:
        tensors = centre_gpt2(_read(kept, weights.read_into))
    except KeyError as error:
        raise InputError(f"{path}: holds no tensor {error}") from None
    config.tie_word_embeddings = False
    config.architectures = ["GPT2LMHeadModel"]
    write_directory(
        directory,
        config,
        _stored(tensors, weights.tensors),
        _writer(tensors),
        tokenizer_directory=path if (path / "tokenizer.json").is_file() else None,
        first_token=None,
        card=f"# {directory.name}\n\nConverted from {path.name}: `llmnorm convert --to centred`.\n",
    )


def _read(stored: Mapping[str, Stored], read_into: Any) -> dict[str, Tensor]:
    """Read every tensor, floating ones as float64."""
    tensors = {
        name: torch.empty(
            entry.shape, dtype=torch.float64 if entry.dtype.is_floating_point else entry.dtype
        )
        for name, entry in stored.items()
    }
    read_into(tensors)
    return tensors


def _stored(tensors: Mapping[str, Tensor], before: Mapping[str, Stored]) -> dict[str, Stored]:
    """Dtype and shape of the tensors to write; a new tensor gets the dtype of the first weight."""
    default = next(entry.dtype for entry in before.values() if entry.dtype.is_floating_point)
    return {
        name: Stored(before[name].dtype if name in before else default, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def _writer(tensors: Mapping[str, Tensor]) -> Any:
    def read_into(into: Mapping[str, Tensor]) -> None:
        for name, tensor in into.items():
            tensor.copy_(tensors[name])

    return read_into


def _model_type(path: Path) -> str | None:
    """`model_type` of the directory's config.json; None where it cannot be read."""
    try:
        name = reading.read_object(path / "config.json").get("model_type")
    except InputError:
        return None
    return name if isinstance(name, str) else None
