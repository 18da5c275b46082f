"""`llmnorm plot RUN...`: pictures of runs.

    plot([Path("runs/quickstart")])       writes runs/quickstart/plots/loss.png, prints the rates
    plot([Path("runs/a"), Path("runs/b")], Path("a-b.png"))

One picture holds, of all the runs together, the loss against tokens and against time, bits per byte
by source, learning rate, gradient norm and throughput. A run alone is held against gzip and xz.

What would surprise: the axis of the loss leaves out the fall of the first tenth, and that of the
gradient norm its highest peaks: both would flatten all that follows.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmnorm.analysis.compression import MODEL, References, label, references, table, verdict
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory, existing
from llmnorm.runs.record import Record, read_metrics, smoothed

# Okabe and Ito's palette, which colour-blind readers can tell apart; references are greys.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")  # where the colours are used up
GREYS = ("#C4C4C4", "#404040", "#808080")
MOST_BARS = 5  # a source; more runs show their totals alone


def plot(runs: Sequence[Path], output: Path | None = None) -> None:
    """Draw the runs in one picture and say where it is; of one run print the rates too.

    Args:
        runs: run directories.
        output: the picture to write (.png, .pdf, .svg); None: RUN/plots/loss.png for a run,
            runs.png here for several.

    Raises:
        InputError: a directory is no run or has no metrics, or the picture cannot be written.
    """
    found = [existing(path) for path in dict.fromkeys(runs)]
    records = dict(zip(names(found), (read_metrics(run.metrics) for run in found), strict=True))
    rates = references(found[0]) if len(found) == 1 else {}
    if output is None:
        output = found[0].plots / "loss.png" if len(found) == 1 else Path("runs.png")
    draw(records, output, rates)
    first = next(iter(records.values()))
    if len(found) == 1 and first.bits_per_byte:
        print(table(first.bits_per_byte, rates))
    print(f"plot: {output}")


def names(runs: Sequence[RunDirectory]) -> list[str]:
    """What the runs are called: their directories' names, as much of the path as tells them."""
    paths = [run.path.resolve() for run in runs]
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def draw(records: Mapping[str, Record], output: Path, rates: References | None = None) -> None:
    """Draw runs, by name.

    Args:
        output: the picture to write (.png, .pdf, .svg).
        rates: bits per byte to draw beside those of a run alone.

    Raises:
        InputError: the picture cannot be written.
    """
    # The object interface draws without a display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
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
        _settings(axis, title, "training tokens", "tokens")
        axis.set_ylim(bottom=0)
    norms = sorted(value for record in records.values() for value in record.training["grad_norm"])
    if norms and norms[-1] > 0:
        axes[1, 1].set_ylim(0, 1.15 * max(norms[int(0.98 * (len(norms) - 1))], 1e-12))
    _numbers(axes[1, 2].yaxis)
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
    alone = len(records) == 1
    settled: list[float] = []
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
    _settings(axis, f"Loss (nats a token) over {over.replace('seconds', 'time')}", title, over)
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
    """Bars of bits per byte by source: the runs', or one run's beside the references."""
    columns = {name: record.bits_per_byte for name, record in records.items()}
    columns = {name: found for name, found in columns.items() if found}
    colours = {name: styles[name]["color"] for name in columns}
    title = "Bits per byte of validation text (less is better)"
    if len(records) == 1 and columns:
        found = next(iter(columns.values()))
        columns = {MODEL: found, **{who: dict(rate) for who, rate in rates.items()}}
        colours = dict(zip(columns, (COLOURS[0], *GREYS), strict=False))
        if rates:
            behind = verdict(found, rates)
            title = textwrap.fill(f"Bits per byte: {behind}", 54)
    if not columns:
        axis.set_axis_off()
        evaluated = any(record.validation["step"] for record in records.values())
        why = "no bits per byte of this objective" if evaluated else "not evaluated yet"
        axis.text(0.5, 0.5, why, ha="center", color=GREYS[2])
        return
    rows = list(dict.fromkeys(name for found in columns.values() for name in found))
    rows = rows if len(columns) <= MOST_BARS else rows[:1]
    height = 0.82 / len(columns)
    for place, (who, found) in enumerate(columns.items()):
        known = [(row, found[name]) for row, name in enumerate(rows) if name in found]
        bars = axis.barh(
            [row + (place - (len(columns) - 1) / 2) * height for row, _ in known],
            [rate for _, rate in known],
            height=height * 0.92,
            color=colours[who],
            label=who,
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


def _settings(axis: Any, title: str, below: str, over: str) -> None:
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
        _numbers(axis.xaxis)
    axis.set_xlim(left=0)


def _numbers(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def _unit(longest: float) -> tuple[str, float]:
    """The unit in which a time reads well, and its seconds."""
    for unit, seconds in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * seconds:
            return unit, seconds
    return "seconds", 1.0
