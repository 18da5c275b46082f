"""Whether an engine's cache fits, answered before it is made; what would fit, where it does not."""

import torch

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Step
from llmnorm.machine.memory import available
from llmnorm.nn.cache import KeyValues
from llmnorm.nn.layer_cache import PADDING, LayerCache, rounded
from llmnorm.part import InputError

GIB = 2**30
BESIDE = 1  # rows that the cache has beside the slots: that in which prompts are run


def refuse_what_does_not_fit(
    step: Step,
    settings: GenerationSettings,
    context: int,
    padding: int,
    draft: Step | None = None,
) -> None:
    """Refuse caches of `settings.slots` rows that are larger than what is free, or than allowed.

    Args:
        step: the model.
        settings: slots and cache_memory.
        context: tokens of each row.
        padding: columns behind a full row.
        draft: a model that drafts, with as many rows of its own.

    Raises:
        InputError: names the largest number of slots that fits, and the longest context.
    """
    if settings.cache_memory is None:
        there, name = _free_on(step.device), "free"
    else:
        there, name = int(settings.cache_memory * GIB), "allowed by generation.cache_memory"

    def needed(slots: int, tokens: int) -> int:
        of_draft = 0 if draft is None else row_bytes(draft, tokens, PADDING)
        return (slots + BESIDE) * row_bytes(step, tokens, padding) + slots * of_draft

    slots = settings.slots
    if there is None or (whole := needed(slots, context)) <= there:
        return
    cures = []
    beside, a_slot = needed(0, context), needed(1, context) - needed(0, context)
    if (fewer := (there - beside) // a_slot) >= 1:
        cures.append(f"generation.slots={fewer}")
    # Buffers are made for multiples of 64 tokens.
    smaller = range(rounded(context) - 64, 0, -64)
    if tokens := next((n for n in smaller if needed(slots, n) <= there), None):
        cures.append(f"generation.context={tokens}")
    fits = f"{' or '.join(cures)} would fit" if cures else "not even one row would fit"
    both = "" if draft is None else " with the draft's"
    raise InputError(
        f"generation: {slots} slots of {context} tokens need {whole / GIB:.3g} GiB of cache{both}, "
        f"and {there / GIB:.3g} GiB are {name}; {fits}"
    )


def row_bytes(step: Step, context: int, padding: int) -> int:
    """Bytes of one row of a cache of the step. Its keys and values are not made for it."""
    return sum(
        layer_bytes(layer, context, padding, step.dtype, step.device)
        for layer in step.new_cache().layers
    )


def layer_bytes(
    layer: LayerCache, context: int, padding: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes of one row of a layer's cache; keys and values are not made, states are."""
    meta = torch.device("meta")
    return layer.reserve(
        1, context, padding, dtype, meta if isinstance(layer, KeyValues) else device
    )


def _free_on(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available()
