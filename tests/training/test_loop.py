"""The loop: a step does not depend on how its batch is cut; bad steps are skipped."""

import json
from pathlib import Path

import pytest
import torch

from llmnorm.config.file import load
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.training.loop import train
from tests.running import SMOKE, metrics_of, state_of


def run_here(run: Path, data: Path, *overrides: str, going_on: bool = False, **options) -> int:
    path = run if going_on else SMOKE
    config = load(path, [f"run_dir={run}", f"data.dir={data}", *overrides]).config
    directory = run_directory.agree(config, going_on=going_on)
    return train(config, directory, data_command="llmnorm data", **options)


def test_accumulation_does_not_change_a_step(tmp_path, smoke_data) -> None:
    # Oracle: the batch in one piece; 1e-6 relative over the first 5 steps, float32, eager.
    lines = {}
    for micro_batch in (16, 8, 4):
        run = tmp_path / str(micro_batch)
        run_here(run, smoke_data, "training.steps=5", f"training.micro_batch={micro_batch}")
        lines[micro_batch] = [line for line in metrics_of(run) if "loss" in line]
    assert lines[16][0]["tokens"] < 16 * 64, "no ignored label in the batch: the test shows nothing"
    for micro_batch in (8, 4):
        for one, other in zip(lines[16], lines[micro_batch], strict=True):
            assert one["tokens"] == other["tokens"]
            for key in ("loss", "grad_norm"):
                assert other[key] == pytest.approx(one[key], rel=1e-6)


def test_the_dry_step_changes_nothing_and_writes_nothing(tmp_path, smoke_data) -> None:
    # Oracle: the same run without its dry run; and the directory that is not there.
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert run_here(tmp_path / "dry", smoke_data, "training.steps=3", dry_run=True) == 0
    assert not (tmp_path / "dry").exists()
    assert torch.get_rng_state().equal(before)


def test_a_diverging_run_stops_with_its_rows_and_keeps_the_good_checkpoint(
    tmp_path, smoke_data
) -> None:
    run = tmp_path / "run"
    run_here(run, smoke_data, "training.steps=4", "checkpoint.every=4", "schedule=constant")
    good = state_of(run, 4)
    # A learning rate that is finite and makes every weight overflow: no loss is finite after it.
    text = (run / "config.yaml").read_text().replace("lr: 0.003", "lr: 1.0e+38")
    (run / "config.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        run_here(run, smoke_data, "training.steps=20", going_on=True)
    message = str(error.value)
    assert "stopped at step 10: 5 steps in a row" in message
    assert "rows 80-159" in message and "step_00000004" in message and "\n" not in message
    kept = state_of(run, 4)
    assert all(kept[name].equal(good[name]) for name in good)
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_00000004"]


def test_bf16_keeps_master_weights_and_state_in_float32_and_learns(tmp_path, smoke_data) -> None:
    # Oracle: the float32 run; bf16 products move its losses by less than 2 %.
    for precision in ("fp32", "bf16"):
        run_here(
            tmp_path / precision,
            smoke_data,
            "training.steps=10",
            f"training.precision={precision}",
        )
    state = state_of(tmp_path / "bf16", 10)
    assert {t.dtype for t in state.values()} == {torch.float32}
    both = zip(metrics_of(tmp_path / "fp32"), metrics_of(tmp_path / "bf16"), strict=True)
    pairs = [(one["loss"], other["loss"]) for one, other in both if "loss" in one]
    assert pairs[-1][1] < pairs[0][1]
    assert all(other == pytest.approx(one, rel=2e-2) for one, other in pairs)
    assert any(one != other for one, other in pairs)


@pytest.mark.parametrize(
    "override", ["parallel.activation_checkpointing=true", "training.deterministic=true"]
)
def test_switches_that_may_not_change_the_numbers(tmp_path, smoke_data, override) -> None:
    # Oracle: the run without the switch, to the bit.
    run_here(tmp_path / "off", smoke_data, "training.steps=3")
    try:
        run_here(tmp_path / "on", smoke_data, "training.steps=3", override)
    finally:
        torch.use_deterministic_algorithms(False)
    off, on = state_of(tmp_path / "off", 3), state_of(tmp_path / "on", 3)
    assert all(on[name].equal(off[name]) for name in off)


def test_odd_sizes_run(tmp_path, smoke_data) -> None:
    # Oracle: it ends; one layer, one row, a prime context, a prime batch.
    for number, overrides in enumerate(
        [
            ["model.num_hidden_layers=1", "training.global_batch=1"],
            ["training.global_batch=7", "model.intermediate_size=31"],
        ]
    ):
        assert run_here(tmp_path / str(number), smoke_data, "training.steps=2", *overrides) == 0


def test_another_configuration_is_refused_with_its_keys(tmp_path, smoke_data) -> None:
    run = tmp_path / "run"
    run_here(run, smoke_data, "training.steps=2")
    with pytest.raises(InputError) as error:
        run_here(run, smoke_data, "training.steps=2", "optimizer.lr=1")
    assert "optimizer.lr (0.003 there, 1.0 here)" in str(error.value)
    assert f"run_dir={run}-2" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"model.norm.name \(rms there, layer here\)"):
        run_here(run, smoke_data, "model.norm=layer", going_on=True)


def test_other_data_is_refused_by_name(tmp_path, smoke_data) -> None:
    run = tmp_path / "run"
    run_here(run, smoke_data, "training.steps=2")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("vocab_size: 512", "vocab_size: 500"))
    with pytest.raises(InputError, match="was trained on the data"):
        run_here(run, smoke_data, "training.steps=4", going_on=True)


def test_a_directory_of_something_else_is_refused(tmp_path, smoke_data) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds other files and no config.yaml"):
        run_here(tmp_path / "photos", smoke_data)
    with pytest.raises(InputError, match="is a file"):
        run_here(tmp_path / "photos" / "cat.png", smoke_data)


def test_metrics_have_the_promised_fields(tmp_path, smoke_data) -> None:
    run = tmp_path / "run"
    run_here(run, smoke_data, "training.steps=4", "evaluation.every=2", "logging.every=2")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4]
    promised = {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu"}
    promised |= {"spent", "wall", "goodput", "clock"}
    assert promised | {"memory_bytes", "seconds", "skipped_steps"} == set(trained[0])
    validated = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validated] == [2, 4]
    assert set(validated[0]["validation"]["sources"]) == {"prose", "notes"}
