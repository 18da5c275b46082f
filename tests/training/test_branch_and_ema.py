"""A run that branches from another's checkpoint, and the moving average of the weights."""

import json
from pathlib import Path

import pytest
import torch

from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.data.loader import Loader
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.training.loop import train
from tests.running import SMOKE, metrics_of, state_of

SHORT = ("training.steps=12", "schedule=wsd", "checkpoint.every=4", "checkpoint.keep=3")


def run_here(run: Path, data: Path, *overrides: str, going_on: bool = False) -> None:
    path = run if going_on else SMOKE
    config = load(path, [f"run_dir={run}", f"data.dir={data}", *overrides]).config
    train(config, run_directory.agree(config, going_on=going_on), data_command="llmnorm data")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    run = tmp_path_factory.mktemp("parent") / "run"
    run_here(run, smoke_data, *SHORT, "training.ema=0.9")
    return run


def test_a_branch_with_the_same_settings_is_the_uninterrupted_run(
    tmp_path, smoke_data, parent
) -> None:
    point = parent / "checkpoints" / "step_00000004"
    run = tmp_path / "branch"
    run_here(run, smoke_data, *SHORT, "training.ema=0.9", f"training.branch_from={point}")
    first, second = state_of(run, 12), state_of(parent, 12)
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    after = [line for line in metrics_of(parent) if line["step"] > 4]
    assert metrics_of(run) == after and len(after) >= 8


def test_a_branch_with_another_batch_goes_on_at_the_parents_row(
    tmp_path, smoke_data, parent
) -> None:
    # Oracle: the loss of the rows that follow, under the checkpoint's weights.
    from llmnorm.exchange.loading import load_model

    run, point = tmp_path / "branch", parent / "checkpoints" / "step_00000008"
    words = ["training.ema=0.9", f"training.branch_from={point}", "training.global_batch=6"]
    run_here(run, smoke_data, *SHORT, *words, "training.steps=9")
    config = load(run, [f"data.dir={smoke_data}"]).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    batch = next(Loader(packed, seed=0, global_batch=6).batches(8 * 16))[0]
    model, _ = load_model(parent, checkpoint="8")
    with torch.no_grad():
        keys = ("input_ids", "position_ids", "shift_labels")
        loss = model(**{key: batch[key] for key in keys}).loss
    assert metrics_of(run)[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("", "is no checkpoint; .*step_00000008"),
        ("checkpoints/step_00000005", "no checkpoint of step 5; nearest: 4, 8"),
    ],
)
def test_a_branch_point_that_is_not_there_is_refused(
    tmp_path, smoke_data, parent, point, words
) -> None:
    with pytest.raises(InputError, match=f"training.branch_from: .*{words}"):
        run_here(tmp_path / "b", smoke_data, *SHORT, f"training.branch_from={parent / point}")


def test_a_branch_of_another_model_is_refused_by_name(tmp_path, smoke_data, parent) -> None:
    point = parent / "checkpoints" / "step_00000004"
    words = [f"training.branch_from={point}", "model.intermediate_size=64"]
    there = "step_00000004 has model.intermediate_size 172, and this run 64; .* give model.inter"
    with pytest.raises(InputError, match=there):
        run_here(tmp_path / "b", smoke_data, *SHORT, "training.ema=0.9", *words)


def test_the_average_is_that_of_the_weights_after_every_step(tmp_path, smoke_data) -> None:
    # Oracle: the recursion in float64 over a checkpoint of every step.
    run = tmp_path / "run"
    every = ["training.steps=6", "schedule.warmup=0", "checkpoint.every=1", "checkpoint.keep=6"]
    run_here(run, smoke_data, *every, "training.ema=0.3")
    states = [state_of(run, step) for step in range(1, 7)]
    names = [name for name in states[0] if name.startswith("model.")]
    for name in names:
        shadow = f"ema.{name.removeprefix('model.')}"
        average = states[0][shadow].double()
        for step, state in enumerate(states[1:], start=1):
            decay = min(0.3, (1 + step) / (10 + step))
            average += (1 - decay) * (state[name].double() - average)
            assert torch.allclose(state[shadow].double(), average, rtol=1e-6, atol=1e-7)
        assert not states[-1][shadow].equal(states[-1][name])


def test_a_resumed_run_averages_on_and_evaluates_both(tmp_path, smoke_data) -> None:
    words = ["schedule=constant", "training.ema=0.9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here(whole, smoke_data, *words, "training.steps=6")
    run_here(cut, smoke_data, *words, "training.steps=4")
    run_here(cut, smoke_data, "training.steps=6", going_on=True)
    first, second = state_of(whole, 6), state_of(cut, 6)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    figures = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    assert figures["ema"].keys() == figures.keys() - {"ema"}
    assert figures["ema"]["loss"] != figures["loss"]
