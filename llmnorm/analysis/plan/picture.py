"""A picture of a plan: a bar of memory by kind for every way to lay the same run out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmnorm.analysis.plan.layout import Layout
from llmnorm.analysis.plan.memory import GIB, Memory, memory
from llmnorm.analysis.plan.recording import Recording
from llmnorm.analysis.plots import COLOURS, GREYS, save

# Kinds in the order in which they are stacked; some have one colour together.
KINDS = {
    "weights": COLOURS[0],
    "teacher": COLOURS[0],
    "buffers": COLOURS[0],
    "optimizer state": COLOURS[1],
    "moving average": COLOURS[1],
    "gradients": COLOURS[2],
    "travelling gradients": COLOURS[3],
    "gathered weights": COLOURS[5],
    "weights cast to bf16": COLOURS[5],
    "activations": COLOURS[4],
    "logits": COLOURS[6],
    "optimizer's step": GREYS[2],
    "no tensor": GREYS[0],
}


def layouts(layout: Layout) -> list[Layout]:
    """The asked layout first, then the same processes under every other sharding."""
    if layout.world == 1:
        return [layout]
    found = [layout]
    for sharding in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        if sharding != layout.sharding:
            shards = 1 if sharding == "ddp" else layout.world
            replicas = layout.world // shards
            found.append(replace(layout, sharding=sharding, shards=shards, replicas=replicas))
    per_node = layout.gpu.per_node
    nodes = layout.world // per_node
    if layout.sharding != "hsdp" and nodes > 1 and layout.world % per_node == 0:
        found.append(replace(layout, sharding="hsdp", shards=per_node, replicas=nodes))
    return found


def draw(layout: Layout, recording: Recording, output: Path) -> None:
    """Draw the peak of every layout by kind, and the memory that there is.

    Raises:
        InputError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = layouts(layout)
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(shown)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    bars(axis, {_name(other): memory(other, recording) for other in shown})
    there = layout.gpu.memory_bytes / GIB
    axis.axvline(there, color="black", linewidth=1.2, linestyle="--")
    axis.text(
        there, -0.62, f"{layout.gpu.name}: {there:.0f} GiB", ha="center", va="bottom", fontsize=9
    )
    save(figure, output)


def bars(axis: Any, needed: dict[str, Memory]) -> None:
    """A stacked bar for each; what needs too little to be seen has no place in the legend."""
    parts = [{**found.at_peak, "no tensor": found.beside} for found in needed.values()]
    least = 0.01 * max(found.needed for found in needed.values())
    for row, sizes in enumerate(parts):
        reached = 0.0
        for kind, colour in KINDS.items():
            size = sizes.get(kind, 0) / GIB
            axis.barh(row, size, left=reached, color=colour, height=0.72, edgecolor="white")
            reached += size
        axis.text(reached, row, f" {reached:.1f}", va="center", fontsize=9)
    seen = [kind for kind in KINDS if any(sizes.get(kind, 0) > least for sizes in parts)]
    from matplotlib.patches import Patch

    axis.legend(
        [Patch(color=KINDS[kind]) for kind in seen],
        seen,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=5,
        fontsize=9,
    )
    axis.set_yticks(range(len(needed)), list(needed))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("GiB of the process with the most, at the step's highest moment")
    axis.margins(x=0.08)
    axis.spines[["top", "right"]].set_visible(False)


def _name(layout: Layout) -> str:
    copies = f", {layout.replicas} copies" if layout.sharding == "hsdp" else ""
    return f"{layout.sharding}{copies}"
