"""The passes of a step under each sharding, on a model whose parts need nothing themselves."""

from typing import Any

import pytest
import torch
from torch import nn

from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.ledger import Ledger
from llmnorm.analysis.plan.recording import Part, Recording, Weight
from llmnorm.analysis.plan.shardings import sharding
from llmnorm.analysis.plan.timeline import passes
from llmnorm.config.file import load
from llmnorm.optim.groups import Groups
from tests.running import SMOKE

BLOCK, ROOT, BLOCKS = 4 * 60 * 10, 4 * 8 * 10, 3  # bytes


def hollow() -> Recording:
    """Three equal blocks of 60 x 10 numbers, and a root of 8 x 10."""
    shapes = [(8, 10), *[(60, 10)] * BLOCKS]
    trained = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    first = {
        "head backward": Part(0, ROOT, ROOT),
        "backward 0": Part(0, BLOCK, BLOCK),
    }
    again = {"head backward": Part(ROOT, 0, 0), "backward 0": Part(BLOCK, 0, 0)}
    nothing: Any = None
    return Recording(
        reduced=nothing,
        trained=trained,
        groups=Groups({}, {}),
        kinds=(0,) * BLOCKS,
        weights=((Weight((60, 10), 4, True),),),
        rest=(Weight((8, 10), 4, True),),
        in_bits=0,
        buffers=0,
        teacher=0,
        first=first,
        again=again,
    )


def peak(kind: str, world: int, words: list[str], held: int = 0, replicas: int = 1) -> Any:
    config = load(SMOKE, words).config
    layout = layout_of(config, gpu_named("h100"), world, sharding=kind, replicas=replicas)
    ledger = Ledger()
    ledger.hold("", held)
    passes(layout, hollow(), ledger)
    return ledger.peak, ledger.live["gradients"], sharding(layout, hollow(), ledger).weights()


WHOLE = BLOCKS * BLOCK + ROOT


@pytest.mark.parametrize("shards", [2, 4])
def test_fsdp2_holds_two_units_and_their_gradients(shards: int) -> None:
    """Oracle: the order of torch's calls, added up by hand.

    At the end of the middle block's backward pass: weights and gradients of the root are whole, and
    so are those of the block; the weights of the block before it travel, the gradients of the block
    behind it are still in the buffer that they were reduced from, and their sum is kept.
    """
    found, gradients, weights = peak("fsdp2", shards, [])
    assert gradients == weights[0] == WHOLE // shards
    assert found == 2 * ROOT + 4 * BLOCK + BLOCK // shards


def test_ddp_has_buckets_from_the_start_and_plain_gradients_before() -> None:
    """Oracle: gradients once with one micro-batch, and twice with two."""
    assert peak("ddp", 2, [])[:2] == (WHOLE + BLOCK, WHOLE)
    assert peak("ddp", 2, ["training.micro_batch=4"])[:2] == (2 * WHOLE + BLOCK, WHOLE)


def test_one_process_adds_up_gradients() -> None:
    """Oracle: a second micro-batch's gradients exist one block at a time."""
    assert peak("none", 1, [])[0] == WHOLE
    assert peak("none", 1, ["training.micro_batch=4"])[0] == WHOLE + BLOCK


def test_a_replica_is_like_fewer_processes() -> None:
    """Oracle: FSDP2 among the processes of a replica."""
    assert peak("hsdp", 4, [], replicas=2) == peak("fsdp2", 2, [])


@pytest.mark.parametrize(("kind", "weights"), [("zero1", 1.5), ("zero2", 1.5), ("zero3", 1.0)])
def test_zero_has_masters_beside_weights(kind: str, weights: float) -> None:
    """Oracle: whole weights or half of them, and half of the masters, on two processes."""
    assert peak(kind, 2, [])[2][0] == weights * WHOLE
