"""Continuing text with a trained model."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmnorm.config.tree import GenerationSettings
from llmnorm.generation.continuation import continuation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    settings: GenerationSettings,
) -> Iterator[str]:
    """Each prompt followed by its continuation, one after the other.

    A prompt is the beginning of a document: it is put after the token that starts one. The noise is
    a function of `settings.seed` alone.
    """
    for prompt in prompts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        ids += continuation(model, tokenizer, ids, settings)
        yield tokenizer.decode(ids, skip_special_tokens=True)
