"""What a process sends in a step, under each sharding, and how long that takes.

    for transfer in transfers(layout, recording, owned):
        transfer.what, transfer.calls, transfer.sent, transfer.seconds(gpu)

Weights, gradients and updates are float32 (llmnorm/parallel). With N bytes of weights, of which the
trained ones have gradients of n bytes and the hidden matrices h, W processes, S of them in a shard
group, R replicas, and a micro-batches in a step, a process sends, less the part that it keeps:

    ddp          2 n                        gradients, with the last micro-batch
    fsdp2        a (2 N + n)                weights for both passes, gradients with each micro-batch
    hsdp         a (2 N + n) and 2 n / S    the second over the replicas, with the last one
    zero1        2 n, N                     gradients with the last micro-batch, weights after it
    zero2        a 2 n, N                   gradients with each
    zero3        a (2 N + n)                weights once, as far as they stay gathered
    rules        2 h / S, or h under ddp    gradients to the owners, updates back

Sources: rings as NCCL counts them; its latencies of a hop are those of nccl, src/graph/tuning.cc
(`hwLat`, ring, simple protocol). DeepSpeed 0.19.8 reduces by all-reduce at stages 1 and 2
(`use_multi_rank_bucket_allreduce`), and stage 1 with the last micro-batch only.

What would surprise: FSDP2 gives every process the same number of rows, so rows that do not divide
are padded, and the padding travels. With more processes than rows most of what travels is padding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llmnorm.analysis.plan.gpus import Gpu
from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.optimizer import Owned
from llmnorm.analysis.plan.recording import Recording, Weight
from llmnorm.analysis.plan.shardings import (
    NUMBER,
    ZERO3_LIVE,
    padded,
    padded_gradients,
)
from llmnorm.parallel.zero import REDUCE_ELEMENTS

LINK_SHARE = 0.8  # of a link's speed on the data sheet that large messages reach
CALL_SECONDS = 8.4e-6  # of one collective
HOP_INSIDE, HOP_ACROSS = 3.4e-6, 9.6e-6  # of a hop inside of a node, and to another
DDP_BUCKET = 25 * 2**20  # bytes that torch's DDP reduces at once


class Group(NamedTuple):
    """Processes that exchange something.

    Attributes:
        size: how many.
        per_node: how many of them a node has.
    """

    size: int
    per_node: int

    @property
    def across(self) -> bool:
        """Whether they are on several nodes."""
        return self.size > self.per_node

    @property
    def hops(self) -> float:
        """Seconds in which a message goes around all of them."""
        nodes = -(-self.size // self.per_node)
        return (self.size - nodes) * HOP_INSIDE + (nodes - 1) * HOP_ACROSS


class Transfer(NamedTuple):
    """One kind of message of a step.

    Attributes:
        what: is sent.
        how: "all-gather", "reduce-scatter", "all-reduce" or "all-to-all".
        group: among which processes.
        calls: collectives in a step.
        sent: bytes that one process sends in a step.
    """

    what: str
    how: str
    group: Group
    calls: float
    sent: float

    def seconds(self, gpu: Gpu) -> float:
        """Seconds in a step, if nothing else happened."""
        if self.group.size == 1:
            return 0.0
        link = gpu.link_across if self.group.across else gpu.link
        latency = self.group.hops
        if self.how == "all-reduce":  # by a tree, up and down
            latency = (
                2 * math.log2(self.group.size) * (HOP_ACROSS if self.group.across else HOP_INSIDE)
            )
        if self.how == "all-to-all":  # everybody sends to everybody at once
            latency = HOP_ACROSS if self.group.across else HOP_INSIDE
        return self.sent / (LINK_SHARE * link) + self.calls * (CALL_SECONDS + latency)


WEIGHTS, GRADIENTS, REPLICAS = "weights", "gradients", "gradients over replicas"
TO_OWNERS, FROM_OWNERS = "gradients to owners", "updates from owners"
READ_BY_OWNERS, UPDATED = "weights to owners", "updated weights"
IN_PASSES = (WEIGHTS, GRADIENTS, REPLICAS)  # the others follow behind the last gradient


def transfers(layout: Layout, recording: Recording, own: Owned | None) -> list[Transfer]:
    """All that a process sends in a step, but for single numbers.

    Args:
        own: who owns which matrix; None for AdamW.
    """
    kind = layout.sharding
    if kind == "none":
        return []
    found = _of_shards(layout, recording) if layout.spread else _of_copies(layout, recording)
    return [*found, *_of_owners(layout, own)]


def _of_shards(layout: Layout, recording: Recording) -> list[Transfer]:
    """fsdp2, hsdp, zero3: units are gathered and reduced."""
    shards, steps = layout.shards, layout.accumulation
    inside = Group(shards, min(shards, layout.gpu.per_node))
    units: list[Sequence[Weight]] = [recording.weights[kind] for kind in recording.kinds]
    units.append(recording.rest)
    gathered = sum(padded(unit, shards) for unit in units)
    reduced = sum(padded_gradients(unit, shards) for unit in units)
    again = gathered
    if layout.sharding == "zero3":  # what stays gathered is not gathered for the backward pass
        again = max(0, gathered - NUMBER * ZERO3_LIVE)
    count, trained = len(units), sum(any(w.trained for w in unit) for unit in units)
    rest = (shards - 1) / shards
    passes = 2 if again else 1
    found = [
        Transfer(
            WEIGHTS, "all-gather", inside, steps * passes * count, steps * rest * (gathered + again)
        ),
        Transfer(GRADIENTS, "reduce-scatter", inside, steps * trained, steps * rest * reduced),
    ]
    if layout.replicas > 1:
        ring = 2 * (layout.replicas - 1) / layout.replicas
        over = _replicas(layout)
        found.append(Transfer(REPLICAS, "all-reduce", over, trained, ring * reduced / shards))
    return found


def _of_copies(layout: Layout, recording: Recording) -> list[Transfer]:
    """ddp, zero1, zero2: gradients are summed; DeepSpeed gathers what processes have updated."""
    world = layout.world
    group = Group(world, min(world, layout.gpu.per_node))
    trained = sum(w.numel for w in recording.all_weights if w.trained) * NUMBER
    bucket = DDP_BUCKET if layout.sharding == "ddp" else NUMBER * REDUCE_ELEMENTS
    steps = layout.accumulation if layout.sharding == "zero2" else 1
    rest = (world - 1) / world
    calls = steps * math.ceil(trained / bucket)
    found = [Transfer(GRADIENTS, "all-reduce", group, calls, steps * 2 * rest * trained)]
    if layout.sharding != "ddp":
        found.append(Transfer(UPDATED, "all-gather", group, 1, rest * trained))
    return found


def _of_owners(layout: Layout, own: Owned | None) -> list[Transfer]:
    """Whole matrices' gradients and updates (optim/sharded.py)."""
    if own is None or own.world == 1:
        return []
    travels = 2 if layout.config.parallel.exchange == "bf16" else NUMBER
    world, calls = own.world, len(own.buckets)
    group = Group(world, min(world, layout.gpu.per_node))
    numel = [[sum(_numel(own, n) for n in part) for part in bucket] for bucket in own.buckets]
    if layout.sharding == "ddp":  # each process's part is padded to the largest
        padding = travels * (world - 1) * sum(max(parts) for parts in numel)
        return [Transfer(FROM_OWNERS, "all-gather", group, calls, padding)]
    whole = sum(sum(parts) for parts in numel) * (world - 1) / world**2
    # The busiest owner sends most: all of its updates, but for its own rows.
    busiest = max(map(sum, zip(*numel, strict=True))) * (world - 1) / world
    found = [Transfer(TO_OWNERS, "all-to-all", group, calls, travels * max(whole, busiest))]
    if own.rule.decay == "inside":
        read = NUMBER * max(whole, busiest)
        found.append(Transfer(READ_BY_OWNERS, "all-to-all", group, calls, read))
    sent = travels * max(whole, busiest)
    return [*found, Transfer(FROM_OWNERS, "all-to-all", group, calls, sent)]


def _replicas(layout: Layout) -> Group:
    """Processes that hold the same part; neighbours in it are `shards` processes apart."""
    return Group(layout.replicas, max(1, layout.gpu.per_node // layout.shards))


def _numel(own: Owned, number: int) -> int:
    return own.pieces[number].rows * own.pieces[number].columns
