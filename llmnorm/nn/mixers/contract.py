"""What every sequence mixer is, and what the model tells it about the tokens it gets.

Shapes: x and out (batch, length, hidden); parameters of a mixing (batch, length, heads, ...),
values among them as `v` (batch, length, kv_heads, value_dim); y (batch, length, heads, value_dim).

The contract, tested for every mixer and every kind of context:
`mix(p) == einsum("bhij,bjhv->bihv", materialize(p), v)`, values repeated over their group of heads.
A diagonal skip belongs to the matrix; gates, norms and the output projection belong to `finish`,
convolutions over time to `prepare`. With a cache, a row's padding stands behind its real tokens.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llmnorm.nn.layer_cache import LayerCache
from llmnorm.nn.linear import Linear
from llmnorm.nn.places import Places
from llmnorm.nn.visibility import Cached, Masked, Packed, Plain, Visibility
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
    visibility: Visibility = Plain()
    """Who may look at whom. The properties below are read from it, for the mixers that treat
    several kinds alike."""
    matrices: list[Tensor] | None = None
    """Where every mixer's forward pass appends its matrix, by which it then mixes, if that is asked
    for."""

    @property
    def real(self) -> Tensor | None:
        """(batch, length), False for padding; None: there is none."""
        match self.visibility:
            case Masked(real=real):
                return real
            case Cached(places=places):
                return places.real
        return None

    @property
    def padding(self) -> Tensor | None:
        """(batch, length), True for padding; None: there is none."""
        match self.visibility:
            case Masked(real=real):
                return ~real
            case Cached(places=places):
                return places.padding
        return None

    @property
    def places(self) -> Places:
        """Where the new tokens go; there is a cache if this is asked."""
        assert isinstance(self.visibility, Cached)
        return self.visibility.places

    @property
    def segments(self) -> Tensor | None:
        """(batch, length), the number of each token's document, if some row holds several."""
        return self.visibility.segments if isinstance(self.visibility, Packed) else None

    @property
    def boundaries(self) -> Tensor | None:
        """(documents + 1,) int32, where documents start, if some row holds several."""
        return self.visibility.boundaries if isinstance(self.visibility, Packed) else None


class HasValues(Protocol):
    """The parameters of a mixing: whatever the matrix is made of, and what it is multiplied by."""

    @property
    def v(self) -> Tensor:
        """The values, (batch, length, kv_heads, value_dim)."""


Parameters = TypeVar("Parameters", bound=HasValues)
Cache = TypeVar("Cache", bound=LayerCache)


class Mixer(nn.Module, Generic[Parameters, Cache]):
    """Mixes positions: prepare the data-dependent parameters, mix the values, finish the output.

    `Parameters` is what `prepare` makes for `mix`, `materialize` and `finish`; `Cache` is what
    `new_cache` makes, `Never` for a mixer that looks at later tokens.
    """

    causal: bool
    """Whether it can serve a causal language model."""

    def new_cache(self) -> Cache:
        """An empty cache of what this mixer carries in decoding.

        Raises:
            InputError: it looks at later tokens, and so cannot decode.
        """
        raise InputError(
            f"use_cache: {type(self).__name__} looks at later tokens and has no cache; leave it out"
        )

    def prepare(self, x: Tensor, context: Context, cache: Cache | None = None) -> Parameters:
        """Everything that the mixing matrix is made of, and the values `v`, from x."""
        raise NotImplementedError

    def mix(self, parameters: Parameters, context: Context, cache: Cache | None = None) -> Tensor:
        """The mixed values (batch, length, heads, value_dim), by the fast way.

        `cache`, given if and only if the context is `Cached`, is read and appended to.
        """
        raise NotImplementedError

    def materialize(self, parameters: Parameters, context: Context) -> Tensor:
        """The mixing matrix (batch, heads, length, length): for tests and pictures, uncached."""
        raise NotImplementedError

    def finish(self, y: Tensor, x: Tensor, parameters: Parameters) -> Tensor:
        """The output (batch, length, hidden) from the mixed values."""
        raise NotImplementedError

    @property
    def output(self) -> Linear:
        """The projection that writes to the residual stream."""
        raise NotImplementedError

    @property
    def values(self) -> Linear:
        """The projection that makes the values, which DeepNorm scales at initialisation.

        Raises:
            InputError: one projection makes the values and other things.
        """
        raise InputError(
            "model.placement: 'deepnorm' scales the values' projection at initialisation, and "
            f"{type(self).__name__} has one projection for everything; nearest: post"
        )

    def flops_per_token(self, context_length: int) -> float:
        """Forward operations a token beyond the linear layers (a multiply-add counts two)."""
        raise NotImplementedError

    def health(self, parameters: Parameters, context: Context) -> dict[str, Tensor]:
        """Numbers, 0-dim, that tell whether it still mixes: health.py says what they mean."""
        return {}

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        """x (batch, length, hidden) -> the same shape."""
        assert (cache is not None) == isinstance(context.visibility, Cached)
        parameters = self.prepare(x, context, cache)
        if context.matrices is None:
            return self.finish(self.mix(parameters, context, cache), x, parameters)
        # By the matrix itself, so that gradients of the output reach it.
        matrix = self.materialize(parameters, context)
        context.matrices.append(matrix)
        v = parameters.v.repeat_interleave(matrix.shape[1] // parameters.v.shape[2], 2)
        y = torch.einsum("bhij,bjhv->bihv", matrix, v.to(matrix.dtype)).to(v.dtype)
        return self.finish(y, x, parameters)


class ProjectedMixer(Mixer[Parameters, Cache]):
    """A mixer that projects values and output apart, by Llama's names."""

    v_proj: Linear
    o_proj: Linear

    @property
    def output(self) -> Linear:
        """The projection that writes to the residual stream."""
        return self.o_proj

    @property
    def values(self) -> Linear:
        """The projection that makes the values."""
        return self.v_proj
