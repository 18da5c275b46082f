"""What every sequence mixer is, and what the model tells it about the tokens it gets.

Shapes: x and out (batch, length, hidden); parameters of a mixing (batch, length, heads, ...),
values among them as `v` (batch, length, kv_heads, value_dim); y (batch, length, heads, value_dim).

The contract, tested for every mixer and every kind of context:
`mix(p) == einsum("bhij,bjhv->bihv", materialize(p), v)`, values repeated over their group of heads.
A diagonal skip belongs to the matrix; gates, norms and the output projection belong to `finish`,
convolutions over time to `prepare`. With a cache the padding of a row is behind its real tokens.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.cache import KeyValues, LayerCache, Places
from llmnorm.nn.linear import Linear
from llmnorm.part import InputError


@dataclass(frozen=True)
class Context:
    """What a forward pass knows about its tokens, the same for all layers.

    Not a tuple on purpose: wrappers that cast a module's inputs to bf16 look into tuples, and would
    find the rotary tables, which stay float32.
    """

    cos: Tensor
    """(batch or 1, length, 1, head_dim/2) rotary table."""
    sin: Tensor
    """The same for the sine."""
    mask: Tensor | None = None
    """(batch or 1, 1, length, keys), True where a query may look; None: see `causal`."""
    causal: bool = True
    """Without a mask, in a causal mixer: a query sees itself and all before it; False: every key
    (one new token)."""
    documents: tuple[int, ...] | None = None
    """Lengths of the documents, the rows laid end to end, if some row holds several; None also
    where shapes must not depend on them, and `mask` or `boundaries` alone keep documents apart."""
    boundaries: Tensor | None = None
    """(documents + 1,) int32, where documents start and the last one ends, on the device, if some
    row holds several and a kernel serves them (varlen.py)."""
    places: Places | None = None
    """Where the new tokens go in the cache, when there is one."""
    segments: Tensor | None = None
    """(batch, length) number of each token's document, if some row holds several."""
    real: Tensor | None = None
    """(batch, length), False for padding; None: there is none."""


class Mixer(nn.Module):
    """Mixes positions: prepare the data-dependent parameters, mix the values, finish the output."""

    causal: bool
    """Whether it can serve a causal language model."""

    def new_cache(self) -> LayerCache:
        """An empty cache of what this mixer carries in decoding."""
        return KeyValues()

    def prepare(self, x: Tensor, context: Context, cache: Any = None) -> Any:
        """Everything that the mixing matrix is made of, and the values `v`, from x."""
        raise NotImplementedError

    def mix(self, parameters: Any, context: Context, cache: Any = None) -> Tensor:
        """The mixed values (batch, length, heads, value_dim), by the fast way.

        `cache`, one that `new_cache` made, is read and appended to.
        """
        raise NotImplementedError

    def materialize(self, parameters: Any, context: Context) -> Tensor:
        """The mixing matrix (batch, heads, length, length): for tests and pictures."""
        raise NotImplementedError

    def finish(self, y: Tensor, x: Tensor, parameters: Any) -> Tensor:
        """The output (batch, length, hidden) from the mixed values."""
        raise NotImplementedError

    @property
    def output(self) -> Linear:
        """The projection that writes to the residual stream."""
        projection = getattr(self, "o_proj", None) or self.out_proj
        assert isinstance(projection, Linear)
        return projection

    @property
    def values(self) -> Linear:
        """The projection that makes the values, which DeepNorm scales at initialisation.

        Raises:
            InputError: it is a part of another one.
        """
        projection = getattr(self, "v_proj", None)
        if not isinstance(projection, Linear):
            raise InputError(
                "model.placement: 'deepnorm' scales the values' projection at initialisation, and "
                f"{type(self).__name__} has one projection for everything; nearest: post"
            )
        return projection

    def flops_per_token(self, context_length: int) -> float:
        """Forward operations a token beyond the linear layers (a multiply-add counts two)."""
        raise NotImplementedError

    def health(self, parameters: Any, context: Context) -> dict[str, Tensor]:
        """Numbers, 0-dim, that tell whether it still mixes: health.py says what they mean."""
        return {}

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """x (batch, length, hidden) -> the same shape."""
        parameters = self.prepare(x, context, cache)
        return self.finish(self.mix(parameters, context, cache), x, parameters)


def document_lengths(position_ids: Tensor) -> tuple[int, ...] | None:
    """Lengths of the documents of packed rows laid end to end; None if each row holds just one.

    A document starts where a row starts and where position_ids (batch, length) is 0:
    [[0, 1, 0], [5, 6, 7]] -> (2, 1, 3).
    """
    starts = position_ids == 0
    starts[:, 0] = True
    first = starts.flatten().nonzero().flatten().tolist()
    if len(first) == len(position_ids):
        return None
    ends = [*first[1:], position_ids.numel()]
    return tuple(end - start for start, end in zip(first, ends, strict=True))


def document_numbers(documents: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """(batch, length) the number of each token's document: (2, 1, 3) -> [[0, 0, 1], [2, 2, 2]]."""
    lengths = torch.tensor(documents, device=device)
    number = torch.arange(len(documents), device=device)
    # Without its size repeat_interleave waits for a GPU to tell it.
    number = number.repeat_interleave(lengths, output_size=sum(documents))
    return number.view(batch, -1)


def document_mask(number: Tensor, *, causal: bool = True) -> Tensor:
    """(batch, 1, length, length): True for what is before, or is, the query in its document.

    causal=False: for all of its document. number (batch, length) is `document_numbers`'.
    """
    same = number[:, None, :, None] == number[:, None, None, :]
    return same & causal_mask(number.shape[-1], number.device) if causal else same


def visible_tokens(like: Tensor, context: Context, *, causal: bool) -> Tensor:
    """How many real tokens each token sees, at least 1: (batch or 1, length), int64.

    In its document, up to itself or (causal=False) to the end; like (batch, length, ...).
    """
    if context.places is not None:
        return context.places.index + 1
    batch, length = like.shape[:2]
    if context.segments is None and context.real is None:
        count = torch.arange(1, length + 1, device=like.device)
        return (count if causal else count.new_full((length,), length)).unsqueeze(0)
    real = torch.ones(batch, length, dtype=torch.long, device=like.device)
    if context.real is not None:
        real = context.real.long()
    seen = _running_count(real, context.segments)
    if not causal:
        segments = None if context.segments is None else context.segments.flip(1)
        seen = seen + _running_count(real.flip(1), segments).flip(1) - real
    return seen.clamp(min=1)


def visible_pairs(like: Tensor, context: Context, *, causal: bool) -> Tensor:
    """(batch or 1, 1, length, length), True where token i sees the real token j.

    What the explicit matrices of recurrent mixers are masked by; like (batch, length, ...).
    """
    length = like.shape[1]
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device)
    if causal:
        visible = visible.tril()
    if context.segments is not None:
        number = context.segments
        visible = visible & (number[:, None, :, None] == number[:, None, None, :])
    if context.real is not None:
        visible = visible & context.real[:, None, None, :]
    return visible


def _running_count(real: Tensor, segments: Tensor | None) -> Tensor:
    running = real.cumsum(1)
    if segments is None:
        return running
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return running - ((running - real) * first).cummax(1).values


def padding_mask(real: Tensor, *, causal: bool = True) -> Tensor | None:
    """(batch, 1, length, length) for rows with padding where `real` (batch, length) is False.

    None where none is needed: there is no padding, or (causal) it is all on the right, behind every
    real token. A padding token sees itself, so that no row of the mask is empty.
    """
    if not bool((real[:, 1:] & ~real[:, :-1]).any() if causal else (~real).any()):
        return None
    length = real.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    visible = real[:, None, None, :]
    return (causal_mask(length, real.device) & visible if causal else visible) | itself


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length), True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def document_boundaries(documents: tuple[int, ...], device: torch.device) -> Tensor:
    """(documents + 1,) int32: (2, 1, 3) -> [0, 2, 3, 6]."""
    return torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device=device)
