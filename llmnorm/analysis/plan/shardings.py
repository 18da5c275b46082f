"""What a process holds during the passes of a step, under each sharding.

    held = sharding(layout, recording, ledger)    told by timeline.py before and after each block

It follows from what a sharding keeps, gathers and sends:

    none      weights, gradients and state are whole
    ddp       the same; gradients lie in DDP's buckets, which are there from the first step on
    fsdp2     of weights, gradients and state a part; of the block at work, the weights and the
              gradients are whole, and the next block's weights and the last block's gradients
              travel meanwhile; those of embedding, final norm and head are whole during a pass
    hsdp      the same among the processes of a replica
    zero1, 2  whole weights, a part of float32 masters and state; gradients in DeepSpeed's bucket
    zero3     parts of all; up to 1e9 numbers of weights stay gathered, as DeepSpeed's default is

Sources: torch 2.13, torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py and
_fsdp_collectives.py (which buffers live from when to when); deepspeed 0.19.8,
runtime/zero/stage_1_and_2.py and stage3.py.

What would surprise:
- FSDP2 keeps an all-gather's buffer beside the weights that were copied out of it until the next
  block has been gathered; so a block at work takes its weights twice.
- DDP with several micro-batches needs the gradients twice: those of the first micro-batches lie
  beside the buckets, which are filled with the last one.
"""

from collections.abc import Sequence

from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.ledger import Ledger
from llmnorm.analysis.plan.recording import Recording, Weight
from llmnorm.parallel.zero import REDUCE_ELEMENTS

GATHERED, TRAVELLING = "gathered weights", "travelling gradients"
# DeepSpeed's defaults: numbers of gathered weights that it keeps, and whether it prefetches.
ZERO3_LIVE = 10**9
NUMBER = 4  # bytes of a gradient, a master weight and a number of the optimizer's state


def sharding(layout: Layout, recording: Recording, ledger: Ledger) -> "Whole":
    """What a process holds beside activations, under the layout's sharding."""
    kind = {
        "none": Whole,
        "ddp": Buckets,
        "fsdp2": Shards,
        "hsdp": Shards,
        "zero1": ZeroBucket,
        "zero2": ZeroBucket,
        "zero3": ZeroParts,
    }[layout.sharding]
    return kind(layout, recording, ledger)


class Whole:
    """One process: gradients are where backward passes put them.

    The other classes override what differs: `made` gets the bytes of gradients that a part of a
    pass has made, the others are called before and after a block, a pass, a step.
    """

    def __init__(self, layout: Layout, recording: Recording, ledger: Ledger) -> None:
        self.layout, self.recording, self.ledger = layout, recording, ledger
        self.last = False
        self.gradients = sum(w.numel for w in recording.all_weights if w.trained) * NUMBER

    def weights(self) -> tuple[int, int]:
        """Bytes of weights that this process holds between steps, trained and not trained."""
        return _sum(self.recording.all_weights, True), _sum(self.recording.all_weights, False)

    def local_gradients(self) -> int:
        """Bytes of gradients that this process holds when the passes are over."""
        return self.gradients

    def fresh(self, number: int, *, last: bool) -> bool:
        """Whether a micro-batch finds no gradient of an earlier one in its way."""
        return number == 0

    def begin(self) -> None:
        """Before the step's first micro-batch."""

    def begin_forward(self) -> None:
        """Before the model's forward pass."""

    def enter(self, block: int) -> None:
        """Before a block's forward pass."""

    def leave(self, block: int) -> None:
        """Behind it."""

    def end_forward(self) -> None:
        """Behind the model's forward pass, the loss included."""

    def begin_backward(self, *, last: bool) -> None:
        """Before the backward pass; `last`: of the step's last micro-batch."""
        self.last = last

    def enter_backward(self, block: int) -> None:
        """Before a block's backward pass."""

    def leave_backward(self, block: int) -> None:
        """Behind it."""

    def end_backward(self) -> None:
        """Behind the backward pass."""

    def made(self, size: int) -> None:
        """Gradients were made, in so many bytes."""
        self.ledger.hold("gradients", size)


class Buckets(Whole):
    """Replicas: with the last micro-batch gradients are copied into DDP's buckets and let go."""

    def begin(self) -> None:
        """The buckets were made before the first step."""
        self.ledger.hold("gradients", self.gradients)

    def fresh(self, number: int, *, last: bool) -> bool:
        """With the last one, a gradient goes as soon as it is copied, as if added to another."""
        return number == 0 and not last

    def end_backward(self) -> None:
        """Those of earlier micro-batches have been let go one by one."""
        if self.last and self.layout.accumulation > 1:
            self.ledger.drop("gradients", self.gradients)


class Shards(Whole):
    """FSDP2: a process holds rows; units are gathered for their passes, and reduced behind them."""

    def __init__(self, layout: Layout, recording: Recording, ledger: Ledger) -> None:
        super().__init__(layout, recording, ledger)
        shards = layout.shards
        units = [recording.weights[kind] for kind in recording.kinds]
        self.parts = [padded(unit, shards) for unit in units]
        self.reduced = [padded_gradients(unit, shards) for unit in units]
        self.root = padded(recording.rest, shards)
        self.root_reduced = padded_gradients(recording.rest, shards)
        self.copies = shards > 1  # one process alone copies its weights and gathers nothing
        self.gathered = 0  # bytes of the last gather's own buffer
        self.whole = 0  # bytes of gradients that no reduction has taken yet
        self.sent = 0  # bytes of the last reduction's input
        self.stored = False

    def weights(self) -> tuple[int, int]:
        """The padded rows of a process, trained and not trained."""
        shards, weights = self.layout.shards, self.recording.all_weights
        return (
            padded([w for w in weights if w.trained], shards) // shards,
            padded([w for w in weights if not w.trained], shards) // shards,
        )

    def local_gradients(self) -> int:
        """The padded rows of a process."""
        return (sum(self.reduced) + self.root_reduced) // self.layout.shards

    def fresh(self, number: int, *, last: bool) -> bool:
        """Whole gradients are let go with every micro-batch."""
        return True

    def begin_forward(self) -> None:
        """Embedding, final norm and head are gathered."""
        self._gather(self.root)
        self._copy_out(self.root)

    def enter(self, block: int) -> None:
        """The buffer of the gather before goes when this one has arrived."""
        before = self.gathered
        self.gathered = 0
        self._gather(self.parts[block])
        self.ledger.drop(GATHERED, before)
        self._copy_out(self.parts[block])

    def leave(self, block: int) -> None:
        """Weights are let go; the gather's buffer stays."""
        self.ledger.drop(GATHERED, self.parts[block])

    def end_forward(self) -> None:
        """All gathered weights are let go."""
        self.ledger.drop(GATHERED, self.root)
        self._free()

    def begin_backward(self, *, last: bool) -> None:
        """Embedding, final norm and head are gathered again; the last block begins to travel."""
        super().begin_backward(last=last)
        self._gather(self.root)
        self._copy_out(self.root)
        self._free()
        self._gather(self.parts[-1])

    def enter_backward(self, block: int) -> None:
        """The block has arrived, and the one before begins to travel."""
        self._copy_out(self.parts[block])
        self._free()
        if block > 0:
            self._gather(self.parts[block - 1])

    def leave_backward(self, block: int) -> None:
        """Weights are let go, gradients reduced."""
        self.ledger.drop(GATHERED, self.parts[block])
        self._reduce(
            _gradients(self.recording.weights[self.recording.kinds[block]]), self.reduced[block]
        )

    def end_backward(self) -> None:
        """What is outside of blocks comes last."""
        self.ledger.drop(GATHERED, self.root)
        self._reduce(self.whole, self.root_reduced)
        self.ledger.drop(TRAVELLING, self.sent)
        self.sent, self.stored = 0, True

    def made(self, size: int) -> None:
        """Whole ones, until they are reduced."""
        self.whole += size
        self.ledger.hold(TRAVELLING, size)

    def _gather(self, size: int) -> None:
        if self.copies:
            self.gathered = size
            self.ledger.hold(GATHERED, size)

    def _copy_out(self, size: int) -> None:
        self.ledger.hold(GATHERED, size)

    def _free(self) -> None:
        self.ledger.drop(GATHERED, self.gathered)
        self.gathered = 0

    def _reduce(self, whole: int, padded: int) -> None:
        """Put gradients into a buffer, let them go, and keep this process's part of their sum."""
        self.ledger.drop(TRAVELLING, self.sent)
        self.sent = padded
        self.ledger.hold(TRAVELLING, padded)
        self.ledger.drop(TRAVELLING, whole)
        self.whole -= whole
        if self.stored:  # added to those of earlier micro-batches
            self.ledger.rise("gradients", padded // self.layout.shards)
        else:
            self.ledger.hold("gradients", padded // self.layout.shards)


class ZeroBucket(Whole):
    """ZeRO-1 and -2: gradients are copied into a bucket as they come, and reduced when it is full.

    A process keeps those of the weights that lie in its part, whole ones.
    """

    def __init__(self, layout: Layout, recording: Recording, ledger: Ledger) -> None:
        super().__init__(layout, recording, ledger)
        trained = [p.numel() for p in recording.trained]
        self.cut = -(-sum(trained) // (2 * layout.shards)) * 2  # DeepSpeed aligns to two numbers
        reached, self.kept = 0, 0
        for numel in trained:  # of the first process
            self.kept += NUMBER * numel if reached < self.cut else 0
            reached += numel
        self.largest = max((n for n in trained if n > REDUCE_ELEMENTS), default=0)
        self.filled, self.held = 0, 0

    def weights(self) -> tuple[int, int]:
        """Whole weights, and a part of float32 masters."""
        trained, frozen = super().weights()
        return trained + NUMBER * self.cut, frozen

    def local_gradients(self) -> int:
        """Those of the weights that lie in this process's part."""
        return self.kept

    def fresh(self, number: int, *, last: bool) -> bool:
        """ZeRO-1 keeps whole gradients until the last micro-batch; else they are copied at once."""
        return self.layout.sharding == "zero1" and number == 0 and not last

    def begin_backward(self, *, last: bool) -> None:
        """The bucket is made for every backward pass."""
        super().begin_backward(last=last)
        self.ledger.hold(TRAVELLING, NUMBER * REDUCE_ELEMENTS)
        self.held = 0

    def leave_backward(self, block: int) -> None:
        """A block's gradients go into the bucket."""
        self._fill(_gradients(self.recording.weights[self.recording.kinds[block]]))

    def end_backward(self) -> None:
        """What is left is reduced; the bucket goes."""
        self._fill(_gradients(self.recording.rest))
        if self._reduces:
            self.ledger.rise(TRAVELLING, max(self.filled, NUMBER * self.largest))
            if not self.held:
                self._keep()
            if self.layout.accumulation > 1 and self.layout.sharding == "zero1":
                self.ledger.drop("gradients", self.gradients)
        # Sums of earlier micro-batches, which these have been added to.
        self.ledger.drop(
            "gradients", max(0, self.ledger.live["gradients"] - self.kept) if self._reduces else 0
        )
        self.ledger.drop(TRAVELLING, NUMBER * REDUCE_ELEMENTS)
        self.filled = 0

    @property
    def _reduces(self) -> bool:
        return self.layout.sharding == "zero2" or self.last

    def _keep(self) -> None:
        self.held = self.kept
        self.ledger.hold("gradients", self.kept)

    def _fill(self, size: int) -> None:
        self.filled += size
        if self._reduces and self.filled > NUMBER * REDUCE_ELEMENTS:
            self.ledger.rise(TRAVELLING, NUMBER * REDUCE_ELEMENTS)
            if not self.held:
                self._keep()
            self.filled %= NUMBER * REDUCE_ELEMENTS


class ZeroParts(Whole):
    """ZeRO-3: a process holds a part of every weight, twice: as weight and as master."""

    def __init__(self, layout: Layout, recording: Recording, ledger: Ledger) -> None:
        super().__init__(layout, recording, ledger)
        weights = recording.all_weights
        self.part = sum(-(-w.numel // layout.shards) for w in weights if w.trained) * NUMBER
        self.frozen = sum(
            -(-w.numel // layout.shards) * w.itemsize for w in weights if not w.trained
        )
        self.live = min(sum(w.nbytes for w in weights), NUMBER * ZERO3_LIVE)

    def weights(self) -> tuple[int, int]:
        """Parts of weights, and as many masters."""
        return 2 * self.part, self.frozen

    def local_gradients(self) -> int:
        """A part."""
        return self.part

    def fresh(self, number: int, *, last: bool) -> bool:
        """Gradients are copied into a bucket as they come."""
        return False

    def begin(self) -> None:
        """Gradients and the bucket have buffers of their own from the start."""
        self.ledger.hold("gradients", self.part)
        self.ledger.hold(TRAVELLING, NUMBER * REDUCE_ELEMENTS)

    def begin_forward(self) -> None:
        """Weights that have been gathered stay, up to a bound."""
        self.ledger.hold(GATHERED, self.live)

    def leave_backward(self, block: int) -> None:
        """A bucket is put in order for its reduction."""
        size = _gradients(self.recording.weights[self.recording.kinds[block]])
        self.ledger.rise(TRAVELLING, min(size, NUMBER * REDUCE_ELEMENTS))

    def end_backward(self) -> None:
        """Gathered weights are let go."""
        self.ledger.drop(GATHERED, self.live)


def _sum(weights: Sequence[Weight], trained: bool) -> int:
    return sum(w.nbytes for w in weights if w.trained is trained)


def _gradients(weights: Sequence[Weight]) -> int:
    return sum(w.numel for w in weights if w.trained) * NUMBER


def padded(weights: Sequence[Weight], shards: int) -> int:
    """Bytes of weights whose rows are padded to a multiple of the processes."""
    return sum(rows_of(w, shards) * shards * w.itemsize for w in weights)


def padded_gradients(weights: Sequence[Weight], shards: int) -> int:
    """Bytes of their gradients, padded likewise."""
    return sum(rows_of(w, shards) * shards for w in weights if w.trained) * NUMBER


def rows_of(weight: Weight, shards: int) -> int:
    """Numbers of a weight that the first of so many processes holds under FSDP2."""
    if not weight.shape:
        return 1
    rows = weight.shape[0]
    return -(-rows // shards) * (weight.numel // max(1, rows))
