"""Continuing text with a trained model."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmnorm.config.tree import GenerationSettings
from llmnorm.generation.continuation import continuation
from llmnorm.generation.prompts import prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    settings: GenerationSettings,
) -> Iterator[str]:
    """Yield each prompt followed by its continuation.

    A prompt is taken for the beginning of a document, so it begins as the tokenizer begins texts
    (`prompts.py`). The noise is a function of `settings.seed` alone, the same for every prompt.
    """
    for prompt in prompts:
        ids = prompt_tokens(tokenizer, prompt)
        ids += continuation(model, tokenizer, ids, settings)
        yield tokenizer.decode(ids, skip_special_tokens=True)
