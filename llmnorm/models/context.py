"""Who may look at whom in a forward pass, and at which positions, from Hugging Face's arguments.

    attention_mask          0 for padding, which no token sees
    position_ids            a document of a packed row starts where they are 0
    cu_seq_lens_q, ...      where documents start, from a caller who knows it (transformers'
                            FlashAttentionKwargs); nothing is then read back from a GPU
    past_key_values         the rows' earlier tokens
    counts                  beside them: how many of a row's new tokens are real, the first ones

This is the one place where these arguments are combined and checked; what comes out is one value of
four kinds (nn/visibility.py). What would be silently wrong is refused.

Under torch.compile and torch.export no value may decide what runs. Padding then always has a mask,
and position_ids always make documents, one a row or several; the numbers are the same.

Shapes: attention_mask and position_ids (batch, length); with a cache the mask may be wider, and its
last `length` columns count.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.models.cache import LlmNormCache
from llmnorm.nn.masks import (
    document_boundaries,
    document_lengths,
    document_mask,
    document_segments,
    document_starts,
    padding_mask,
)
from llmnorm.nn.visibility import Cached, Masked, Packed, Plain, Visibility
from llmnorm.part import InputError


class Documents(NamedTuple):
    """Where the documents of packed rows are: boundaries (documents + 1,) int32, and their longest
    one's tokens, or more."""

    boundaries: Tensor
    longest: int


class Rules(NamedTuple):
    """What the model and its device ask of packed rows.

    causal: no token sees later ones. kernel: a GPU kernel serves attention between boundaries.
    fixed_shapes: no shape may depend on the documents' lengths.
    """

    causal: bool
    kernel: bool
    fixed_shapes: bool


def given_documents(
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
    hidden: Tensor,
) -> Documents | None:
    """The documents that the caller hands over; None if it hands over none.

    Queries and keys are the same tokens, so both pairs say the same. Values on a GPU are trusted:
    reading them back would wait for it. On a CPU they are checked.

    Args:
        cu_seq_lens_q: (documents + 1,) int32, [0, 2, 3, 6] for documents of 2, 1 and 3 tokens. Rows
            are laid end to end, and a row starts a document.
        cu_seq_lens_k: the same.
        max_length_q: tokens of the longest document, or more.
        max_length_k: the same.
        hidden: (batch, length, hidden), the rows.

    Raises:
        InputError: some of the four are missing, or they are not as above.
    """
    given = {
        "cu_seq_lens_q": cu_seq_lens_q,
        "cu_seq_lens_k": cu_seq_lens_k,
        "max_length_q": max_length_q,
        "max_length_k": max_length_k,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise InputError(
            f"{', '.join(missing)}: missing; give all of {', '.join(given)}, or none of them"
        )
    assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
    (batch, length, _), device = hidden.shape, hidden.device
    for name, value in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if value.ndim != 1 or len(value) <= batch or value.dtype != torch.int32:
            raise InputError(
                f"{name}: must be int32 of shape (documents + 1,), with at least one document for "
                f"each of {batch} rows; got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != device:
            raise InputError(f"{name}: is on {value.device}, and the rows are on {device}")
    if cu_seq_lens_q.shape != cu_seq_lens_k.shape or max_length_q != max_length_k:
        raise InputError(
            "cu_seq_lens_k, max_length_k: must be those of cu_seq_lens_q and max_length_q: queries "
            "and keys are the same tokens"
        )
    if not isinstance(max_length_q, int) or not 1 <= max_length_q <= length:
        raise InputError(
            f"max_length_q: must be a Python int from 1 to the rows' length {length}, got "
            f"{max_length_q!r}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist(), max_length_q, batch, length)
    return Documents(cu_seq_lens_q, max_length_q)


def _check_values(
    starts: list[int], of_keys: list[int], longest: int, batch: int, length: int
) -> None:
    """Refuse boundaries that are not those of documents in `batch` rows of `length` tokens."""
    total, lengths = batch * length, [b - a for a, b in pairwise(starts)]
    if of_keys != starts:
        raise InputError(f"cu_seq_lens_k: {of_keys} differs from cu_seq_lens_q: {starts}")
    if (starts[0], starts[-1]) != (0, total) or min(lengths) < 1:
        raise InputError(f"cu_seq_lens_q: must rise from 0 to {total}, got {starts}")
    if not set(range(0, total, length)) <= set(starts):
        raise InputError(
            f"cu_seq_lens_q: must hold the start of every row, 0, {length}, ...; got {starts}"
        )
    if max(lengths) > longest:
        raise InputError(
            f"max_length_q: is {longest}, and cu_seq_lens_q has a document of {max(lengths)} tokens"
        )


def without_cache(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    documents: Documents | None,
    hidden: Tensor,
    rules: Rules,
) -> tuple[Visibility, Tensor]:
    """Who sees whom in the rows hidden (batch, length, hidden), and their position_ids.

    With a mask, positions that are 0 behind a row's first real token start documents too, and each
    run of padding counts as a document of its own.

    Raises:
        InputError: a mask of another shape; documents that are given with a mask, or do not start
            where position_ids do (checked on a CPU only).
    """
    (batch, length, _), device, lengths = hidden.shape, hidden.device, None
    if attention_mask is not None:
        if documents is not None:
            raise InputError(
                "attention_mask: cannot be given with cu_seq_lens_q; leave it out, and let padding "
                "be a document of its own"
            )
        if attention_mask.shape[1] != length:
            raise InputError(
                f"attention_mask: must be (batch, length) = {(batch, length)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        real = attention_mask.bool().expand(batch, length)
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1).clamp(min=0)
        elif torch.compiler.is_compiling():
            return _numbered(position_ids, real, rules), position_ids
        else:
            lengths = document_lengths(position_ids, real)
        if torch.compiler.is_compiling():
            return Masked(real, padding_mask(real, causal=rules.causal)), position_ids
        if lengths is None:
            if bool(real.all()):
                return Plain(), position_ids
            return Masked(real, padding_mask(real, causal=rules.causal)), position_ids
    elif documents is None and position_ids is not None:
        if torch.compiler.is_compiling():
            return _numbered(position_ids, None, rules), position_ids
        lengths = document_lengths(position_ids)
    if lengths is not None:
        documents = Documents(document_boundaries(lengths, device), max(lengths))
    if documents is not None and position_ids is not None and lengths is None:
        _check_starts(documents.boundaries, position_ids)
    if documents is None or len(documents.boundaries) == batch + 1:
        if position_ids is None:
            position_ids = torch.arange(length, device=device).unsqueeze(0)
        return Plain(), position_ids
    packed = _packed(documents, rules, batch=batch, length=length)
    if position_ids is None:
        token = torch.arange(batch * length, device=device).view(batch, length)
        position_ids = token - documents.boundaries.long()[packed.segments]
    return packed, position_ids


def _packed(documents: Documents, rules: Rules, *, batch: int, length: int) -> Packed:
    boundaries, longest = documents
    segments = document_segments(boundaries, batch, length)
    if torch.compiler.is_compiling():
        rules, longest = rules._replace(fixed_shapes=True), length
    elif rules.fixed_shapes:
        # The number of documents is the one shape that changes; the compiler is told beforehand. A
        # row's length is the same in every step.
        torch._dynamo.maybe_mark_dynamic(boundaries, 0)
        longest = length
    mask = None
    if not rules.kernel and (rules.fixed_shapes or boundaries.is_cuda):
        mask = document_mask(segments, causal=rules.causal)
    return Packed(boundaries, segments, longest, rules.kernel, mask, rules.fixed_shapes)


def _numbered(position_ids: Tensor, real: Tensor | None, rules: Rules) -> Packed:
    """Documents by their numbers alone, for a compiler: how many there are is a value."""
    starts = document_starts(position_ids, real)
    if real is not None:
        before = F.pad(real[:, :-1], (1, 0))
        again = real & ~before & (position_ids != 0) & (real.cumsum(1) > 1)
        require(
            ~again.any(), "attention_mask: has a hole inside a document; leave position_ids out"
        )
    segments = starts.flatten().cumsum(0).view(starts.shape) - 1
    mask = document_mask(segments, causal=rules.causal)
    return Packed(None, segments, position_ids.shape[1], mask=mask, fixed_shapes=True)


def require(condition: Tensor, message: str) -> None:
    """Refuse what a 0-dim bool tensor says is wrong; a compiled program refuses when it runs.

    Raises:
        InputError: the message.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise InputError(message)


def check_claims(
    more: Any,
    cache: LlmNormCache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    hidden: Tensor,
    *,
    causal: bool,
) -> None:
    """Refuse keywords (pretrained_model.py) that say otherwise than the rest.

    Args:
        more: the keywords; is_causal, cache_position and seq_idx are looked at.
        hidden: (batch, length, hidden), the new tokens.

    Raises:
        InputError: another direction than the mixers'; columns other than those behind the cache;
            numbers of documents without anything that says where they start.
    """
    if more.get("is_causal") not in (None, causal):
        raise InputError(f"is_causal: the mixers have {causal}; leave it out")
    columns, length = more.get("cache_position"), hidden.shape[1]
    if columns is not None:
        end = length + (0 if cache is None else cache.get_seq_length())
        if cache is not None and attention_mask is not None:
            end = attention_mask.shape[1]
        expected = torch.arange(end - length, end, device=columns.device)
        message = "cache_position: new tokens stand behind those in the cache; leave it out"
        if columns.shape != expected.shape:
            raise InputError(message)
        require((columns == expected).all(), message)
    if more.get("seq_idx") is not None:
        if cache is not None:
            raise InputError("seq_idx: packed rows have no cache; leave one of them out")
        if position_ids is None and more.get("cu_seq_lens_q") is None:
            raise InputError(
                "seq_idx: needs position_ids or cu_seq_lens_q beside it, which say where the "
                "documents start"
            )


def check_numbers(seq_idx: Tensor | None, visibility: Visibility) -> None:
    """Refuse numbers of documents that change elsewhere than the documents do; on a CPU only.

    Args:
        seq_idx: (batch, length) or None.

    Raises:
        InputError: they do.
    """
    if seq_idx is None or seq_idx.device.type != "cpu" or torch.compiler.is_compiling():
        return
    segments = visibility.segments if isinstance(visibility, Packed) else torch.zeros_like(seq_idx)
    assert segments is not None
    changes = [(t[:, 1:] != t[:, :-1]) for t in (seq_idx, segments)]
    if not torch.equal(*(t.expand_as(changes[1]) for t in changes)):
        raise InputError(
            "seq_idx: documents start elsewhere than position_ids or cu_seq_lens_q say; leave it "
            "out, or make them agree"
        )


def _check_starts(boundaries: Tensor, position_ids: Tensor) -> None:
    """Refuse positions that start documents elsewhere than the boundaries; on a CPU only."""
    if boundaries.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = position_ids == 0
    starts[:, 0] = True
    expected = torch.zeros_like(starts)
    expected.view(-1)[boundaries[:-1].long()] = True
    if (starts != expected).any().tolist():
        raise InputError(
            "cu_seq_lens_q: documents start elsewhere than position_ids are 0; leave one of them "
            "out, or make them agree"
        )


def with_cache(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: LlmNormCache,
    hidden: Tensor,
    counts: Sequence[int] | None = None,
) -> tuple[Cached, Tensor, Tensor | None]:
    """Places in the cache, position_ids (batch, length), and the order to take the tokens in.

    The order (batch, length) brings each row's real tokens to the front, and both others are for
    the tokens in this order; None: the tokens of hidden (batch, length, hidden) as they stand. The
    rows' own lengths give the places, and the positions if there are none. An empty cache takes in
    the rows; of a filled one the first rows take part.

    `counts` says how many of each row's tokens are real, the first ones. Nothing is then reordered,
    nor read back from a GPU, as a mask is and position_ids of several tokens are.

    Raises:
        InputError: a mask with fewer columns than there are tokens, or beside counts; counts of
            other rows; several new tokens whose positions restart at 0, inside a row or behind
            tokens that the cache holds.
    """
    (batch, length, _), device, real, order = hidden.shape, hidden.device, None, None
    if counts is not None:
        if attention_mask is not None:
            raise InputError("counts: say which tokens are real, as attention_mask does; give one")
        if isinstance(counts, Tensor):
            raise InputError("counts: must be a list of numbers, on the host; got a tensor")
        if len(counts) != batch or not all(0 <= count <= length for count in counts):
            raise InputError(
                f"counts: must be {batch} numbers from 0 to {length}, how many of each row's new "
                f"tokens are real; got {list(counts)}"
            )
        if position_ids is not None and length > 1:
            counted = torch.tensor(counts, device=device)
            real = torch.arange(length, device=device) < counted[:, None]
    if attention_mask is not None:
        if attention_mask.shape[1] < length:
            raise InputError(
                f"attention_mask: must have a column for each of the {length} new tokens, got "
                f"{tuple(attention_mask.shape)}"
            )
        real = attention_mask[:, -length:].bool()
        if bool(real.all()):
            real = None
    if real is not None and counts is None:
        order = (~real).long().argsort(dim=1, stable=True)
        real = real.take_along_dim(order, 1)
        counts = real.sum(1).tolist()
        if position_ids is not None:
            position_ids = position_ids.take_along_dim(order, 1)
    if position_ids is not None and length > 1:
        _check_goes_on(position_ids, real, cache.slots.lengths)
    places = cache.slots.places(batch, length, device, counts)
    if position_ids is None:
        position_ids = places.index
    return Cached(places), position_ids, order


def _check_goes_on(position_ids: Tensor, real: Tensor | None, lengths: list[int]) -> None:
    """Refuse positions that restart at 0; real tokens stand in front."""
    restarts = position_ids == 0
    if real is not None:
        restarts = restarts & real
    if bool(restarts[:, 1:].any()):
        raise InputError("position_ids restart inside a row: packed rows have no cache")
    rows = [row for row, first in enumerate(restarts[:, 0].tolist()) if first]
    for row in rows:
        if row < len(lengths) and lengths[row]:
            raise InputError(
                f"position_ids restart at 0 in row {row}, of which the cache holds {lengths[row]} "
                "tokens: the new tokens would see them as theirs; leave position_ids out to go on, "
                "or begin with an empty cache"
            )
