"""The step forms of the recurrences and mixers: few tokens behind a cache, without chunks."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.nn.mixers import steps
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.gated_delta import delta_recurrence, delta_state_step, delta_step
from llmnorm.nn.mixers.gla import channel_recurrence, channel_state_step, channel_step
from llmnorm.nn.mixers.linear_recurrence import linear_recurrence
from llmnorm.nn.mixers.linear_step import recurrence_step, state_step
from llmnorm.nn.mixers.normalised_sums import normalised_sums, states_step, sums_step
from llmnorm.nn.places import Places, find_places
from llmnorm.nn.recurrent_cache import State
from llmnorm.nn.visibility import Cached
from tests.nn.recurrences import token_by_token
from tests.nn.test_mixers import CAUSAL, build, every, tables

RECURRENT = {name: keys for name, keys in CAUSAL.items() if keys["name"] != "softmax"}
# Heads of queries, keys and values: plain, grouped queries, groups of values.
HEADS = [(2, 2, 2), (4, 2, 2), (1, 1, 3), (2, 2, 4)]
Form = Callable[..., Any]
# Step form, that of the state alone, chunked form, and what they take beyond q, k and v.
FORMS: dict[str, tuple[Form, Form, Form, tuple[str, ...]]] = {
    "none": (
        lambda q, k, v, state: recurrence_step(q, k, v, None, state),
        lambda k, v, state: state_step(k, v, None, state),
        linear_recurrence,
        (),
    ),
    "linear": (recurrence_step, state_step, linear_recurrence, ("decay",)),
    "channel": (channel_step, channel_state_step, channel_recurrence, ("gates",)),
    "delta": (delta_step, delta_state_step, delta_recurrence, ("share", "decay")),
}


def near(got: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    """Within `rtol` of the largest number expected."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= rtol * max(1e-300, float(expected.abs().max()))


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from([*FORMS]),
    heads=st.sampled_from(HEADS),
    rows=st.lists(st.integers(0, steps.MOST), min_size=1, max_size=8).filter(any),
    strength=st.sampled_from([0.1, 1.0, 50.0]),
    began=st.booleans(),
    seed=st.integers(0, 5),
)
def test_a_step_is_the_chunks_and_the_recurrence(
    form: str,
    heads: tuple[int, int, int],
    rows: list[int],
    strength: float,
    began: bool,
    seed: int,
) -> None:
    """Oracles: the chunked form, and each row alone token by token, in float64; padding behind a
    row's tokens has no keys, shares and decays, and leaves the state as it is."""
    step, of_state, chunked, more = FORMS[form]
    if "gates" in more:
        heads = (2, 2, 2)
    elif "share" in more and heads[0] > heads[1]:
        heads = (2, 2, 4)
    generator = torch.Generator().manual_seed(seed)
    batch, new = len(rows), max(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, new, *shape, dtype=torch.float64, generator=generator)

    inputs = {
        "q": draw(heads[0], 5),
        "k": draw(heads[1], 5),
        "v": draw(heads[2], 3),
        "share": draw(heads[2]).sigmoid(),
        "decay": -strength * draw(heads[2]).abs(),
        "gates": -strength * draw(heads[2], 5).abs(),
    }
    if form == "delta":
        inputs["k"] = inputs["k"] / inputs["k"].norm(dim=-1, keepdim=True)
    real = torch.arange(new) < torch.tensor(rows)[:, None]
    for name in ("k", "share", "decay", "gates"):
        t = inputs[name]
        inputs[name] = t.masked_fill(~real.view(batch, new, *[1] * (t.ndim - 2)), 0)
    taken = [inputs[name] for name in ("q", "k", "v", *more)]
    state = draw(heads[2], 5, 3)[:, 0] if began else None
    y, after = step(*taken, state)
    of_chunks, after_chunks = chunked(*taken, state=state)
    near(after, after_chunks)
    near(of_state(*taken[1:], state), after_chunks)
    near(y[real], of_chunks[real])
    for row, count in enumerate(rows):
        if not count:
            assert torch.equal(
                after[row], torch.zeros_like(after[row]) if state is None else state[row]
            )
            continue
        alone = {name: t[row : row + 1, :count] for name, t in inputs.items()}
        expected, behind = token_by_token(
            *(alone["q"], alone["k"], alone["v"]),
            g=alone["decay"] if "decay" in more else alone["gates"] if "gates" in more else None,
            share=alone["share"] if "share" in more else None,
            state=None if state is None else state[row : row + 1],
        )
        torch.testing.assert_close(y[row : row + 1, :count], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(after[row : row + 1], behind, rtol=0, atol=1e-11)


@pytest.mark.parametrize("new", [1, 2, 17])
@pytest.mark.parametrize("began", [False, True])
def test_both_sums_of_a_step_are_those_of_the_chunks(new: int, began: bool) -> None:
    """Oracle: `normalised_sums` of the same features in float64."""
    torch.manual_seed(0)
    q, turned_q = torch.rand(2, 3, new, 4, 6, dtype=torch.float64)
    k, turned_k = torch.rand(2, 3, new, 2, 6, dtype=torch.float64)
    v = torch.randn(3, new, 2, 5, dtype=torch.float64)
    states = (torch.randn(3, 2, 6, 5, dtype=torch.float64), torch.rand(3, 2, 6, 1).double())
    expected = normalised_sums(
        lambda *_: (q, k, turned_q, turned_k),
        states if began else tuple(torch.zeros_like(t) for t in states),
        *(q, k, v, q, q, None, None),
    )
    before = states if began else None
    found = sums_step(q, k, turned_q, turned_k, v, before)
    for got, other in zip(found, expected, strict=True):
        near(got, other)
    for got, other in zip(states_step(k, turned_k, v, before), expected[2:], strict=True):
        near(got, other)


class Carried:
    """A cache of the state alone, which is handed in, and taken out after the pass."""

    def __init__(self, state: State | None) -> None:
        self.state = state
        self.inputs: State = ()

    def before(self, places: Places) -> State | None:
        return self.state

    def append(self, inputs: State, state: State, places: Places) -> None:
        self.inputs, self.state = inputs, state


def taken(
    mixer: Mixer,
    x: Tensor,
    state: State | None,
    lengths: list[int],
    counts: list[int] | None = None,
) -> tuple[Tensor, Carried]:
    """The output and the cache of one pass of new tokens x (batch, new, hidden)."""
    places = find_places(lengths, x.shape[1], x.device, counts)
    wide = torch.promote_types(x.dtype, torch.float32)
    cache: Any = Carried(state)
    with torch.no_grad():
        return mixer(x, Context(*tables(places.index, wide), Cached(places)), cache), cache


@every(RECURRENT)
@pytest.mark.parametrize(
    ("batch", "new", "ragged"),
    [(1, 1, False), (8, 1, False), (8, 1, True), (3, 2, True), (2, 5, False), (1, 17, False)]
    + [(2, 5, True), (4, 16, True)],
)
def test_a_pass_in_one_step_is_the_pass_in_chunks(
    mixer: dict[str, Any], batch: int, new: int, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the chunked form in float64: outputs, what is carried, what a replay would take, and
    the replay itself; into an empty cache, behind it again, and behind a longer pass."""
    built, generator = build(mixer), torch.Generator().manual_seed(1)
    ways, lengths = (steps.MOST, 0), [0] * batch
    states: list[State | None] = [None, None]
    for length in (new, new, 20, new):
        x = torch.randn(batch, length, 20, dtype=torch.float64, generator=generator)
        counts = [length] * batch
        if ragged:
            counts = [(length - 5 * row) % (length + 1) for row in range(batch)]
        real = torch.arange(length) < torch.tensor(counts)[:, None]
        found = []
        for way, (most, state) in enumerate(zip(ways, states, strict=True)):
            monkeypatch.setattr(steps, "MOST", most)
            out, cache = taken(built, x, state, lengths, counts)
            kept = torch.tensor(counts) // 2
            shown = torch.arange(length) < kept[:, None]
            inputs = tuple(t * shown.view(batch, length, *[1] * (t.ndim - 2)) for t in cache.inputs)
            with torch.no_grad():
                replayed = built.advance(state, inputs, kept)
            found.append((out[real], *cache.state, *cache.inputs, *replayed))
            states[way] = cache.state
        for got, expected in zip(*found, strict=True):
            near(got, expected)
        lengths = [a + b for a, b in zip(lengths, counts, strict=True)]


@every(RECURRENT)
@pytest.mark.parametrize(("new", "full"), [(1, True), (1, False), (5, False)])
def test_a_step_can_be_traced(mixer: dict[str, Any], new: int, full: bool) -> None:
    """Oracle: the eager step, on another number of rows, other tokens, positions and states than
    those traced; and the graph holds torch's own operators only."""
    built = build(mixer)
    built.requires_grad_(False)
    torch.manual_seed(2)
    _, cache = taken(built, torch.randn(3, 7, 20, dtype=torch.float64), None, [0] * 3)
    assert cache.state is not None

    def step(
        x: Tensor, index: Tensor, counted: Tensor, cos: Tensor, sin: Tensor, *state: Tensor
    ) -> Any:
        numbers = torch.stack((index[:, 0], counted))
        places = Places([], [], new, numbers, None, 0, padded=not full)
        carried: Any = Carried(state)
        out = built(x, Context(cos, sin, Cached(places)), carried)
        return (out, *carried.state)

    def arguments(start: int, rows: int) -> tuple[Tensor, ...]:
        assert cache.state is not None
        index = start + torch.arange(new).expand(rows, new)
        x = torch.randn(rows, new, 20, dtype=torch.float64)
        counted = torch.randint(0, new + 1, (rows,))
        return (x, index, counted, *tables(index), *(t[:rows] / rows for t in cache.state))

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and shapes are meant to be fixed
        traced = torch.jit.trace(step, arguments(7, 2), check_trace=False)
        given = arguments(30, 3)
        for got, expected in zip(traced(*given), step(*given), strict=True):
            near(got, expected)
    functions = set(re.findall(r"\^(\w+)", str(traced.inlined_graph)))
    assert not functions


@every(RECURRENT)
def test_without_a_cache_nothing_is_taken_in_one_step(mixer: dict[str, Any]) -> None:
    """Oracle: equal bits of a pass of few tokens with gradients, and of one without; the step form
    differs from both by rounding, as the pass into an empty cache shows for some mixer."""
    built, x = build(mixer), torch.randn(2, 5, 20, dtype=torch.float64)
    context = Context(*tables(torch.arange(5).unsqueeze(0)))
    with_gradients = built(x, context).detach()
    with torch.no_grad():
        assert torch.equal(built(x, context), with_gradients)
    near(taken(built, x, None, [0, 0])[0], with_gradients, 1e-11)


@every({k: v for k, v in RECURRENT.items() if k == v["name"]})
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_a_step_in_lower_precision(mixer: dict[str, Any], dtype: torch.dtype, rtol: float) -> None:
    """Oracle: the same passes in float64; states are float32, outputs the model's dtype."""
    built, wide = build(mixer, std=0.2).to(dtype), build(mixer, std=0.2).to(dtype).double()
    state, exact, lengths = None, None, [0, 0]
    for new in (3, 1, 1, 5):
        x = torch.randn(2, new, 20).to(dtype)
        out, cache = taken(built, x, state, lengths)
        expected, reference = taken(wide, x.double(), exact, lengths)
        state, exact, lengths = cache.state, reference.state, [n + new for n in lengths]
        assert out.dtype == dtype and cache.state is not None
        assert cache.state[0].dtype == torch.float32
        near(out.double(), expected, rtol)
