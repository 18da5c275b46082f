"""How long a planned step takes: hand counts, a step that was measured, mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.analysis.plan import time as plan_time
from llmnorm.analysis.plan.gpus import Gpu, gpu_named
from llmnorm.analysis.plan.layout import Layout, layout_of
from llmnorm.analysis.plan.optimizer import owned
from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.time import StepTime, run_time, step_time, step_work
from llmnorm.analysis.plan.traffic import Group, Transfer, transfers
from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError
from tests.running import ROOT, SMOKE

H100 = gpu_named("h100")
# What a plan divides by, so that a time is a number of operations or bytes.
UNIT = Gpu("unit", 2**60, 1.0, 1.0, 1e30, 1e30, 1e30)


def laid_out(*words: str, gpus: int = 1, gpu: Gpu = H100, **more: Any) -> Layout:
    return layout_of(load(SMOKE, ["training.global_batch=32", *words]).config, gpu, gpus, **more)


def time_of(layout: Layout, efficiency: float = 1.0) -> StepTime:
    recording = record(layout.config, layout.micro_batch, layout.device)
    return step_time(step_work(layout, recording), efficiency)


def sent(layout: Layout) -> dict[str, float]:
    recording = record(layout.config, layout.micro_batch, layout.device)
    found = transfers(layout, recording, owned(layout, recording))
    return {transfer.what: transfer.sent for transfer in found}


def sizes(config: RunConfig) -> tuple[int, int]:
    """Numbers in all weights, and in hidden matrices, of the smoke model."""
    h, inner, layers, rows = 64, 172, 2, 512
    matrices = layers * (2 * h * h + 2 * h * (h // 2) + 3 * h * inner)
    assert config.model.tie_word_embeddings
    return matrices + rows * h + (2 * layers + 1) * h, matrices


def test_traffic_of_every_sharding() -> None:
    """Oracle: the table of traffic.py by hand; 4 processes, 2 micro-batches, rows that divide."""
    words = ["training.micro_batch=4", "optimizer=muon"]
    config = load(SMOKE, words).config
    numbers, matrices = sizes(config)
    rest, n, h = 3 / 4, 4 * numbers, 4 * matrices

    def of(sharding: str, **more: Any) -> dict[str, float]:
        return sent(laid_out(*words, gpus=4, sharding=sharding, **more))

    ddp = of("ddp")
    assert ddp["gradients"] == 2 * rest * n
    assert ddp["updates from owners"] >= rest * h  # parts are padded to the largest
    fsdp2 = of("fsdp2")
    assert fsdp2["weights"] == 2 * 2 * rest * n
    assert fsdp2["gradients"] == 2 * rest * n
    assert fsdp2["updates from owners"] == fsdp2["gradients to owners"] >= h * 3 / 16
    hsdp = of("hsdp", replicas=2)
    assert hsdp["weights"] == 2 * 2 * n / 2
    assert hsdp["gradients over replicas"] == 2 * (1 / 2) * n / 2
    assert of("zero1")["gradients"] == 2 * rest * n
    zero2 = of("zero2")
    assert zero2["gradients"] == 2 * 2 * rest * n
    assert zero2["updated weights"] == rest * n
    zero3 = of("zero3")
    assert zero3["weights"] == 2 * rest * n  # they stay gathered for the backward pass
    halved = sent(laid_out(*words, "parallel.exchange=bf16", gpus=4, sharding="fsdp2"))
    assert halved["updates from owners"] == fsdp2["updates from owners"] / 2
    assert "weights to owners" in sent(laid_out("optimizer=soap", gpus=4, sharding="fsdp2"))


def test_seconds_of_a_transfer() -> None:
    """Oracle: by hand; bytes over the link, and hops around 16 GPUs on two nodes."""
    inside = Transfer("weights", "all-gather", Group(8, 8), 10, 450e9)
    assert inside.seconds(H100) == pytest.approx(1 / 0.8 + 10 * (8.4e-6 + 7 * 3.4e-6))
    across = Transfer("weights", "all-gather", Group(16, 8), 10, 50e9)
    assert across.seconds(H100) == pytest.approx(1 / 0.8 + 10 * (8.4e-6 + 14 * 3.4e-6 + 9.6e-6))
    assert Transfer("weights", "all-gather", Group(1, 1), 10, 1e12).seconds(H100) == 0


def test_products_alone() -> None:
    """Oracle: operations of the MFU; a machine with nothing else to wait for spends 1 s on each.

    A fused kernel computes half of the scores, and five products in the backward pass, where the
    MFU credits 3 times 2 whole ones.
    """
    layout = laid_out(gpu=UNIT)
    found = time_of(layout)
    flops = found.flops.products + found.flops.attention * 0.5 * 7 / 6
    assert found.computing == pytest.approx(found.tokens * flops, rel=1e-6)
    recomputed = time_of(laid_out("parallel.activation_checkpointing=true", gpu=UNIT))
    assert found.computing < recomputed.computing < 4 / 3 * found.computing
    assert time_of(layout, 0.5).computing == pytest.approx(2 * found.computing)


def test_the_network_is_hidden_while_blocks_compute() -> None:
    """Oracle: a network without end takes no time, a slow one its own; a CPU hides nothing."""
    quick, slow = (
        time_of(laid_out(gpus=4, sharding="fsdp2", gpu=replace(H100, link=speed)))
        for speed in (1e30, 1.0)
    )
    assert slow.computing == quick.computing
    alone = sum(t.seconds(slow.layout.gpu) for t in slow.transfers)
    assert slow.waiting == pytest.approx(alone, rel=0.5)
    assert quick.waiting < 1e-2
    cpu = time_of(laid_out("training.device=cpu", gpus=4, sharding="fsdp2", gpu=gpu_named("cpu")))
    assert cpu.waiting == sum(t.seconds(cpu.layout.gpu) for t in cpu.transfers)
    assert cpu.starting == 0


def test_an_owner_takes_the_rule_s_time() -> None:
    """Oracle: Newton-Schulz on one process against four, whose busiest owner has its part."""
    words = ["optimizer=muon", "optimizer.precision=fp32"]
    alone, spread = (time_of(laid_out(*words, gpus=n, sharding="fsdp2", gpu=UNIT)) for n in (1, 4))
    assert 0.25 * alone.updating <= spread.updating * 1.001 < 0.6 * alone.updating
    adamw = time_of(laid_out(gpu=UNIT))
    assert adamw.updating < 1e-9 * alone.updating


def test_length_and_cost() -> None:
    """Oracle: by hand."""
    step = time_of(laid_out(gpus=4, sharding="ddp"))
    found = run_time(step, 1000, 2.5)
    assert found.tokens == 1000 * 32 * 64
    assert found.seconds == 1000 * step.seconds
    assert found.cost == pytest.approx(4 * 2.5 * found.seconds / 3600)
    assert run_time(step, 1000, None).cost is None


def test_a_step_of_1_1_billion_parameters_on_an_h200(tmp_path: Path) -> None:
    """Oracle: docs/results/gpu_step.json, a step that was measured there; 15 %."""
    measured = json.loads((ROOT / "docs" / "results" / "gpu_step.json").read_text())
    shape = measured["shape"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "data": {"sources": "default", "context_length": shape["max_position_embeddings"]},
                "model": shape,
                "training": {"steps": 10, "global_batch": measured["rows"], "precision": "bf16"},
                "parallel": {"compile": True},
            }
        )
    )
    layout = layout_of(load(recipe).config, gpu_named("h200"), 1, sharding="fsdp2")
    recording = record(layout.config, layout.micro_batch, layout.device)
    found = step_time(step_work(layout, recording))
    ours = measured["candidates"]["ours"]
    assert found.tokens_per_second == pytest.approx(ours["tokens_per_second"], rel=0.15)
    assert found.mfu == pytest.approx(ours["mfu"], rel=0.15)


def test_a_length_that_is_not_known(tmp_path: Path) -> None:
    """Oracle: the message."""
    config = load(
        SMOKE, ["training.steps=null", "training.epochs=3", f"data.dir={tmp_path}"]
    ).config
    with pytest.raises(InputError, match="training.epochs: 3 passes over data that are not"):
        plan_time.length_of(config)


def test_what_is_asked_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the messages, in one line with exit code 2."""
    plan = ["plan", str(SMOKE), "--gpu", "h100", "--gpus", "4"]
    for words, message in (
        (["--trace", "--sharding", "zero2"], "--trace: zero2 is DeepSpeed's"),
        (["--trace", "first"], "expected the number of a process, got 'first'"),
        (["--fit", "--price", "2"], "--price: is of one layout, and --fit lists several"),
        (["--sharding", "tensor"], "tensor parallelism is not offered"),
        (["selection=colm", "selection.pool=64", "--sharding", "ddp"], "plan: selection 'colm'"),
        (["--calibrate", "configs"], "configs: is no run directory"),
    ):
        assert cli.main([*plan, *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1] and error[-1].startswith("llmnorm: error: ")


def test_time_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the printed lines against the JSON beside them."""
    words = ["plan", str(SMOKE), "--gpu", "h100", "--gpus", "4", "--sharding", "fsdp2"]
    words += ["--price", "2", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    time = found["time"]
    assert f"a step                        {time['step']:10.4g} s" in printed
    assert f"the run: 30 steps, {30 * 16 * 64:,} tokens, " in printed
    assert time["cost"] == pytest.approx(4 * 2 * 30 * time["step"] / 3600)
    assert [t["what"] for t in time["transfers"]] == ["weights", "gradients"]
    assert "the Step Law says nothing of models below 10 million" in printed


def test_the_step_law_stands_beside_the_run_s_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: 0.58 D^0.571 and 1.79 N^-0.713 D^0.307 by hand."""
    words = ["plan", "configs/quickstart.yaml", "--gpu", "h100", "model.hidden_size=512"]
    words += ["model.intermediate_size=2048", "model.num_hidden_layers=8"]
    words += ["model.num_attention_heads=8", "model.num_key_value_heads=8"]
    assert cli.main(words) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "the Step Law" in x]
    tokens = 2500 * 4 * 256
    assert f"{0.58 * tokens**0.571:,.0f} tokens" in line
    assert "outside of the 0.2 to 1.1 billion it was fitted to" in line
