"""The engine against full passes without a cache, whatever rows, drafts and callers do."""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation import engine as engine_module
from llmnorm.generation import slots as slots_module
from llmnorm.generation.contract import Request, Sampling, Verdict
from llmnorm.generation.engine import Engine
from llmnorm.generation.slots import Slots
from llmnorm.models import LlmNormForCausalLM
from llmnorm.models.decoding import Decoder
from llmnorm.part import InputError
from tests.generation.watched import (
    CONTEXT,
    KnownDraft,
    Watched,
    WrongTextError,
    mixed,
    model_of,
    prompts,
    texts,
)
from tests.models.cache_rounds import MODELS, VOCABULARY, build

MIXED = ("softmax", "gated_delta, ssd, window")

# --- equal to plain decoding ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_every_mixer_are_plain_decoding(name: str) -> None:
    """Oracle: full passes. Prompts of 1 token, of the whole context and between; an end token that
    ends rows; drafts that are right now and then; requests of two rows, or without drafts."""
    model, starts = model_of(name), prompts(7, CONTEXT - 20)
    starts[3] = (starts[1] * 2)[:CONTEXT]
    known = texts(model, starts)
    end = known[2][len(starts[2]) + 6]
    # The campaign has batches of 1 to 16 rows for all of them.
    for slots, drafted, piece in ((3, 4, 16), (16, 2, 128))[: 2 - (name not in MIXED)]:
        chance = random.Random(slots)
        draft = KnownDraft(known, mixed(slots), lambda n, c=chance: c.randint(0, n))
        made = Watched(
            model, draft, ends=[end], slots=slots, draft_tokens=drafted, prefill_chunk=piece
        )
        for number, start in enumerate(starts):
            made.add(start, n=1 + number % 2, speculative=number != 5, ignore_end=number == 4)
        answers = made.run()
        made.check()
        assert {a.finish for a in answers} == {"stop", "length"}
        assert 0 < sum(made.engine.counters.accepted) < sum(made.engine.counters.drafted)
        assert all(a.accepted == 0 for a in answers if a.request.prompt == tuple(starts[5]))


@pytest.mark.parametrize("right", [True, False])
def test_a_draft_that_is_always_or_never_right(right: bool) -> None:
    """Oracle: a round commits K + 1 tokens a row, or one; the counters by position."""
    model, starts = model_of("softmax"), prompts(3, 12)
    made = Watched(model, KnownDraft(texts(model, starts), lambda: right), draft_tokens=4)
    for start in starts:
        made.add(start, max_tokens=20)
    made.run()
    made.check()
    counters = made.engine.counters
    assert counters.rounds == (4 if right else 20)
    sizes = {len(event.tokens) for events in made.rounds for event in events}
    assert sizes == ({5} if right else {1})
    # The last rounds propose fewer: the bonus token must fit as well.
    last = [57, 54, 51, 48]
    assert counters.drafted == ([12] * 4 if right else last)
    assert counters.accepted == ([12] * 4 if right else [0] * 4)


def test_an_end_at_every_offset_of_a_block_ends_the_row_there() -> None:
    """Oracle: the known continuation, cut at the stop token; tokens behind it were all accepted."""
    model = model_of("softmax")
    (known,) = texts(model, [[3, 1, 4]])
    answer = known[3:]
    offsets = [n for n in range(16) if answer[n] not in answer[:n]]
    assert {n % 5 for n in offsets} == set(range(5))  # each place of a block of 1 + 4 tokens
    made = Watched(model, KnownDraft([known], lambda: True), draft_tokens=4, slots=3)
    for offset in offsets:
        made.add([3, 1, 4], stop_tokens=frozenset({answer[offset]}))
    for offset, got in zip(offsets, made.run(), strict=True):
        assert (got.tokens, got.finish) == (answer[: offset + 1], "stop")
        assert got.accepted <= offset + 1
    made.check()


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    """Oracle: full passes; the prompt is made of end tokens."""
    model = model_of("softmax")
    (known,) = texts(model, [[9, 9, 9]], 10)
    end = 9
    assert end not in known[3:13]
    made = Watched(model, ends=[end])
    made.add([9, 9, 9], max_tokens=10)
    (answer,) = made.run()
    made.check()
    assert answer.finish == "length"


@settings(max_examples=10, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["softmax", "softmax before nala"])
def test_rows_come_and_go_in_every_order(name: str, data: st.DataObject) -> None:
    """Oracle: full passes, after any order of requests, rounds and aborts. Prompts begin alike, so
    that finished rows are taken over."""
    model, trunk = model_of(name), prompts(2, 40, seed=5)[1]
    right = random.Random(data.draw(st.integers(0, 9)))
    draft = KnownDraft(
        texts_of_trunk(name), lambda: right.random() < 0.7, lambda n: right.randint(0, n)
    )
    made = Watched(
        model,
        draft if data.draw(st.booleans()) else None,
        slots=data.draw(st.integers(1, 4)),
        prefill_chunk=data.draw(st.sampled_from([5, 64])),
        ends=[trunk[0]],
    )
    numbers = []
    for _ in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(["add", "add", "again", "abort"]))
        done = [a for a in made.answers.values() if a.finish in ("stop", "length")]
        if kind == "abort" and numbers:
            made.abort(data.draw(st.sampled_from(numbers)))
        else:
            start = trunk[: data.draw(st.integers(1, len(trunk)))]
            if kind == "again" and done:  # the next turn of a conversation
                last = data.draw(st.sampled_from(done))
                start = [*last.request.prompt, *last.tokens][: CONTEXT - 4]
                start = [*start, data.draw(st.integers(0, VOCABULARY - 1))]
            most = data.draw(st.integers(1, 12))
            numbers.append(made.add(start, n=data.draw(st.integers(1, 2)), max_tokens=most))
        for _ in range(data.draw(st.integers(0, 6))):
            made.step()
        slots = made.engine._slots
        assert len(made.engine._rows) == slots.running <= slots.rows
        assert slots.lengths == [len(row.ids) - 1 for row in made.engine._rows]
        assert sorted([*slots._ids, *slots._cache.free]) == list(range(slots.rows))
        assert sorted(slots._finished) == sorted(n for n in slots._ids if n >= slots.running)
    made.run()
    made.check()
    assert all(a.finish for a in made.answers.values())


_TRUNKS: dict[str, list[list[int]]] = {}


def texts_of_trunk(name: str) -> list[list[int]]:
    if name not in _TRUNKS:
        trunk = prompts(2, 40, seed=5)[1]
        _TRUNKS[name] = texts(model_of(name), [trunk[:n] for n in range(1, 41, 3)])
    return _TRUNKS[name]


def test_events_come_in_the_order_of_the_rows_and_number_them() -> None:
    """Oracle: the slots of the rows before the round."""
    made = Watched(model_of("softmax"), slots=4)
    for number, start in enumerate(prompts(6, 9)):
        made.add(start, max_tokens=3 + 2 * (number % 3))
    while not made.engine.idle:
        before = [(row.request, row.row) for row in made.engine._rows]
        events = [(e.request, e.row) for e in made.step()]
        assert events[: len(before)] == before


def test_a_prompt_comes_in_pieces_between_the_rounds_of_the_others() -> None:
    """Oracle: the widths of the passes; every step with a piece has a round of the others too, and
    so has the step in which the row gets its slot."""
    model = model_of("softmax")
    made = Watched(model, slots=2, prefill_chunk=10)
    made.add([1, 2], max_tokens=30)
    made.step()
    made.add(prompts(2, 43)[1], max_tokens=2)
    widths: list[int] = []
    run = made.engine._slots.run
    made.engine._slots.run = lambda most, every: (  # type: ignore[method-assign, misc]
        widths.append(made.engine._slots.piece(most)) or run(most, every=every)  # type: ignore[func-returns-value]
    )
    steps = 0
    while made.engine.waiting:
        assert [event.request for event in made.step()][:1] == [0]
        steps += 1
    assert sum(widths) == 42 and max(widths) <= 10 and steps == 1 + len(widths) == 6
    made.run()
    made.check()


def test_short_prompts_share_a_piece() -> None:
    """Oracle: rows that run after the first step: those whose prompts have 20 tokens together."""
    made = Watched(model_of("softmax"), slots=4, prefill_chunk=20)
    for _ in range(4):
        made.add(prompts(2, 8, seed=made.engine._next)[1], max_tokens=5)
    made.step()
    assert made.engine.running == 2  # 7 tokens each but the pending one; the third would be 21


# --- what ends alone -----------------------------------------------------------------------------


def poisoned() -> LlmNormForCausalLM:
    """A model whose token 30 is nan."""
    model = build("softmax before nala")
    with torch.no_grad():
        model.get_input_embeddings().weight[30] = torch.nan
    return model


@pytest.mark.parametrize("place", ["prompt", "pending"])
def test_a_row_with_nan_fails_alone(place: str) -> None:
    """Oracle: full passes of the other rows and of the next tenants of the slot, by a model whose
    only fault is one token."""
    model = poisoned()
    bad = [4, 30, 6, 2] if place == "prompt" else [4, 6, 2, 30]
    starts = [[start[0] % 30, *(t % 30 for t in start)] for start in prompts(4, 30)]
    made = Watched(model, slots=3, ends=[30])
    failed = []
    for start in starts:
        made.add(start, max_tokens=8)
        failed.append(made.add(bad, max_tokens=8))
    made.add(bad[:1] * 3, max_tokens=4)
    made.run()
    answers = {number: made.answers.pop((number, 0)) for number in failed}
    for answer in answers.values():
        assert answer.finish == "error" and answer.tokens == []
        assert answer.message is not None and "not finite" in answer.message
        assert ("of the prompt" in answer.message) == (place == "prompt")
    made.check()
    assert made.engine.counters.finished["error"] == len(failed)


class Fussy:
    """A processor that fails at its n-th token."""

    def __init__(self, fails: int) -> None:
        self._left = fails

    def apply(self, logits: Tensor) -> Tensor:
        if self._left <= 0:
            raise RuntimeError("the grammar is at its end")
        return logits

    def advance(self, token: int) -> None:
        self._left -= 1

    def rollback(self, count: int) -> None:
        self._left += count


@pytest.mark.parametrize("drafted", [False, True])
def test_a_row_whose_processor_fails_ends_alone(drafted: bool) -> None:
    """Oracle: full passes; the row has the tokens that it had before, and a message."""
    model, starts = model_of("softmax"), prompts(3, 12)
    draft = KnownDraft(texts(model, starts), lambda: True) if drafted else None
    made = Watched(model, draft, slots=3)
    for number, start in enumerate(starts):
        made.add(start, max_tokens=12, processors=(Fussy(6),) if number == 1 else ())
    answers = made.run()
    assert answers[1].finish == "error" and "the grammar is at its end" in str(answers[1].message)
    assert len(answers[1].tokens) == (5 if drafted else 6)
    made.check()


def test_abort_ends_rows_that_wait_come_in_or_run() -> None:
    """Oracle: an abort event for each, and full passes for those that go on."""
    made = Watched(model_of("softmax"), slots=2, prefill_chunk=5)
    long = prompts(2, 40)[1]
    running, coming, waiting, other = (
        made.add([7, 8], max_tokens=30),
        made.add(long),
        made.add([1, 2]),
        made.add([3], n=3),
    )
    made.step()
    made.step()
    assert (made.engine.running, made.engine.waiting) == (1, 5)
    for number in (running, coming, waiting, running, 99):
        made.abort(number)
    assert made.engine.running == 0
    made.run()
    made.check()
    ends = {key: answer.finish for key, answer in made.answers.items()}
    assert [ends[n, 0] for n in (running, coming, waiting)] == ["abort"] * 3
    assert [ends[other, row] for row in range(3)] == ["length"] * 3


def test_an_interrupted_round_fails_its_rows_and_the_engine_goes_on() -> None:
    """Oracle: full passes of what comes afterwards; a ctrl-C in the middle of a pass."""
    made = Watched(model_of("softmax"), slots=2)
    for start in prompts(4, 9):
        made.add(start, max_tokens=4)
    made.step()
    feed, made._feed = made._feed, interrupted
    with pytest.raises(KeyboardInterrupt):
        made.step()
    made._feed = feed
    assert not made.engine.idle
    answers = made.run()
    assert [a.finish for a in answers] == ["error", "error", "length", "length"]
    assert "KeyboardInterrupt" in str(answers[0].message)
    made.check()


def test_what_a_round_has_told_stays_told_when_it_is_not_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: one last event a row. One has ended in the round whose rollback fails."""
    made = Watched(model_of("softmax"), slots=2)
    made.add([1, 2], max_tokens=2)
    made.add([3, 4], max_tokens=9)
    made.step()

    def broken(slots: Slots, counts: list[int]) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Slots, "rollback", broken)
    with pytest.raises(RuntimeError):
        made.step()
    monkeypatch.undo()
    made.add([5], max_tokens=3)
    assert [answer.finish for answer in made.run()] == ["length", "error", "length"]
    made.check()


def interrupted(blocks: Sequence[Sequence[int]]) -> Tensor:
    raise KeyboardInterrupt


def test_generate_yields_events_as_they_come_and_aborts_when_closed() -> None:
    """Oracle: the same requests by `step`; after a close the engine is idle and usable."""
    model, starts = model_of("softmax"), prompts(3, 9)
    made = Watched(model, slots=2)
    for start in starts:
        made.add(start, max_tokens=5)
    expected = [a.tokens for a in made.run()]
    requests = [Request(tuple(s), Sampling(temperature=0, max_tokens=5)) for s in starts]
    got: list[list[int]] = [[], [], []]
    for event in made.engine.generate(requests):
        got[event.request] += event.tokens
    assert got == expected
    stream = made.engine.generate(requests)
    assert next(stream).tokens == expected[0][:1]
    stream.close()
    assert made.engine.idle
    assert [e.tokens for e in made.engine.generate(requests[2:])] == [[t] for t in expected[2]]
    made.add(starts[0])
    with pytest.raises(ValueError, match="the engine has other requests"):
        next(made.engine.generate(requests))


def test_captured_steps_give_the_same_rows() -> None:
    """Oracle: full passes; the decoder captures its steps, as it does by itself."""
    model, starts = model_of("softmax before nala"), prompts(3, 20)
    draft = KnownDraft(texts(model, starts), mixed(4), lambda n: min(n, 2))
    made = Watched(model, draft, slots=2, captured=True)
    for start in starts:
        made.add(start, max_tokens=12)
    made.run()
    made.check()


# --- what is refused -----------------------------------------------------------------------------


def engine(**keys: Any) -> Engine:
    return Engine(Decoder(model_of("softmax"), captured=False), None, GenerationSettings(**keys))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "prompt: has no tokens"),
        (Request((1,) * 33), "prompt: has 33 tokens, and the context is 32 tokens"),
        (Request((1, 99)), "prompt: token 99 is none of the model's 31 tokens"),
        (Request((1,), Sampling(max_tokens=0)), "max_tokens: must be at least 1, got 0"),
        (Request((1,), Sampling(stop=("x",))), "stop: needs the engine's tokenizer"),
        (Request((1,), n=0), "n: must be at least 1, got 0"),
        (Request((1,), Sampling(processors=(Fussy(1),)), n=2), "n: is 2, and the request has pro"),
        (Request((1,), Sampling(temperature=-1)), "temperature"),
    ],
)
def test_requests_that_cannot_be_are_refused(request_: Request, message: str) -> None:
    """Oracle: the message, in one line; nothing is queued."""
    made = engine(context=32)
    with pytest.raises(InputError, match=message) as caught:
        made.add(request_)
    assert "\n" not in str(caught.value) and made.idle


def test_settings_that_cannot_be_are_refused() -> None:
    """Oracle: the messages, which name the key."""
    most = Decoder(model_of("softmax")).context
    for keys, message in (
        ({"context": most + 1}, f"generation.context: is {most + 1}, and the model takes {most}"),
        ({"method": "ragged"}, "generation.method: 'ragged' needs a draft"),
        ({"method": "eqspec"}, "generation.method: 'eqspec' is no method of the engine's"),
    ):
        with pytest.raises(InputError, match=message):
            engine(**keys)


# --- planted errors ------------------------------------------------------------------------------


def planted(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Callable[..., Any]
) -> None:
    true = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **keys: wrong(true, *args, **keys))


def bonus_dropped(true: Any, *args: Any) -> list[Verdict]:
    return [Verdict(v.tokens[:-1], v.accepted) if v.accepted == 4 else v for v in true(*args)]


def mismatch_accepted(true: Any, choosers: Any, logits: Any, first: Any, proposals: Any) -> Any:
    found = true(choosers, logits, first, proposals)
    return [
        Verdict([*v.tokens[:-1], p.tokens[v.accepted]], v.accepted)
        if v.accepted < len(p.tokens)
        else v
        for v, p in zip(found, proposals, strict=True)
    ]


def one_token_too_many(true: Any, slots: Slots, counts: list[int]) -> None:
    true(slots, [max(0, count - 1) for count in counts])


def one_token_too_few(true: Any, slots: Slots, counts: list[int]) -> None:
    true(slots, [count + (count > 0) for count in counts])


def reused_too_far(true: Any, ids: list[int], prompt: list[int], held: int) -> int:
    return min(true(ids, prompt, held) + 1, held, len(prompt))


def rows_exchanged(true: Any, slots: Slots, blocks: list[list[int]]) -> Tensor:
    return true(slots, blocks).flip(0)


def piece_left_out(true: Any, slots: Slots, most: int, **more: Any) -> Tensor:
    if slots.left > 12:
        slots._prompt = slots._prompt[:5] + slots._prompt[6:]  # type: ignore[index]
    left: Tensor = true(slots, most, **more)
    return left


def gap_filled_by_another(true: Any, slots: Slots, gap: int, last: int) -> None:
    other = next((n for n in range(last) if n != gap), None)
    if other is None:
        true(slots, gap, last)
        return
    slots._cache.admit(slots._cache, other)
    slots._cache.release(last)
    slots._ids[gap] = slots._ids.pop(last)


PLANTED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the bonus token is dropped": (engine_module, "verify", bonus_dropped),
    "the rejected token is kept": (engine_module, "verify", mismatch_accepted),
    "a rejected token stays in the cache": (Slots, "rollback", one_token_too_many),
    "an accepted token is lost from the cache": (Slots, "rollback", one_token_too_few),
    "rows are exchanged": (Slots, "feed", rows_exchanged),
    "a token of the prompt is left out": (Slots, "run", piece_left_out),
    "another row fills a gap": (Slots, "_fill", gap_filled_by_another),
    "a reused row has one token too many": (
        slots_module,
        "_common",
        reused_too_far,
    ),
}


@pytest.mark.parametrize("error", [None, *PLANTED])
def test_a_planted_error_is_caught(error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: without an error the requests pass, and with one they do not."""
    model, starts = model_of("softmax"), prompts(4, 30, seed=8)
    known = texts(model, starts)
    if error is not None:
        planted(monkeypatch, *PLANTED[error])
    chance = random.Random(3)
    made = Watched(model, KnownDraft(known, lambda: chance.random() < 0.8), slots=3)
    with nullcontext() if error is None else pytest.raises(WrongTextError):
        for start in starts:
            made.add(start, max_tokens=20)
        made.run()
        for start in starts:
            made.add([*start[:20], 1, 2, 3], max_tokens=8)
        made.run()
        made.check()


class Holed:
    """A rotation whose positions from 10 on are too large."""

    def __init__(self, rotary: Any, hole: int) -> None:
        self._rotary, self._hole = rotary, hole
        self.reach = rotary.reach

    def __call__(self, index: Tensor, dtype: torch.dtype) -> Any:
        return self._rotary(index + self._hole * (index >= 10), dtype)


def test_a_hole_in_the_positions_is_caught() -> None:
    """Oracle: the same requests without it. The engine's model alone has it."""
    for hole in (0, 1):
        made = Watched(model_of("softmax"), slots=2)
        base = made.engine._step._model.model  # type: ignore[attr-defined]
        assert base is not made.model.model
        base.rotary = Holed(base.rotary, hole)
        for start in prompts(3, 9):
            made.add(start, max_tokens=12)
        made.run()
        if hole:
            with pytest.raises(WrongTextError):
                made.check()
        else:
            made.check()
