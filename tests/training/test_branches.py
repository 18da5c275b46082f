"""Runs in stages, and branches onto another mixture, a longer context and another corpus."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.data.loader import IGNORED, Loader
from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.runs.record import read_metrics
from llmnorm.training.prepare import Prepared, prepare
from tests.running import SMOKE, assert_same_run, llmnorm, metrics_of, state_of

WORDS = [
    *("training.global_batch=8", "evaluation.samples=0", "schedule=constant", "schedule.warmup=2"),
    *("checkpoint.every=4", "checkpoint.keep=9", "training.device=cpu"),
]
STAGED = "data.stages=[{rows: 44, weights: {prose: 3, notes: 1}}, {weights: {notes: 1, prose: 1}}]"


def train(run: Path, data: Path, *words: str) -> int:
    given = [str(SMOKE), f"run_dir={run}", *WORDS]
    return cli.main(["train", *given, f"data.dir={data}", *words])


@contextmanager
def prepared(run: Path, data: Path, *words: str) -> Iterator[Prepared]:
    """A run before its first step."""
    config = load(SMOKE, [f"run_dir={run}", *WORDS, f"data.dir={data}", *words]).config
    directory = run_directory.agree(config, going_on=False)
    with ExitStack() as stack:
        yield prepare(config, directory, stack, data_command="", dry_run=True)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A run of 8 steps of 8 rows, saved after 4 and 8."""
    run = tmp_path_factory.mktemp("parent") / "stable"
    assert train(run, smoke_data, "training.steps=8") == 0
    return run


def point(parent: Path, step: int = 4) -> str:
    return f"training.branch_from={parent}/checkpoints/step_{step:08d}"


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command has left."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("llmnorm: error: ")]
    return line.removeprefix("llmnorm: error: ")


def rows_of(data: Path, numbers: range, *words: str) -> list[tuple[int, int]]:
    """Where rows lie in the packed data, by their numbers in an order of weights alone."""
    config = load(SMOKE, [f"data.dir={data}", *words]).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    found = packed.order(config.data_seed).locate(numbers.start, len(numbers))
    return list(zip(*(axis.tolist() for axis in found), strict=True))


# Stages.


def test_a_run_in_stages_goes_on_to_the_bit_in_each_of_them(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the run that was not stopped; the stage of a step is that of its first row."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, smoke_data, STAGED, "training.steps=9") == 0
    for steps in (3, 7, 9):
        words = [STAGED, f"training.steps={steps}"]
        if steps == 3:  # it ends within its first stage, which then has no end
            words = ["data.stages=[{weights: {prose: 3, notes: 1}}]", "training.steps=3"]
            assert train(cut, smoke_data, *words) == 0
        else:
            assert cli.main(["train", str(cut), f"data.dir={smoke_data}", *words]) == 0
    first, second = state_of(whole, 9), state_of(cut, 9)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    lines = [line for line in metrics_of(whole) if "lr" in line]
    assert [line["stage"] for line in lines] == [1] * 6 + [2] * 3
    assert [line["loss"] for line in metrics_of(cut) if "lr" in line] == [x["loss"] for x in lines]
    # Where a picture has its dotted line: 6 steps were of the first stage.
    assert read_metrics(whole / "metrics.jsonl").stages == (lines[6]["tokens"],)


def test_processes_and_batches_read_the_same_rows_in_stages(smoke_data: Path) -> None:
    """Oracle: one process that reads from row 0; others begin in either stage."""
    config = load(SMOKE, [f"data.dir={smoke_data}", STAGED]).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    from llmnorm.data.stages import course

    packed = packed.in_stages(course(config, packed).stages)
    batches = Loader(packed, seed=0, global_batch=8).batches()
    steps = [next(batches)[0] for _ in range(9)]
    whole = {key: torch.cat([step[key] for step in steps]) for key in steps[0]}
    for world, batch, first in ((2, 8, 0), (4, 12, 36), (3, 24, 48)):
        readers = [
            Loader(packed, seed=0, global_batch=batch, rank=r, world=world).batches(first)
            for r in range(world)
        ]
        read = [reader for _ in range((72 - first) // batch) for reader in map(next, readers)]
        for key, expected in whole.items():
            found = torch.cat([part[key] for parts in read for part in parts])
            assert found.equal(expected[first:]), (world, key)


def test_a_run_that_has_read_rows_refuses_another_mixture_for_them(
    parent: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message; nothing was written."""
    before = sorted(parent.rglob("*"))
    words = ["training.steps=12", f"data.dir={smoke_data}", "data.stages=[{weights: {notes: 1}}]"]
    assert cli.main(["train", str(parent), *words]) == 2
    line = refused(capsys)
    assert "has read the rows before 64 as it was told" in line
    assert f"training.branch_from={parent}/checkpoints/step_00000008" in line
    assert sorted(parent.rglob("*")) == before


# Branches.


def test_a_branch_in_which_nothing_changed_is_its_parent(
    tmp_path: Path, smoke_data: Path, parent: Path
) -> None:
    """Oracle: the parent's weights, state and lines; its stages need not be repeated."""
    run = tmp_path / "branch"
    assert train(run, smoke_data, "training.steps=8", point(parent)) == 0
    first, second = state_of(run, 8), state_of(parent, 8)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert metrics_of(run) == [line for line in metrics_of(parent) if line["step"] > 4]
    again = tmp_path / "again"
    assert train(again, smoke_data, "training.steps=8", point(parent)) == 0
    assert_same_run(run, again, 8)


def test_a_branch_on_another_mixture_goes_on_with_each_sources_next_row(
    tmp_path: Path, smoke_data: Path, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the parent's rows, and those that each source would have given next, by the order of
    that source alone; state and rate of the first step are the parent's."""
    weights = "data.weights={prose: 1, notes: 1}"
    words = ["training.steps=8", point(parent), weights]
    with prepared(tmp_path / "branch", smoke_data, *words) as run:
        capsys.readouterr()
        assert run.progress.row == 32 and run.progress.step == 4
        objective: Any = run.objective
        source, index = objective._rows.order.locate(0, 64)
        _same_state(run, parent)
    parents = rows_of(smoke_data, range(32))
    assert list(zip(source[:32].tolist(), index[:32].tolist(), strict=True)) == parents
    assert np.bincount(source[32:]).tolist() == [16, 16]
    for number in (0, 1):
        had = sum(s == number for s, _ in parents)
        one_hot = f"data.stages=[{{weights: {{{('prose', 'notes')[number]}: 1}}}}]"
        config = load(SMOKE, [f"data.dir={smoke_data}", one_hot]).config
        packed = packing.find(config.data, config.tokenizer)
        assert packed is not None
        from llmnorm.data.stages import course

        alone = packed.in_stages(course(config, packed).stages).order(0)
        expected = alone.locate(had, 16)[1]
        assert index[32:][source[32:] == number].tolist() == expected.tolist()
    run_dir = tmp_path / "trained"
    assert train(run_dir, smoke_data, *words) == 0
    said = capsys.readouterr().err
    assert "; another mixture begins at row 32, and each source goes on with its next row" in said
    assert "stage 1 of 2, rows 0 to 31, of the run that this one branches from: prose" in said
    assert cli.main(["train", str(run_dir), f"data.dir={smoke_data}", "training.steps=10"]) == 0


def _same_state(run: Prepared, parent: Path) -> None:
    """Weights, optimizer state and the rate of the next step are those of the parent's step 4."""
    there = state_of(parent, 4)
    for name, held in run.state.items():
        tensor = held if isinstance(held, torch.Tensor) else held.tensor
        assert torch.equal(tensor.detach(), there[name]), name
    assert any(name.startswith("optimizer.") for name in run.state)
    run.hyperparameters.set(run.optimizer.param_groups, run.progress.step)
    (line,) = [x for x in metrics_of(parent) if x["step"] == 5 and "lr" in x]
    assert run.optimizer.param_groups[0]["lr"] == line["lr"]


CORPUS = "the queen of small islands counts her ships at dawn and writes a letter about the wind. "


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, parent: Path) -> list[str]:
    """Settings of another corpus by the parent's tokenizer; prepared."""
    place = tmp_path_factory.mktemp("other")
    texts = [CORPUS.replace("wind", f"wind of {n} and {n * n % 97}") * 40 for n in range(30)]
    lines = [json.dumps({"text": text}) for text in texts]
    (place / "letters.jsonl").write_text("\n".join(lines))
    words = [
        f"data.sources=[{{name: letters, path: {place}/letters.jsonl}}]",
        f"tokenizer.path={parent}/tokenizer",
        "tokenizer.vocab_size=32768",  # the default, which counts as left out
    ]
    llmnorm("data", SMOKE, *words, f"data.dir={place}/data")
    return [*words, f"data.dir={place}/data"]


def test_a_branch_onto_another_corpus_begins_at_its_row_0(
    tmp_path: Path, parent: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the rows of the new corpus from 0 on, read by hand; the parent's state and rate; the
    loss of the checkpoint's weights on these rows."""
    run_dir, data = tmp_path / "branch", Path(other[-1].removeprefix("data.dir="))
    words = [*other[:-1], point(parent), "training.steps=7"]
    with prepared(run_dir, data, *words) as run:
        assert (run.progress.step, run.progress.row) == (4, 0) and run.progress.tokens > 0
        _same_state(run, parent)
        (batch,) = next(run.batches())
    config = load(SMOKE, other).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    (expected,) = next(Loader(packed, seed=0, global_batch=8).batches())
    assert batch.inputs["input_ids"].equal(expected["input_ids"])
    assert batch.rows.tolist() == list(range(8))
    capsys.readouterr()
    assert train(run_dir, data, *words) == 0
    said = capsys.readouterr().err
    assert f"the rows of the data {packed.identity} (before: " in said and "from 0" in said
    model, _ = load_model(parent, checkpoint="4")
    with torch.no_grad():
        keys = ("input_ids", "position_ids", "shift_labels")
        loss = model(**{key: expected[key] for key in keys}).loss
    first, *_ = metrics_of(run_dir)
    assert (first["step"], first["loss"]) == (5, pytest.approx(float(loss), rel=1e-5))
    (before,) = [x for x in metrics_of(parent) if x["step"] == 4 and "lr" in x]
    assert first["tokens"] == before["tokens"] + int((expected["shift_labels"] != IGNORED).sum())
    # It goes on by itself, to the bit, and tells where it came from.
    longer, data_dir = tmp_path / "longer", f"data.dir={data}"
    assert train(longer, data, *words[:-1], "training.steps=9") == 0
    assert cli.main(["train", str(run_dir), data_dir, "training.steps=9"]) == 0
    one, two = state_of(longer, 9), state_of(run_dir, 9)
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    assert cli.main(["train", str(run_dir), data_dir, "training.steps=null", "training.epochs=9"])
    assert "training.epochs: counts passes over one corpus" in refused(capsys)
    llmnorm("export", run_dir, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    from_there = f"Branched from {parent}/checkpoints/step_00000004 at step 4, on rows of its own."
    assert from_there in card
    capsys.readouterr()
    llmnorm("runs", tmp_path)
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert "branch of" in header and "stable step 4" in line


ROPES = {
    "the same": "{}",
    "theta": "{rope_theta: 40000}",
    "linear": "{rope_type: linear, factor: 2}",
    "dynamic": "{rope_type: dynamic, factor: 2}",
    "yarn": "{rope_type: yarn, factor: 2, original_max_position_embeddings: 64}",
    "llama3": "{rope_type: llama3, factor: 2, original_max_position_embeddings: 64, "
    "low_freq_factor: 1, high_freq_factor: 4}",
    "longrope": "{rope_type: longrope, original_max_position_embeddings: 64, "
    f"short_factor: {[1.0] * 8}, long_factor: {[2.0] * 8}}}",
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_branch_may_read_a_longer_context_with_other_rotary_positions(
    tmp_path: Path, smoke_data: Path, parent: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same weights in a model made with these settings, on rows of twice the length."""
    words = [point(parent), "data.context_length=128", f"model.rope_parameters={ROPES[kind]}"]
    words += ["training.steps=8", "training.global_batch=4"]
    with prepared(tmp_path / "longer", smoke_data, *words) as run:
        assert (run.progress.step, run.progress.row, run.course.rows) == (4, 0, 16)
        _same_state(run, parent)
        (batch,) = next(run.batches())
        assert batch.inputs["input_ids"].shape == (4, 128)
        with torch.no_grad():
            loss = float(run.model(**batch.inputs).loss)
            given = run.model.config.rope_parameters
    said = capsys.readouterr().err
    assert "of data.context_length 128 (before: 64) from 0; epochs that were read" in said
    twin, _ = load_model(parent, checkpoint="4")
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.modeling import LlmNormForCausalLM

    tree = {**twin.config.to_dict(), "rope_parameters": given}
    model = LlmNormForCausalLM(LlmNormConfig(**tree))
    model.load_state_dict(twin.state_dict())
    with torch.no_grad():
        expected = float(model.eval()(**batch.inputs).loss)
    assert math.isclose(loss, expected, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.norm=layer"], "has model.norm.name rms, and this run layer; .* model.norm.name="),
        (["model.num_attention_heads=8"], "has model.num_attention_heads 4, and this run 8"),
        (["model.mixer=linear"], "has model.mixer softmax, and this run linear"),
        (["optimizer=conda"], "by optimizer 'adamw', whose state is none of 'conda'; .* with thes"),
        (["training.ema=0.9"], "step_00000004.*ema"),
        (["data.stages=[{weights: {nots: 1}}]"], "called 'nots'; did you mean 'notes'"),
    ],
)
def test_what_a_branch_may_not_change_is_refused_by_name(
    tmp_path: Path, smoke_data: Path, parent: Path, words: list[str], message: str
) -> None:
    """Oracle: the message, one line; nothing was written."""
    with (
        pytest.raises(InputError, match=message) as error,
        prepared(tmp_path / "branch", smoke_data, "training.steps=8", point(parent), *words),
    ):
        pass
    assert "\n" not in str(error.value) and not (tmp_path / "branch").exists()


def test_a_branch_with_another_tokenizer_is_refused(
    tmp_path: Path, parent: Path, other: list[str]
) -> None:
    """Oracle: the messages; what would train a tokenizer is refused before it prepares anything,
    and one that was prepared with another is told by its tokens."""
    sources, data = other[0], Path(other[-1].removeprefix("data.dir="))
    prepared_before = sorted((data / "packed").iterdir())
    with (
        pytest.raises(InputError, match=f"keep its parent's: tokenizer.path={parent}/tokenizer"),
        prepared(tmp_path / "branch", data, sources, point(parent), "training.steps=8"),
    ):
        pass
    assert sorted((data / "packed").iterdir()) == prepared_before
    tokenizer = json.loads((parent / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (parent / "tokenizer").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        pytest.raises(InputError, match=r"another than that of .* \(it cuts a text otherwise"),
        prepared(
            tmp_path / "branch",
            data,
            *(sources, f"tokenizer.path={changed}", other[2], point(parent), "training.steps=8"),
        ),
    ):
        pass
