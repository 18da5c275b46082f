"""The forward and backward passes of a step, in the order in which they happen.

    passes(layout, recording, ledger)

The parts are those of a recording; what a process holds beside them is shardings.py's.

What would surprise: autocast keeps every weight that it has cast until the forward pass is over.
Recomputed blocks need these casts no longer, and 2 bytes a parameter of the whole model are live
all the same.
"""

from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.ledger import Ledger
from llmnorm.analysis.plan.recording import Part, Recording
from llmnorm.analysis.plan.shardings import Whole, sharding

CAST = "weights cast to bf16"


def passes(layout: Layout, recording: Recording, ledger: Ledger) -> None:
    """Run the passes of a step on a ledger that holds what is there before it."""
    held = sharding(layout, recording, ledger)
    held.begin()
    for number in range(layout.accumulation):
        # A third micro-batch is like the second, but for the last.
        if 2 <= number < layout.accumulation - 1:
            continue
        _micro_batch(recording, held, ledger, number, last=number == layout.accumulation - 1)


def _micro_batch(
    recording: Recording, held: Whole, ledger: Ledger, number: int, *, last: bool
) -> None:
    kinds = recording.kinds
    parts = recording.first if held.fresh(number, last=last) else recording.again

    def play(name: str, what: str = "activations") -> None:
        part = parts.get(name, Part())
        ledger.rise(what, part.rise)
        ledger.hold("activations", part.left - part.gradients - part.cast)
        ledger.hold(CAST, part.cast)
        held.made(part.gradients)

    ledger.doing = "forward pass"
    before = ledger.live["activations"]
    held.begin_forward()
    play("teacher")
    play("embedding")
    for block, kind in enumerate(kinds):
        held.enter(block)
        play(f"forward {kind}")
        held.leave(block)
    play("norm")
    ledger.doing = "loss"
    play("head", "logits")
    held.end_forward()
    ledger.drop(CAST, ledger.live[CAST])
    held.begin_backward(last=last)
    play("head backward", "logits")
    ledger.doing = "backward pass"
    play("norm backward")
    for block in reversed(range(len(kinds))):
        held.enter_backward(block)
        play(f"backward {kinds[block]}")
        held.leave_backward(block)
    play("embedding backward")
    held.end_backward()
    ledger.drop("activations", ledger.live["activations"] - before)
