"""What a training step needs in the memory of each process, under any layout.

    needed = memory(layout)
    needed.peak          bytes of tensors at the step's worst moment
    needed.at_peak       what they are, by kind
    needed.fits          whether that, and what is no tensor, is less than the GPU's memory

The passes are put together of recorded parts (recording.py, timeline.py) and of what a sharding
holds (shardings.py), the optimizer's state and step follow from its rule (optimizer.py).
`train --print-memory` prints the same numbers for one process.

What would surprise:
- The process is the one with the most optimizer state. Of everything else the first process has as
  much as any other.
- `peak` counts tensors. What CUDA's context, NCCL's buffers and the allocator's gaps take is
  estimated in `beside`, and counts in `fits`.
"""

from dataclasses import dataclass

from llmnorm.analysis.plan import optimizer, shardings, timeline
from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.ledger import Ledger
from llmnorm.analysis.plan.recording import Recording, record

GIB = 2**30
# What is no tensor, on a GPU: estimates, not measured here.
CONTEXT = 0.6 * GIB
NCCL = 1.2 * GIB
GAPS = 0.04  # of the peak: memory that the allocator holds and cannot use


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs for a training step.

    Attributes:
        trained: weights that are trained: float32 masters.
        frozen: weights that are not trained, in the dtype or the bits that they are stored in.
        teacher: weights of the model that is learned from, 0 where there is none.
        buffers: of the model, e.g. running statistics.
        gradients: when the passes are over.
        state: of the optimizer, on the process that has most.
        average: the weights' moving average, where there is one.
        activations: what the forward pass keeps for the backward pass, before the head.
        logits: what the head and the loss take beside that.
        scratch: what the optimizer needs for a moment, when activations are gone.
        checkpoint: this process's part of a checkpoint: what is trained, and the state.
        peak: at the step's worst moment. That is less than the sum of the others where gradients
            come as activations go, and more where a block needs room while it is recomputed.
        at_peak: what is live then, by kind.
        moment: when that is.
        balance: work of the busiest owner of matrices divided by the mean; 1 without a rule.
        beside: what is no tensor, estimated.
        there: memory of the GPU; of a CPU the share of a process.
    """

    trained: int
    frozen: int
    teacher: int
    buffers: int
    gradients: int
    state: int
    average: int
    activations: int
    logits: int
    scratch: int
    checkpoint: int
    peak: int
    at_peak: dict[str, int]
    moment: str
    balance: float
    beside: int
    there: int

    @property
    def needed(self) -> int:
        """Tensors, and what is none."""
        return self.peak + self.beside

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.needed <= self.there


def memory(layout: Layout, recording: Recording | None = None) -> Memory:
    """The memory that a process of a layout needs.

    Args:
        layout: of a run that `refuse_uncounted` lets pass.
        recording: of the same settings, micro-batch, recomputation and device, where there is one;
            it serves every sharding and any number of processes.

    Raises:
        InputError: as `record`; the optimizer is not known.
    """
    if recording is None:
        recording = record(layout.config, layout.micro_batch, layout.device)
    own = optimizer.owned(layout, recording)
    states = optimizer.state_bytes(layout, recording, own)
    state = max(states)
    rank = states.index(state)

    ledger = Ledger()
    held = shardings.sharding(layout, recording, ledger)
    trained, frozen = held.weights()
    average = _average(layout, recording, rank) if layout.config.training.ema else 0
    ledger.hold("weights", trained + frozen + recording.in_bits)
    ledger.hold("buffers", recording.buffers)
    ledger.hold("teacher", recording.teacher)
    ledger.hold("optimizer state", state)
    ledger.hold("moving average", average)
    timeline.passes(layout, recording, ledger)
    step = Ledger()  # without what is held
    optimizer.step(layout, recording, step, own, rank)
    optimizer.step(layout, recording, ledger, own, rank)
    activations, logits = _of_activations(recording)
    return Memory(
        trained=trained,
        frozen=frozen + recording.in_bits,
        teacher=recording.teacher,
        buffers=recording.buffers,
        gradients=held.local_gradients(),
        state=state,
        average=average,
        activations=activations,
        logits=logits,
        scratch=step.peak,
        checkpoint=trained + state + average,
        peak=ledger.peak,
        at_peak=ledger.at_peak,
        moment=ledger.moment,
        balance=1.0 if own is None else own.balance,
        beside=_beside(layout, ledger.peak),
        there=_there(layout),
    )


def _average(layout: Layout, recording: Recording, rank: int) -> int:
    """Bytes of the moving average: a float32 copy of what this process steps."""
    elements = optimizer.elements(layout, recording, recording.trained, layout.shards)
    return shardings.NUMBER * elements[min(rank, len(elements) - 1)]


def _of_activations(recording: Recording) -> tuple[int, int]:
    """What is kept before the head, and what the head takes beside it."""
    parts = recording.first
    names = ["teacher", "embedding", *(f"forward {kind}" for kind in recording.kinds), "norm"]
    return sum(parts[name].left for name in names), parts["head"].rise


def _beside(layout: Layout, peak: int) -> int:
    """What is no tensor."""
    if layout.device == "cpu":
        return 0
    return int(CONTEXT + (NCCL if layout.world > 1 else 0) + GAPS * peak)


def _there(layout: Layout) -> int:
    """The memory of a GPU; processes on one CPU share it."""
    if layout.gpu.device == "cpu":
        return layout.gpu.memory_bytes // layout.world
    return layout.gpu.memory_bytes
