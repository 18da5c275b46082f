"""A model's own forward pass behind a cache: for a model that is being trained.

`decoding.Decoder` is faster, and copies or joins weights to be so. This step leaves the model as it
is: its parameters' memory, its modules, and the autocast in which it is called. With its logits a
sample in the middle of a run is that of the model which is trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmnorm.models.decoding import hidden_states, last_tokens
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.cache import RaggedCache


class EagerStep:
    """Runs a model of ours behind caches of it, without gradients.

    Args:
        model: in evaluation mode; its parameters may change between two caches.

    Attributes:
        context: tokens that a row may have.
        vocabulary: tokens that the logits are of.
        dtype: of keys and values; where the step is called under autocast, autocast's.
        device: where ids, logits and the cache are.
        says: what it does, in one line.
    """

    says = "decoding: the model's own modules, as they are trained"

    def __init__(self, model: LlmNormForCausalLM) -> None:
        self._model = model
        self.context: int = model.config.max_position_embeddings
        self.vocabulary: int = model.config.vocab_size
        self.device: torch.device = model.device
        kind = self.device.type
        cast = torch.is_autocast_enabled(kind)
        self.dtype: torch.dtype = torch.get_autocast_dtype(kind) if cast else model.dtype

    def new_cache(self) -> RaggedCache:
        """An empty cache of the model."""
        return self._model.model.new_cache().slots

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        cache: RaggedCache,
        counts: Sequence[int] | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """As `Decoder.step`.

        Raises:
            ValueError: what `RaggedCache.places` refuses; nothing is changed.
        """
        rows, new = ids.shape
        places = cache.places(rows, new, ids.device, counts)
        hidden = hidden_states(self._model, ids, places, cache.layers)
        logits: Tensor = self._model.lm_head(last_tokens(hidden, places) if last else hidden)
        return logits
