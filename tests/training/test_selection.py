"""Runs that choose the rows of a step: the same numbers after a kill, what is counted, refusals."""

import itertools
import json
import math
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmnorm.config.file import load
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.packed_text import PackedText
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.training.prepare import Prepared, prepare
from llmnorm.training.selecting import Selecting, _check_pool
from llmnorm.training.signals import StopRequest
from llmnorm.training.step import step
from tests.objectives.examples import on_disk
from tests.running import SMOKE, Child, assert_same_run, llmnorm, metrics_of, state_of

SIZES = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=2"]
SHORT = ["training.steps=4", "training.global_batch=4", "checkpoint.every=2"]
SHORT += ["evaluation.every=null", "evaluation.samples=0", "evaluation.micro_batch=64"]
COLM = ["selection=colm", "selection.pool=12"]
SELECTIONS = {
    "random": ["selection=random", "selection.pool=12"],
    "stratified": ["selection=stratified", "selection.pool=12"],
    "loss": ["selection=loss", "selection.pool=12"],
    "colm": COLM,
    "probes": [*COLM, "selection.probes=3", "selection.metric=cosine", "selection.keep=none"],
    "gradient": [*COLM, "selection.feature=gradient", "selection.sketch=8"],
    "hidden": [*COLM, "selection.feature=hidden", "selection.keep=[prose]"],
}


def words_of(run: Path, data: Path, *words: str) -> list[str]:
    return [str(SMOKE), *SIZES, *SHORT, f"run_dir={run}", f"data.dir={data}", *words]


@contextmanager
def prepared(run: Path, data: Path, *words: str) -> Iterator[Prepared]:
    """A run before its first step."""
    path, *settings = words_of(run, data, *words)
    config = load(Path(path), settings).config
    directory = run_directory.agree(config, going_on=False)
    with ExitStack() as stack:
        yield prepare(config, directory, stack, data_command="", dry_run=True)


def die_in_step(step: int) -> None:
    """Have this process killed by -9 when it has chosen the rows of a step, before it trains."""
    choose, steps = Selecting.choose, itertools.count(1)

    def dying(self: Selecting, first_row: int) -> list[MicroBatch]:
        micro_batches = choose(self, first_row)
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return micro_batches

    Selecting.choose = dying  # type: ignore[method-assign]


def kill_in_step(step: int, run: Path, *words: str) -> None:
    """`llmnorm train` in a process that is killed; the steps before it were recorded.

    Args:
        step: in which it is killed, at least 3.
        run: the run directory.
        words: the command's, which save every second step.
    """
    child = Child(["train", *words], run.with_suffix(".log"), before=partial(die_in_step, step))
    assert child.finish() == -signal.SIGKILL, child.log.read_text()
    steps = [line["step"] for line in metrics_of(run) if "loss" in line]
    assert steps == [*range(1, step)]
    newest = max(path.name for path in (run / "checkpoints").glob("step_*"))
    assert newest == f"step_{2 * ((step - 1) // 2):08d}"


@pytest.mark.parametrize("words", SELECTIONS.values(), ids=SELECTIONS)
def test_a_killed_run_goes_on_with_the_same_picks(
    tmp_path: Path, smoke_data: Path, words: list[str]
) -> None:
    """Oracle: the run that was not killed, to the bit, its picks and their figures too; a step
    reads 12 rows, of which a third is kept, and trains on 6 of them."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*words, "training.global_batch=6", "training.micro_batch=2"]
    llmnorm("train", *words_of(whole, smoke_data, *words))
    kill_in_step(4, killed, *words_of(killed, smoke_data, *words))
    llmnorm("train", killed)
    assert_same_run(killed, whole, 4)
    lines = [line for line in metrics_of(whole) if "selection" in line]
    assert [line["selection"]["read"] for line in lines] == [12, 24, 36, 48]
    picks = [line["selection"]["picks"] for line in lines]
    assert all(sum(found.values()) == 6 and found["prose"] for found in picks)
    manifest = json.loads((whole / "checkpoints/step_00000004/MANIFEST.json").read_text())
    assert manifest["meta"]["row"] == 48


def test_the_history_of_one_projection_is_in_the_checkpoint(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: three tensors, moved by as many steps as had picks of a large source."""
    run = tmp_path / "run"
    llmnorm("train", *words_of(run, smoke_data, *COLM, "selection.keep=none"))
    state = {n: t for n, t in state_of(run, 4).items() if n.startswith("selection.")}
    assert sorted(state) == ["selection.first", "selection.second", "selection.updates"]
    assert state["selection.updates"] == 4 and state["selection.second"] > 0
    branch = tmp_path / "branch"
    plain = words_of(branch, smoke_data, f"training.branch_from={run}/checkpoints/step_00000002")
    llmnorm("train", *plain)  # without a selection
    there = branch / "checkpoints/step_00000004"
    back = words_of(tmp_path / "back", smoke_data, *COLM, "training.steps=6")
    llmnorm("train", *back, f"training.branch_from={there}")
    assert state_of(tmp_path / "back", 6)["selection.updates"] <= 2


def test_the_picks_are_trained_on_and_nothing_else(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the rows with the largest losses of the pool, by the model itself, row by row; the
    step's loss is theirs."""
    words = [*SELECTIONS["loss"], "training.micro_batch=2"]
    with prepared(tmp_path / "run", smoke_data, *words) as run:
        model, losses = run.model.eval(), []
        read = {"rank": 0, "world": 1, "micro_batch": 1}
        pool = run.objective.read(np.arange(12), **read)
        with torch.no_grad():
            losses = [float(model(**batch.inputs).loss) for batch in pool]
        model.train()
        micro_batches = next(run.batches())
        expected = sorted(sorted(range(12), key=lambda row: -losses[row])[:4])
        assert torch.cat([batch.rows for batch in micro_batches]).tolist() == expected
        outcome = step(run, micro_batches, StopRequest())
        weights = [pool[row].labels for row in expected]
        mean = np.average([losses[row] for row in expected], weights=weights)
        assert outcome.loss == pytest.approx(mean, rel=1e-5)
        assert run.selecting is not None
        figures = run.selecting.line()["selection"]
        assert figures["pool_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert figures["picked_loss"] == pytest.approx(
            np.mean([losses[row] for row in expected]), rel=1e-5
        )
        assert run.progress.row == 12


class Saved:
    """Bytes that autograd keeps beside parameters, counted once for each memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def saved_bytes(run: Path, data: Path, *words: str) -> tuple[int, int]:
    """Of choosing the rows of the first step, and of the step itself."""
    with prepared(run, data, *words) as begun:
        found = []
        saved = Saved(begun.model)
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            micro_batches = next(begun.batches())
            found.append(saved.bytes)
            step(begun, micro_batches, StopRequest())
        return found[0], saved.bytes - found[0]


def test_activations_are_those_of_the_rows_trained_on(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: plain training on as many rows, and on as many as are read; nothing is kept of
    measuring."""
    half = saved_bytes(tmp_path / "a", smoke_data, "training.global_batch=8")
    whole = saved_bytes(tmp_path / "b", smoke_data, "training.global_batch=16")
    colm = saved_bytes(
        tmp_path / "c", smoke_data, "training.global_batch=8", "selection=colm", "selection.pool=16"
    )
    assert half[0] == whole[0] == colm[0] == 0
    assert colm[1] <= 1.05 * half[1] and colm[1] <= 0.55 * whole[1]


def test_epochs_count_the_rows_that_are_read(smoke_data: Path) -> None:
    """Oracle: rows over the pool, rounded up."""
    words = ["training.steps=null", "training.epochs=4", "training.global_batch=4"]
    plain = load(SMOKE, [*words, f"data.dir={smoke_data}"]).config
    chosen = load(SMOKE, [*words, *COLM, f"data.dir={smoke_data}"]).config
    assert (plain.total_steps(1125), chosen.total_steps(1125)) == (1125, 375)


WORDS = ["river", "stone", "light", "green", "window", "paper", "morning", "seven", "water"]


def small_corpus(place: Path) -> list[dict[str, str]]:
    """Two sources, of which the second is small."""
    sources = []
    for name, documents in (("prose", 24), ("notes", 9)):
        for held, count in (("", documents), ("-held", 2)):
            rng = random.Random(f"{name}{held}")
            texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(count)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (place / f"{name}{held}.jsonl").write_text(lines)
        path, held_out = place / f"{name}.jsonl", place / f"{name}-held.jsonl"
        sources.append({"name": name, "path": str(path), "validation": str(held_out)})
    return sources


def test_four_epochs_read_every_row_four_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Oracle: the rows as the run reads them, counted; the run that was not killed, of one that was
    killed in the step whose pool holds the end of an epoch and the beginning of the next."""
    read: list[tuple[int, int]] = []
    real = PackedText.read

    def counting(self: PackedText, numbers: Any, **given: Any) -> list[MicroBatch]:
        if len(numbers) == 8:  # the pool; its 4 picks are then read again
            read.extend(zip(*(x.tolist() for x in self._rows.order.find(numbers)), strict=True))
        return real(self, numbers, **given)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [f"data.sources={json.dumps(small_corpus(tmp_path))}", "data.context_length=32"]
    words += ["training.steps=null", "training.epochs=4"]
    words += ["selection=colm", "selection.pool=8"]
    with monkeypatch.context() as patch:
        patch.setattr(PackedText, "read", counting)
        llmnorm("train", *words_of(whole, tmp_path / "data", *words))
    rows = len(set(read))
    steps = math.ceil(4 * rows / 8)
    assert rows % 8 and rows > 24  # the end of an epoch lies inside a pool
    assert len(read) == 8 * steps and {*Counter(read[: 4 * rows]).values()} == {4}
    assert (whole / "DONE").read_text() == f"{steps}\n"
    lines = [line for line in metrics_of(whole) if "loss" in line]
    assert [line["selection"]["read"] for line in lines] == [8 * (n + 1) for n in range(steps)]
    manifest = whole / "checkpoints" / f"step_{steps:08d}" / "MANIFEST.json"
    assert json.loads(manifest.read_text())["meta"]["row"] == 8 * steps
    table = capfd.readouterr().err.partition("held out kB\n")[2].splitlines()
    assert [line.split()[7] for line in table[:2]] == ["4.00", "4.00"]  # epochs of each source

    across = rows // 8 + 1
    kill_in_step(across, killed, *words_of(killed, tmp_path / "data", *words))
    llmnorm("train", killed)
    assert_same_run(killed, whole, steps)


def test_a_row_that_is_not_finite_is_named(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the number of the row that holds a token whose embedding is not finite."""
    untied = "model.tie_word_embeddings=false"
    with prepared(tmp_path / "run", smoke_data, *COLM, untied) as run:
        read = {"rank": 0, "world": 1, "micro_batch": 12}
        ids = run.objective.read(np.arange(12), **read)[0].inputs["input_ids"]
        assert isinstance(ids, Tensor)
        others = set(torch.cat([ids[:7], ids[8:]]).flatten().tolist())
        token = next(t for t in ids[7].tolist() if t not in others)
        run.model.get_input_embeddings().weight.data[token] = torch.inf
        with pytest.raises(InputError, match="measured of row 7 is not finite"):
            next(run.batches())


def test_kept_rows_that_fill_the_batch_are_counted_and_said_once(
    tmp_path: Path, smoke_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a third of the rows is kept, so that a batch of 2 of 12 has no room for others."""
    words = ["training.global_batch=2", "training.steps=12", "selection=stratified"]
    llmnorm("train", *words_of(tmp_path / "run", smoke_data, *words, "selection.pool=12"))
    lines = [line["selection"] for line in metrics_of(tmp_path / "run") if "selection" in line]
    assert all(line["kept_rows_fill_the_batch"] == 1 for line in lines)
    assert all(line["picks"] == {"prose": 0, "notes": 2} for line in lines)
    said = capfd.readouterr().err
    assert said.count("the rows of the kept sources alone filled the batch") == 1
    assert "data.weights={prose: 1, notes: 1000}" in said


OWN = """
from typing import Literal
from llmnorm.selection.contract import Selector
from llmnorm.selection.settings import SelectionSettings

class SmallestLoss(Selector):
    def select(self, features, losses, sources, budget, numbers):
        assert features.shape == (len(numbers), 0)
        return losses.argsort(stable=True)[:budget].sort().values

class Smallest(SelectionSettings):
    name: Literal["smallest"] = "smallest"
    reads = "losses"

    def build(self, names, sizes, seed):
        return SmallestLoss()

class Wrong(Smallest):
    def build(self, names, sizes, seed):
        selector = SmallestLoss()
        selector.select = lambda features, losses, sources, budget, numbers: numbers[:1]
        return selector
"""


def test_a_selector_of_ones_own(
    tmp_path: Path, smoke_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the mean loss of its picks, which is below the pool's; what are no picks is
    refused."""
    (tmp_path / "own_selector.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_selector", raising=False)
    words = ["selection=own_selector:Smallest", "selection.pool=12"]
    llmnorm("train", *words_of(tmp_path / "run", smoke_data, *words))
    lines = [line["selection"] for line in metrics_of(tmp_path / "run") if "selection" in line]
    assert all(line["picked_loss"] < line["pool_loss"] for line in lines)
    words[0] = "selection=own_selector:Wrong"
    with (
        prepared(tmp_path / "wrong", smoke_data, *words) as run,
        pytest.raises(InputError, match="has chosen 1 places; it must give 4 different ones"),
    ):
        next(run.batches())


GRADIENT = [*COLM, "selection.feature=gradient"]
MISTAKES: list[tuple[list[str], str]] = [
    (["selection=colm"], "selection.pool: .*required|selection.pool: is missing|selection.pool"),
    (["selection=colm", "selection.pool=2"], "pool 2 is less than the training.global_batch 4"),
    ([*COLM, "selection.metric=cosine"], "'cosine' compares angles"),
    ([*GRADIENT, "selection.sketch=1", "selection.metric=cosine"], "give more selection.sketch"),
    ([*GRADIENT, "parallel.sharding=zero3"], "'gradient' needs a backward pass inside"),
    ([*GRADIENT, "selection.probes=4"], "selection.probes belongs to selection.feature 'zeroth_o"),
    ([*COLM, "selection.sketch=4"], "selection.sketch belongs to selection.feature 'gradient'"),
    (
        [*COLM, "objective=masked_lm", "model.mixer.bidirectional=true", "tokenizer.mask=true"],
        "rows of objective 'masked_lm' cannot be selected",
    ),
    (["selection=colmm", "selection.pool=12"], "did you mean 'colm'"),
    (["selection.pool=12"], "selection.pool: unknown key; .*'none' has no settings"),
    (["selection=random", "selection.pool=12", "selection.keep=none"], "selection.keep"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    """Oracle: the message, one line."""
    with pytest.raises(InputError, match=message) as error:
        load(SMOKE, ["training.global_batch=4", *words])
    assert "\n" not in str(error.value)


LATE: list[tuple[list[str], str]] = [
    (["selection.keep=[pros]"], "no source is called 'pros'; did you mean 'prose'"),
    (["selection.keep=[prose, notes]"], "selection.keep: names all sources"),
    (
        ['data.sources=[{"name": "notes", "path": "llmnorm:text/notes.txt"}]'],
        "'auto' keeps the small ones of several sources, and 'notes' is the only one",
    ),
]


@pytest.mark.parametrize(("words", "message"), LATE)
def test_what_does_not_fit_the_sources_is_refused(
    tmp_path: Path, smoke_data: Path, words: list[str], message: str
) -> None:
    """Oracle: the message, before anything is trained."""
    with (
        pytest.raises(InputError, match=message),
        prepared(tmp_path / "run", smoke_data, *COLM, *words),
    ):
        pass


@pytest.mark.parametrize(
    ("pool", "world", "even", "message"),
    [
        (13, 2, True, "pool: 13 rows do not divide over 2 processes; the nearest that does is 12"),
        (2, 1, True, "pool 2 is less than the training.global_batch 4"),
        (13, 2, False, ""),  # examples are laid into rows, and these dealt out
    ],
)
def test_a_pool_is_shared_out(pool: int, world: int, even: bool, message: str) -> None:
    """Oracle: the message."""
    if not message:
        return _check_pool(pool, 4, world, even)
    with pytest.raises(InputError, match=message):
        _check_pool(pool, 4, world, even)


def test_a_run_cannot_change_its_selection(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the message, which names the key; of another selector its name alone."""
    run = tmp_path / "run"
    llmnorm("train", *words_of(run, smoke_data, *COLM, "training.steps=1"))
    config = load(run, ["selection.pool=16"]).config
    with pytest.raises(InputError, match=r"selection.pool \(12 there, 16 here\)"):
        run_directory.agree(config, going_on=True)
    config = load(run, ["selection=loss", "selection.pool=16"]).config
    message = r"run: selection.name \(colm there, loss here\), selection.pool \(12 .*16 here\): an"
    with pytest.raises(InputError, match=message):
        run_directory.agree(config, going_on=True)


# Fine-tuning: a row is an example.


@pytest.mark.parametrize("feature", ["zeroth_order", "gradient"])
def test_examples_of_a_fine_tuned_adapter_are_chosen(
    tmp_path: Path, run: Path, feature: str
) -> None:
    """Oracle: the run that was not killed; an adapter without the last values' projection is
    refused with what would do."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    config = on_disk(tmp_path, run)
    words = ["adapter=lora", "adapter.rank=4", "selection=colm", "selection.pool=14"]
    words += [f"selection.feature={feature}", "training.steps=4", "checkpoint.every=2"]
    words += ["evaluation.every=null", "evaluation.answers=0", "evaluation.samples=0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    llmnorm("train", config, *words, f"run_dir={whole}")
    kill_in_step(4, killed, str(config), *words, f"run_dir={killed}")
    llmnorm("train", killed)
    assert_same_run(killed, whole, 4)
    picks = [line["selection"]["picks"] for line in metrics_of(whole) if "selection" in line]
    assert all(sum(found.values()) == 7 for found in picks)
    settings: Any = load(config, [*words, "adapter.targets=[q_proj]", f"run_dir={tmp_path}/x"])
    with ExitStack() as stack, pytest.raises(InputError, match="add v_proj to adapter.targets"):
        directory = run_directory.agree(settings.config, going_on=False)
        prepare(settings.config, directory, stack, data_command="", dry_run=True)
