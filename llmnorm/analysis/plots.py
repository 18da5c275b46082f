"""`llmnorm plot RUN...`: pictures of runs.

    plot([Path("runs/quickstart")])       writes runs/quickstart/plots/loss.png, prints the rates
    plot([Path("runs/a"), Path("runs/b")], Path("a-b.png"))

One picture shows all the runs together: loss against tokens and against time, bits per byte by
source, learning rate, gradient norm and throughput, and scores on lm-eval's tasks where a run has
taken some (`evaluation.tasks`). A single run is shown beside gzip and xz. A dotted line stands
where a stage of the data begins (`data.stages`). A second picture shows the load of experts, where
a run has measured it (expert_load.py).

What would surprise: the loss axis is scaled to the losses after the first tenth of a run, and that
of the gradient norm to its lower 98 %; all of them would flatten the rest.
"""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmnorm.analysis import expert_load
from llmnorm.analysis.compression import MODEL, References, label, references, verdict
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory, existing
from llmnorm.runs.record import Record, read_metrics, smoothed

# Okabe and Ito's palette, which colour-blind readers can tell apart; references are greys.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")  # where the colours are used up
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#C4C4C4", "#404040", "#808080")
MOST_BARS = 5  # of a source; of more runs only the bars of all sources together are drawn


def plot(runs: Sequence[Path], output: Path | None = None) -> None:
    """Draw the runs in one picture and print its path.

    Args:
        runs: run directories.
        output: the picture to write (.png, .pdf, .svg); None: RUN/plots/loss.png for one run,
            runs.png in the working directory for several. The picture of experts' loads stands
            beside it, with `-experts` at the end of its name.

    Raises:
        InputError: a directory is not a run or has no metrics, or the picture cannot be written.
    """
    found = [existing(path) for path in dict.fromkeys(runs)]
    records = dict(zip(names(found), (read_metrics(run.metrics) for run in found), strict=True))
    for record in records.values():
        if record.damaged:
            print(f"llmnorm: note: {record.damaged} and left out", file=sys.stderr)
    rates = references(found[0]) if len(found) == 1 else {}
    if output is None:
        output = found[0].plots / "loss.png" if len(found) == 1 else Path("runs.png")
    draw(records, output, rates)
    print(f"plot: {output}")
    loads = {name: record.expert_load for name, record in records.items() if record.expert_load}
    if loads:
        beside = output.with_name(f"{output.stem}-experts{output.suffix}")
        save(expert_load.picture(loads), beside)
        print(f"plot: {beside}")


def names(runs: Sequence[RunDirectory]) -> list[str]:
    """Names for the runs: the ends of their paths, as short as they can be and still differ."""
    paths = [run.path.resolve() for run in runs]
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def draw(records: Mapping[str, Record], output: Path, rates: References | None = None) -> None:
    """Draw runs.

    Args:
        records: the runs' metrics by name.
        output: the picture to write (.png, .pdf, .svg).
        rates: bits per byte of compressors, drawn where there is a single run.

    Raises:
        InputError: the picture cannot be written.
    """
    # Without pyplot, so that no display is needed and no global state changes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    scored = any(record.tasks for record in records.values())
    axes = figure.subplots(3 if scored else 2, 3)
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % 4]}
        for i, name in enumerate(records)
    }
    _loss(axes[0, 0], records, styles, "tokens", "training tokens")
    _loss(axes[0, 1], records, styles, "seconds", "training time")
    _rates(axes[0, 2], records, styles, rates or {})
    for name, record in records.items():
        tokens, style = record.training["tokens"], styles[name]
        axes[1, 0].plot(tokens, record.training["lr"], linewidth=1.6, **style)
        for axis, key in ((axes[1, 1], "grad_norm"), (axes[1, 2], "tokens_per_second")):
            values = record.training[key]
            axis.plot(tokens, values, color=style["color"], alpha=0.18, linewidth=0.7)
            axis.plot(tokens, smoothed(tokens, values), linewidth=1.6, **style)
    for axis, title in zip(
        axes[1], ("Learning rate", "Gradient norm", "Throughput (tokens a second)"), strict=True
    ):
        _finish(axis, title, "training tokens", "tokens")
        axis.set_ylim(bottom=0)
    norms = sorted(value for record in records.values() for value in record.training["grad_norm"])
    if norms and norms[-1] > 0:
        axes[1, 1].set_ylim(0, 1.15 * max(norms[int(0.98 * (len(norms) - 1))], 1e-12))
    if scored:
        figure.set_figheight(11.5)
        for axis in axes[2]:
            axis.remove()
        _tasks(figure.add_subplot(axes[0, 0].get_gridspec()[2, :]), records, styles)
    for axis in (axes[0, 0], *axes[1]):
        for name, record in records.items():
            for begins in record.stages:  # where the data's mixture changes
                axis.axvline(begins, color=styles[name]["color"], linestyle=":", linewidth=0.9)
    _engineering(axes[1, 2].yaxis)
    axes[1, 0].yaxis.set_major_formatter("{x:g}")
    if len(records) == 1:
        figure.suptitle(next(iter(records)), fontsize=14, fontweight="bold")
    else:
        _legend(figure, styles)
    save(figure, output)


def save(figure: Any, output: Path) -> None:
    """Write a matplotlib figure, whole or not at all.

    Raises:
        InputError: the picture cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".writing-{output.name}")
        figure.savefig(temporary)
        temporary.replace(output)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise InputError(f"{output} cannot be written: {error}") from None


def _legend(figure: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2.4, **style) for style in styles.values()]
    figure.legend(
        lines, list(styles), loc="outside upper center", ncols=min(len(styles), 6), frameon=False
    )


def _loss(
    axis: Any,
    records: Mapping[str, Record],
    styles: Mapping[str, Mapping[str, Any]],
    over: str,
    title: str,
) -> None:
    """The loss over `over`: "tokens" or "seconds"."""
    alone = len(records) == 1
    settled: list[float] = []  # losses after the first tenth, which set the axis
    for name, record in records.items():
        style, training, validation = styles[name], record.training, record.validation
        if training["loss"]:
            smooth = smoothed(training["tokens"], training["loss"])
            if alone:
                axis.plot(
                    training[over],
                    training["loss"],
                    color=style["color"],
                    alpha=0.25,
                    linewidth=0.7,
                )
            axis.plot(training[over], smooth, label="training (smoothed)", linewidth=1.7, **style)
            settled += smooth[len(smooth) // 10 :]
        if validation["loss"]:
            axis.plot(
                validation[over],
                validation["loss"],
                color=COLOURS[1] if alone else style["color"],
                linestyle="-" if alone else "none",
                marker="o",
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                linewidth=1.2,
                label=f"validation (last: {validation['loss'][-1]:.3f})" if alone else "validation",
            )
            settled += validation["loss"]
    if settled and max(settled) > min(settled):
        margin = 0.06 * (max(settled) - min(settled))
        axis.set_ylim(min(settled) - margin, max(settled) + margin)
    _finish(axis, f"Loss (nats a token) over {over.replace('seconds', 'time')}", title, over)
    if over == "tokens":
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        legend = axis.legend(handles.values(), handles.keys(), frameon=False, loc="upper right")
        for handle in () if alone else legend.legend_handles:
            handle.set(color=GREYS[2], linestyle="-" if handle.get_marker() == "None" else "none")


def _rates(
    axis: Any,
    records: Mapping[str, Record],
    styles: Mapping[str, Mapping[str, Any]],
    rates: References,
) -> None:
    """Bars of bits per byte by source: of several runs, or of one run and the compressors."""
    columns = {name: record.bits_per_byte for name, record in records.items()}
    columns = {name: found for name, found in columns.items() if found}
    colours = {name: styles[name]["color"] for name in columns}
    title = "Bits per byte of validation text (less is better)"
    if len(records) == 1 and columns:
        found = next(iter(columns.values()))
        columns = {MODEL: found, **{name: dict(rate) for name, rate in rates.items()}}
        colours = dict(zip(columns, (COLOURS[0], *GREYS), strict=False))
        if rates:
            behind = verdict(found, rates)
            title = textwrap.fill(f"Bits per byte: {behind}", 54)
    if not columns:
        axis.set_axis_off()
        evaluated = any(record.validation["step"] for record in records.values())
        reason = "this objective has no bits per byte" if evaluated else "not evaluated yet"
        axis.text(0.5, 0.5, reason, ha="center", color=GREYS[2])
        return
    rows = list(dict.fromkeys(name for found in columns.values() for name in found))
    rows = rows if len(columns) <= MOST_BARS else rows[:1]
    height = 0.82 / len(columns)
    for number, (column, found) in enumerate(columns.items()):
        known = [(row, found[name]) for row, name in enumerate(rows) if name in found]
        bars = axis.barh(
            [row + (number - (len(columns) - 1) / 2) * height for row, _ in known],
            [rate for _, rate in known],
            height=height * 0.92,
            color=colours[column],
            label=column,
        )
        axis.bar_label(bars, fmt="%.3f" if len(rows) == 1 else "%.2f", padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), map(label, rows))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.14)
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    if len(records) == 1 and rates:
        axis.legend(
            frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(columns)
        )


def _tasks(
    axis: Any, records: Mapping[str, Record], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    """The scores of lm-eval's tasks: a marker a task, a colour a run (of one run a task)."""
    alone = len(records) == 1
    tasks = list(dict.fromkeys(task for record in records.values() for task in record.tasks))
    for name, record in records.items():
        for number, task in enumerate(tasks):
            if task not in record.tasks:
                continue
            own = COLOURS[number % len(COLOURS)] if alone else styles[name]["color"]
            axis.plot(
                *record.tasks[task],
                color=own,
                linestyle="-" if alone else styles[name]["linestyle"],
                marker=MARKERS[number % len(MARKERS)],
                label=task if alone else f"{name}: {task}",
            )
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    _finish(axis, "Scores on benchmark tasks", "training tokens", "tokens")


def _finish(axis: Any, title: str, below: str, over: str) -> None:
    """Title, label and number format of an axis; `over`: "tokens" or "seconds"."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_title(title, fontsize=11)
    axis.set_xlabel(below)
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if over == "seconds":
        unit, seconds = _unit(axis.get_xlim()[1])
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 2, 3, 6, 10]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / seconds:g}"))
        axis.set_xlabel(f"{below} ({unit})")
    else:
        _engineering(axis.xaxis)
    axis.set_xlim(left=0)


def _engineering(axis: Any) -> None:
    """Numbers with metric prefixes: 10k, 2M."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def _unit(longest: float) -> tuple[str, float]:
    """The unit in which a time is easy to read, and its length in seconds."""
    for unit, seconds in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * seconds:
            return unit, seconds
    return "seconds", 1.0
