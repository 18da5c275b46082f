"""The ragged slot cache (llmnorm/nn/cache.py) as a Hugging Face Cache.

`generate` and beam search use the Hugging Face side; the verbs for single rows (rollback, admit,
release, select) and `reserve` are on `slots`. Shapes on this side: keys and values (batch,
kv_heads, new, head_dim).

Surprises: `get_seq_length` is the longest row's. Hugging Face's own masks and positions assume rows
of one length and would be silently wrong for others, so asking for the sizes of such a mask is
refused; our models build both from the rows' lengths.

A pass with fewer rows than the cache has takes the first ones; the others keep what they hold.
Hugging Face's caches would refuse it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from llmnorm.nn.cache import KeyValues, LayerCache, RaggedCache
from llmnorm.nn.places import find_places
from llmnorm.part import InputError


class SlotLayer(CacheLayerMixin):
    """One layer's cache behind Hugging Face's layer interface; a recurrent layer has no keys."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, slots: LayerCache) -> None:
        # Not the parent's __init__: keys and values live in the slots.
        self.slots = slots

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """(rows, kv_heads, slots in use, head_dim): the longest row's tokens, or what a window
        keeps of them; None before the first tokens."""
        return self.slots.in_use()[0] if isinstance(self.slots, KeyValues) else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values of the same slots."""
        return self.slots.in_use()[1] if isinstance(self.slots, KeyValues) else None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there are rows."""
        return bool(self.slots.lengths)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers are made by the first `update`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the same number of tokens to every row (stock models); return all of them."""
        assert isinstance(self.slots, KeyValues), "a stock model has attention layers only"
        batch, _, new, _ = key_states.shape
        while len(self.slots.lengths) < batch:
            self.slots.admit(len(self.slots.lengths), None, 0)
        places = find_places(self.slots.lengths[:batch], new, key_states.device)
        return self.slots.append(key_states.transpose(1, 2), value_states.transpose(1, 2), places)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys and offset of a mask that Hugging Face would build: for rows of one length only."""
        lengths = self.slots.lengths
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the cache holds rows of unequal lengths {lengths}: pass a 4-D attention_mask and "
                "position_ids (Hugging Face's defaults assume equal lengths)"
            )
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the longest row."""
        return max(self.slots.lengths, default=0)

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.slots.clear()


def check_cache_class(cache: object) -> None:
    """Refuse a cache of another class.

    Raises:
        InputError: names its class.
    """
    if not isinstance(cache, LlmNormCache):
        raise InputError(
            f"past_key_values: must be an LlmNormCache, got {type(cache).__name__}: an llmnorm "
            "model brings its own cache; leave it out, or use `model.model.new_cache()` (instead "
            "of PEFT's prefix tuning, which fills a cache of its own: prompt tuning)"
        )


class LlmNormCache(Cache):
    """A Hugging Face Cache of ragged layers; `slots` has the verbs for single rows.

    `layers`: what the model's mixers made (`model.model.new_cache()`), or a number of layers of
    keys and values.
    """

    def __init__(self, layers: int | Sequence[LayerCache]) -> None:
        self.slots = RaggedCache(layers)
        super().__init__(layers=[SlotLayer(layer) for layer in self.slots.layers])

    @property
    def max_cache_len(self) -> int:
        """No limit. PEFT asks every cache but a DynamicCache for it."""
        return -1

    def reset(self) -> None:
        """Forget everything, and give up the buffers."""
        self.slots.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every row, in all layers or in none.

        Raises:
            ValueError: a positive number; more than a row has, or can take back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        self.slots.rollback([-tokens_to_remove] * len(self.slots.lengths))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the surviving beams."""
        self.slots.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.slots.select([r for r in range(len(self.slots.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.slots.select(torch.arange(len(self.slots.lengths))[indices.cpu()].tolist())
