"""An engine out of models, their tokenizers and the settings of `generation`.

    engine = engine_of(model, tokenizer, settings, ends)
    engine = engine_of(model, tokenizer, settings, ends, draft=(smaller, its_tokenizer))

Which step runs a model: one that is bit-equal in any batch (`deterministic`), the captured one for
models of ours (models/decoding.py), the model as it is for other decoders of transformers. Which
draft: `lookup`, or the model that is given; which its lengths: costs.py.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from llmnorm.config.tree import GenerationSettings
from llmnorm.generation.contract import Draft, Step
from llmnorm.generation.costs import DraftLengths, Size, costs_for, size_of
from llmnorm.generation.draft import Lookup
from llmnorm.generation.engine import Engine
from llmnorm.generation.model_draft import ModelDraft, check_draft
from llmnorm.models.decoding import Decoder
from llmnorm.models.foreign_decoding import ForeignStep
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def engine_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: GenerationSettings,
    ends: Collection[int],
    *,
    draft: Loaded | None = None,
) -> Engine:
    """An engine, with the draft that `settings.draft` names.

    Args:
        model: in evaluation mode, of this package or a decoder of transformers.
        tokenizer: its own.
        settings: `draft` is `none`, `lookup`, or what the caller has loaded as `draft`.
        ends: the model's end tokens.
        draft: a model in evaluation mode and its tokenizer.

    Raises:
        InputError: the model, the draft or the settings are such that they cannot be served.
    """
    step = step_of(model, deterministic=settings.deterministic)
    if settings.draft == "none":
        return Engine(step, tokenizer, settings, ends=ends)
    drafted, size = _draft(step, tokenizer, settings, draft)
    lengths = DraftLengths(
        costs_for(
            size_of(model),
            size,
            device=step.device.type,
            threads=torch.get_num_threads(),
            recurrent=_is_recurrent(step),
        ),
        settings.draft_tokens,
    )
    return Engine(step, tokenizer, settings, drafted, ends=ends, lengths=lengths)


def step_of(model: "PreTrainedModel", *, deterministic: bool = False) -> Step:
    """What runs a model behind caches.

    Raises:
        InputError: it cannot be run so.
    """
    if not isinstance(model, LlmNormForCausalLM):
        if deterministic:
            raise InputError(
                "generation.deterministic: is shown for models of this package alone, and this is "
                f"a {type(model).__name__}; leave it out"
            )
        return ForeignStep(model)
    return Decoder(model)


def _draft(
    step: Step,
    tokenizer: "PreTrainedTokenizerBase",
    settings: GenerationSettings,
    draft: Loaded | None,
) -> tuple[Draft, Size | None]:
    """The draft, and its size if it is a model."""
    if settings.draft == "lookup":
        return Lookup(), None
    assert draft is not None, "the caller has loaded the draft"
    model, own = draft
    check_draft(tokenizer, own)
    small = step_of(model)
    made = ModelDraft(
        small,
        settings.slots,
        context=settings.context or step.context,
        vocabulary=step.vocabulary,
        device=small.device,
    )
    made.reserve(small.dtype)
    return made, size_of(model)


def _is_recurrent(step: Step) -> bool:
    from llmnorm.nn.cache import KeyValues

    return not all(isinstance(layer, KeyValues) for layer in step.new_cache().layers)
