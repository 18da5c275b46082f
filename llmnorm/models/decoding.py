"""The decode step: logits of a few new tokens a row behind a cache, as fast as the machine allows.

    decoder = Decoder(model)
    cache = decoder.new_cache()
    logits = decoder.step(prompt_ids, cache, last=True)     # prefill
    logits = decoder.step(next_ids, cache)                  # one token a row, and so on

The step runs the modules of the model itself, in a copy for inference that shares its parameters
(nn/projections.py). On a CPU it is captured: the passes of few tokens are traced once, and then run
without Python between the operators. What is traced is a pure function of tensors: ids, numbers of
the rows (lengths, real tokens), the buffers of keys and values and of a recurrence's inputs (both
written in place), recurrent states (old ones in, new ones out). What a rollback needs to know stays
on the host. So one graph for a number of new tokens serves any number of rows and any length.

When a step is captured is a rule and nothing that is timed: `captures`. Otherwise, and for prompts,
the same modules run eagerly, with the same result up to rounding (tests/models/test_decoding.py).

Shapes: ids (rows, new), the first rows of the cache, padding behind the real tokens; logits (rows,
new, vocabulary), or (rows, 1, vocabulary) of each row's last real token.

What would surprise: a Decoder does not follow later changes of the model's parameters; make another
one after training. What a Decoder does it says in `says`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.models.nf4 import NF4Linear
from llmnorm.nn.cache import KeyValues, RaggedCache
from llmnorm.nn.layer_cache import VERIFIED, LayerCache, rounded
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.nn.places import Places
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.projections import Layout, Product, for_inference, layout_for
from llmnorm.nn.recurrent_cache import RING, RecurrentCache
from llmnorm.nn.states import Inputs, State, write_inputs
from llmnorm.nn.visibility import Cached
from llmnorm.part import InputError

# Columns of captured passes: each is a graph of its own, which takes as long to make as some thirty
# steps, so a pass of another number of tokens is padded to the next of them.
WIDTHS = (1, 2, 3, 4, 5, 9, VERIFIED)
TRACED = ("llmnorm", "peft", "torch", "transformers")  # packages whose modules a tracer can follow


def captures(model: LlmNormForCausalLM) -> tuple[bool, str]:
    """Whether steps of this model are captured, and a clause that says why.

    On a CPU, where torch has a tracer, and every layer keeps keys and values or a state of ours.
    What a trace would not follow is left out: norms that keep statistics, weights in four bits,
    modules of other packages.
    """
    device, dtype = model.device.type, model.dtype
    kind = f"{str(dtype).removeprefix('torch.')} on {device}"
    if device != "cpu":
        return False, f"steps run eagerly ({kind})"
    if not hasattr(torch.jit, "trace"):
        return False, "steps run eagerly (this torch has no tracer)"
    if any(isinstance(module, RunningNorm) for module in model.modules()):
        return False, "steps run eagerly (a norm keeps running statistics)"
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        return False, "steps run eagerly (a tracer cannot follow weights in four bits)"
    for module in model.modules():
        if type(module).__module__.split(".")[0] not in TRACED:
            name = type(module).__name__
            return False, f"steps run eagerly ({name} is no module of this package)"
    layers = model.model.new_cache().slots.layers
    if not all(type(layer) in (KeyValues, RecurrentCache) for layer in layers):
        return False, "steps run eagerly (a mixer has a cache of its own kind)"
    return True, f"steps are captured ({kind})"


class Decoder:
    """Runs a model behind caches of it, without gradients.

    Args:
        model: in evaluation mode. Its weights may be joined (nn/projections.py), with the same
            numbers in them.
        captured: False: every step runs eagerly, whatever `captures` says.
        layout: of the weights, in the place of what `layout_for` says.

    Attributes:
        context: tokens that a row may have.
        vocabulary: tokens that the logits are of.
        dtype: of keys and values, for `RaggedCache.reserve`.
        device: where ids, logits and the cache are.
        says: what it does, in one line.

    Raises:
        InputError: the model is in training mode.
    """

    def __init__(
        self,
        model: LlmNormForCausalLM,
        *,
        captured: bool = True,
        layout: Layout | None = None,
    ) -> None:
        if model.training:
            raise InputError("Decoder: the model is in training mode; call model.eval() first")
        weight = model.lm_head.weight
        assert isinstance(weight, Tensor)
        ruled, about_weights = layout_for(weight)
        if layout is not None:
            ruled, about_weights = layout, f"weights: {layout}, as asked for"
        self._captured, about_steps = captures(model)
        if not captured:
            self._captured, about_steps = False, "steps run eagerly, as asked for"
        self.says = f"decoding: {about_steps}; {about_weights}"
        self.context: int = longest_row(model)
        self.vocabulary: int = model.config.vocab_size
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        with torch.no_grad():
            self._model = for_inference(model, ruled)
        # A graph cannot hold a packed weight, so these are inputs of it.
        self._packed = [
            module
            for module in self._model.modules()
            if isinstance(module, Product) and module.layout == "packed"
        ]
        # By the number of new tokens, and whether there is one row: an axis of one has strides of
        # its own, which a trace of it takes for granted.
        self._columns = torch.empty(0, dtype=torch.long)
        self._graphs: dict[tuple[int, bool], Callable[..., tuple[Tensor, ...]]] = {}

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
        """Append the new tokens ids (rows, new) to the first rows of the cache; their logits.

        Args:
            ids: padding behind the real tokens is any token.
            cache: of this model (`decoder.new_cache()`).
            counts: how many of each row's tokens are real; all if None.
            last: logits of each row's last real token alone, (rows, 1, vocabulary).

        Raises:
            ValueError: what `RaggedCache.places` refuses; nothing is changed.
        """
        (rows, asked), device = ids.shape, ids.device
        new = asked
        # An empty cache has no buffers and no states yet; a prompt brings them.
        captured = self._captured and new <= VERIFIED and any(cache.lengths[:rows])
        if captured and _has_room(cache, rows):
            new = next(columns for columns in WIDTHS if columns >= asked)
        if new > asked:
            ids, counts = pad(ids, (0, new - asked)), counts or [asked] * rows
        width = max(cache.lengths[:rows]) + new if captured else None
        places = cache.places(rows, new, device, counts, width)
        if not captured:
            hidden = hidden_states(self._model, ids, places, cache.layers)
            if last:
                hidden = last_tokens(hidden, places)
            logits: Tensor = self._model.lm_head(hidden)
            return logits
        if len(self._columns) < places.width or self._columns.device != device:
            self._columns = torch.arange(rounded(2 * places.width), device=device)
        inputs, layers = _graph_inputs(ids, places, cache.layers, self._columns)
        inputs += [product.weight for product in self._packed]
        graph = self._graphs.get((new, rows == 1))
        if graph is None:
            graph = _traced(_Step(self._model, layers, self._packed), inputs)
            self._graphs[new, rows == 1] = graph
        logits, *states = graph(*inputs)
        _take_in(cache.layers, layers, states, places)
        return last_tokens(logits, places) if last and new > 1 else logits[:, :asked]


def _has_room(cache: RaggedCache, rows: int) -> bool:
    """Whether a pass of these rows may be padded."""
    if cache.reserved is None:
        return True
    _, tokens, padding = cache.reserved
    return max(cache.lengths[:rows]) + VERIFIED <= tokens + padding


def longest_row(model: LlmNormForCausalLM) -> int:
    """Tokens that a row may have, so that none changes its neighbours.

    With longrope a call turns all of its rows by other frequencies as soon as one is longer than
    the context before it was extended.
    """
    longest, reach = model.config.max_position_embeddings, model.model.rotary.reach
    return longest if reach is None else min(longest, reach)


def hidden_states(
    model: LlmNormForCausalLM, ids: Tensor, places: Places, layers: Sequence[LayerCache]
) -> Tensor:
    """The model's last hidden states (rows, new, hidden) of ids (rows, new) behind a cache."""
    base = model.model
    hidden = base.embed_tokens(ids)
    positions = places.index
    if base.rotary.reach is not None and places.real is not None:
        positions = positions.masked_fill(~places.real, 0)  # padding may not turn the rows
    context = Context(*base.rotary(positions, wide_dtype(hidden.dtype)), Cached(places))
    return base.hidden_states(hidden, context, layers)[-1]


def last_tokens(tokens: Tensor, places: Places) -> Tensor:
    """(rows, new, ...) -> (rows, 1, ...), those of each row's last real token."""
    last = (places.counted - 1).clamp(min=0)[:, None, None]
    return tokens.take_along_dim(last, 1)


class _Layer(NamedTuple):
    """What a layer's part of a graph's inputs is.

    window: of keys. tensors: how many inputs it has. states: how many of them are states, the first
    ones; None: the layer keeps keys and values.
    """

    window: int | None
    tensors: int
    states: int | None


def _graph_inputs(
    ids: Tensor, places: Places, layers: Sequence[LayerCache], columns: Tensor
) -> tuple[list[Tensor], list[_Layer]]:
    """A graph's inputs, in the order in which `_Step` reads them: the pass's ids and numbers, the
    columns that are attended over in layers of each window, the layers' states and buffers.

    `columns`: numbers from 0, as many as the widest layer attends over, or more.
    """
    inputs = [ids, places.numbers]
    windows: set[int | None] = set()
    own: list[Tensor] = []
    described = []
    for layer in layers:
        if isinstance(layer, KeyValues):
            if layer.window not in windows:
                windows.add(layer.window)
                inputs.append(columns[: layer.width(places)])
            own += layer.buffers(places)
            described.append(_Layer(layer.window, 2, None))
        else:
            assert isinstance(layer, RecurrentCache)
            state = layer.before(places)
            assert state is not None
            own += [*state, *layer.buffers(places)]
            described.append(_Layer(None, len(state) + len(layer.inputs), len(state)))
    return inputs + own, described


def _take_in(
    layers: Sequence[LayerCache], described: Sequence[_Layer], states: list[Tensor], places: Places
) -> None:
    """The host's part of a captured pass: lengths, and the new states of recurrences."""
    for layer, what in zip(layers, described, strict=True):
        if isinstance(layer, KeyValues):
            layer.extend(places)
        else:
            assert isinstance(layer, RecurrentCache)
            layer.extend(tuple(states[: what.states]), places)
            states = states[what.states :]


class _Written(KeyValues):
    """Keys and values as a graph sees them: buffers, which it writes in place.

    The columns that the places were given have the number of slots to attend over.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None) -> None:
        self._buffers, self.window = (keys, values), window

    def append(self, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Write new tokens (rows, new, kv_heads, head_dim); all keys and values."""
        slots, rows = places.slots(self.window), keys.shape[0]
        width = places.columns(self.window).shape[0]
        for kept, fresh in zip(self._buffers, (keys, values), strict=True):
            # An assignment would put the sizes of one row into the graph.
            kept.transpose(1, 2).index_put_((places.rows, slots), fresh.to(kept.dtype))
        kept_keys, kept_values = (kept[:rows].narrow(2, 0, width) for kept in self._buffers)
        return kept_keys, kept_values

    def width(self, places: Places) -> int:
        """No number of its own: that of the given columns."""
        return 0


class _Carried(RecurrentCache):
    """A state as a graph sees it: the old one goes in, the new one comes out, and inputs are
    written in place."""

    def __init__(self, state: State, rings: Inputs) -> None:
        self._state, self._rings = state, rings
        self.out: State = ()

    def before(self, places: Places) -> State:
        """The state before the pass."""
        return self._state

    def append(self, inputs: Inputs, state: State, places: Places) -> None:
        """Write the inputs, and keep the state for the graph's outputs."""
        write_inputs(self._rings, inputs, places.ring(RING))
        self.out = state


class _Step:
    """The step as a function of tensors, to be traced."""

    def __init__(
        self, model: LlmNormForCausalLM, layers: Sequence[_Layer], packed: Sequence[Product]
    ) -> None:
        self.model = model
        self._layers, self._packed = list(layers), list(packed)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits, and the new state of each recurrent layer."""
        kept = [product.weight for product in self._packed]
        given = inputs[len(inputs) - len(kept) :]
        try:
            for product, weight in zip(self._packed, given, strict=True):
                product.weight = weight
            return self._run(*inputs[: len(inputs) - len(kept)])
        finally:
            for product, weight in zip(self._packed, kept, strict=True):
                product.weight = weight

    def _run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        ids, numbers, *rest = inputs
        rows, new = ids.shape
        columns: dict[int | None, Tensor] = {}
        for layer in self._layers:
            if layer.states is None and layer.window not in columns:
                columns[layer.window], *rest = rest
        # On the host nothing is known of the rows: numbers there would stay in the graph. But the
        # only new token of an only row sees all there is, as rows that start together do.
        start = 0 if rows == new == 1 else None
        windows = {window: 2 + n for n, window in enumerate(w for w in columns if w is not None)}
        places = Places([], [], int(new), numbers, start, 0, True, windows, True)
        places = places.with_columns(columns)
        caches: list[_Written | _Carried] = []
        for layer in self._layers:
            own, rest = rest[: layer.tensors], rest[layer.tensors :]
            if layer.states is None:
                keys, values = own
                caches.append(_Written(keys, values, layer.window))
            else:
                caches.append(_Carried(tuple(own[: layer.states]), tuple(own[layer.states :])))
        logits = self.model.lm_head(hidden_states(self.model, ids, places, caches))
        states = [t for cache in caches if isinstance(cache, _Carried) for t in cache.out]
        return (logits, *states)


def _traced(step: _Step, inputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The step's graph. Tracing writes to copies of the buffers."""
    copies = tuple(t if t.is_mkldnn else t.clone() for t in inputs)
    with warnings.catch_warnings():
        # Shapes are compared while tracing (few queries or many), which is what a graph is for;
        # and torch.jit calls itself deprecated.
        warnings.simplefilter("ignore")
        graph: Callable[..., tuple[Tensor, ...]] = torch.jit.trace(
            step.__call__, copies, check_trace=False
        )
    _remove_casts_to_the_same(graph)
    return graph


def _remove_casts_to_the_same(graph: Any) -> None:
    """Take out of a traced graph what gives its own input back; a step has up to 15 a layer."""
    for node in graph.graph.findAllNodes("aten::to"):
        given, made = node.inputsAt(0), node.output()
        if given.type().dtype() == made.type().dtype():
            made.replaceAllUsesWith(given)
            node.destroy()
