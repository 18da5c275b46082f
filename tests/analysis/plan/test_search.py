"""`plan --fit`: which layouts are listed, and what is said where none is."""

import re
from dataclasses import replace

import pytest

from llmnorm import cli
from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.memory import memory
from llmnorm.analysis.plan.search import fitting
from llmnorm.config.file import load
from llmnorm.part import InputError
from tests.running import SMOKE

CONFIG = load(SMOKE, ["training.global_batch=32", "data.context_length=256"]).config
# Four rows and no more fit beside the rest, at least where nothing is recomputed.
SMALL = replace(gpu_named("h100"), memory_bytes=int(1.9 * 2**30))


def test_the_fastest_comes_first_and_all_fit() -> None:
    """Oracle: the plan of each; a larger micro-batch than the one listed does not fit."""
    found = fitting(CONFIG, SMALL, 4)
    assert [c.step.seconds for c in found] == sorted(c.step.seconds for c in found)
    kinds = {(c.layout.sharding, c.layout.replicas, c.layout.recompute) for c in found}
    assert len(kinds) == len(found)
    assert {c.layout.sharding for c in found} >= {"ddp", "fsdp2", "hsdp"}
    for candidate in found:
        layout = candidate.layout
        assert memory(layout).needed == candidate.needed <= SMALL.memory_bytes
        if layout.micro_batch < 8:
            larger = layout_of(
                CONFIG,
                SMALL,
                4,
                sharding=layout.sharding,
                replicas=layout.replicas if layout.sharding == "hsdp" else 1,
                micro_batch=2 * layout.micro_batch,
                recompute=layout.recompute,
            )
            assert not memory(larger).fits


def test_nothing_fits() -> None:
    """Oracle: the message names the nearest that does, and that fits."""
    least = memory(
        layout_of(CONFIG, SMALL, 8, sharding="fsdp2", micro_batch=1, recompute=True)
    ).needed
    tiny = replace(SMALL, memory_bytes=least)
    with pytest.raises(InputError, match="nothing fits: 2 x h100") as error:
        fitting(CONFIG, tiny, 2)
    (gpus,) = re.findall(r"the nearest that fits is --gpus (\d+)", str(error.value))
    nearest = layout_of(CONFIG, tiny, int(gpus), sharding="fsdp2", micro_batch=1, recompute=True)
    assert memory(nearest).fits
    with pytest.raises(InputError, match="the nearest that fits is --gpu l4|--gpu a10|--gpu rtx"):
        fitting(CONFIG, replace(SMALL, memory_bytes=1), 2)


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one process has one sharding, with and without recomputation."""
    assert cli.main(["plan", str(SMOKE), "--gpu", "h100", "--fit"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "sharding"
    assert [row.split()[0] for row in rows] == ["none", "none"]
    assert {row.split()[3] for row in rows} == {"yes", "no"}
