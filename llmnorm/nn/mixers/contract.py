"""What every sequence mixer is, and what the model tells it about the tokens it gets.

Shapes: x and out (batch, length, hidden); parameters of a mixing (batch, length, heads, ...),
values among them as `v` (batch, length, kv_heads, value_dim); y (batch, length, heads, value_dim).

The contract, tested for every mixer and every kind of context:
`mix(p) == einsum("bhij,bjhv->bihv", materialize(p), v)`, values repeated over their group of heads.
A diagonal skip belongs to the matrix; gates, norms and the output projection belong to `finish`.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmnorm.nn.cache import KeyValues, Places
from llmnorm.nn.linear import Linear


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
    """Without a mask: a query sees itself and all before it; False: every key (one new token)."""
    documents: tuple[int, ...] | None = None
    """Lengths of the documents, the rows laid end to end, if some row holds several and no mask
    keeps them apart."""
    boundaries: Tensor | None = None
    """(documents + 1,) int32, where documents start and the last one ends, on the device: given on
    a GPU together with `documents`."""
    places: Places | None = None
    """Where the new tokens go in the cache, when there is one."""


class Mixer(nn.Module):
    """Mixes positions: prepare the data-dependent parameters, mix the values, finish the output."""

    causal: ClassVar[bool]
    """Whether it can serve a causal language model."""

    def prepare(self, x: Tensor, context: Context) -> Any:
        """Everything that the mixing matrix is made of, and the values `v`, from x."""
        raise NotImplementedError

    def mix(self, parameters: Any, context: Context, cache: KeyValues | None = None) -> Tensor:
        """The mixed values (batch, length, heads, value_dim), by the fast way."""
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
        assert isinstance(self.o_proj, Linear)
        return self.o_proj

    @property
    def values(self) -> Linear:
        """The projection that makes the values, which DeepNorm scales at initialisation."""
        assert isinstance(self.v_proj, Linear)
        return self.v_proj

    def flops_per_token(self, context_length: int) -> float:
        """Forward operations a token beyond the linear layers (a multiply-add counts two)."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context, cache: KeyValues | None = None) -> Tensor:
        """x (batch, length, hidden) -> the same shape."""
        parameters = self.prepare(x, context)
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


def document_mask(documents: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """(batch, 1, length, length): True for what is before, or is, the query in its document."""
    lengths = torch.tensor(documents, device=device)
    number = torch.repeat_interleave(torch.arange(len(documents), device=device), lengths)
    number = number.view(batch, 1, -1)
    same = number[..., :, None] == number[..., None, :]
    return same & causal_mask(number.shape[-1], device)


def padding_mask(real: Tensor) -> Tensor | None:
    """(batch, 1, length, length) for rows with padding where `real` (batch, length) is False.

    None where plain causality is enough: padding on the right is behind every real token. A padding
    token sees itself, so that no row of the mask is empty.
    """
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    length = real.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    return (causal_mask(length, real.device) & real[:, None, None, :]) | itself


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length), True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def document_boundaries(documents: tuple[int, ...], device: torch.device) -> Tensor:
    """(documents + 1,) int32: (2, 1, 3) -> [0, 2, 3, 6]."""
    return torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device=device)
