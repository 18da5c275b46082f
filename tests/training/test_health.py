"""The mixers' health in a run: which lines hold it, and that nothing else is changed by it."""

from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.parallel.processes import Parallel
from llmnorm.runs.trackers import values
from llmnorm.training.health import health
from tests.running import SMOKE, llmnorm, metrics_of, state_of

HYBRID = ["model.mixer=[nala,softmax]", "model.dropout=0.1", "model.norm=power"]
FIGURES = {
    "0": {"min_denominator", "entropy", "row_sum", "saturation"},
    "1": {"entropy", "max_logit"},
}


def test_lines_at_the_interval_hold_it_and_the_run_is_the_same(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the run without; dropout and a norm with running statistics would tell."""
    words = [f"data.dir={smoke_data}", *HYBRID, "training.steps=5", "training.micro_batch=8"]
    llmnorm("train", SMOKE, f"run_dir={tmp_path}/off", *words)
    words += ["logging.every=3", "logging.health_every=2"]
    for name, switch in (("on", "false"), ("recomputed", "true")):
        more = f"parallel.activation_checkpointing={switch}"
        llmnorm("train", SMOKE, f"run_dir={tmp_path}/{name}", *words, more)
    off, on = state_of(tmp_path / "off", 5), state_of(tmp_path / "on", 5)
    assert all(tensor.equal(off[name]) for name, tensor in on.items())
    lines = [line for line in metrics_of(tmp_path / "on") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    assert [line["step"] for line in lines if "health" in line] == [2, 4]
    for line in lines:
        found = line.get("health", FIGURES)
        assert {layer: set(figures) for layer, figures in found.items()} == FIGURES
    assert metrics_of(tmp_path / "recomputed") == metrics_of(tmp_path / "on")
    shown = values(lines[0])
    assert shown["health/0/entropy"] == lines[0]["health"]["0"]["entropy"]
    assert "train/loss" in shown and not any(key.startswith("train/health") for key in shown)


def test_compiled_blocks_are_looked_at_uncompiled() -> None:
    """Oracle: the same model uncompiled; dynamo's own count of what it has traced."""
    config: Any = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "mixer": "linear"}
    torch.manual_seed(0)
    model = LlmNormForCausalLM(LlmNormConfig(**config)).train()
    ids = torch.randint(40, (2, 12))
    inputs = {"input_ids": ids, "position_ids": torch.arange(12).repeat(2, 1) % 7}
    inputs["shift_labels"] = ids
    alone = Parallel(ParallelSettings(), TrainingSettings(steps=1, device="cpu"))
    model.model.fixed_shapes = True
    expected = health(model, inputs, alone)
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    loss = model(**inputs).loss
    traced = counters["frames"]["total"]
    assert traced
    assert health(model, inputs, alone) == expected
    assert model.training and counters["frames"]["total"] == traced
    assert model(**inputs).loss == loss and counters["frames"]["total"] == traced
