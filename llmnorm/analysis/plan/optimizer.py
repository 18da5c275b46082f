"""What an optimizer needs in memory: its state, exactly, and the room of its highest step.

    states = state_bytes(layout, recording)          of every process of a replica
    step(layout, recording, ledger, rank)            the update, on a ledger that holds the rest

State follows from the rule's own `fields`, the owners from the exchange's own balance
(optim/owners.py). What a rule needs for a moment is counted by running it on fake tensors, on one
chunk of matrices of each shape.

What would surprise:
- A rule that multiplies in bf16 where the hardware does (Muon) is counted in the dtype that it
  takes on this machine's CPU.
- Not counted: the work space inside of a library's call (LAPACK's of Conda's decompositions).
"""

import math
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.ledger import Ledger
from llmnorm.analysis.plan.recording import Recording, Weight
from llmnorm.analysis.plan.shardings import NUMBER, rows_of
from llmnorm.analysis.plan.storages import Storages
from llmnorm.optim import sharded
from llmnorm.optim.groups import matrices
from llmnorm.optim.matrix import Matrix
from llmnorm.optim.owners import blocks, owners
from llmnorm.optim.settings import AdamWSettings, MatrixSettings
from llmnorm.optim.stacks import CHUNK_BYTES, Hyperparameters, Rule, Stack, deltas
from llmnorm.part import InputError

ROOM = "optimizer's step"
PARTS = ("fsdp2", "hsdp", "zero1", "zero2", "zero3")  # under these a matrix is spread
Shape = tuple[int, int]


class Owned:
    """The matrices of a rule, by bucket of the exchange and by process.

    Attributes:
        rule: the rule.
        pieces: all matrices.
        buckets: of each bucket, for every process, the indices of the matrices that it owns.
        balance: work of the busiest process divided by the mean.
        world: processes.
        alone: whether one process has everything, without an exchange.
    """

    def __init__(self, rule: Rule, pieces: list[Matrix], world: int | None) -> None:
        """Share matrices out over `world` processes; None: one process, without an exchange."""
        self.rule, self.pieces = rule, pieces
        self.alone, self.world = world is None, world or 1
        if world is None:
            self.buckets, self.balance = [[list(range(len(pieces)))]], 1.0
        else:
            every = blocks(pieces, world)
            self.pieces = [piece for block in every for piece in block.pieces]
            ends = [0, *accumulate(len(block.pieces) for block in every)]
            found, load = owners(every, world, sharded.BUCKET_BYTES)
            self.buckets = [
                [
                    [n for block in mine for n in range(ends[block], ends[block + 1])]
                    for mine in bucket
                ]
                for bucket in found
            ]
            self.balance = max(load) * world / sum(load)

    def shapes(self, numbers: Iterable[int]) -> dict[Shape, int]:
        """How many of some matrices have each shape, in the order of the optimizer's stacks."""
        found: dict[Shape, int] = {}
        for number in numbers:
            shape = (self.pieces[number].rows, self.pieces[number].columns)
            found[shape] = found.get(shape, 0) + 1
        return found

    def state(self, numbers: Iterable[int]) -> int:
        """Bytes of the state of matrices of one bucket that one process owns."""
        total = 0
        for shape, count in self.shapes(numbers).items():
            fields = self.rule.fields(*shape).values()
            total += NUMBER * count * sum(math.prod(field) for field in fields)
            total += NUMBER * ("step" in self.rule.scalars)
            total += NUMBER * count * ("phase" in self.rule.scalars)
        return total


def owned(layout: Layout, recording: Recording) -> Owned | None:
    """Who owns which matrix; None for AdamW, which has none.

    Raises:
        InputError: the optimizer is neither AdamW nor a rule of matrices.
    """
    settings = layout.config.optimizer
    if isinstance(settings, MatrixSettings):
        pieces = matrices(recording.groups, settings.split_sizes)
        world = layout.world if layout.sharding == "ddp" else layout.shards
        return Owned(settings.rule(), pieces, None if layout.sharding == "none" else world)
    if not isinstance(settings, AdamWSettings):
        raise InputError(
            f"optimizer: the state of '{settings.name}' is not known here; AdamW's is, and that of "
            "rules that are derived from MatrixSettings"
        )
    return None


def state_bytes(layout: Layout, recording: Recording, own: Owned | None) -> list[int]:
    """Bytes of optimizer state on every process that holds other parts (all replicas hold these).

    Args:
        own: of the same layout.
    """
    groups = recording.groups
    stepped = [*groups.auxiliary.values()]  # by AdamW
    if own is None:
        stepped = [*groups.matrices.values(), *stepped]
    world = own.world if own is not None else layout.shards
    counters = NUMBER * len(stepped)
    found = [2 * NUMBER * count + counters for count in elements(layout, recording, stepped, world)]
    if own is not None:
        for bucket in own.buckets:
            for rank, numbers in enumerate(bucket):
                found[rank] += own.state(numbers)
    if getattr(layout.config.optimizer, "nap", False):
        found = [size + NUMBER * len(groups.matrices) for size in found]
    return found


def elements(
    layout: Layout, recording: Recording, stepped: list[nn.Parameter], world: int
) -> list[int]:
    """How many numbers of some parameters every process steps."""
    kind, sizes = layout.sharding, [p.numel() for p in stepped]
    if kind in ("none", "ddp"):
        return [sum(sizes)] * world
    if kind == "zero3":
        parts = [(-(-size // world), size) for size in sizes]
        return [sum(max(0, min(c, s - c * rank)) for c, s in parts) for rank in range(world)]
    if kind in ("zero1", "zero2"):
        chosen = {id(p) for p in stepped}
        trained = recording.trained
        cut = -(-sum(p.numel() for p in trained) // (2 * world)) * 2
        found, start = [0] * world, 0
        for parameter in trained:
            stop = start + parameter.numel()
            if id(parameter) in chosen:
                for rank in range(start // cut, -(-stop // cut)):
                    found[rank] += min(stop, cut * (rank + 1)) - max(start, cut * rank)
            start = stop
        return found
    shapes = [(p.shape[0] if p.ndim else 1, p.numel()) for p in stepped]
    blocks = [(-(-rows // world), rows, numel // max(1, rows)) for rows, numel in shapes]
    return [
        sum(max(0, min(block, rows - block * rank)) * row for block, rows, row in blocks)
        for rank in range(world)
    ]


def step(
    layout: Layout, recording: Recording, ledger: Ledger, own: Owned | None, rank: int
) -> None:
    """An update of the matrices, on a ledger that holds what is there after the passes.

    AdamW's fused kernel needs no room.

    Args:
        own: of the same layout.
        rank: the process.
    """
    if own is None:
        return
    ledger.doing = "optimizer's step"
    if own.alone:
        step_alone(own, layout.device, ledger)
    else:
        _exchanged(layout, recording, own, Rooms(own.rule, layout.device), ledger, rank)


class Rooms:
    """What a rule needs for a moment, by the shape and the number of its matrices."""

    def __init__(self, rule: Rule, device: str) -> None:
        self.rule, self.chunk_bytes = rule, CHUNK_BYTES[device]
        self._known: dict[tuple[Shape, int], int] = {}
        self._numbers = [0, math.lcm(1, *(n for n in vars(rule).values() if type(n) is int and n))]

    def chunks(self, shape: Shape, count: int) -> list[int]:
        """How many matrices the rule gets at a time: as optim/stacks.py cuts a stack."""
        size = max(1, self.chunk_bytes // (NUMBER * shape[0] * shape[1]))
        return [size] * (count // size) + ([count % size] if count % size else [])

    def __getitem__(self, asked: tuple[Shape, int]) -> int:
        """Bytes beside gradients and state at the highest moment, deltas included."""
        if asked not in self._known:
            self._known[asked] = self._run(*asked)
        return self._known[asked]

    def _run(self, shape: Shape, count: int) -> int:
        """Run the rule. The first step makes bases, which others renew every so many steps.

        All of that is done at a common multiple of the rule's whole numbers.
        """
        rows, columns = shape
        with FakeTensorMode(), Storages() as storages, torch.no_grad():
            found = []
            for number in range(count):
                parameter = nn.Parameter(torch.empty(rows, columns))
                parameter.grad = torch.empty(rows, columns)
                found.append(Matrix(str(number), parameter, "", 0, rows, False, 0, 1, number))
            state = {
                field: torch.empty(count, *size)
                for field, size in self.rule.fields(rows, columns).items()
            }
            state |= {"step": torch.zeros(())} if "step" in self.rule.scalars else {}
            state |= {"phase": torch.zeros(count)} if "phase" in self.rule.scalars else {}
            stack = Stack(found, state, self.chunk_bytes)
            storages.peak = live = storages.live
            hyperparameters = Hyperparameters(1e-3, 0.1, 0.9)
            for storages.number in self._numbers:
                # Each result is let go before the next step.
                list(deltas(stack, self.rule, hyperparameters, Matrix.grad, Matrix.weight))
            return storages.peak - live


def step_alone(own: Owned, device: str, ledger: Ledger) -> None:
    """Stack after stack, chunk after chunk; the last chunk's deltas go when the next are there.

    Args:
        device: where the step is planned for; a GPU's rules get more matrices at once.
    """
    before, rooms = 0, Rooms(own.rule, device)
    for shape, count in own.shapes(own.buckets[0][0]).items():
        chunks = rooms.chunks(shape, count)
        # Those between are like the second.
        for size in chunks if len(chunks) < 3 else [*chunks[:2], chunks[-1]]:
            ledger.rise(ROOM, before + rooms[shape, size])
            before = _bytes(shape, size)


def _exchanged(
    layout: Layout,
    recording: Recording,
    own: Owned,
    rooms: Rooms,
    ledger: Ledger,
    rank: int,
) -> None:
    """Bucket after bucket, as optim/sharded.py does.

    Gradients arrive for the next bucket while the rule runs on this one; the deltas of the bucket
    before are still on their way, and kept by name.
    """
    spread = layout.sharding in PARTS
    travels = 2 if layout.config.parallel.exchange == "bf16" else NUMBER
    reads = own.rule.decay == "inside"
    part = _part(layout, recording, own, rank)

    def arriving(numbers: list[list[int]]) -> int:
        """Bytes on their way to the owners: what is sent and what is received."""
        if not spread:
            return 0
        local = sum(part(n) for numbers_of in numbers for n in numbers_of)
        mine = sum(_numel(own.pieces[n]) for n in numbers[rank])
        return (travels + NUMBER * reads) * (local + mine)

    held, finish, updates = arriving(own.buckets[0]), (0, 0), 0
    ledger.hold(ROOM, held)
    for number, bucket in enumerate(own.buckets):
        mine = bucket[rank]
        whole = NUMBER * sum(_numel(own.pieces[n]) for n in mine)
        arrived = (1 + reads) * whole if spread else 0
        ledger.hold(ROOM, arrived)
        if number + 1 < len(own.buckets):
            following = arriving(own.buckets[number + 1])
            ledger.hold(ROOM, following)
            ledger.drop(ROOM, held)
            held = following
        made = 0
        for shape, count in own.shapes(mine).items():
            for size in rooms.chunks(shape, count):
                ledger.rise(ROOM, made + rooms[shape, size])
                made += _bytes(shape, size)
        ledger.hold(ROOM, made)
        ledger.drop(ROOM, updates + arrived)
        updates = made
        ledger.rise(ROOM, finish[1])  # what the former bucket's deltas are unpacked into
        leaving = _leaving(own, bucket, rank, part, travels, spread)
        ledger.hold(ROOM, leaving[0])
        ledger.drop(ROOM, finish[0])
        finish = leaving
    ledger.rise(ROOM, finish[1])
    ledger.drop(ROOM, held + updates + finish[0])


def _leaving(
    own: Owned,
    bucket: list[list[int]],
    rank: int,
    part: Callable[[int], int],
    travels: int,
    spread: bool,
) -> tuple[int, int]:
    """Bytes of deltas on their way from the owners, and what they are unpacked into."""
    of = [sum(_numel(own.pieces[n]) for n in numbers) for numbers in bucket]
    local = sum(part(n) for numbers in bucket for n in numbers)
    if spread:
        return travels * (of[rank] + local), 0
    return travels * (max(of) * (1 + len(of))), travels * sum(of)


def _part(layout: Layout, recording: Recording, own: Owned, rank: int) -> Callable[[int], int]:
    """A function that gives how many numbers of a matrix this process has."""
    starts: dict[int, int] = {}
    if layout.sharding in ("zero1", "zero2"):
        trained = recording.trained
        sizes = [p.numel() for p in trained]
        cut = -(-sum(sizes) // (2 * own.world)) * 2
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + size)
        starts = {id(p): start for p, (start, _) in zip(trained, pairwise(ends), strict=True)}

    def numel(number: int) -> int:
        matrix = own.pieces[number]
        start, stop = matrix.start * matrix.columns, matrix.stop * matrix.columns
        size = matrix.parameter.numel()
        if layout.sharding == "ddp":
            return stop - start
        if layout.sharding == "zero3":
            block = -(-size // own.world)
            first, last = block * rank, block * (rank + 1)
        elif layout.sharding in ("zero1", "zero2"):
            first = cut * rank - starts[id(matrix.parameter)]
            last = first + cut
        else:
            weight = Weight(tuple(matrix.parameter.shape), NUMBER, True)
            block = rows_of(weight, own.world)
            first, last = block * rank, block * (rank + 1)
        return max(0, min(last, stop) - max(first, start))

    return numel


def _numel(matrix: Matrix) -> int:
    return matrix.rows * matrix.columns


def _bytes(shape: Shape, count: int) -> int:
    return NUMBER * count * shape[0] * shape[1]
