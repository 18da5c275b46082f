"""A model's step whose logits have the same bits whatever else is in the batch: `deterministic`.

    step = ExactStep(model, context=512, rows=8)        refuses what a self-test does not show

A library's product chooses the order of its sums by the number of rows, and with it the last bits
of each row. So every product here runs on numbers of rows of one class (nn/row_classes.py): packed
weights where the table has them, with rows added up to the class's first number; else each row by
itself, which is slow and needs no table. Attention is two products and a softmax for one query
position at a time, over all slots of the cache, most of them masked: so their shapes change with
the number of rows alone, for which they have one class. Norms, rotations and sums have one class.
A block of tokens, of a prompt or of a verification, thus has the bits of its tokens one by one.

A recurrence runs a block as single steps. Tokens that are taken back cost it its bits: it repeats
those before them from an earlier state, by another order of sums. So with a draft no model with
recurrent layers has passed the self-test, and without one some do (linear; not nala, ssd, gla).

What would surprise: the guarantee is that of this processor, this build of torch and its libraries.
Other machines may give other bits, each the same ones in any batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmnorm.machine.processor import processor
from llmnorm.models.decoding import hidden_states, longest_row
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.cache import KeyValues, RaggedCache
from llmnorm.nn.layer_cache import KEPT, PADDING, rounded
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.softmax import SoftmaxAttention, SoftmaxParameters
from llmnorm.nn.projections import Layout, Product, for_inference, has_packing
from llmnorm.nn.row_classes import FIRST_ROWS, MOST
from llmnorm.part import InputError

LEAVE_OUT = "leave generation.deterministic out"
TESTED = 14  # tokens of a row in the self-test
BLOCK = 6  # a verification of 5 drafts


class ExactStep:
    """Runs a model behind caches; a `generation.contract.Step`.

    Args:
        model: in evaluation mode, float32 on a CPU.
        context: tokens that a cache's rows are reserved for; None: the model's.
        rows: how many are at most run at once.
        drafts: whether there is a draft, so that tokens are taken back.

    Attributes:
        context, vocabulary, dtype, device, says: as the contract has them.

    Raises:
        InputError: the model is of another kind, or the self-test does not show equal bits.
    """

    def __init__(
        self,
        model: LlmNormForCausalLM,
        *,
        context: int | None = None,
        rows: int = 8,
        drafts: bool = True,
    ) -> None:
        self.dtype, self.device = model.dtype, model.device
        _check(model)
        layout, first, most = products()
        with torch.no_grad():
            self._model = for_inference(model, layout)
        for module in list(self._model.modules()):
            for name, child in module.named_children():
                if type(child) is Product:
                    setattr(module, name, _OneClass(child, first, most))
                if type(child) is SoftmaxAttention:
                    setattr(module, name, _OneByOne(child))
        layers = self.new_cache().layers
        # Otherwise a block is run token by token.
        self._blocks = all(type(layer) is KeyValues for layer in layers)
        self.context: int = min(context or longest_row(model), longest_row(model))
        self.vocabulary: int = model.config.vocab_size
        how = f"{layout} weights" if most > 1 else "each row by itself"
        self.says = f"decoding: bit-equal in any batch, as a self-test has shown; {how}"
        self._prove(rows, drafts)

    def new_cache(self) -> RaggedCache:
        """An empty cache of the model."""
        return _Padded(self._model.model.new_cache().slots.layers)

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

        As `models.decoding.Decoder.step`. Rows are attended to over all slots of a reserved cache,
        or over the context's.
        """
        rows, new = ids.shape
        counts = [new] * rows if counts is None else list(counts)
        tokens = self.context if cache.reserved is None else cache.reserved.tokens
        width = rounded(tokens + PADDING)
        if self._blocks:
            hidden = self._hidden(ids, cache, counts, width)
        else:
            cache.places(rows, new, ids.device, counts, width)  # refused now, or not at all
            each = []
            for at in range(new):
                here = [int(at < count) for count in counts]
                each.append(self._hidden(ids[:, at : at + 1], cache, here, width))
            hidden = torch.cat(each, 1)
        if last:
            ends = torch.tensor([max(count - 1, 0) for count in counts])[:, None, None]
            hidden = hidden.take_along_dim(ends, 1)
        logits: Tensor = self._model.lm_head(hidden)
        return logits

    def _hidden(self, ids: Tensor, cache: RaggedCache, counts: Sequence[int], width: int) -> Tensor:
        places = cache.places(ids.shape[0], ids.shape[1], ids.device, counts, width)
        return hidden_states(self._model, ids, places, cache.layers)

    def _prove(self, rows: int, drafts: bool) -> None:
        """Compare bits of rows alone, a token a pass, with those of batches and blocks.

        Raises:
            InputError: they differ.
        """
        # A recurrence keeps its last tokens; here they are more than it keeps.
        length = min(TESTED if self._blocks else KEPT + TESTED, self.context)
        sizes = sorted({1, 4, 8, rows})
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(self.vocabulary, (sizes[-1], length), generator=generator).tolist()
        texts = [text[: length - number % 3] for number, text in enumerate(texts)]
        threads = torch.get_num_threads()
        ways = [(batch, new, threads) for batch in sizes for new in (1, BLOCK)]
        ways.append((sizes[-1], BLOCK, 2 if threads == 1 else 1))
        alone = [self._logits([text], 1, False)[0] for text in texts[:4]]
        for batch, new, count in ways[1:]:
            with _threads(count):
                found = self._logits(texts[:batch], new, drafts)
            for want, have in zip(alone, found, strict=False):
                if not torch.equal(want, have):
                    far = float((want - have).abs().max())
                    without = "" if self._blocks or not drafts else "set generation.draft=none, or "
                    raise InputError(
                        f"generation.deterministic: a self-test found other logits with {batch} "
                        f"row(s), {new} token(s) a pass and {count} thread(s) than with one row, "
                        f"one token and {threads} thread(s), by up to {far:.1e}; {without}"
                        f"{LEAVE_OUT}"
                    )

    def _logits(self, texts: list[list[int]], new: int, drafts: bool) -> list[Tensor]:
        """Of each text, (tokens, vocabulary): up to `new` tokens a pass.

        drafts: each pass has `new` tokens of every row, of which some are taken back.
        """
        cache = self.new_cache()
        cache.reserve(len(texts), self.context, PADDING, dtype=self.dtype, device=self.device)
        found: list[list[Tensor]] = [[] for _ in texts]
        done, passes = [0] * len(texts), 0
        while any(a < len(text) for a, text in zip(done, texts, strict=True)):
            ids, counts = torch.zeros(len(texts), new, dtype=torch.long), []
            kept = [
                min(len(text) - done[row], 1 + (row + passes) % new)
                for row, text in enumerate(texts)
            ]
            for row, text in enumerate(texts):
                block = text[done[row] : done[row] + kept[row]]
                ids[row, : len(block)] = torch.tensor(block, dtype=torch.long)
                # Behind them drafts that are refused, as many as the context has room for.
                refused = min(new, self.context - done[row]) if drafts and block else 0
                counts.append(max(len(block), refused))
            logits = self.step(ids, cache, counts)
            cache.rollback([count - keep for count, keep in zip(counts, kept, strict=True)])
            for row, keep in enumerate(kept):
                found[row] += logits[row, :keep].unbind()
                done[row] += keep
            passes += 1
        return [torch.stack(lines) for lines in found]


def products() -> tuple[Layout, int, int]:
    """The layout of weights whose products have one class on this processor; the fewest and the
    most rows of a product."""
    known = FIRST_ROWS.get(processor())
    if known is None or not has_packing():
        return "plain", 1, 1
    first = max(classes[-1] for classes in known["packed"].values())
    return ("packed", first, MOST) if first <= MOST // 8 else ("plain", 1, 1)


def _check(model: LlmNormForCausalLM) -> None:
    if model.training:
        raise InputError("ExactStep: the model is in training mode; call model.eval() first")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        kind = str(model.dtype).removeprefix("torch.")
        raise InputError(
            f"generation.deterministic: is for float32 on a CPU, and the model is {kind} on "
            f"{model.device.type}; set generation.device=cpu generation.dtype=fp32, or {LEAVE_OUT}"
        )
    layers = model.model.new_cache().slots.layers
    if any(isinstance(layer, KeyValues) and layer.window is not None for layer in layers):
        raise InputError(
            "generation.deterministic: layers with a sliding window drop tokens at times that "
            f"depend on a row's drafts; {LEAVE_OUT}"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Padded(RaggedCache):
    """A cache that has the same slots whether or not there are drafts."""

    def reserve(
        self, rows: int, tokens: int, padding: int, *, dtype: torch.dtype, device: torch.device
    ) -> int:
        return super().reserve(rows, tokens, PADDING, dtype=dtype, device=device)


class _OneClass(Product):
    """A product that is only run on numbers of rows of one class, from `first` to `most`."""

    def __init__(self, product: Product, first: int, most: int) -> None:
        nn.Module.__init__(self)
        self.sizes, self.inputs, self.layout = product.sizes, product.inputs, product.layout
        self.product, self._first, self._most = product, first, most

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for part in x.flatten(0, -2).split(self._most):
            rows = len(part)
            if rows < self._first:
                part = torch.cat([part, part.new_zeros(self._first - rows, part.shape[1])])
            parts.append(self.product(part)[:rows])
        return torch.cat(parts).view(*x.shape[:-1], -1)


class _OneByOne(SoftmaxAttention):
    """The attention of a cached pass, one query position after another."""

    def __init__(self, attention: SoftmaxAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)

    def mix(
        self, parameters: SoftmaxParameters, context: Context, cache: KeyValues | None = None
    ) -> Tensor:
        """Of a pass of `ExactStep`, whose places have a fixed width."""
        assert cache is not None
        places = context.places
        keys, values = cache.append(parameters.k, parameters.v, places)
        mask = cache.mask(places, parameters.q.dtype)
        assert mask is not None, "places of a fixed width"
        group = self.heads // self.kv_heads
        q = (parameters.q * self.head_dim**-0.5).unflatten(2, (self.kv_heads, group))
        mixed = []
        for at in range(q.shape[1]):
            scores = q[:, at] @ keys.mT + mask[:, :, at : at + 1]
            mixed.append((scores.softmax(-1) @ values).flatten(1, 2))
        return torch.stack(mixed, 1)
