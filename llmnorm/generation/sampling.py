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
    """Yield each prompt followed by its continuation.

    A prompt is taken for the beginning of a document, so the bos token is put in front of it. The
    noise is a function of `settings.seed` alone, the same for every prompt.
    """
    for prompt in prompts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        ids += continuation(model, tokenizer, ids, settings)
        yield tokenizer.decode(ids, skip_special_tokens=True)
