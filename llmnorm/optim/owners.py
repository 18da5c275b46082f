"""Who owns which matrices: computed on every process alike, from names, shapes and their number.

    every = blocks(matrices, world)             what has one owner each
    parts, load = owners(every, world, size)    by bucket and process, indices into `every`

Longest processing time first, Graham 1969, inside each bucket, and over the buckets so far.

What would surprise: a stack of experts has an owner for each run of consecutive experts. Where they
divide evenly, process r owns the r-th run, which FSDP2 has stored there.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from llmnorm.optim.fragments import whole_shape
from llmnorm.optim.matrix import Matrix


class Block(NamedTuple):
    """What has one owner: a parameter that holds matrices, or consecutive experts of a stack.

    Attributes:
        pieces: its matrices, all of the same parameter and the same experts.
    """

    pieces: list[Matrix]

    @property
    def parameter(self) -> nn.Parameter:
        """What the block is of."""
        return self.pieces[0].parameter

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.pieces[0].name

    @property
    def first(self) -> int:
        """The first expert; 0 where there is no stack."""
        return self.pieces[0].first

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, *, *), as the parameter stores them."""
        first, second = whole_shape(self.parameter)[-2:]
        return self.pieces[0].count, first, second

    @property
    def elements(self) -> tuple[int, int]:
        """The elements [first, last) of the parameter, counted row by row."""
        experts, first, second = self.shape
        begin = self.first * first * second
        return begin, begin + experts * first * second

    @property
    def work(self) -> int:
        """Its owner's: the sum of shorter side^2 * longer side over its matrices."""
        return sum(m.count * min(m.rows, m.columns) * m.rows * m.columns for m in self.pieces)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a single matrix as the parameter stores it."""
        first = self.pieces[0]
        return len(self.pieces) == 1 and first.count == 1 and not first.transposed


def blocks(matrices: Sequence[Matrix], world: int) -> list[Block]:
    """What processes own, in the order of the model's parameters.

    A stack of experts is one block a process, as equal as whole experts can be; with fewer experts
    than processes, one an expert.
    """
    by_parameter: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_parameter.setdefault(matrix.name, []).append(matrix)
    found = []
    for pieces in by_parameter.values():
        experts = pieces[0].count
        parts = min(world, experts)
        borders = [experts * part // parts for part in range(parts + 1)]
        found += [
            Block([replace(matrix, first=first, last=last) for matrix in pieces])
            for first, last in pairwise(borders)
        ]
    return found


def owners(
    every: Sequence[Block], world: int, bucket_bytes: int
) -> tuple[list[list[list[int]]], list[int]]:
    """Who owns which block. No process owns two blocks of one stack.

    Args:
        bucket_bytes: about how many bytes of gradients there are in a bucket.

    Returns:
        By bucket and process the indices of the blocks that it owns, ascending; and the work of
        every process over all buckets (`Block.work`).
    """
    load, found = [0] * world, []
    for numbers in _buckets(every, world, bucket_bytes):
        fixed = _in_order(every, numbers, world)
        for rank, mine in enumerate(fixed):
            load[rank] += sum(every[number].work for number in mine)
        loose = set(numbers).difference(*fixed)
        parts: list[list[int]] = [[] for _ in range(world)]
        inside = [0] * world
        for number in sorted(loose, key=lambda n: (-every[n].work, every[n].name, every[n].first)):
            name = every[number].name
            free = [r for r in range(world) if all(every[n].name != name for n in parts[r])]
            least = min(free, key=lambda part: inside[part])
            parts[least].append(number)
            inside[least] += every[number].work
        # The heaviest part to the process that has least so far.
        heaviest = sorted(range(world), key=lambda part: (-inside[part], part))
        idlest = sorted(range(world), key=lambda rank: (load[rank], rank))
        of_rank = dict(zip(idlest, heaviest, strict=True))
        for rank, part in of_rank.items():
            load[rank] += inside[part]
        found.append([sorted(fixed[rank] + parts[of_rank[rank]]) for rank in range(world)])
    return found, load


def _in_order(every: Sequence[Block], numbers: list[int], world: int) -> list[list[int]]:
    """By process the blocks of stacks that divide evenly, which belong to processes in order."""
    stacks: dict[str, list[int]] = {}
    for number in numbers:
        stacks.setdefault(every[number].name, []).append(number)
    even = [
        stack
        for stack in stacks.values()
        if len(stack) == world > 1 and len({every[number].shape for number in stack}) == 1
    ]
    return [[stack[rank] for stack in even] for rank in range(world)]


def _buckets(every: Sequence[Block], world: int, bucket_bytes: int) -> list[list[int]]:
    """Indices of consecutive blocks, cut into buckets of about the same size.

    The blocks of a stack are in one bucket, so that a process gets one of them at most.
    """
    sizes = [4 * math.prod(block.shape) for block in every]
    count = max(1, min(sum(sizes) // bucket_bytes, len(every) // (2 * world)))
    buckets: list[list[int]] = [[] for _ in range(count)]
    reached, bucket = 0, 0
    for number, size in enumerate(sizes):
        if every[number].first == 0:  # the first block of a parameter
            bucket = min(reached * count // sum(sizes), count - 1)
        buckets[bucket].append(number)
        reached += size
    return [bucket for bucket in buckets if bucket]
