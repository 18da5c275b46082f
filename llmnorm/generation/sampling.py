"""Continuing text with a trained model, through Hugging Face's `generate`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from llmnorm.config import GenerationSettings

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
    greedy = settings.temperature == 0
    for prompt in prompts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        torch.manual_seed(settings.seed)
        out = model.generate(
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else settings.temperature,
            top_k=0 if settings.top_k is None or greedy else settings.top_k,
            top_p=None if greedy else settings.top_p,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        yield tokenizer.decode(out[0], skip_special_tokens=True)
