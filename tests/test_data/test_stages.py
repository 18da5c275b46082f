"""The stages of a run as rows: when it begins, when it goes on, and in a branch of it."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmnorm.config.file import load
from llmnorm.config.saved import to_tree
from llmnorm.config.tree import RunConfig
from llmnorm.data.report import stages_table
from llmnorm.data.run_data import RunData, Stage
from llmnorm.data.stages import Course, Start, already_read, course
from llmnorm.part import InputError
from tests.running import SMOKE

POINT = Path("runs/parent/checkpoints/step_00000008")
A, B, C = "{prose: 3, notes: 1}", "{notes: 1}", "{prose: 1}"
AT_80 = f"data.stages=[{{until: 0.8, weights: {A}}}, {{weights: {B}}}]"


class Sized(NamedTuple):
    """A source of so many rows."""

    name: str
    weight: int
    rows: int
    documents: int = 1
    tokens: int = 1
    bytes: int = 1


def data(identity: str = "0123", context: int = 64, weights: tuple[int, int] = (2, 1)) -> RunData:
    sources = [Sized("prose", weights[0], 300), Sized("notes", weights[1], 100)]
    return RunData(
        directory=Path("data"),
        identity=identity,
        tokenizer_directory=Path("tokenizer"),
        vocab_size=512,
        bos=0,
        eos=1,
        pad=2,
        context_length=context,
        sources=sources,
    )


def settings(*words: str, steps: int = 10) -> RunConfig:
    return load(SMOKE, [f"training.steps={steps}", "schedule=constant", *words]).config


def saved(config: RunConfig, found: Course, step: int, *, own: bool = True) -> Start:
    """The checkpoint that a run of this course writes after `step`."""
    read = data().in_stages(found.stages)
    meta: dict[str, Any] = {
        "step": step,
        "row": found.pace.row_of(step),
        "data": read.identity,
        "config": to_tree(config),
        "sources": read.sizes(),
        "stages": read.saved_stages(),
    }
    return Start(POINT, meta, own)


def rows_and_weights(found: Course) -> list[tuple[int, tuple[int, ...]]]:
    return [(stage.row, stage.weights) for stage in found.stages]


@pytest.mark.parametrize(
    ("end", "row"),
    [("until: 0.8", 128), ("until: 0.55", 96), ("rows: 77", 77), ("tokens: 2049", 48)],
)
def test_the_end_of_a_stage_becomes_a_row(end: str, row: int) -> None:
    """Oracle: by hand, 10 steps of 16 rows of 64 tokens; shares and tokens are of whole steps."""
    found = course(settings(f"data.stages=[{{{end}, weights: {A}}}, {{weights: {B}}}]"), data())
    assert rows_and_weights(found) == [(0, (3, 1)), (row, (0, 1))]
    assert found.rows == 160


def test_without_stages_there_is_one_of_the_sources_weights() -> None:
    """Oracle: the weights of the sources; the order is that of weights alone."""
    found = course(settings(), data())
    assert found.stages == (Stage(0, (2, 1), 0),)
    one, other = data().order(5).locate(0, 50), data().in_stages(found.stages).order(5)
    assert all((x == y).all() for x, y in zip(one, other.locate(0, 50), strict=True))
    assert stages_table(data().in_stages(found.stages), found) == ""


def test_a_longer_run_moves_the_boundaries_that_are_ahead() -> None:
    """Oracle: by hand: 80 % of 20 steps; after step 9 the boundary at step 8 has been passed."""
    first = settings(AT_80)
    begun = course(first, data())
    longer = settings(AT_80, steps=20)
    for step, row in ((5, 256), (8, 256), (9, 128)):
        found = course(longer, data(), saved(first, begun, step))
        assert rows_and_weights(found) == [(0, (3, 1)), (row, (0, 1))], step
        again = course(longer, data(), saved(longer, found, 17))  # and is saved so
        assert again.stages == found.stages
    assert course(first, data(), saved(first, begun, 9)).stages == begun.stages


def test_stages_ahead_may_change_and_those_behind_may_not() -> None:
    """Oracle: by hand; a change of what was read is refused, with where it may change."""
    first = settings(AT_80)
    start = saved(first, course(first, data()), 6)
    later = settings(
        f"data.stages=[{{rows: 100, weights: {A}}}, {{until: 0.9, weights: {C}}}, {{weights: {B}}}]"
    )
    found = course(later, data(), start)
    assert rows_and_weights(found) == [(0, (3, 1)), (100, (1, 0)), (144, (0, 1))]
    other = settings(f"data.stages=[{{until: 0.8, weights: {C}}}, {{weights: {B}}}]")
    with pytest.raises(InputError, match="has read the rows before 96 .*training.branch_from="):
        course(other, data(), start)
    passed = saved(first, course(first, data()), 9)
    moved = settings(f"data.stages=[{{until: 0.7, weights: {A}}}, {{weights: {B}}}]")
    with pytest.raises(InputError, match="has read the rows before 144"):
        course(moved, data(), passed)
    early = settings(f"data.stages=[{{rows: 95, weights: {A}}}, {{weights: {B}}}]")
    with pytest.raises(InputError, match=r"data.stages.0.rows: 95.* row 95, .* at row 96 by then"):
        course(early, data(), start)


def test_a_run_may_be_given_stages_that_are_ahead() -> None:
    """Oracle: by hand; the first stage is what the run has read, by the sources' weights."""
    first = settings()
    start = saved(first, course(first, data()), 6)
    words = f"data.stages=[{{until: 0.8}}, {{weights: {B}}}]"
    found = course(settings(words), data(), start)
    assert rows_and_weights(found) == [(0, (2, 1)), (128, (0, 1))]
    del start.meta["stages"]  # type: ignore[attr-defined]  # of before there were stages
    assert course(settings(words), data(), start).stages == found.stages


def test_a_branch_on_another_mixture_begins_a_stage_at_its_row() -> None:
    """Oracle: by hand; the branch's own length, in rows of its own batch from there on."""
    parent = settings(AT_80)
    begun = course(parent, data())
    start = saved(parent, begun, 6, own=False)
    assert course(parent, data(), start).stages == begun.stages  # nothing changed
    weights = settings("data.weights={prose: 1, notes: 4}")
    found = course(weights, data(weights=(1, 4)), start)
    assert found.stages == (Stage(0, (3, 1), None), Stage(96, (1, 4), 0)) and found.anew is None
    words = f"data.stages=[{{until: 0.9, weights: {C}}}, {{weights: {B}}}]"
    staged = settings(words, "training.global_batch=8")
    found = course(staged, data(), start)
    assert rows_and_weights(found) == [(0, (3, 1)), (96, (1, 0)), (96 + 3 * 8, (0, 1))]
    assert found.rows == 96 + 4 * 8
    # The branch goes on by itself: what it has not read itself stays, too.
    own = saved(staged, found, 8)
    assert course(staged, data(), own).stages == found.stages
    same = settings(f"data.stages=[{{until: 0.9, weights: {A}}}, {{weights: {B}}}]")
    found = course(same, data(), start)  # the present mixture goes on, without a boundary
    assert rows_and_weights(found) == [(0, (3, 1)), (144, (0, 1))]
    over = settings(f"data.stages=[{{until: 0.5, weights: {C}}}, {{weights: {B}}}]")
    with pytest.raises(InputError, match=r"data.stages.0.until: 0.5 is row 80, .* at row 96"):
        course(over, data(), start)


@pytest.mark.parametrize(
    ("words", "read", "why"),
    [
        ([], data("4567"), "of the data 4567 (before: 0123)"),
        (["data.context_length=128"], data(context=128), "of data.context_length 128 (before: 64)"),
        (["data.seed=7"], data(), "in the order of seed 7 (before: 0)"),
    ],
)
def test_where_row_n_would_be_another_rows_begin_at_0(
    words: list[str], read: RunData, why: str
) -> None:
    """Oracle: by hand: steps go on from 6, so that 4 steps of rows are left."""
    parent = settings()
    start = saved(parent, course(parent, data()), 6, own=False)
    found = course(settings(*words), read, start)
    assert found.anew == why and found.pace.row == 0 and found.rows == 4 * 16
    assert found.stages == (Stage(0, (2, 1), 0),)
    assert course(settings(*words, AT_80), read, start).stages[1].row == 2 * 16
    with pytest.raises(InputError, match="until: 0.5 is a row before the branch"):
        course(settings(*words, AT_80.replace("0.8", "0.5")), read, start)
    epochs = ["training.steps=null", "training.epochs=2"]
    with pytest.raises(InputError, match=r"training.epochs: .* give training.steps or training.t"):
        course(settings(*words, *epochs), read, start)


def test_epochs_that_a_parent_has_read_are_counted() -> None:
    """Oracle: by hand, 96 rows by the weights 3 and 1, of sources with 300 and 100."""
    parent = settings(AT_80)
    start = saved(parent, course(parent, data()), 6)
    assert already_read(start.meta) == {"prose": 72 / 300, "notes": 24 / 100}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{rows: 0}, {}]", "data.stages.0.rows: must be at least 1"),
        ("[]", "data.stages: is empty"),
        ("[{}, {}]", "data.stages.0: does not end; give it 'until'"),
        ("[{until: 0.5, rows: 3}, {}]", "data.stages.0: has until and rows; give one of them"),
        ("[{until: 0.5}]", "data.stages.0: is the last and has 'until'"),
        ("[{until: 0.5}, {until: 0.5}, {}]", "data.stages.1.until: 0.5 is not behind 0.5"),
        ("[{until: 1.5}, {}]", "data.stages.0.until: must be less than 1, got 1.5"),
        ("[{weights: {}}]", "data.stages.0.weights: names no source"),
        ("[{weights: {prosa: 1}}]", "data.stages.0.weights: .* 'prosa'; did you mean 'prose'"),
        ("[{weights: {prose: 2147483647, notes: 2}}]", "data.stages.0.weights: must sum to less"),
        ("[{weights: {prose: 1}}] data.weights={prose: 1, notes: 1}", "data.weights: would not be"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: str, message: str) -> None:
    """Oracle: the message, one line."""
    words = f"data.stages={stages}".split(" data.w")
    with pytest.raises(InputError, match=message) as error:
        settings(words[0], *(f"data.w{word}" for word in words[1:]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{until: 0.01}, {}]", "data.stages.0.until: 0.01 is row 0, and the stage is at row 0"),
        ("[{rows: 160}, {}]", "data.stages.1: begins at row 160, but the run ends at row 160"),
        ("[{until: 0.5}, {rows: 80}, {}]", "data.stages.1.rows: 80 is row 80, .* at row 80"),
    ],
)
def test_a_stage_without_a_row_is_refused(stages: str, message: str) -> None:
    """Oracle: the message, one line; 10 steps of 16 rows."""
    with pytest.raises(InputError, match=message) as error:
        course(settings(f"data.stages={stages}"), data())
    assert "\n" not in str(error.value)
