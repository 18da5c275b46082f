"""Continuing a prompt of tokens by Hugging Face's `generate`.

What would surprise: the noise is a function of `settings.seed` alone, and torch's generators keep
their states, so that a run can print samples while it trains.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from llmnorm.config.stock import all_tokens
from llmnorm.config.tree import GenerationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continuation(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    stops: Collection[int] = (),
    together: bool = False,
) -> list[int]:
    """The tokens that follow `prompt`: at most `settings.max_new_tokens`, the end token included.

    Args:
        model: in evaluation mode; its configuration's end tokens, one or several, end the text.
        tokenizer: its end token, where the model's configuration has none, and its padding token.
        prompt: token ids, at least one.
        settings: sampling; temperature 0 is greedy.
        stops: tokens that end the text beside those.
        together: the model is sharded over processes, all of which make this call. Then every
            process runs the model until all have reached their end token, since a forward pass
            needs all of them.
    """
    greedy, own = settings.temperature == 0, model.config.eos_token_id
    ends = all_tokens(tokenizer.eos_token_id if own is None else own, list(stops))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        out = model.generate(
            torch.tensor([list(prompt)], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else settings.temperature,
            # 0 asks for no limit; left out, or None, it would be transformers' own of 50.
            top_k=None if greedy else settings.top_k or 0,
            top_p=None if greedy else settings.top_p,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=together,
        )
    return out[0, len(prompt) :].tolist()
