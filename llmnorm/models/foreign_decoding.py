"""The decode step of a stock decoder: any causal model of transformers with plain attention.

    step = ForeignStep(model)                   # GPT-2, GPT-NeoX, OPT, Gemma, Mixtral, ...
    cache = step.new_cache()
    logits = step.step(prompt_ids, cache, last=True)

The model runs as it is, with our ragged cache behind transformers' interface (models/cache.py).
Hugging Face derives masks and positions from one length for all rows, so both are made here from
each row's own length: a mask (rows, 1, new, width) that is added to the scores, and position_ids
(rows, new). The cache's layers then append the same number of tokens to every row; what is padding
is taken back at once.

Which models can be served follows from the configuration (`refuse_foreign`) and from a proof: when
a ForeignStep is made, it runs two rows of other lengths and compares their logits with those of one
pass without a cache. So a class whose attention needs something that is not handed over is refused
and never served with wrong numbers.

Shapes: ids (rows, new), the first rows of the cache, padding behind the real tokens; logits (rows,
new, vocabulary), or (rows, 1, vocabulary) of each row's last real token.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmnorm.config.stock import from_stock
from llmnorm.models.cache import LlmNormCache
from llmnorm.nn.cache import KeyValues, RaggedCache
from llmnorm.nn.places import Places
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = ("sdpa", "eager")  # what takes a mask of four axes
# Differences of the proof's logits, over their spread, that rounding explains: in 32 bits and more,
# and in 16. A hole of one position gives 5e-4 in a random Llama 16 wide, more in other classes.
ROUNDING, ROUNDING_OF_HALVES = 1e-4, 0.25


class ForeignStep:
    """Runs a stock decoder behind ragged caches, without gradients; a `contract.Step`.

    Args:
        model: in evaluation mode.

    Attributes:
        context: tokens that a row may have.
        vocabulary: tokens that the logits are of.
        says: what it does, in one line.
        dtype, device: of the weights and the cache.

    Raises:
        InputError: the model is in training mode, or cannot be served (`refuse_foreign`), or the
            proof fails.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        name = type(model).__name__
        if model.training:
            raise InputError(f"{name}: the model is in training mode; call model.eval() first")
        refuse_foreign(model.config, type(model), name)
        attention = model.config._attn_implementation
        if attention not in ATTENTION:
            raise InputError(
                f"{name}: attention by {attention} takes no mask for rows of unequal lengths; load "
                "the model with attn_implementation='sdpa'"
            )
        self._model, self._name = model, name
        self.dtype, self.device = model.dtype, model.device
        decoder = model.config.get_text_config(decoder=True)
        self.context: int = longest_row(model.config)
        self._layers: int = decoder.num_hidden_layers
        self._some_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._shape: tuple[int, int] | None = None
        self.vocabulary = self._prove()
        dtype = str(model.dtype).removeprefix("torch.")
        self.says = (
            f"decoding: {name} of transformers, its own modules run eagerly ({dtype} on "
            f"{model.device.type}, {attention})"
        )

    def new_cache(self) -> RaggedCache:
        """An empty cache of the model."""
        heads, head_dim = self._shape or (None, None)
        return RaggedCache([KeyValues(heads=heads, head_dim=head_dim) for _ in range(self._layers)])

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        cache: RaggedCache,
        counts: Sequence[int] | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """Append the new tokens ids (rows, new) to the first rows of the cache; their logits.

        Args:
            ids: padding behind the real tokens is any token.
            cache: of this model (`step.new_cache()`).
            counts: how many of each row's tokens are real; all if None.
            last: logits of each row's last real token alone, (rows, 1, vocabulary).

        Raises:
            ValueError: what `RaggedCache.places` refuses; nothing is changed.
        """
        rows, new = ids.shape
        places = cache.places(rows, new, ids.device, counts)
        ends = [max(count, 1) - 1 for count in places.counts]
        logits = self._run(ids, cache, places, sorted(set(ends)) if last else None)
        if any(count < new for count in places.counts):
            cache.rollback([new - count for count in places.counts])
        if not last:
            return logits
        column = {end: number for number, end in enumerate(sorted(set(ends)))}
        chosen = torch.tensor([column[end] for end in ends], device=logits.device)
        return logits.take_along_dim(chosen[:, None, None], 1)

    def _run(
        self, ids: Tensor, cache: RaggedCache, places: Places, columns: list[int] | None
    ) -> Tensor:
        """Logits (rows, new or columns, vocabulary) of a pass; padding is appended as well."""
        some = {}
        if columns is not None and self._some_logits:
            some["logits_to_keep"] = torch.tensor(columns, device=ids.device)
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=_mask(places, self._model.dtype),
            position_ids=places.index.clamp(max=self.context - 1),  # padding may stand beyond
            past_key_values=LlmNormCache(cache.layers),
            use_cache=True,
            **some,
        ).logits
        if columns is not None and not some:
            logits = logits[:, columns]
        return logits

    @torch.no_grad()
    def _prove(self) -> int:
        """Compare ragged rows with a pass without a cache; return the size of the vocabulary.

        A row of 6 tokens and one of 4, the beginning of the first, are run in two passes, the
        second row with padding in both.
        """
        size = self._model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(1, 7, device=self._model.device)[None] % size
        whole = self._model(input_ids=ids, use_cache=False).logits
        halves = self._model.dtype.itemsize == 2
        bound = (ROUNDING_OF_HALVES if halves else ROUNDING) * float(whole.double().std())
        beginning = self._model(input_ids=ids[:, :4], use_cache=False).logits
        if not _close(beginning, whole[:, :4], bound):
            self._refuse("it is an encoder: what it says of a token depends on later ones")
        cache = self.new_cache()
        try:
            first = self.step(ids[:, :3].repeat(2, 1), cache, [3, 1])
            filled = [isinstance(n, KeyValues) and n.keys is not None for n in cache.layers]
            if all(filled):
                second = torch.stack((ids[0, 3:], ids[0, 1:4]))
                behind = self.step(second, cache, [3, 3], last=True)
        except Exception as error:  # of any kind: it is the class's own code
            reason = " ".join(str(error).split())[:200]
            self._refuse(
                f"it does not run behind a ragged cache ({type(error).__name__}: {reason})"
            )
        if not all(filled):
            self._refuse(f"{filled.count(False)} of its {self._layers} layers keep no keys")
        shapes = set()
        for layer in cache.layers:
            assert isinstance(layer, KeyValues)
            assert layer.keys is not None and layer.values is not None
            shapes |= {(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)}
        if len(shapes) > 1:
            self._refuse(f"its keys and values differ in heads and size: {sorted(shapes)}")
        (self._shape,) = shapes
        found = torch.cat((first[0], first[1, :1], behind[0], behind[1]))
        wanted = torch.cat((whole[0, :3], whole[0, :1], whole[0, 5:], whole[0, 3:4]))
        if not _close(found, wanted, bound):
            off = float((found - wanted).abs().max())
            self._refuse(
                f"rows of unequal lengths get other logits behind a cache than without one (by "
                f"{off:.1e}, where rounding explains {bound:.1e})"
            )
        return int(whole.shape[-1])

    def _refuse(self, why: str) -> NoReturn:
        _refuse(self._name, why, self._model.config)


def refuse_foreign(config: "PreTrainedConfig", kind: "type[PreTrainedModel]", who: str) -> None:
    """Refuse a class of transformers that rows of unequal lengths cannot be run with.

    Args:
        config: of the model.
        kind: the model's class.
        who: how the message begins: the class, or the directory.

    Raises:
        InputError: an encoder or an encoder with a decoder; a recurrent or compressed state;
            windows; positions that are not told by position_ids. Says the nearest way.
    """
    decoder = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        _refuse(who, "it has an encoder beside its decoder", config)
    if kind.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        _refuse(who, f"{kind.__name__} is no causal language model", config)
    if getattr(kind, "_is_stateful", False):
        _refuse(who, "it carries a recurrent state, which cannot be taken back", config)
    if getattr(decoder, "kv_lora_rank", None):
        _refuse(who, "its keys and values are compressed (kv_lora_rank)", config)
    # What transformers' own cache would keep for this configuration.
    kept = {type(layer) for layer in DynamicCache(config=config).layers}
    if other := sorted(layer.__name__ for layer in kept - {DynamicLayer}):
        windows = any("Sliding" in name for name in other)
        what = "have a window" if windows else "keep other things than keys and values"
        _refuse(who, f"some or all of its layers {what} ({', '.join(other)})", config)
    if "local" in getattr(decoder, "attention_layers", ()):
        _refuse(who, "some of its layers have a window (attention_layers: local)", config)
    told = "position_ids" in inspect.signature(kind.forward).parameters
    if not told or getattr(decoder, "alibi", False):
        _refuse(who, "its positions cannot be told by position_ids", config)
    if not isinstance(getattr(decoder, "max_position_embeddings", None), int):
        _refuse(who, "its configuration names no longest context (max_position_embeddings)", config)


def longest_row(config: "PreTrainedConfig") -> int:
    """Tokens that a row of a stock decoder may have.

    With longrope all rows of a pass get other frequencies as soon as one of them is longer than the
    context before it was extended, so rows stay within that: none may depend on its neighbours.
    """
    decoder = config.get_text_config(decoder=True)
    longest: int = decoder.max_position_embeddings
    rope = getattr(decoder, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        longest = min(longest, rope["original_max_position_embeddings"])
    return longest


def _refuse(who: str, why: str, config: "PreTrainedConfig") -> NoReturn:
    """Raise the error, with the nearest way."""
    try:
        from_stock(config.to_dict(), who)
        way = "load its directory as a model of llmnorm, which has such layers"
    except InputError:
        way = "use transformers' own `generate` for it"
    raise InputError(
        f"{who}: {why}; decoders of transformers with plain attention in all layers are served; "
        f"{way}"
    )


def _mask(places: Places, dtype: torch.dtype) -> Tensor:
    """(rows, 1, new, width), 0 where a query may look and -inf elsewhere, to be added.

    A Boolean one would be right for sdpa and silently wrong for eager attention.
    """
    hidden = torch.arange(places.width, device=places.index.device) > places.index[..., None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)


def _close(found: Tensor, wanted: Tensor, bound: float) -> bool:
    """Whether all numbers are finite and alike."""
    return bool(((found - wanted).double().abs() <= bound).all())
