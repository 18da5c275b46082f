"""What `llmnorm plan` is asked: refusals in one line with the nearest that is possible."""

import pytest

from llmnorm import cli
from llmnorm.analysis.plan.gpus import GPUS, gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.config.file import load
from tests.running import SMOKE

PLAN = ["plan", str(SMOKE), "--gpu", "h100"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", str(SMOKE), "--gpu", "h101"], "--gpu: 'h101' is not known; did you mean 'h100'?"),
        (["plan", str(SMOKE), "--memory", "80"], "--gpu: is missing: a100, h100"),
        ([*PLAN, "--tflops", "3"], "give one or the other"),
        (["plan", str(SMOKE), "--memory", "-1"], "expected a number above 0, got '-1'"),
        ([*PLAN, "--gpus", "12"], "16 rows do not divide over 12 GPUs; 8 is the nearest"),
        (
            [*PLAN, "--gpus", "4", "training.micro_batch=8"],
            "training.micro_batch: 8 does not divide the 4 rows of a process (training.global_batch"
            " 16 over 4); the nearest that does is 4",
        ),
        (
            [*PLAN, "--gpus", "2", "parallel.replicas=4"],
            "parallel.replicas: 4 are more than the 2 GPUs; the most is 2",
        ),
        (
            [*PLAN, "--gpus", "8", "parallel.replicas=3"],
            "parallel.replicas: 3 does not divide the 8 GPUs; the nearest that does is 2",
        ),
        ([*PLAN, "training.steps=null"], "give exactly one of training.steps, training.tokens"),
        ([*PLAN, "--gpus", "2", "--sharding", "none"], "did you mean 'ddp'?"),
        ([*PLAN, "--sharding", "fsdp3"], "'fsdp3' is not known; did you mean 'fsdp2'?"),
        ([*PLAN, "--sharding", "tensor"], "tensor parallelism is not offered: a rule of whole"),
        ([*PLAN, "--sharding", "hsdp"], "'hsdp' needs parallel.replicas; 1 is 'fsdp2'"),
        (
            [*PLAN, "objective=masked_lm", "tokenizer.mask=true", "model.mixer=hydra"],
            "plan: objective 'masked_lm' trains another class of model",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the messages, and exit code 2."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("sharding", "world", "replicas", "expected"),
    [
        ("auto", 1, 1, ("none", 1, 1)),
        ("ddp", 1, 1, ("none", 1, 1)),
        ("auto", 8, 1, ("ddp", 1, 8)),
        ("fsdp2", 8, 1, ("fsdp2", 8, 1)),
        ("fsdp2", 8, 2, ("hsdp", 4, 2)),
        ("auto", 8, 4, ("hsdp", 2, 4)),
        ("zero2", 16, 1, ("zero2", 16, 1)),
    ],
)
def test_processes_are_shards_times_replicas(
    sharding: str, world: int, replicas: int, expected: tuple[str, int, int]
) -> None:
    """Oracle: what parallel/launch.py and make_mesh do with the same words."""
    config = load(SMOKE, []).config
    found = layout_of(config, gpu_named("h100"), world, sharding=sharding, replicas=replicas)
    assert (found.sharding, found.shards, found.replicas) == expected
    assert found.micro_batch * found.accumulation * world == config.training.rows


def test_every_gpu_has_numbers_of_the_right_order() -> None:
    """Oracle: bounds of the last three generations; a slip of a unit is a factor of 8 or 1000."""
    for gpu in GPUS.values():
        assert 20e9 < gpu.memory_bytes < 300e9
        assert 1e14 < gpu.flops < 1e16 and gpu.flops / 40 < gpu.flops_float32 < gpu.flops
        assert 2e11 < gpu.bandwidth < 1e13
        assert 1e9 < gpu.link_across <= gpu.link < 1e12
        assert gpu.device == "cuda"
    assert gpu_named("H100") is GPUS["h100"]
    assert gpu_named("cpu").device == "cpu"
