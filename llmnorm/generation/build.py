"""An engine out of models, their tokenizers and the settings of `generation`.

    built = engine_of(model, tokenizer, settings, ends)
    built = engine_of(model, tokenizer, settings, ends, draft=(smaller, its_tokenizer))
    built.engine.add(request)
    built.says                    what runs, and what its caches take

Which step runs a model: one that is bit-equal in any batch (`deterministic`), the captured one for
models of ours (models/decoding.py), the model as it is for other decoders of transformers. Which
draft: `lookup`, or the model that is given; which its lengths: costs.py.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.cache_memory import refuse_what_does_not_fit
from llmnorm.generation.contract import Draft, Step
from llmnorm.generation.costs import DraftLengths, costs_for, size_of
from llmnorm.generation.draft import Lookup
from llmnorm.generation.engine import Engine
from llmnorm.generation.exact import ExactStep
from llmnorm.generation.grouped import Grouped, draft_slots
from llmnorm.generation.model_draft import ModelDraft, check_draft
from llmnorm.models.decoding import Decoder
from llmnorm.models.foreign_decoding import ForeignStep
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.cache import KeyValues
from llmnorm.nn.layer_cache import PADDING
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


class Built(NamedTuple):
    """An engine, and what there is to say about it, a line each."""

    engine: Engine | Grouped
    says: list[str]


def engine_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: GenerationSettings,
    ends: Collection[int],
    *,
    draft: Loaded | None = None,
) -> Built:
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
    step = _exact(model, settings) if settings.deterministic else step_of(model)
    grouped = settings.method in ("eqspec", "exspec")
    context = settings.context or step.context
    says = [step.says]
    proposing: Draft | None = None
    lengths, own = None, ""
    if draft is not None:
        check_draft(tokenizer, draft[1])
        small = step_of(draft[0])
        if not grouped:  # before either cache is made
            refuse_what_does_not_fit(step, settings, context, PADDING, small)
        made = ModelDraft(
            small,
            draft_slots(settings),
            context=context,
            vocabulary=step.vocabulary,
        )
        proposing = made
        own = f", and {_size(made.bytes)} of the draft's"
    elif settings.draft == "lookup":
        proposing = Lookup()
    if proposing is not None and grouped:
        says.append(f"cache: of {settings.slots} rows, it grows with them{own}")
        return Built(Grouped(step, tokenizer, proposing, settings, ends=ends), says)
    if proposing is not None:
        costs = costs_for(
            size_of(model),
            None if draft is None else size_of(draft[0]),
            device=step.device.type,
            threads=torch.get_num_threads(),
            recurrent=not all(isinstance(layer, KeyValues) for layer in step.new_cache().layers),
        )
        lengths = DraftLengths(costs, settings.draft_tokens)
        if settings.draft_tokens == "auto":
            says.append(costs.says)
    engine = Engine(step, tokenizer, settings, proposing, ends=ends, lengths=lengths)
    rows = f"{settings.slots} row{'s' * (settings.slots > 1)} of {context:,} tokens"
    says.append(f"cache: {rows}, {_size(engine.bytes)}{own}")
    return Built(engine, says)


def step_of(model: "PreTrainedModel") -> Step:
    """What runs a model behind caches.

    Raises:
        InputError: it cannot be run so.
    """
    return Decoder(model) if isinstance(model, LlmNormForCausalLM) else ForeignStep(model)


def _exact(model: "PreTrainedModel", settings: GenerationSettings) -> Step:
    """As `step_of`, bit-equal in any batch of these settings."""
    if not isinstance(model, LlmNormForCausalLM):
        raise InputError(
            "generation.deterministic: is shown for models of this package alone, and this is a "
            f"{type(model).__name__}; leave it out"
        )
    longest: int = model.config.max_position_embeddings
    context = min(settings.context or longest, longest)
    drafts = settings.draft != "none"
    return ExactStep(model, context=context, rows=settings.slots, drafts=drafts)


def _size(count: int) -> str:
    """Bytes, as people say them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
