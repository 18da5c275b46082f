"""What transformers' `generate` asks of the causal language model: its cache, its new tokens.

Shapes: input_ids (batch, columns); attention_mask (batch, columns), over the tokens in the cache
too.

Surprise: `generate` takes the cache's longest row for the number of columns that it has seen. Rows
of a left-padded batch are stored without their padding, so there are more columns than that. When
it goes on from a cache, the new columns are counted here, from the mask and the rows' lengths.
"""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from llmnorm.models.cache import LlmNormCache, check_cache_class
from llmnorm.part import InputError


class LlmNormGenerationMixin(GenerationMixin):
    """`generate` with a cache of our own."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: LlmNormCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next pass, as transformers' method; it cuts off the new tokens.

        Raises:
            InputError: the first pass of a `generate` whose cache holds other tokens than the mask
                has in front of the new ones.
        """
        lengths = [] if past_key_values is None else past_key_values.slots.lengths
        if is_first_iteration and any(lengths) and attention_mask is not None:
            if next_sequence_length is not None:  # whole sequences were given
                next_sequence_length = _new_columns(attention_mask, lengths)
            new = next_sequence_length
            if new is None:
                new = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            _check_cached(attention_mask[:, :-new], lengths)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate`'s hook (private to transformers, pinned by a test): our cache, not theirs."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation '{generation_config.cache_implementation}': an llmnorm "
                "model brings its own cache; leave the key out"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache_class(given)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.model.new_cache()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching (`generate_batch`) keeps keys and values in pages.

        Raises:
            InputError: always; no layer of ours knows such pages.
        """
        raise InputError(
            "continuous batching: an llmnorm model has a cache of its own, without pages; use "
            "`generate`, which takes prompts of unequal lengths"
        )


def _new_columns(attention_mask: Tensor, lengths: list[int]) -> int:
    """Columns behind those in the cache, where rows of these lengths are.

    Raises:
        InputError: there are none.
    """
    tokens = attention_mask.sum(1).tolist()
    new = max(row - cached for row, cached in zip(tokens, lengths, strict=False))
    if new < 1:
        raise InputError(
            f"input_ids: have {tokens} tokens in their rows and past_key_values holds {lengths}; "
            "give the whole sequences, or the new tokens with an attention_mask over all"
        )
    return int(new)


def _check_cached(attention_mask: Tensor, lengths: list[int]) -> None:
    """Refuse a mask of the columns in the cache that has other numbers of tokens than it holds."""
    tokens = attention_mask.sum(1).tolist()
    if tokens != lengths[: len(tokens)]:
        raise InputError(
            f"attention_mask: has {tokens} tokens in front of the new ones and past_key_values "
            f"holds {lengths}; give the mask of all tokens, without a prefill_chunk_size"
        )
