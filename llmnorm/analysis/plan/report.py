"""The plan of a run's memory as a table, as JSON, and what would help where it does not fit."""

from dataclasses import asdict, replace
from typing import Any, NamedTuple

from llmnorm.analysis.plan.layout import Layout, alone
from llmnorm.analysis.plan.memory import Memory, memory
from llmnorm.analysis.plan.recording import Recording, record, refuse_uncounted
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError

GIB = 2**30


def memory_table(config: RunConfig) -> str:
    """The table that `--print-memory` prints: one process that holds the whole model.

    Raises:
        InputError: as `refuse_uncounted`, `alone` and `memory`.
    """
    refuse_uncounted(config, "--print-memory")
    layout = alone(config)
    return "\n".join(
        [
            f"{_rows(layout)}; a process that holds the whole model on {layout.device}",
            *_lines(_parts(memory(layout))),
        ]
    )


class Change(NamedTuple):
    """A change of the layout, and what is needed after it."""

    words: str
    needed: Memory


def describe(layout: Layout, needed: Memory, recording: Recording, best: Change | None) -> str:
    """What `llmnorm plan` prints of memory.

    Args:
        best: what `what_helps_most` has found.
    """
    gpu, cards = layout.gpu, "GPU" if layout.world == 1 else "GPUs"
    numbers = sum(weight.numel for weight in recording.all_weights)
    spread = f"{layout.shards} processes hold a copy" if layout.shards > 1 else "whole copies"
    if layout.replicas > 1:
        spread += f", {layout.replicas} copies"
    verdict = "fits" if needed.fits else "does not fit"
    lines = [
        f"{numbers / 1e6:,.1f}M parameters on {layout.world} {cards} ({gpu.name}, "
        f"{gpu.memory_bytes / GIB:.1f} GiB each), sharding {layout.sharding}: {spread}",
        f"{_rows(layout)}, {layout.accumulation} of these a step",
        "",
        "memory of the process with the most:",
        *_lines(_parts(needed)),
        f"what is no tensor (estimated): {needed.beside / GIB:.2f} GiB",
        f"needed: {needed.needed / GIB:.2f} GiB of {needed.there / GIB:.2f}: {verdict}",
        f"at the peak ({needed.moment}): {_at_peak(needed)}",
    ]
    if needed.balance > 1.005:
        lines.append(f"busiest owner of matrices: {needed.balance:.2f} times the mean")
    if best is not None:
        lines.append(
            f"what would help most: {best.words}, {needed.needed / GIB:.2f} -> "
            f"{best.needed.needed / GIB:.2f} GiB"
        )
    return "\n".join(lines)


def as_json(
    layout: Layout, needed: Memory, recording: Recording, best: Change | None
) -> dict[str, Any]:
    """The same as plain values; sizes in bytes."""
    return {
        "gpu": asdict(layout.gpu),
        "gpus": layout.world,
        "sharding": layout.sharding,
        "shards": layout.shards,
        "replicas": layout.replicas,
        "micro_batch": layout.micro_batch,
        "accumulation": layout.accumulation,
        "context_length": layout.config.data.context_length,
        "recompute": layout.recompute,
        "precision": layout.config.training.precision,
        "optimizer": layout.config.optimizer.name,
        "parameters": sum(weight.numel for weight in recording.all_weights),
        "memory": {**asdict(needed), "needed": needed.needed, "fits": needed.fits},
        "what_helps_most": None
        if best is None
        else {"change": best.words, "needed": best.needed.needed},
    }


def what_helps_most(layout: Layout, needed: Memory, recording: Recording) -> Change | None:
    """The one change of the layout after which least is needed, and what is needed then.

    None where no change helps by more than a hundredth. The changes: half the micro-batch,
    recomputation, another sharding of the same processes.
    """
    found: list[Change] = []
    if layout.world > 1:
        for sharding in ("fsdp2", "zero3") if layout.sharding != "fsdp2" else ():
            other = replace(layout, sharding=sharding, shards=layout.world, replicas=1)
            found.append(Change(f"--sharding {sharding}", memory(other, recording)))
    half = layout.micro_batch // 2
    if half and layout.micro_batch % half == 0:
        other = replace(layout, micro_batch=half, accumulation=2 * layout.accumulation)
        fewer = record(layout.config, half, layout.device, like=recording)
        found.append(Change(f"training.micro_batch={half}", memory(other, fewer)))
    if not layout.recompute:
        parallel = layout.config.parallel.model_copy(update={"activation_checkpointing": True})
        config = layout.config.model_copy(update={"parallel": parallel})
        other = replace(layout, config=config, recompute=True)
        again = record(config, other.micro_batch, other.device, like=recording)
        found.append(Change("parallel.activation_checkpointing=true", memory(other, again)))
    if not found:
        return None
    best = min(found, key=lambda change: change.needed.needed)
    return best if best.needed.needed < 0.99 * needed.needed else None


def refuse_what_does_not_fit(layout: Layout, needed: Memory, best: Change | None) -> None:
    """Refuse a plan that does not fit.

    Args:
        best: what `what_helps_most` has found.

    Raises:
        InputError: names what is largest, and the change that would help most.
    """
    if needed.fits:
        return
    largest = max(needed.at_peak, key=lambda kind: needed.at_peak[kind])
    cure = "more GPUs, or a smaller model"
    if best is not None:
        after = best.needed
        enough = "would fit" if after.fits else f"would need {after.needed / GIB:.1f} GiB"
        cure = f"{best.words} {enough}"
    raise InputError(
        f"plan: does not fit: {needed.needed / GIB:.1f} GiB are needed and {layout.gpu.name} has "
        f"{needed.there / GIB:.1f}; most of it {largest} "
        f"({needed.at_peak[largest] / GIB:.1f} GiB); {cure}"
    )


def _rows(layout: Layout) -> str:
    """Rows at once, and how."""
    count = layout.micro_batch
    how = [f"precision {layout.config.training.precision}"]
    if layout.recompute:
        how.append("blocks recomputed")
    return (
        f"{count} {'row' if count == 1 else 'rows'} of {layout.config.data.context_length} tokens "
        f"at once, {', '.join(how)}"
    )


def _parts(needed: Memory) -> list[tuple[str, int]]:
    return [
        ("weights, frozen", needed.frozen),
        *([("weights, teacher", needed.teacher)] if needed.teacher else []),
        ("weights, trained", needed.trained),
        ("gradients", needed.gradients),
        ("optimizer state", needed.state + needed.average),
        ("activations", needed.activations),
        ("logits", needed.logits),
        ("optimizer's step", needed.scratch),
        ("peak of a step", needed.peak),
        ("a checkpoint", needed.checkpoint),
    ]


def _lines(parts: list[tuple[str, int]]) -> list[str]:
    width = max(len(name) for name, _ in parts)
    return [f"{name:{width}}  {size / GIB:9.3f} GiB  {size:>16,}" for name, size in parts]


def _at_peak(needed: Memory) -> str:
    kinds = sorted(needed.at_peak.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size / GIB:.2f} GiB" for kind, size in kinds[:4])
