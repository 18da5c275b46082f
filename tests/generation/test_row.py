"""A row's end: tokens, texts and numbers that end it, whatever a round has decided behind them."""

import pytest

from llmnorm.generation.contract import Chosen, Event, Request, Sampling, Verdict
from llmnorm.generation.row import Row, rows_of
from tests.generation.test_text import TOKENIZERS

TOKENIZER = TOKENIZERS["byte level"]
ENDS = frozenset({5})


def row(prompt: tuple[int, ...] = (1, 2), context: int = 64, **sampling: object) -> Row:
    asked = Request(prompt, Sampling(**{"temperature": 0, **sampling}))  # type: ignore[arg-type]
    (made,) = rows_of(
        3, asked, tokenizer=TOKENIZER, ends=ENDS, vocabulary=len(TOKENIZER), context=context
    )
    return made


def commit(made: Row, tokens: list[int], accepted: int | None = None) -> Event:
    chosen = [Chosen(-float(token), []) for token in tokens]
    accepted = len(tokens) - 1 if accepted is None else accepted
    return made.commit(Verdict(tokens, accepted, chosen), drafted=4)


@pytest.mark.parametrize("place", range(4))
def test_what_stands_behind_an_end_is_dropped(place: int) -> None:
    """Oracle: the block, cut by hand; tokens, accepted ones and log-probabilities alike."""
    tokens = [10, 11, 12, 13]
    tokens[place] = 5
    made = row()
    event = commit(made, tokens)
    assert (event.tokens, event.finish) == (tokens[: place + 1], "stop")
    assert event.accepted == min(3, place + 1) and event.drafted == 4
    assert event.chosen is not None and [c.logprob for c in event.chosen] == [
        -float(token) for token in event.tokens
    ]
    assert made.ids == [1, 2, *event.tokens]
    assert event.text == TOKENIZER.decode(tokens[:place])  # the end token has no text


def test_an_end_token_may_be_ignored_and_stop_tokens_are_not() -> None:
    """Oracle: the tokens that come."""
    made = row(ignore_end=True, stop_tokens=frozenset({9}))
    assert commit(made, [5, 5]).finish is None
    assert commit(made, [5, 9, 4]).tokens == [5, 9]


def test_the_most_tokens_and_the_context_end_a_row() -> None:
    """Oracle: counts; the last token is not run, so a row may have one more than the context."""
    made = row(max_tokens=3)
    assert [made.remaining, commit(made, [10]).finish, made.remaining] == [3, None, 2]
    event = commit(made, [10, 11, 12, 13])
    assert (event.tokens, event.finish, event.accepted) == ([10, 11], "length", 2)
    assert commit(row(max_tokens=1), [5]).finish == "stop"
    full = row(prompt=(1,) * 8, context=8)
    assert full.remaining == 1
    assert row(prompt=(1,) * 5, context=8).remaining == 4


def test_a_stop_text_ends_the_row_at_the_token_that_completes_it() -> None:
    """Oracle: the same text cut by hand; the stop goes over a border of tokens and of rounds."""
    ids = TOKENIZER.encode("one two three four", add_special_tokens=False)
    whole = [TOKENIZER.decode(ids[: n + 1]) for n in range(len(ids))]
    stop = "wo thr"
    last = next(n for n, text in enumerate(whole) if stop in text)
    made = row(stop=(stop,))
    events = [commit(made, ids[n : n + 2]) for n in range(0, last + 1, 2)]
    assert events[-1].finish == "stop" and not any(e.finish for e in events[:-1])
    assert "".join(event.text for event in events) == "one t"
    assert made.ids[2:] == ids[: last + 1]


def test_text_that_waited_comes_with_the_last_event() -> None:
    """Oracle: the whole text; its end might have been the beginning of a stop."""
    ids = TOKENIZER.encode("a bc", add_special_tokens=False)
    made = row(stop=("c!",), max_tokens=len(ids) + 1)
    event = commit(made, ids)
    assert event.text == "a b" and event.finish is None
    assert made.end("abort").text == "c"


@pytest.mark.parametrize("accepted", range(4))
def test_accepted_characters_are_those_of_the_accepted_tokens(accepted: int) -> None:
    """Oracle: the accepted tokens, decoded; those behind an end were not accepted."""
    ids = TOKENIZER.encode("one two three four", add_special_tokens=False)[:4]
    assert commit(row(), ids, accepted).accepted_characters == len(TOKENIZER.decode(ids[:accepted]))
    cut = commit(row(max_tokens=2), ids, accepted)
    assert cut.accepted_characters == len(TOKENIZER.decode(ids[: min(accepted, 2)]))


def test_rows_of_a_request_have_seeds_of_their_own() -> None:
    """Oracle: the n-th row's seed is the request's plus n; without a seed none has one."""
    for seed, expected in ((7, [7, 8, 9]), (None, [None] * 3)):
        request = Request((1, 2), Sampling(seed=seed), n=3)
        made = rows_of(0, request, tokenizer=None, ends=ENDS, vocabulary=len(TOKENIZER), context=9)
        assert [one.chooser.sampling.seed for one in made] == expected
        assert [one.row for one in made] == [0, 1, 2]
