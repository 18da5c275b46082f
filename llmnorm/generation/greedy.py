"""The likeliest continuations of several prompts at once, by Hugging Face's `generate`.

What would surprise: prompts are padded on the left, and padding is neither stored nor seen, so that
a prompt has the continuation that it has alone, up to the rounding of other shapes.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def greedy(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    stops: Collection[int],
    pad: int,
    longest: int,
    together: bool = False,
) -> list[list[int]]:
    """The tokens that follow each prompt, the one of `stops` that ends them included.

    Args:
        model: in evaluation mode.
        prompts: token ids, each at least one.
        stops: ids of tokens that end a text.
        pad: the padding token's id.
        longest: how many tokens are generated at most.
        together: the model is sharded over processes, all of which make this call, each with
            prompts of its own. Every process then runs the model until all have ended.

    Returns:
        Of each prompt the new tokens; fewer than `longest`, or the last is one of `stops`, or
        neither, where the text has not ended in time.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
        synced_gpus=together,
    )
    found = []
    for new in out[:, width:].tolist():
        end = next((place for place, token in enumerate(new) if token in stops), longest)
        found.append(new[: end + 1])
    return found
