"""How long a step takes, the run, and the preparation of its data; what the run costs.

    found = step_time(step_work(layout), efficiency=0.7)
    found.seconds, found.tokens_per_second, found.mfu
    run_time(found, steps=10_000, price=2.5)

A roofline: an operation takes as long as its products at the GPU's peak or its bytes at the speed
of its memory, whichever is longer (work.py counts both), divided by `efficiency`, the share of that
which kernels reach. Beside that there are the host, which starts operations one by one and holds
up a GPU that computes faster, and the other processes (traffic.py).

Assumptions, where no run has measured them (`--calibrate`, calibration.py):
- EFFICIENCY: on an H200, a step of 1.1 billion parameters ran its products at .75 of the peak
  (docs/results/gpu_step.json).
- HOST_SECONDS: PyTorch needs some microseconds for an operation that autograd records. A compiled
  block starts a quarter of its operations, and moves FUSED of the bytes of those without products.
- Gathers and reductions of fsdp2, hsdp and zero3 travel while blocks compute, and so do DDP's
  buckets in the last backward pass, two thirds of a micro-batch. On CPUs, and under zero1 and
  zero2, a process waits for all of them.
- Nothing else is at work: evaluations, checkpoints and restarts are not counted.
"""

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.optimizer import Owned, owned
from llmnorm.analysis.plan.recording import Recording
from llmnorm.analysis.plan.shardings import NUMBER
from llmnorm.analysis.plan.traffic import (
    IN_PASSES,
    REPLICAS,
    Transfer,
    padded_gradients,
    transfers,
)
from llmnorm.analysis.plan.work import Passes, Rates, Work, passes, rule_work, seconds_of
from llmnorm.config.tree import RunConfig
from llmnorm.models.flops import Flops, flops_by_kind
from llmnorm.part import InputError
from llmnorm.selection.settings import SelectionSettings
from llmnorm.training.outline import outline

EFFICIENCY = 0.7
HOST_SECONDS = 6e-6
COMPILED_STARTS, FUSED = 0.25, 0.35
CPU_STARTS = 250_000.0  # operations that a CPU begins in a second, beside their arithmetic
BACKWARD = 2 / 3  # of a micro-batch's time
# Bytes for an element of what is trained: AdamW's kernel reads weight, gradient and two moments and
# writes all but the gradient; a rule's delta changes the weight; the norm is taken and applied.
ADAMW_BYTES, APPLY_BYTES, CLIP_BYTES, AVERAGE_BYTES = 28, 12, 12, 12
# A gather's buffer is copied into the weights, gradients are copied into the buffer of a reduction;
# parts are put together for the owners, and taken apart.
COPIED_BYTES, EXCHANGED_BYTES = 8, 16
# docs/results/data.json: text to packed rows, on one core; a byte-pair vocabulary of some 10,000s.
PREPARED_BYTES_PER_SECOND = 2.7e6
BYTES_PER_TOKEN = 4.2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what they are spent on.

    Attributes:
        layout: the run on its processes.
        efficiency: see above.
        flops: operations of a token that the MFU counts, by kind.
        computing: forward and backward passes on the device.
        starting: what the host needs to start them; on a CPU part of `computing`.
        waiting: for other processes, as far as nothing is computed meanwhile.
        updating: the gradient's norm, the exchange with owners, the rule on the busiest, AdamW.
        transfers: what a process sends.
    """

    layout: Layout
    efficiency: float
    flops: Flops
    computing: float
    starting: float
    waiting: float
    updating: float
    transfers: tuple[Transfer, ...]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.computing + self.waiting, self.starting) + self.updating

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all processes."""
        return self.layout.tokens * self.layout.accumulation * self.layout.world

    @property
    def tokens_per_second(self) -> float:
        """Over all processes."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the GPUs' bf16 peak that the model's own operations take."""
        peak = self.layout.gpu.flops * (1 if self.layout.device == "cpu" else self.layout.world)
        return sum(self.flops) * self.tokens_per_second / peak


class RunTime(NamedTuple):
    """A run's length.

    Attributes:
        steps, tokens: of the run.
        seconds: of all steps.
        cost: in the price's currency; None without a price.
    """

    steps: int
    tokens: int
    seconds: float
    cost: float | None


class StepWork(NamedTuple):
    """What a process does in a step.

    Attributes:
        layout: the run on its processes.
        recording: of its model.
        own: who owns which matrix; None for AdamW.
        passes: the work of a micro-batch.
        flops: operations of a token that the MFU counts, by kind.
    """

    layout: Layout
    recording: Recording
    own: Owned | None
    passes: Passes
    flops: Flops


def step_work(layout: Layout, recording: Recording, counted: Passes | None = None) -> StepWork:
    """Count the work of a step.

    Args:
        recording: of the layout's model.
        counted: the work of a micro-batch of as many rows, if it is known.
    """
    config = layout.config
    return StepWork(
        layout,
        recording,
        owned(layout, recording),
        counted or passes(config, layout.micro_batch, layout.device, recording.kinds),
        flops_by_kind(outline(config), config.data.context_length),
    )


def step_time(step: StepWork, efficiency: float = EFFICIENCY) -> StepTime:
    """The time that a step takes."""
    layout, recording, own, found, flops = step
    config, rates = layout.config, rates_of(layout)
    work = found.whole(recompute=layout.recompute)
    starts = float(sum(work.values()))
    if config.parallel.compile:
        work, starts = _fused(work), starts * COMPILED_STARTS
    copied = COPIED_BYTES * _copied(layout, recording)
    micro = (seconds_of(work, rates) + copied / rates.moved) / efficiency
    on_gpu = layout.device != "cpu"
    sent = transfers(layout, recording, own)
    return StepTime(
        layout=layout,
        efficiency=efficiency,
        flops=flops,
        computing=layout.accumulation * micro,
        starting=layout.accumulation * starts * HOST_SECONDS if on_gpu else 0.0,
        waiting=_waiting(layout, sent, micro, len(recording.kinds) + 1, on_gpu=on_gpu),
        updating=_updating(layout, recording, own, efficiency, sent),
        transfers=tuple(sent),
    )


def refuse_untimed(config: RunConfig) -> None:
    """Refuse a run whose step is not timed.

    Raises:
        InputError: it selects its rows.
    """
    if isinstance(config.selection, SelectionSettings):
        raise InputError(
            f"plan: selection '{config.selection.name}' looks at a pool of rows in every step, "
            "whose time is not planned; selection=none gives the time without it"
        )


def rates_of(layout: Layout) -> Rates:
    """What one process's device does at its best; processes on CPUs share one machine."""
    gpu = layout.gpu
    if layout.device == "cpu":
        n = layout.world
        return Rates(gpu.flops / n, gpu.flops_float32 / n, gpu.bandwidth / n, CPU_STARTS)
    return Rates(gpu.flops, gpu.flops_float32, gpu.bandwidth, started=math.inf)


def run_time(step: StepTime, steps: int, price: float | None) -> RunTime:
    """The time of a run of so many steps.

    Args:
        price: of one GPU for an hour.
    """
    seconds = steps * step.seconds
    cost = None if price is None else price * step.layout.world * seconds / 3600
    return RunTime(steps, steps * step.tokens, seconds, cost)


def length_of(config: RunConfig) -> int:
    """A run's steps.

    Raises:
        InputError: the length is in epochs of data that are not prepared.
    """
    if config.training.epochs is None:
        return config.total_steps(0)
    preparation = config.objective.preparation(config)
    prepared = None if preparation is None else preparation.find()
    if prepared is None:
        raise InputError(
            f"training.epochs: {config.training.epochs:g} passes over data that are not prepared "
            "have no known length; run `llmnorm data` first, or give training.tokens"
        )
    return config.total_steps(prepared.rows)


def preparation_seconds(tokens: float) -> float:
    """Seconds in which this machine's cores make rows of so many tokens of text."""
    return tokens * BYTES_PER_TOKEN / (PREPARED_BYTES_PER_SECOND * (os.cpu_count() or 1))


def _fused(work: Work) -> Work:
    """Work of compiled blocks: operations without products are run together."""
    found = Work()
    for each, count in work.items():
        moved = each.moved if each.flops else FUSED * each.moved
        found[each._replace(moved=moved)] += count
    return found


def _copied(layout: Layout, recording: Recording) -> float:
    """Bytes of weights and gradients that a micro-batch copies to and from buffers, once each."""
    weights = recording.all_weights
    gradients = padded_gradients(weights, layout.shards if layout.spread else 1)
    if layout.spread:
        return 2 * sum(w.nbytes for w in weights) / NUMBER + gradients / NUMBER
    return gradients / NUMBER if layout.sharding in ("zero1", "zero2") else 0.0


def _waiting(
    layout: Layout, sent: list[Transfer], micro: float, units: int, *, on_gpu: bool
) -> float:
    """Seconds of a step in which a process waits for weights and gradients."""
    inside = [t for t in sent if t.what in IN_PASSES]
    if not on_gpu or layout.sharding in ("zero1", "zero2"):
        return sum(t.seconds(layout.gpu) for t in inside)
    if layout.sharding == "ddp":
        return max(0.0, sum(t.seconds(layout.gpu) for t in inside) - BACKWARD * micro)
    steps = layout.accumulation
    each = sum(t.seconds(layout.gpu) for t in inside if t.what != REPLICAS) / steps
    over = sum(t.seconds(layout.gpu) for t in inside if t.what == REPLICAS)
    # The first unit's weights and the last one's gradients have nothing to hide behind.
    return steps * (max(0.0, each - micro) + each / units) + max(0.0, over - BACKWARD * micro)


def _updating(
    layout: Layout,
    recording: Recording,
    own: Owned | None,
    efficiency: float,
    sent: list[Transfer],
) -> float:
    """Seconds from the last gradient to the new weights."""
    rates, config = rates_of(layout), layout.config
    trained = [w for w in recording.all_weights if w.trained]
    whole = sum(w.numel for w in trained)
    share = 1.0 if layout.sharding in ("none", "ddp") else 1 / layout.shards
    numbers = padded_gradients(trained, layout.shards if layout.spread else 1) / NUMBER * share
    by_rule = 0 if own is None else sum(m.rows * m.columns for m in own.pieces)
    moved = CLIP_BYTES * numbers + ADAMW_BYTES * numbers * (1 - by_rule / whole)
    moved += AVERAGE_BYTES * numbers if config.training.ema else 0.0
    rule, buckets = 0.0, 1
    if own is not None:
        moved += APPLY_BYTES * by_rule * share
        if own.world > 1:
            moved += EXCHANGED_BYTES * by_rule * share
        rule, buckets = _rule_seconds(layout, own, rates) / efficiency, len(own.buckets)
    exchange = sum(t.seconds(layout.gpu) for t in sent if t.what not in IN_PASSES)
    # While the rule runs on a bucket, the next one's gradients and the last one's updates travel.
    hidden = min(rule, exchange * (buckets - 1) / buckets) if layout.device != "cpu" else 0.0
    return moved / rates.moved / efficiency + rule + exchange - hidden


def _rule_seconds(layout: Layout, own: Owned, rates: Rates) -> float:
    """Seconds of the rule at its best; all processes wait for a bucket's busiest owner."""
    known: dict[tuple[int, int], float] = {}

    def of(number: int) -> float:
        shape = own.pieces[number].rows, own.pieces[number].columns
        if shape not in known:
            work = rule_work(layout.config, *shape, layout.device)
            known[shape] = seconds_of(work, rates)
        return known[shape]

    return sum(max(sum(map(of, part)) for part in bucket) for bucket in own.buckets)
