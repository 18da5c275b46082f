"""Any rule on matrices that are spread over processes, with the result of a single process.

A rule needs whole matrices. So every parameter that holds matrices has an owner, and of a stack of
experts every process owns consecutive ones: who owns a matrix has its state and computes its
update, with the rule and the arithmetic of a single process (stacks.py); owners.py chooses it. A
step does for every bucket of matrices:

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
- A part of a parameter is a range of elements, counted row by row. FSDP2 gives each process
  ceil(rows / W) rows (of a stack: experts), the last processes fewer or none; a part of ZeRO's may
  end inside a row (fragments.py).
- What travels is laid out as the parameter is. Its owner transposes it, and cuts fused projections.
- Experts that divide evenly belong to the processes in order, which is how FSDP2 has them: then
  nothing of them travels.
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
from llmnorm.optim.matrix import Matrix
from llmnorm.optim.owners import Block, blocks, owners
from llmnorm.optim.stacks import (
    Hyperparameters,
    Rule,
    RuleOptimizer,
    Stack,
    allocate,
    apply,
    deltas,
    hyperparameters_of,
)

# Bytes of gradients that travel at once. A bucket has at least two blocks for every process.
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
        rows, size = parameter.shape[0], parameter.shape[1:].numel()
        block = -(-rows // dist.get_world_size(self.group))
        return min(block * rank, rows) * size, min(block * (rank + 1), rows) * size

    def own(self, parameter: Tensor) -> tuple[int, int]:
        """The elements [first, last) that this process has of a parameter."""
        if not self.spread:
            return 0, parameter.numel()
        return self.cut(parameter, dist.get_rank(self.group))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes that have parts of the same tensor, in place."""
        if self.spread:
            with self.waiting():
                dist.all_reduce(values, group=self.group)
        return values


class Bucket(NamedTuple):
    """Blocks whose updates travel together.

    Attributes:
        owned: by process, the blocks that it owns.
        stacks: those of this process's matrices.
    """

    owned: list[list[Block]]
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
        self._cuts: dict[tuple[int, int], tuple[int, int]] = {}  # by block (its id) and process
        super().__init__(matrices, auxiliary, rule, hyperparameters)

    def _allocate(self, matrices: list[Matrix]) -> list[Stack]:
        every, total = blocks(matrices, self.world), sum(matrix.count for matrix in matrices)
        parts, load = owners(every, self.world, BUCKET_BYTES)
        self.balance = max(load) * self.world / sum(load)
        self.buckets = []
        for numbers in parts:
            owned = [[every[number] for number in part] for part in numbers]
            mine = [matrix for block in owned[self.rank] for matrix in block.pieces]
            self.buckets.append(Bucket(owned, allocate(mine, total, self.rule)))
        return [stack for bucket in self.buckets for stack in bucket.stacks]

    def _update(self, hyperparameters: Hyperparameters) -> None:
        finish: Callable[[], None] | None = None
        arriving = self._to_owners(self.buckets[0])
        for number, bucket in enumerate(self.buckets):
            grads, weights = arriving()
            if number + 1 < len(self.buckets):
                arriving = self._to_owners(self.buckets[number + 1])
            updates = self._updates(bucket, grads, weights, hyperparameters)
            del grads, weights
            # The last bucket's deltas have travelled while the rule ran on this one.
            if finish is not None:
                finish()
            finish = self._from_owners(bucket, updates, hyperparameters)
        assert finish is not None
        finish()

    def _updates(
        self,
        bucket: Bucket,
        grads: dict[int, Tensor],
        weights: dict[int, Tensor],
        hyperparameters: Hyperparameters,
    ) -> dict[int, Tensor]:
        """The deltas of this process's own blocks, laid out as `grads` and `weights` are.

        Args:
            grads, weights: whole ones by the id of the `Block`, in its shape.
        """
        of = {id(m): block for block in bucket.owned[self.rank] for m in block.pieces}
        updates: dict[int, Tensor] = {}
        for stack in bucket.stacks:
            for (matrix, experts), delta in deltas(
                stack,
                self.rule,
                hyperparameters,
                lambda matrix: matrix.within(grads[id(of[id(matrix)])]),
                lambda matrix: matrix.within(weights[id(of[id(matrix)])]),
            ):
                block = of[id(matrix)]
                if block.is_matrix:
                    updates[id(block)] = delta
                    continue
                if id(block) not in updates:
                    updates[id(block)] = delta.new_empty(block.shape)
                matrix.within(updates[id(block)])[experts] = delta
        return updates

    def _to_owners(
        self, bucket: Bucket
    ) -> Callable[[], tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """Send gradients off to the owners, and weights if the rule reads them.

        Returns:
            A function that waits and returns whole gradients and whole weights of this process's
            own blocks, by the id of the `Block`, in its shape.
        """
        mine, reads = bucket.owned[self.rank], self.rule.decay == "inside"
        if not self.exchange.spread:
            grads = {id(b): self._whole(b, gradient=True) for b in mine}
            weights = {id(b): self._whole(b, gradient=False) for b in mine} if reads else {}
            return lambda: (grads, weights)
        sending = [self._gather(bucket, gradient=True)]
        if reads:
            sending.append(self._gather(bucket, gradient=False))

        def wait() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
            arrived = [call() for call in sending]
            return arrived[0], arrived[1] if reads else {}

        return wait

    def _whole(self, block: Block, *, gradient: bool) -> Tensor:
        """The weights or the gradient of a block whose parameter is not spread, in its shape."""
        return self._local(block, gradient).view(block.shape)

    def _gather(self, bucket: Bucket, *, gradient: bool) -> Callable[[], dict[int, Tensor]]:
        """Send parts of gradients or weights to the owners.

        Returns:
            A function that waits and returns the whole ones of this process's own blocks.
        """
        mine = bucket.owned[self.rank]
        send = [self._local(block, gradient) for block in self._held(bucket)]
        pieces = [(block, self._numel(block, rank)) for rank in range(self.world) for block in mine]
        wait = self._all_to_all(
            # Weights are never rounded on their way: the rule reads what the weights are.
            self._packed(send, None if not gradient else self.exchange.payload),
            [sum(self._numel(block, self.rank) for block in part) for part in bucket.owned],
            [sum(self._numel(block, rank) for block in mine) for rank in range(self.world)],
        )

        def unpack() -> dict[int, Tensor]:
            arrived: dict[int, list[Tensor]] = {id(block): [] for block in mine}
            flat = wait().split([numel for _, numel in pieces])
            for (block, _), piece in zip(pieces, flat, strict=True):
                arrived[id(block)].append(piece)
            return {id(block): torch.cat(arrived[id(block)]).view(block.shape) for block in mine}

        return unpack

    def _from_owners(
        self, bucket: Bucket, updates: dict[int, Tensor], hyperparameters: Hyperparameters
    ) -> Callable[[], None]:
        """Send deltas off; the returned function waits for them and applies them to the weights.

        Args:
            updates: the deltas of this process's own blocks, by the id of the `Block`.
        """
        mine, payload = bucket.owned[self.rank], self.exchange.payload
        sizes = [sum(self._numel(block, self.rank) for block in part) for part in bucket.owned]
        if self.exchange.spread:
            send = [
                updates[id(block)].reshape(-1)[slice(*self._cut(block, rank))]
                for rank in range(self.world)
                for block in mine
            ]
            counts = [sum(self._numel(block, rank) for block in mine) for rank in range(self.world)]
            wait = self._all_to_all(self._packed(send, payload), counts, sizes)
        else:
            send = [updates[id(block)] for block in mine]
            wait = self._all_gather(self._packed(send, payload), sizes)

        def finish() -> None:
            held = self._held(bucket)
            for block, delta in zip(
                held,
                wait().split([self._numel(block, self.rank) for block in held]),
                strict=True,
            ):
                weight = self._local(block, gradient=False)
                delta, own = delta.to(wide_dtype(weight.dtype)), block.pieces[0]
                apply(self.rule, weight, delta, hyperparameters_of(own, hyperparameters))

        return finish

    def _held(self, bucket: Bucket) -> list[Block]:
        """The blocks that this process has elements of, in the order of their owners."""
        return [b for part in bucket.owned for b in part if self._numel(b, self.rank)]

    def _cut(self, block: Block, rank: int) -> tuple[int, int]:
        """The elements [first, last) of a block that process `rank` has."""
        if (cut := self._cuts.get((id(block), rank))) is None:
            start, stop = block.elements
            first, last = start, stop
            if self.exchange.spread:
                first, last = self.exchange.cut(block.parameter, rank)
                first, last = min(max(first, start), stop), min(max(last, start), stop)
            cut = self._cuts[id(block), rank] = first - start, last - start
        return cut

    def _numel(self, block: Block, rank: int) -> int:
        first, last = self._cut(block, rank)
        return last - first

    def _local(self, block: Block, gradient: bool) -> Tensor:
        """This process's elements of a block or of its gradient, (elements,)."""
        whole = block.parameter.grad if gradient else block.parameter.detach()
        assert whole is not None
        part = self.exchange.local(whole)
        part = part.reshape(-1) if gradient else part.view(-1)  # weights are changed in place
        first, last = self._cut(block, self.rank)
        begin = block.elements[0] + first - self.exchange.own(block.parameter)[0]
        return part[begin : begin + last - first]

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
