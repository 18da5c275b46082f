"""Admission: which prompts are run in one pass, and what becomes of their rows."""

import pytest
import torch
from torch import Tensor

from llmnorm.generation.admission import TOGETHER
from tests.generation.watched import Watched, model_of, prompts
from tests.models.cache_rounds import MODELS, build

CHUNK = 40


def passes_of(made: Watched) -> list[list[int]]:
    """The passes of prompts run together, which are noted here: tokens of each, without padding."""
    noted: list[list[int]] = []
    true = made.engine._slots.run_together

    def run(rows: list[list[int]]) -> Tensor:
        noted.append([len(row) - 1 for row in rows])
        return true(rows)

    made.engine._slots.run_together = run  # type: ignore[method-assign, assignment]
    return noted


def fresh(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths that begin differently."""
    return [prompts(2, length, seed=40 + n)[1] for n, length in enumerate(lengths)]


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_prompts_run_together_are_full_passes(name: str) -> None:
    """Oracle: full passes without a cache; rows of unequal prompts, and of later waves."""
    made = Watched(model_of(name), slots=4, prefill_chunk=CHUNK)
    noted = passes_of(made)
    for number, start in enumerate(fresh(9, 5, 8, 2, 20, 19, 13, 3)):
        made.add(start, max_tokens=3 + 2 * (number // 2))
    made.run()
    made.check()
    assert noted == [[8, 4, 7, 1], [19, 18], [12, 2]]


@pytest.mark.parametrize(
    ("starts", "together"),
    [
        (fresh(11, 11, 11, 11, 11), [[10, 10, 10, 10]]),  # no more than TOGETHER, nor than CHUNK
        (fresh(21, 3, 3), [[20, 2]]),  # with padding a third one would be 60 tokens
        (fresh(43, 6, 6), [[5, 5]]),  # a long prompt is run in pieces
        ([[1], *fresh(6, 6)], [[5, 5]]),  # of one token nothing is to be run
        ([fresh(20)[0], [*fresh(20)[0][:17], 1]], []),  # the second starts from the first
        ([fresh(20)[0], [*fresh(20)[0][:15], 1, 2]], [[19, 16]]),  # too little for a copy
        ([fresh(6)[0], fresh(6)[0]], []),
    ],
)
def test_which_prompts_are_run_together(starts: list[list[int]], together: list[list[int]]) -> None:
    """Oracle: the shapes by hand, of a first step with free slots, or of the next ones."""
    made = Watched(model_of("softmax"), slots=6, prefill_chunk=CHUNK)
    noted = passes_of(made)
    for start in starts:
        made.add(start, max_tokens=12)
    while made.engine.waiting:
        made.step()
    made.run()
    made.check()
    assert noted[: len(together) + (not together)] == together
    assert all(len(some) <= TOGETHER for some in noted)


def test_what_is_left_of_a_chunk_does_not_part_prompts() -> None:
    """Oracle: the shapes: 24 of 40 tokens are used, and the next three wait for a whole chunk."""
    made = Watched(model_of("softmax"), slots=8, prefill_chunk=CHUNK)
    noted = passes_of(made)
    for start in fresh(13, 13, 11, 11, 11):
        made.add(start, max_tokens=9)
    made.step()
    made.step()
    made.run()
    made.check()
    assert noted == [[12, 12, 10], [10, 10]]


def test_prompts_whose_tokens_are_told_or_saved_are_run_alone() -> None:
    """Oracle: the shapes, and the tokens that an earlier row has saved."""
    made = Watched(model_of("softmax"), slots=6, prefill_chunk=CHUNK)
    noted = passes_of(made)
    scored, first, second = fresh(8, 30, 8)
    made.add(first, max_tokens=2)
    made.add(scored, max_tokens=0, prompt_logprobs=0)
    made.run()
    made.add(second, max_tokens=2)
    made.add([*first, 1, 2], max_tokens=2)
    made.run()
    made.check()
    assert noted == [] and made.engine.counters.cached_tokens == 30


def test_a_deterministic_engine_runs_every_prompt_alone() -> None:
    """Oracle: no pass of several prompts."""
    made = Watched(model_of("softmax"), slots=4, deterministic=True)
    noted = passes_of(made)
    for start in fresh(6, 7, 8):
        made.add(start, max_tokens=3)
    made.run()
    made.check()
    assert noted == []


def test_a_prompt_with_nan_fails_alone_among_others() -> None:
    """Oracle: full passes of the rows beside it, by a model whose only fault is one token."""
    model = build("softmax before nala")
    with torch.no_grad():
        model.get_input_embeddings().weight[30] = torch.nan
    made = Watched(model, slots=4, ends=[30], prefill_chunk=CHUNK)
    noted = passes_of(made)
    starts = [[t % 30 for t in start] for start in fresh(6, 7, 9)]
    numbers = [made.add(start, max_tokens=6) for start in [starts[0], [4, 30, 6], *starts[1:]]]
    made.run()
    failed = made.answers.pop((numbers[1], 0))
    assert failed.finish == "error" and failed.tokens == []
    assert noted == [[5, 2, 6, 8]]
    made.check()


def test_a_pass_that_raises_fails_its_rows_and_no_other() -> None:
    """Oracle: the ends of all rows; those that waited are full passes."""
    made = Watched(model_of("softmax"), slots=4, prefill_chunk=CHUNK)
    starts = fresh(9, 9, 9, 9, 9)
    for start in starts:
        made.add(start, max_tokens=4)

    def broken(rows: list[list[int]]) -> Tensor:
        raise RuntimeError("out of memory")

    true = made.engine._slots.run_together
    made.engine._slots.run_together = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="out of memory"):
        made.step()
    made.engine._slots.run_together = true  # type: ignore[method-assign]
    made.run()
    ends = [answer.finish for answer in made.answers.values()]
    assert ends == ["error"] * 4 + ["length"]
    made.answers = {(4, 0): made.answers[4, 0]}
    made.check()
