"""Any rule on matrices that are spread over processes, with the result of a single process.

A rule needs whole matrices. So every hidden matrix has an owner: the process that has its state and
computes its update, with the rule and the arithmetic of a single process (stacks.py). A step does
for every bucket of matrices:

    weights spread           all-to-all of the gradient's parts to the owners (for rules that read
                             weights a second one, of weights), the rule, all-to-all of deltas back
    weights whole (ddp)      the rule on the owners' gradients, one all-gather of deltas

Sources: owners as in Essential AI's and torchtitan's distributed Muon; longest processing time
first: Graham 1969. With H bytes in all matrices and W processes, a process sends
2 H (W - 1) / W^2 bytes for spread weights (3 in the place of 2 for rules that read them) and
H (W - 1) / W for whole ones.

What would surprise:
- Every process computes all owners from names, shapes and the number of processes. Nothing about
  owners is saved, and a checkpoint is the same as that of a single process.
- Processes wait for each other at every bucket. So owners have about equal work within each bucket,
  and the heaviest part of a bucket goes to the process that has the least work so far. The next
  bucket's gradients travel while the rule runs on this one.
- A part of a matrix is a range of elements, counted row by row. FSDP2 gives each process
  ceil(rows / W) rows, the last processes fewer or none; a part of ZeRO's may end inside a row
  (fragments.py).
- In replicas of spread weights (HSDP) every replica does all of the work inside its own group.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmnorm.nn.precision import wide_dtype
from llmnorm.optim.adamw import AdamW
from llmnorm.optim.fragments import Fragment
from llmnorm.optim.groups import Matrix
from llmnorm.optim.stacks import (
    Hyperparameters,
    Rule,
    RuleOptimizer,
    Stack,
    allocate,
    apply,
    deltas,
)

# Bytes of gradients that travel at once. A bucket has at least two matrices for every process.
BUCKET_BYTES = 2**26


@dataclass(frozen=True)
class Exchange:
    """The processes that share the matrices.

    Attributes:
        group: their process group; with `spread`, the processes that a matrix is spread over.
        spread: whether each process has a part of every parameter (a DTensor or a Fragment); else
            it has all of it.
        payload: dtype that gradients and deltas are rounded to before they travel; None: they are
            not rounded.
        waiting: entered while this process waits for others.
    """

    group: dist.ProcessGroup
    spread: bool
    payload: torch.dtype | None = None
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    def local(self, parameter: Tensor) -> Tensor:
        """This process's part of a parameter, or of a gradient."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def cut(self, parameter: Tensor, rank: int) -> tuple[int, int]:
        """The elements [first, last) that process `rank` has of a parameter that is spread."""
        if isinstance(parameter, Fragment):
            return parameter.cuts[rank], parameter.cuts[rank + 1]
        rows, columns = parameter.shape
        block = -(-rows // dist.get_world_size(self.group))
        return min(block * rank, rows) * columns, min(block * (rank + 1), rows) * columns

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes that have parts of the same tensor, in place."""
        if self.spread:
            with self.waiting():
                dist.all_reduce(values, group=self.group)
        return values


class Bucket(NamedTuple):
    """Matrices whose updates travel together.

    Attributes:
        owned: by process, the matrices that it owns.
        stacks: those of this process.
    """

    owned: list[list[Matrix]]
    stacks: list[Stack]


class ShardedRuleOptimizer(RuleOptimizer):
    """A `RuleOptimizer` of several processes, all of which must make every call.

    Attributes:
        balance: work of the busiest owner divided by the mean work of an owner.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        auxiliary: AdamW | None,
        rule: Rule,
        hyperparameters: Hyperparameters,
        exchange: Exchange,
    ) -> None:
        self.exchange = exchange
        self.rank, self.world = dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
        super().__init__(matrices, auxiliary, rule, hyperparameters)

    def _allocate(self, matrices: list[Matrix]) -> list[Stack]:
        parts, load = owners(matrices, self.world)
        self.balance = max(load) * self.world / sum(load)
        self.buckets = []
        for owned in parts:
            mine = {number: matrices[number] for number in owned[self.rank]}
            stacks = allocate(mine, len(matrices), self.rule)
            self.buckets.append(Bucket([[matrices[n] for n in part] for part in owned], stacks))
        return [stack for bucket in self.buckets for stack in bucket.stacks]

    def _update(self, hyperparameters: Hyperparameters) -> None:
        finish: Callable[[], None] | None = None
        arriving = self._to_owners(self.buckets[0])
        for number, bucket in enumerate(self.buckets):
            grads, weights = arriving()
            if number + 1 < len(self.buckets):
                arriving = self._to_owners(self.buckets[number + 1])
            updates = {
                id(matrix): delta
                for stack in bucket.stacks
                for matrix, delta in deltas(
                    stack,
                    self.rule,
                    hyperparameters,
                    lambda matrix, grads=grads: grads[id(matrix)],  # type: ignore[misc]
                    lambda matrix, weights=weights: weights[id(matrix)],  # type: ignore[misc]
                )
            }
            del grads, weights
            # The last bucket's deltas have travelled while the rule ran on this one.
            if finish is not None:
                finish()
            finish = self._from_owners(bucket, updates, hyperparameters)
        assert finish is not None
        finish()

    def _to_owners(
        self, bucket: Bucket
    ) -> Callable[[], tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """Send gradients off to the owners, and weights if the rule reads them.

        Returns:
            A function that waits and returns whole gradients and whole weights of this process's
            own matrices, by the id of the `Matrix`.
        """
        mine, reads = bucket.owned[self.rank], self.rule.decay == "inside"
        if not self.exchange.spread:
            grads = {id(m): m.grad() for m in mine}
            weights = {id(m): m.weight() for m in mine} if reads else {}
            return lambda: (grads, weights)
        sending = [self._gather(bucket, gradient=True)]
        if reads:
            sending.append(self._gather(bucket, gradient=False))

        def wait() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
            arrived = [call() for call in sending]
            return arrived[0], arrived[1] if reads else {}

        return wait

    def _gather(self, bucket: Bucket, *, gradient: bool) -> Callable[[], dict[int, Tensor]]:
        """Send parts of gradients or weights to the owners.

        Returns:
            A function that waits and returns the whole ones of this process's own matrices.
        """
        mine = bucket.owned[self.rank]
        send = [self._local(m, gradient) for part in bucket.owned for m in part]
        pieces = [(m, self._numel(m, rank)) for rank in range(self.world) for m in mine]
        wait = self._all_to_all(
            # Weights are never rounded on their way: the rule reads what the weights are.
            self._packed(send, None if not gradient else self.exchange.payload),
            [sum(self._numel(m, self.rank) for m in part) for part in bucket.owned],
            [sum(self._numel(m, rank) for m in mine) for rank in range(self.world)],
        )

        def unpack() -> dict[int, Tensor]:
            arrived: dict[int, list[Tensor]] = {id(m): [] for m in mine}
            flat = wait().split([numel for _, numel in pieces])
            for (matrix, _), piece in zip(pieces, flat, strict=True):
                arrived[id(matrix)].append(piece)
            return {id(m): torch.cat(arrived[id(m)]).view(m.rows, m.columns) for m in mine}

        return unpack

    def _from_owners(
        self, bucket: Bucket, updates: dict[int, Tensor], hyperparameters: Hyperparameters
    ) -> Callable[[], None]:
        """Send deltas off; the returned function waits for them and applies them to the weights.

        Args:
            updates: the deltas of this process's own matrices, by the id of the `Matrix`.
        """
        mine, payload = bucket.owned[self.rank], self.exchange.payload
        sizes = [sum(self._numel(m, self.rank) for m in part) for part in bucket.owned]
        if self.exchange.spread:
            send = [
                updates[id(m)].reshape(-1)[slice(*self._cut(m, rank))]
                for rank in range(self.world)
                for m in mine
            ]
            counts = [sum(self._numel(m, rank) for m in mine) for rank in range(self.world)]
            wait = self._all_to_all(self._packed(send, payload), counts, sizes)
        else:
            wait = self._all_gather(self._packed([updates[id(m)] for m in mine], payload), sizes)

        def finish() -> None:
            matrices = [m for part in bucket.owned for m in part]
            for matrix, delta in zip(
                matrices,
                wait().split([self._numel(m, self.rank) for m in matrices]),
                strict=True,
            ):
                weight = self._local(matrix, gradient=False)
                apply(self.rule, weight, delta.to(wide_dtype(weight.dtype)), hyperparameters)

        return finish

    def _cut(self, matrix: Matrix, rank: int) -> tuple[int, int]:
        """The elements [first, last) of a matrix that process `rank` has."""
        start, stop = matrix.start * matrix.columns, matrix.stop * matrix.columns
        if not self.exchange.spread:
            return 0, stop - start
        first, last = self.exchange.cut(matrix.parameter, rank)
        first, last = min(max(first, start), stop), min(max(last, start), stop)
        return first - start, last - start

    def _numel(self, matrix: Matrix, rank: int) -> int:
        first, last = self._cut(matrix, rank)
        return last - first

    def _local(self, matrix: Matrix, gradient: bool) -> Tensor:
        """This process's elements of a matrix or of its gradient, (elements,)."""
        whole = matrix.parameter.grad if gradient else matrix.parameter.detach()
        assert whole is not None
        part = self.exchange.local(whole)
        part = part.reshape(-1) if gradient else part.view(-1)  # weights are changed in place
        first, last = self._cut(matrix, self.rank)
        begin = matrix.start * matrix.columns + first
        if self.exchange.spread:
            begin -= self.exchange.cut(matrix.parameter, self.rank)[0]
        return part[begin : begin + last - first] if last > first else part[:0]

    def _packed(self, tensors: list[Tensor], payload: torch.dtype | None) -> Tensor:
        """All tensors as one flat tensor in the dtype that travels."""
        first = self.param_groups[0]["params"][0]
        dtype = payload or wide_dtype(first.dtype)
        flat = [tensor.reshape(-1).to(dtype) for tensor in tensors]
        return torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=first.device)

    def _all_to_all(
        self, send: Tensor, counts: list[int], expected: list[int]
    ) -> Callable[[], Tensor]:
        received = send.new_empty(sum(expected))
        work = dist.all_to_all_single(
            received, send, expected, counts, group=self.exchange.group, async_op=True
        )

        def wait() -> Tensor:
            assert send is not None  # in memory until it has been sent
            with self.exchange.waiting():
                work.wait()
            return received

        return wait

    def _all_gather(self, send: Tensor, sizes: list[int]) -> Callable[[], Tensor]:
        padded = torch.nn.functional.pad(send, (0, max(sizes) - len(send)))
        received = [torch.empty_like(padded) for _ in sizes]
        work = dist.all_gather(received, padded, group=self.exchange.group, async_op=True)

        def wait() -> Tensor:
            assert padded is not None  # in memory until it has been sent
            with self.exchange.waiting():
                work.wait()
            return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

        return wait


def owners(matrices: list[Matrix], world: int) -> tuple[list[list[list[int]]], list[int]]:
    """Who owns which matrix.

    Returns:
        By bucket and process the indices of the matrices that it owns, ascending; and the work of
        every process over all buckets, as a sum of shorter side^2 * longer side.
    """
    work = [min(m.rows, m.columns) * m.rows * m.columns for m in matrices]
    load, found = [0] * world, []
    for numbers in _buckets(matrices, world):
        parts: list[list[int]] = [[] for _ in range(world)]
        inside = [0] * world
        names = {n: (matrices[n].name, matrices[n].start) for n in numbers}
        for number in sorted(numbers, key=lambda n: (-work[n], names[n])):
            least = inside.index(min(inside))
            parts[least].append(number)
            inside[least] += work[number]
        # The heaviest part to the process that has least so far.
        heaviest = sorted(range(world), key=lambda part: (-inside[part], part))
        idlest = sorted(range(world), key=lambda rank: (load[rank], rank))
        of_rank = dict(zip(idlest, heaviest, strict=True))
        for rank, part in of_rank.items():
            load[rank] += inside[part]
        found.append([sorted(parts[of_rank[rank]]) for rank in range(world)])
    return found, load


def _buckets(matrices: list[Matrix], world: int) -> list[list[int]]:
    """Indices of consecutive matrices, cut into buckets of about the same size."""
    sizes = [4 * m.rows * m.columns for m in matrices]
    count = max(1, min(sum(sizes) // BUCKET_BYTES, len(matrices) // (2 * world)))
    buckets: list[list[int]] = [[] for _ in range(count)]
    reached = 0
    for number, size in enumerate(sizes):
        buckets[min(reached * count // sum(sizes), count - 1)].append(number)
        reached += size
    return [bucket for bucket in buckets if bucket]
