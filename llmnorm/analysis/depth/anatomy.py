"""The blocks of any decoder and the two branches of each: mixer and MLP.

Shapes: streams and branches (batch, length, hidden). x is the stream that a branch is added to, f
what is added, S the sum: S = carry x + f, with carry = 1 in all placements but DeepNorm.

The names of an architecture are not used. Instead the model runs on a few tokens, and every child
of a block is observed. A child with matrices is a branch

- if its output, or the output of the norms behind it (peri, reordered), is the f of an equation
  S = carry x + f, where x is a tensor that was seen before the child's call and S one after it;
- or, of two parallel branches, if S = carry x + f + g holds with both outputs.

So pre, post, sandwich, reordered, DeepNorm and parallel blocks are all measured where the addition
really is (tests/analysis/depth/test_anatomy.py has one of each kind). A child for which no such
equation holds is not measured.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmnorm.analysis.depth.hooks import Place, first, logits_of, stream_in
from llmnorm.part import InputError

SIDES = ("mixer", "mlp")


class Branch(NamedTuple):
    """One of the two branches of a block.

    Attributes:
        module: the child that has the matrices.
        added: the module whose output is f: the child itself, or the norm behind it.
        stream: where x is found.
        carry: the factor of x.
        norm: the norm in front of the child; None where the child reads the stream itself.
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
        norms: by name, in the order of their calls; norms inside a branch are left out.
        roles: by the norm's name: "before the mixer", "after the MLP" and the like.
        beside: how many values the block returns beside the stream (older Hugging Face blocks
            return a tuple); None: it returns the tensor alone.
    """

    module: nn.Module
    branches: dict[str, Branch]
    norms: dict[str, nn.Module]
    roles: dict[str, str]
    beside: int | None

    def output_with(self, stream: Tensor) -> Any:
        """A return value of the block with a copy of this stream in it."""
        stream = stream.clone()
        return stream if self.beside is None else (stream, *[None] * self.beside)


def anatomy(model: nn.Module, ids: Tensor) -> list[Block]:
    """The blocks of a causal language model, in order.

    Args:
        model: takes `input_ids` and returns `.logits`.
        ids: (batch, length) tokens on which the model is observed; length >= 2.

    Raises:
        InputError: there is no list of blocks, a block is not called, or an earlier token's logits
            depend on a later token.
    """
    modules = blocks_of(model)
    traces: dict[nn.Module, _Trace] = {}
    hooks = [hook for block in modules for hook in _observe(block, traces)]
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
    if uncalled := [block for block in modules if block not in traces]:
        raise InputError(f"{type(model).__name__}: {len(uncalled)} of its blocks are not called")
    return [_dissect(block, traces.pop(block)) for block in modules]


def blocks_of(model: Any) -> list[nn.Module]:
    """The model's blocks: its outermost list of modules that is `num_hidden_layers` long.

    Raises:
        InputError: there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and matrices(module[0]):
            return list(module)
    raise InputError(f"{type(model).__name__}: has no list of {count} blocks")


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The weight matrices of a module by name; of stacked experts each matrix by itself."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and min(parameter.shape) > 1:
            found[name] = parameter
        elif parameter.ndim == 3 and min(parameter.shape[1:]) > 1:
            found |= {f"{name}.{index}": matrix for index, matrix in enumerate(parameter)}
    return found


class _Event(NamedTuple):
    """A call of a block's child.

    Attributes:
        input, output: copies of the values at that moment (later, an addition in place may change
            the tensors).
        input_identity, output_identity: tell whether one child's output is another's input.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    input_identity: "_Identity"
    output_identity: "_Identity"


class _Identity(NamedTuple):
    """Which tensor it is, and how often it was written to; `kept` stops its memory being reused."""

    address: int
    version: int
    kept: Tensor

    def equals(self, other: "_Identity") -> bool:
        return self[:2] == other[:2]


class _Trace(NamedTuple):
    """A call of a block: the calls of its children, its input and output, `Block.beside`."""

    events: list[_Event]
    input: Tensor
    output: Tensor
    beside: int | None


def _observe(block: nn.Module, traces: dict[nn.Module, _Trace]) -> Iterator[Any]:
    """Register the hooks that write `traces[block]` during a forward pass."""
    events: list[_Event] = []

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            before, after = stream_in(args, kwargs), first(output)
        except InputError:
            return  # this child is not given the stream
        identities = _identity(before), _identity(after)
        events.append(_Event(name, module, before.clone(), after.clone(), *identities))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        beside = None if isinstance(output, Tensor) else len(output) - 1
        stream = stream_in(args, kwargs).clone(), first(output).clone()
        traces[module] = _Trace(events, *stream, beside)

    for name, child in block.named_children():
        yield child.register_forward_hook(_with_name(record, name), with_kwargs=True)
    yield block.register_forward_hook(end, with_kwargs=True)


def _with_name(record: Any, name: str) -> Any:
    return lambda module, args, kwargs, output: record(name, module, args, kwargs, output)


def _identity(tensor: Tensor) -> _Identity:
    return _Identity(tensor.data_ptr(), tensor._version, tensor)


def _dissect(block: nn.Module, trace: _Trace) -> Block:
    """The block's branches and norms, from one call of it."""
    candidates = [n for n, event in enumerate(trace.events) if matrices(event.module)]
    outputs = [_final_call(trace.events, n) for n in candidates]
    found = [_branch(block, trace, n, last) for n, last in zip(candidates, outputs, strict=True)]
    if found == [None, None]:
        found = _parallel(block, trace, candidates, outputs)
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
    """Where each norm stands: before the MLP if the MLP reads it, else after the last branch."""
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


def _final_call(events: list[_Event], index: int) -> _Event | None:
    """The call whose output a branch adds: the call number `index`, or that of the norm behind it.

    None where another child with matrices reads the output: the two are layers of one MLP.
    """
    last, later = events[index], events[index + 1 :]

    def readers() -> list[int]:
        written = last.output_identity
        return [n for n, event in enumerate(later) if event.input_identity.equals(written)]

    while numbers := readers():
        reader, later = later[numbers[0]], later[numbers[0] + 1 :]
        if matrices(reader.module):
            return None
        if not reader.output_identity.equals(last.output_identity):  # not so for idle dropout
            last = reader
    return last


def _branch(block: nn.Module, trace: _Trace, index: int, added: _Event | None) -> Branch | None:
    """The branch whose child is the call number `index`; None if its output is not added.

    Args:
        added: what `_final_call` returned for the child.
    """
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
    block: nn.Module, trace: _Trace, candidates: list[int], outputs: list[_Event | None]
) -> list[Branch | None]:
    """Both branches of x + f(x) + g(x); an empty list if the block is not of this form."""
    added = [last for last in outputs if last is not None]
    if len(added) != 2 or added[0].output.shape != added[1].output.shape:
        return []
    carry = _carry(trace.output, trace.input, added[0].output + added[1].output)
    if carry is None:
        return []
    events = [trace.events[n] for n in candidates]
    return [
        Branch(event.module, last.module, Place(block, "in"), carry, _norm(trace, event))
        for event, last in zip(events, added, strict=True)
    ]


def _norm(trace: _Trace, event: _Event) -> nn.Module | None:
    """The child whose output the call reads; None if it reads the stream itself."""
    given = event.input_identity
    return next((e.module for e in trace.events if e.output_identity.equals(given)), None)


def _carry(total: Tensor, stream: Tensor, added: Tensor) -> float | None:
    """The factor in total = carry stream + added; None if there is none, or it is 0."""
    if not total.shape == stream.shape == added.shape:
        return None
    s, x, f = (t.double().flatten() for t in (total, stream, added))
    carry = float((s - f) @ x / (x @ x))
    off = (s - f - carry * x).norm()
    if not off <= 1e-3 * f.norm() + 1e-6 * s.norm() or abs(carry) < 1e-3:
        return None
    return 1.0 if abs(carry - 1) < 1e-4 else carry
