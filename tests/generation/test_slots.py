"""Slots: what stays of finished rows, what is copied, and what never moves; full passes beside."""

import pytest

from llmnorm.nn.key_values import KeyValues
from tests.generation.watched import KnownDraft, Watched, mixed, model_of, prompts, texts
from tests.models.cache_rounds import MODELS


@pytest.mark.parametrize("name", ["softmax", "window", "nala"])
def test_rounds_copy_no_row_and_move_no_buffer(name: str) -> None:
    """Oracle: the addresses of all buffers, and the counter; admission copies each row once."""
    model, starts = model_of(name), prompts(4, 30)
    draft = KnownDraft(texts(model, starts), mixed(2))
    made = Watched(model, draft, slots=4)
    slots = made.engine._slots

    def addresses() -> list[int]:
        caches = (slots._cache, slots._side)
        layers = [layer for cache in caches for layer in cache.layers]
        tensors = [
            tensor
            for layer in layers
            for tensor in (
                (layer.keys, layer.values) if isinstance(layer, KeyValues) else layer._kept
            )
        ]
        return [tensor.data_ptr() for tensor in tensors]

    before, size = addresses(), made.engine.bytes
    for start in starts:
        made.add(start, max_tokens=15)
    while made.engine.waiting or not made.engine.running:
        made.step()
    admitted = made.engine.copies
    assert admitted == 3  # a prompt of one token has nothing to be copied
    while made.engine.running == 4:
        assert made.engine.copies == admitted
        made.step()
    made.run()
    assert addresses() == before
    assert size == made.engine.bytes


def test_rows_of_a_request_share_one_prefill() -> None:
    """Oracle: tokens that are run in the side cache; five rows of four slots, equal answers."""
    made = Watched(model_of("nala"), slots=4)
    ran: list[int] = []
    run = made.engine._slots.run
    made.engine._slots.run = lambda most, every: (  # type: ignore[method-assign, misc]
        ran.append(made.engine._slots.piece(most)) or run(most, every=every)  # type: ignore[func-returns-value]
    )
    start = prompts(2, 33)[1]
    made.add(start, n=5, max_tokens=6)
    answers = made.run()
    made.check()
    assert sum(ran) == 32
    assert len({tuple(a.tokens) for a in answers}) == 1
    assert made.engine.counters.cached_tokens == 4 * 32


def test_a_row_that_runs_lends_its_beginning() -> None:
    """Oracle: full passes; the tokens that are not run again, while the first row goes on."""
    made = Watched(model_of("softmax"), slots=3)
    trunk = prompts(2, 30, seed=9)[1]
    made.add([*trunk, 1], max_tokens=20)
    made.step()
    made.engine._slots.forget()  # so that the slots alone are looked at
    made.add([*trunk, 2, 3], max_tokens=20)
    made.run()
    made.check()
    assert made.engine.counters.cached_tokens == 30


# --- finished rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ended_by", ["stop", "length"])
def test_the_next_turn_takes_a_finished_row_over(name: str, ended_by: str) -> None:
    """Oracle: full passes, and how many tokens of the second prompt are not run again: all that
    was committed but the last token. The row has ended in the middle of accepted drafts."""
    model = model_of(name)
    other, *starts = [prompts(2, 30, seed=seed)[1] for seed in range(6)]
    known = texts(model, [other, *starts], 15)
    start, end = next(  # a stop token that comes for the first time in the middle of a block
        (text[:30], n)
        for text in known[1:]
        for n in range(1, 12)
        if text[30 + n] not in text[30 : 30 + n] and n % 5 != 4
    )
    answer = next(text[30:] for text in known if text[:30] == start)
    # The row leaves a gap in front, and changes places by way of a free slot or the side cache.
    made = Watched(model, KnownDraft(known, lambda: True), slots=3 if ended_by == "stop" else 2)
    stop = {answer[end]} if ended_by == "stop" else set()
    made.add(start, stop_tokens=frozenset(stop), max_tokens=40 if stop else end + 1)
    made.add(other, max_tokens=30)
    while made.answers[0, 0].finish is None:
        made.step()
    assert made.engine.running == 1
    turn = [*start, *made.answers[0, 0].tokens, 5, 6, 7]
    assert made.answers[0, 0].finish == ended_by and len(turn) == 30 + end + 4
    made.add(turn, max_tokens=12)
    made.run()
    made.check()
    assert made.engine.counters.cached_tokens == 30 + end
    assert made.engine.prefix_lost == 0


@pytest.mark.parametrize("name", ["softmax", "window", "nala", "softmax before nala"])
def test_a_common_beginning_is_taken_where_the_layers_reach_it(name: str) -> None:
    """Oracle: full passes; keys and values go back by any length, a state by 64 tokens, and a
    window by what it keeps."""
    model = model_of(name)
    trunk = prompts(2, 30, seed=6)[1]
    made = Watched(model, slots=2, context=260)
    (far,) = prompts(2, 240, seed=7)[1:]
    made.add([*trunk, *far[:20]], max_tokens=3)
    made.run()
    made.add([*trunk, 1, 2, 3], max_tokens=5)  # 22 tokens back
    made.run()
    assert made.engine.counters.cached_tokens == 30
    made.add([*trunk, *far[:210]], max_tokens=4)
    made.run()
    cached = made.engine.counters.cached_tokens
    made.engine._slots.forget()  # so that the slots alone are looked at
    made.engine._slots._let_go(made.engine._slots._finished[0])
    made.add([*trunk, 4, 5, 6], max_tokens=5)  # 212 tokens back
    made.run()
    made.check()
    reached = name == "softmax"
    assert made.engine.counters.cached_tokens - cached == (30 if reached else 0)
    assert made.engine.prefix_lost == (0 if reached else 1)


def test_a_finished_row_stays_until_its_slot_is_needed() -> None:
    """Oracle: of three conversations and a fourth prompt in three slots, which are still there:
    the oldest has made room."""
    made = Watched(model_of("softmax"), slots=3)
    starts = [prompts(2, 20, seed=seed)[1] for seed in range(20, 24)]
    for start in starts:
        made.add(start, max_tokens=2)
        made.run()
    seen = []
    for number in (1, 2, 0):
        before = made.engine.counters.cached_tokens
        made.add(starts[number], max_tokens=1)
        made.run()
        seen.append(made.engine.counters.cached_tokens - before)
    made.check()
    assert seen == [19, 19, 0]


def test_a_finished_row_makes_room_for_the_prompt_that_is_being_run() -> None:
    """Oracle: full passes; three slots hold a row that runs, one that has just finished in front
    of it, and an older one, which goes: a prompt is in the side cache and needs a slot."""
    made = Watched(model_of("softmax"), slots=3, prefill_chunk=8)
    first, second, third, fourth = (prompts(2, 20, seed=seed)[1] for seed in range(30, 34))
    made.add(first, max_tokens=1)
    made.run()
    made.add(second, max_tokens=7)
    made.add(third, max_tokens=30)
    while made.engine.running < 2:
        made.step()
    made.add((fourth * 2)[:39], max_tokens=2)  # in five pieces
    while made.answers[1, 0].finish is None:
        made.step()
    slots = made.engine._slots
    assert (made.engine.running, made.engine.waiting, len(slots._finished)) == (1, 1, 1)
    made.add([*second, *made.answers[1, 0].tokens, 7], max_tokens=3)
    made.run()
    made.check()
    assert made.engine.counters.cached_tokens == 20 + 6


def test_without_reuse_a_deterministic_engine_runs_every_prompt() -> None:
    """Oracle: the counter; but the rows of one request share their prefill."""
    made = Watched(model_of("softmax"), slots=3, deterministic=True)
    for _ in range(2):
        made.add(range(20), n=2, max_tokens=3)
        made.run()
        made.engine._slots.forget()
    made.check()
    assert made.engine.counters.cached_tokens == 2 * 19
