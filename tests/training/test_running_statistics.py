"""Norms with running statistics in whole runs: counted by steps, saved, resumed."""

from pathlib import Path

import pytest
import torch

from tests.running import SMOKE, assert_same_run, llmnorm, metrics_of, state_of

NORMS = {
    "power": "model.norm=power",
    "unified": "model.norm={name: unified, allow_leak: true, warmup: 3, window: 2}",
}


def train(run: Path, smoke_data: Path, *words: str) -> Path:
    keys = ["schedule=constant", "training.global_batch=8", "training.steps=6"]
    keys += ["checkpoint.every=3", "evaluation.samples=0", "evaluation.every=6"]
    keys += ["model.num_hidden_layers=1"]
    places = [f"run_dir={run}", f"data.dir={smoke_data}"]
    llmnorm("train", SMOKE, *keys, *places, *words)
    return run


@pytest.mark.parametrize("name", NORMS)
def test_recomputation_and_a_stop_change_nothing(
    name: str, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: a run without them, weights, statistics and losses to the bit; six steps are counted
    for twelve micro-batches."""
    words = [NORMS[name], "training.micro_batch=4"]
    whole = train(tmp_path / "whole", smoke_data, *words)
    again = train(tmp_path / "again", smoke_data, *words, "parallel.activation_checkpointing=true")
    assert_same_run(whole, again, 6)
    stopped = train(tmp_path / "stopped", smoke_data, *words, "training.steps=3")
    llmnorm("train", stopped, "training.steps=6")
    state = state_of(stopped, 6)
    for key, tensor in state_of(whole, 6).items():
        assert tensor.equal(state[key]), key
    steps = [value for key, value in state.items() if key.endswith("layernorm.steps")]
    assert len(steps) == 2 and all(value == 6 for value in steps)
    assert state["model.model.norm.running_square"].dtype == torch.float32
    assert state["model.model.norm.running_square"].std() > 0


def test_micro_batches_of_a_step_share_its_statistics(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the same run with whole batches; by the paper's backward pass nothing depends on how
    a batch is cut, beyond rounding."""
    norm = "model.norm={name: power, backward: paper}"
    runs = [train(tmp_path / str(m), smoke_data, norm, f"training.micro_batch={m}") for m in (8, 2)]
    for one, other in zip(*map(metrics_of, runs), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    first, second = (state_of(run, 6) for run in runs)
    for key, tensor in first.items():
        if "running" in key:
            torch.testing.assert_close(tensor, second[key], rtol=1e-3, atol=1e-5)
