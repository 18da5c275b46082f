"""The blocks of any decoder, the two branches of each, and where to hook them.

Shapes: streams and branches (batch, length, hidden). x is the stream that a branch is added to, f
what is added, S the sum: S = carry x + f, with carry = 1 in all placements but DeepNorm.

Nothing is read from the names of an architecture: every block is watched on a few tokens. A child
with matrices is a branch if what comes out of it - or what norms make of that before anything else
reads it (peri, reordered) - is f in S = carry x + f for some x that stood before it and some S that
stands after it; or, of parallel branches, if both of them are: S = carry x + f + g. So pre, post,
sandwich, reordered, DeepNorm and parallel blocks are all measured at the right place, and what is
found nowhere in such an equation is not measured at all.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.part import InputError

SIDES = ("mixer", "mlp")


class Place(NamedTuple):
    """Where a tensor can be seen: what goes into a module, or what comes out of it."""

    module: nn.Module
    end: Literal["in", "out"]


class Branch(NamedTuple):
    """One of the two branches of a block.

    Attributes:
        module: the child that holds the matrices.
        added: whose output f is added to the stream: the module itself, or the norm behind it.
        stream: where x is.
        carry: the factor of x.
        norm: the norm through which it reads x; None where it reads the stream itself.
    """

    module: nn.Module
    added: nn.Module
    stream: Place
    carry: float
    norm: nn.Module | None


class Block(NamedTuple):
    """A block of the model.

    Attributes:
        module: the block.
        branches: by side (mixer, mlp); a side that was not found is missing.
        norms: by the child's name, in the order of the calls; those inside a branch are its own.
        roles: where each of them stands, "before the mixer" and the like.
        beside: what it gives beside the stream, in older Hugging Face blocks; None: a tensor alone.
    """

    module: nn.Module
    branches: dict[str, Branch]
    norms: dict[str, nn.Module]
    roles: dict[str, str]
    beside: int | None

    def giving(self, stream: Tensor) -> Any:
        """The block's output with (a copy of) this stream in it."""
        stream = stream.clone()
        return stream if self.beside is None else (stream, *[None] * self.beside)


def anatomy(model: nn.Module, ids: Tensor) -> list[Block]:
    """The blocks of a causal language model, in order.

    Args:
        model: takes `input_ids` and gives `.logits`.
        ids: (batch, length) tokens to watch it on; length >= 2.

    Raises:
        InputError: there is no list of blocks, or an earlier token's logits depend on a later one.
    """
    modules = blocks_of(model)
    traces: dict[nn.Module, _Trace] = {}
    hooks = [hook for block in modules for hook in _watch(block, traces)]
    try:
        logits = logits_of(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % logits.shape[-1]
    change = (logits_of(model, other) - logits)[:, :-1].abs().max()
    if not change <= 1e-4 * logits.abs().max():
        raise InputError(
            f"{type(model).__name__}: earlier logits depend on later tokens; only causal decoders "
            "are inspected"
        )
    if silent := [block for block in modules if block not in traces]:
        raise InputError(f"{type(model).__name__}: {len(silent)} of its blocks are never called")
    return [_dissect(block, traces.pop(block)) for block in modules]


def blocks_of(model: Any) -> list[nn.Module]:
    """The outermost list of modules that is as long as the configuration says.

    Raises:
        InputError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and matrices(module[0]):
            return list(module)
    raise InputError(f"{type(model).__name__}: has no list of {count} blocks")


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """(batch, length, vocabulary) of tokens (batch, length) from position 0 on."""
    return model(input_ids=ids, use_cache=False).logits


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def recorded(places: Iterable[Place], *, graph: bool = False) -> Iterator[Mapping[Place, Tensor]]:
    """What passes the places, after a forward pass inside the `with`.

    Args:
        graph: the tensors themselves, for derivatives; else copies, since some blocks add in place.
    """
    seen: dict[Place, Tensor] = {}
    wanted: dict[nn.Module, set[str]] = {}
    for module, end in places:
        wanted.setdefault(module, set()).add(end)

    def kept(tensor: Tensor) -> Tensor:
        return tensor if graph else tensor.clone()

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if "in" in wanted[module]:
            seen[Place(module, "in")] = kept(stream_in(args, kwargs))
        if "out" in wanted[module]:
            seen[Place(module, "out")] = kept(first(output))

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in wanted]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def first(output: Any) -> Tensor:
    """The tensor of a module's output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def instead(output: Any, tensor: Tensor) -> Any:
    """A module's output with its first tensor replaced."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])


def stream_in(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first (batch, length, hidden) tensor among a module's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    raise InputError("a block is called without a (batch, length, hidden) tensor")


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The weight matrices of a module by name; stacked experts' one by one."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and min(parameter.shape) > 1:
            found[name] = parameter
        elif parameter.ndim == 3 and min(parameter.shape[1:]) > 1:
            found |= {f"{name}.{index}": one for index, one in enumerate(parameter)}
    return found


class _Event(NamedTuple):
    """A call of a child: what went in and came out.

    The copies are the values at that moment (an addition in place would change them later); the
    tensors themselves tell whether one child's output is another's input.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    came: "_Same"
    left: "_Same"


class _Same(NamedTuple):
    """Equal for the same tensor that was not written to in between; `kept` keeps its address."""

    address: int
    version: int
    kept: Tensor

    def is_(self, other: "_Same") -> bool:
        return self[:2] == other[:2]


class _Trace(NamedTuple):
    events: list[_Event]
    input: Tensor
    output: Tensor
    beside: int | None


def _watch(block: nn.Module, traces: dict[nn.Module, _Trace]) -> Iterator[Any]:
    events: list[_Event] = []

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            before, after = stream_in(args, kwargs), first(output)
        except InputError:
            return  # a child that does not see the stream
        events.append(
            _Event(name, module, before.clone(), after.clone(), _same(before), _same(after))
        )

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        beside = None if isinstance(output, Tensor) else len(output) - 1
        stream = stream_in(args, kwargs).clone(), first(output).clone()
        traces[module] = _Trace(events, *stream, beside)

    for name, child in block.named_children():
        yield child.register_forward_hook(_named(look, name), with_kwargs=True)
    yield block.register_forward_hook(end, with_kwargs=True)


def _named(look: Any, name: str) -> Any:
    return lambda module, args, kwargs, output: look(name, module, args, kwargs, output)


def _same(tensor: Tensor) -> _Same:
    return _Same(tensor.data_ptr(), tensor._version, tensor)


def _dissect(block: nn.Module, trace: _Trace) -> Block:
    inner = [n for n, event in enumerate(trace.events) if matrices(event.module)]
    chains = [_added(trace.events, n) for n in inner]
    found = [_branch(block, trace, n, chain) for n, chain in zip(inner, chains, strict=True)]
    if found == [None, None]:
        found = _parallel(block, trace, inner, chains)
    norms = {
        event.name: event.module
        for event in trace.events
        if not matrices(event.module)
        and event.input.shape == event.output.shape == trace.input.shape
        and ("norm" in type(event.module).__name__.lower() or list(event.module.parameters()))
    }
    sides = zip(SIDES, found, strict=False) if len(found) <= len(SIDES) else ()
    branches = {side: branch for side, branch in sides if branch is not None}
    return Block(block, branches, norms, _roles(trace, branches, norms), trace.beside)


def _roles(
    trace: _Trace, branches: dict[str, Branch], norms: dict[str, nn.Module]
) -> dict[str, str]:
    """A norm that the MLP reads through is before it; any other is after what was called last."""
    if len(branches) < len(SIDES):
        return {name: name for name in norms}
    roles, called = {}, "before the mixer"
    for event in trace.events:
        if event.module is branches["mixer"].module:
            called = "after the mixer"
        elif event.module is branches["mlp"].module:
            called = "after the MLP"
        elif event.name in norms:
            read = event.module is branches["mlp"].norm is not branches["mixer"].norm
            roles[event.name] = "before the MLP" if read else called
    return roles


def _added(events: list[_Event], index: int) -> _Event | None:
    """The call whose output is what the branch gives in the end: its own, or that of its norm."""
    last, later = events[index], events[index + 1 :]
    while readers := [n for n, event in enumerate(later) if event.came.is_(last.left)]:
        reader, later = later[readers[0]], later[readers[0] + 1 :]
        if matrices(reader.module):
            return None  # the first of two layers that an MLP is made of
        if not reader.left.is_(last.left):  # dropout hands its input on
            last = reader
    return last


def _branch(block: nn.Module, trace: _Trace, index: int, added: _Event | None) -> Branch | None:
    """The branch that the call number `index` is, if what it gives is added to the stream."""
    if added is None:
        return None
    event = trace.events[index]
    sums = [*(e.input for e in trace.events[index + 1 :]), trace.output]
    streams = [(Place(block, "in"), trace.input), (Place(event.module, "in"), event.input)]
    for e in trace.events[:index]:
        streams += [(Place(e.module, "in"), e.input), (Place(e.module, "out"), e.output)]
    for total in sums:
        for place, stream in streams:
            if carry := _carry(total, stream, added.output):
                norm = None if place == Place(event.module, "in") else _norm(trace, event)
                return Branch(event.module, added.module, place, carry, norm)
    return None


def _parallel(
    block: nn.Module, trace: _Trace, inner: list[int], chains: list[_Event | None]
) -> list[Branch | None]:
    """Both branches of x + f(x) + g(x)."""
    added = [chain for chain in chains if chain is not None]
    if len(added) != 2 or added[0].output.shape != added[1].output.shape:
        return []
    carry = _carry(trace.output, trace.input, added[0].output + added[1].output)
    if carry is None:
        return []
    events = [trace.events[n] for n in inner]
    return [
        Branch(event.module, last.module, Place(block, "in"), carry, _norm(trace, event))
        for event, last in zip(events, added, strict=True)
    ]


def _norm(trace: _Trace, event: _Event) -> nn.Module | None:
    """The child whose output the call reads."""
    return next((e.module for e in trace.events if e.left.is_(event.came)), None)


def _carry(total: Tensor, stream: Tensor, added: Tensor) -> float | None:
    """carry, where total = carry stream + added; None where it is not, or carry is 0."""
    if not total.shape == stream.shape == added.shape:
        return None
    s, x, f = (t.double().flatten() for t in (total, stream, added))
    carry = float((s - f) @ x / (x @ x))
    off = (s - f - carry * x).norm()
    if not off <= 1e-3 * f.norm() + 1e-6 * s.norm() or abs(carry) < 1e-3:
        return None
    return 1.0 if abs(carry - 1) < 1e-4 else carry
