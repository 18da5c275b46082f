"""`llmnorm plan`: what it prints and writes, and the refusal of what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.analysis.plan.cache import cache_bytes
from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.memory import GAPS, memory
from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.report import what_helps_most
from llmnorm.config.file import load
from llmnorm.generation.engine import Engine
from llmnorm.models.building import empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.decoding import Decoder
from tests.running import SMOKE

LARGE = ["model.hidden_size=4096", "model.intermediate_size=11008", "model.num_hidden_layers=32"]
LARGE += ["model.num_attention_heads=32", "model.num_key_value_heads=8", "model.vocab_size=32000"]
LARGE += ["model.tie_word_embeddings=false", "training.precision=bf16"]
NUMBERS = 2 * 32000 * 4096 + 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 11008)


def test_a_large_model_is_planned_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the sizes of a Llama of 6 billion parameters, by hand; the files hold what is said.

    All of its weights have rows that 8 processes share evenly.
    """
    words = ["plan", str(SMOKE), "--gpus", "8", "--gpu", "h100", "--sharding", "fsdp2", *LARGE]
    assert cli.main([*words, "--out", str(tmp_path / "plan")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    norms = 65 * 4096  # too small to be counted by hand in NUMBERS
    assert f"{(NUMBERS + norms) / 1e6:,.1f}M parameters on 8 GPUs (h100, 79.6 GiB each)" in out
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    needed = found["memory"]
    weights = 4 * (NUMBERS + norms) // 8
    assert needed["trained"] == needed["gradients"] == weights
    assert needed["state"] == pytest.approx(2 * weights, rel=1e-4)  # and a counter a tensor
    (line,) = (line for line in out.splitlines() if line.startswith("weights, trained"))
    assert line.split()[2:] == [f"{weights / 2**30:.3f}", "GiB", f"{weights:,}"]
    assert needed["peak"] == sum(needed["at_peak"].values()) > 4 * weights
    assert needed["needed"] == pytest.approx(needed["peak"] * (1 + GAPS) + 1.8 * 2**30, abs=2)
    assert needed["fits"] and "fits" in out
    assert (tmp_path / "plan" / "memory.png").stat().st_size > 10_000


def test_what_does_not_fit_is_refused_with_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the change that the message names is accepted."""
    words = ["plan", str(SMOKE), "--gpus", "8", "--gpu", "h100", *LARGE]
    assert cli.main([*words, "--sharding", "ddp"]) == 2
    out, err = capsys.readouterr()
    assert "does not fit" in out
    assert err.startswith("llmnorm: error: plan: does not fit: ")
    assert "--sharding fsdp2 would fit" in err
    assert cli.main([*words, "--sharding", "fsdp2"]) == 0


def test_more_gpus_need_less_of_each() -> None:
    """Oracle: FSDP2's parts are halved when processes are doubled; activations are not."""
    config = load(SMOKE, LARGE).config
    recording = record(config, 2, "cuda")
    found = [
        memory(
            layout_of(config, gpu_named("h100"), world, sharding="fsdp2", micro_batch=2), recording
        )
        for world in (2, 4, 8)
    ]
    for few, many in zip(found, found[1:], strict=False):
        assert many.trained * 2 == few.trained
        assert many.activations == few.activations
        assert many.peak < few.peak


def test_the_best_change_is_the_one_that_needs_least() -> None:
    """Oracle: recomputation and half the micro-batch, each planned by itself."""
    config = load(SMOKE, []).config
    layout = layout_of(config, gpu_named("h100"), 1)
    recording = record(config, layout.micro_batch, layout.device)
    needed = memory(layout, recording)
    best = what_helps_most(layout, needed, recording)
    others: list[dict[str, Any]] = [{"micro_batch": 8}, {"recompute": True}]
    least = min(memory(layout_of(config, gpu_named("h100"), 1, **o)).needed for o in others)
    assert best is not None and best.needed.needed == least < needed.needed


@pytest.mark.parametrize("mixer", ["softmax", "nala", "ssd"])
def test_a_servers_cache_is_the_one_that_an_engine_makes(mixer: str) -> None:
    """Oracle: the bytes of an engine's own cache."""
    words = [f"model.mixer={mixer}", "generation.slots=3", "generation.context=100"]
    config = load(SMOKE, [*words, "model.vocab_size=64"]).config
    model = empty_model(LlmNormConfig.from_settings(config.model, vocab_size=64), device="cpu")
    engine = Engine(Decoder(model.eval(), captured=False), None, config.generation)
    assert cache_bytes(config) == engine.bytes > 0
