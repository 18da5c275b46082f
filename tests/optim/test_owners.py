"""Owners of stacks of experts, computed without processes."""

from collections import Counter
from math import prod

import pytest
import torch
from torch import nn

from llmnorm.models.foreign import empty_foreign
from llmnorm.optim.groups import matrices, split
from llmnorm.optim.matrix import Layout, Matrix
from llmnorm.optim.owners import Block, blocks, owners
from llmnorm.optim.settings import CondaSettings, MuonSettings
from tests.families import class_of, configuration

SIZES = {"hidden_size": 256, "moe_intermediate_size": 192, "num_hidden_layers": 6}


def of_a_mixture(experts: int) -> list[Matrix]:
    """The matrices of a qwen3_moe of six layers, on the meta device."""
    config = configuration("qwen3_moe", num_experts=experts, **SIZES)
    return matrices(split(empty_foreign(class_of(config), config)), {})


def owned(every: list[Block], world: int, size: int) -> list[list[Block]]:
    """By process, over all buckets."""
    parts, _ = owners(every, world, size)
    return [[every[n] for bucket in parts for n in bucket[rank]] for rank in range(world)]


@pytest.mark.parametrize("experts", [1, 5, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_expert_has_one_owner_and_an_owners_experts_lie_together(
    experts: int, world: int
) -> None:
    """Oracle: counting, with one and with many buckets."""
    found = of_a_mixture(experts)
    for size in (2**20, 2**40):
        claims: Counter[tuple[str, int]] = Counter()
        for own in owned(blocks(found, world), world, size):
            assert len({block.name for block in own}) == len(own)
            for block in own:
                claims.update((block.name, e) for e in range(block.first, block.pieces[0].last))
                assert all(
                    (m.first, m.count) == (block.first, block.shape[0]) for m in block.pieces
                )
        expected = {(m.name, e) for m in found for e in range(m.count)}
        assert claims == Counter(dict.fromkeys(expected, 1))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_experts_that_divide_evenly_belong_to_the_processes_in_order(world: int) -> None:
    """Oracle: the intervals of torch.chunk, by which FSDP2 cuts."""
    every = blocks(of_a_mixture(24), world)
    for rank, own in enumerate(owned(every, world, 2**20)):
        expected = torch.arange(24).chunk(world)[rank]
        for block in own:
            if block.name.endswith("_proj"):  # of experts; linear layers have .weight
                assert list(range(block.first, block.first + block.shape[0])) == expected.tolist()


@pytest.mark.parametrize("experts", [5, 8, 13])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_no_owner_of_a_mixture_has_much_more(experts: int, world: int) -> None:
    """Oracle: the work of all owners, and bytes of state under two rules, over their means."""
    every = blocks(of_a_mixture(experts), world)
    _, load = owners(every, world, 2**26)
    assert max(load) * world / sum(load) <= 1.25
    for rule in (MuonSettings().rule(), CondaSettings().rule()):
        held = [
            sum(
                m.count * prod(shape)
                for block in own
                for m in block.pieces
                for shape in rule.fields(m.rows, m.columns).values()
            )
            for own in owned(every, world, 2**26)
        ]
        assert max(held) * world / sum(held) <= 1.3


def test_a_block_says_which_elements_of_its_parameter_it_is() -> None:
    """Oracle: counted by hand: 7 experts of (4, 6) over three processes."""
    parameter = nn.Parameter(torch.zeros(7, 4, 6))
    layout = Layout(True, (2, 4))
    pieces = [
        Matrix("w", parameter, f".{n}", start, stop, layout.transposed, 0, 7, 7 * n)
        for n, (start, stop) in enumerate([(0, 2), (2, 6)])
    ]
    found = blocks(pieces, 3)
    assert [block.elements for block in found] == [(0, 48), (48, 96), (96, 168)]
    assert [block.shape for block in found] == [(2, 4, 6), (2, 4, 6), (3, 4, 6)]
    assert [[m.weight().shape for m in block.pieces] for block in found[1:]] == [
        [(2, 2, 4), (2, 4, 4)],
        [(3, 2, 4), (3, 4, 4)],
    ]
