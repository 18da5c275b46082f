"""The picture of a comparison, against its first baseline.

    a  final loss by learning rate          b  final loss by length of the run
    c  factors with their intervals         d  training losses

Without tuning, a shows the final losses of the seeds. Without runs of other lengths, b shows the
seeds and c the gaps in loss. An arm has the same colour in all four. `found` is everywhere what
`results.results` returned.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmnorm.analysis.compare.report import interval
from llmnorm.analysis.plots import COLOURS, GREYS, STYLES, save
from llmnorm.runs.record import smoothed

Tree = Mapping[str, Any]

MARKERS = "osD^vP*X"  # beside the colours, for prints without them


def draw(found: Tree, output: Path, title: str) -> None:
    """Draw the picture.

    Args:
        found: what `results` returned.
        output: the picture to write (.png, .pdf, .svg).
        title: its heading.

    Raises:
        InputError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 7.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": STYLES[i // len(COLOURS) % len(STYLES)],
        }
        for i, name in enumerate(found["arms"])
    }
    baseline = next(iter(found["against"]))
    tuned = any(arm["tuning"] for arm in found["arms"].values())
    (_tuning if tuned else _seeds)(axes[0, 0], found, styles)
    if found["horizons"] == "none":
        _seeds(axes[0, 1], found, styles)
        _gaps(axes[1, 0], found, styles, baseline)
    else:
        _lengths(axes[0, 1], found, styles, baseline)
        _factors(axes[1, 0], found, styles, baseline)
    _curves(axes[1, 1], found, styles)
    for axis, letter in zip(axes.flat, "abcd", strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        text = axis.get_title()
        axis.set_title("")
        axis.set_title(f"{letter}   {text}", fontsize=10.5, loc="left")
    lines = [Line2D([], [], linewidth=1.5, markersize=6, **style) for style in styles.values()]
    names = [f"{name} (baseline)" if name == baseline else name for name in styles]
    figure.legend(
        lines,
        names,
        loc="outside upper center",
        ncols=min(len(names), 6),
        frameon=False,
        handlelength=3.5,
        title=title,
        title_fontproperties={"weight": "bold", "size": 12},
    )
    save(figure, output)


def _tuning(axis: Any, found: Tree, styles: Mapping[str, Tree]) -> None:
    """Final loss by learning rate."""
    settled: list[float] = []
    for name, arm in found["arms"].items():
        points = [(p["lr"], p["loss"]) for p in arm["tuning"]]
        finite = [(lr, loss) for lr, loss in points if math.isfinite(loss)]
        if finite:
            axis.plot(*zip(*finite, strict=True), linewidth=1.4, markersize=4, **styles[name])
            best = min(finite, key=lambda point: point[1])
            axis.plot(*best, markersize=10, markerfacecolor="none", **styles[name])
            settled += [loss for _, loss in finite]
        for lr, _ in (point for point in points if not math.isfinite(point[1])):
            axis.plot(
                [lr],
                [0.97],
                marker="x",
                color=styles[name]["color"],
                markersize=7,
                transform=axis.get_xaxis_transform(),
                linestyle="none",
            )
    if settled and max(settled) > min(settled):
        low, high = min(settled), float(np.quantile(settled, 0.9))
        axis.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    steps = (1, 2, 5) if high / low < 200 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [t for t in (k * 10.0**d for d in decades for k in steps) if low <= t <= high]
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("learning rate (ring: chosen; ×: diverged)")
    axis.set_ylabel("final loss (nats a token)")
    axis.set_title("Learning rates, one seed")
    axis.grid(alpha=0.2)


def _seeds(axis: Any, found: Tree, styles: Mapping[str, Tree]) -> None:
    """Final losses seed by seed."""
    for name, arm in found["arms"].items():
        axis.plot(
            range(len(found["seeds"])), arm["losses"], linewidth=1.2, markersize=5, **styles[name]
        )
    axis.set_xticks(range(len(found["seeds"])), [f"seed {seed}" for seed in found["seeds"]])
    axis.margins(x=0.15)
    axis.set_ylabel("final loss (nats a token)")
    axis.set_title("Paired seeds")
    axis.grid(axis="y", alpha=0.2)


def _lengths(axis: Any, found: Tree, styles: Mapping[str, Tree], baseline: str) -> None:
    """Final losses by length, and the line by which gaps are converted."""
    for number, (name, arm) in enumerate(found["arms"].items()):
        style, shift = styles[name], 1 + 0.006 * (number - (len(found["arms"]) - 1) / 2)
        means = []
        for horizon, losses in arm["horizons"].items():
            finite = [loss for loss in losses if math.isfinite(loss)]
            axis.plot(
                [float(horizon) * shift] * len(finite),
                finite,
                alpha=0.45,
                markersize=3.5,
                markeredgewidth=0,
                **{**style, "linestyle": "none"},
            )
            if len(finite) == len(losses):
                means.append((float(horizon) * shift, float(np.mean(losses))))
        if means:
            axis.plot(*zip(*means, strict=True), linewidth=1.4, markersize=6, **style)
    base = found["arms"][baseline]
    if math.isfinite(base["loss"]):
        axis.axhline(base["loss"], color=GREYS[2], linewidth=0.8, linestyle=":")
    pairs = found["against"][baseline].values()
    varied = [pair for pair in pairs if pair["converted_by"] == baseline]
    if varied and varied[0]["nats_for_e_times_the_length"] > 0 and math.isfinite(base["loss"]):
        beta = varied[0]["nats_for_e_times_the_length"]
        x = np.geomspace(0.85, 1.6, 20)
        axis.plot(
            x,
            base["loss"] - beta * np.log(x),
            color=GREYS[1],
            linewidth=0.9,
            linestyle="--",
            label=f"{beta:.3f} nats for e times the length",
        )
        axis.legend(frameon=False, fontsize=8.5, loc="upper right")
    axis.set_xscale("log")
    ticks = sorted({float(h) for arm in found["arms"].values() for h in arm["horizons"]})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"length of a complete run (1: {_tokens(found['tokens'])} tokens)")
    axis.set_ylabel("final loss (nats a token)")
    axis.set_title("Final losses by length")
    axis.grid(axis="y", alpha=0.2)


def _tokens(count: int) -> str:
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _factors(axis: Any, found: Tree, styles: Mapping[str, Tree], baseline: str) -> None:
    """The factors in tokens (full) and seconds (hollow), with intervals."""
    from matplotlib.lines import Line2D

    others = found["against"][baseline]
    ends: list[float] = [0.95, 1.05]
    rows = []
    for row, (name, pair) in enumerate(others.items()):
        rows.append(name)
        style = styles[name]
        for offset, tree, hollow in (
            (-0.14, pair["tokens"], False),
            (0.14, pair["timing"] and pair["timing"]["seconds"], True),
        ):
            if not tree or not 0 < tree["value"] < 1e6:
                continue
            low, high = (tree["value"] if math.isnan(tree[e]) else tree[e] for e in ("low", "high"))
            low, high = max(low, tree["value"] / 8), min(high, tree["value"] * 8)
            ends += [low, high]
            axis.plot([low, high], [row + offset] * 2, color=style["color"], linewidth=1.6)
            axis.plot(
                [tree["value"]],
                [row + offset],
                markersize=7,
                **style,
                markerfacecolor="white" if hollow else style["color"],
            )
            axis.annotate(
                interval(tree),
                (high, row + offset),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=GREYS[1],
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
            )
        if math.isinf(pair["gap"]["value"]):
            axis.annotate(
                "diverged",
                (1, row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=GREYS[1],
            )
        resolvable = pair["tokens"]["resolvable"]
        if 1 < resolvable < 8:
            axis.fill_betweenx(
                [row - 0.4, row + 0.4],
                1 / resolvable,
                resolvable,
                color=GREYS[0],
                alpha=0.35,
                linewidth=0,
            )
            ends += [resolvable, 1 / resolvable]
    _one_row_per_arm(axis, rows, no_difference=1)
    axis.set_xscale("log")
    low, high = min(ends), max(ends)
    axis.set_xlim(low * (low / high) ** 0.05, high * (high / low) ** 0.45)
    ticks = _ticks(low, high)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"what {baseline} needs over what the arm needs  (→ the arm is ahead)")
    axis.set_title("Factors with 95 % intervals (grey: not resolved by these seeds)")
    marks = [
        Line2D([], [], linestyle="none", marker="o", color=GREYS[1], label="tokens"),
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            color=GREYS[1],
            markerfacecolor="white",
            label="seconds",
        ),
    ]
    axis.legend(handles=marks, frameon=False, fontsize=8.5, loc="upper right", ncols=2)


def _gaps(axis: Any, found: Tree, styles: Mapping[str, Tree], baseline: str) -> None:
    """The gaps in loss with their intervals."""
    others = found["against"][baseline]
    for row, (name, pair) in enumerate(others.items()):
        value, *ends = (pair["gap"][key] for key in ("value", "low", "high"))
        if math.isinf(value):
            axis.annotate("diverged", (0, row), xytext=(8, 0), textcoords="offset points")
            continue
        low, high = (value if math.isnan(end) else end for end in ends)
        axis.plot([low, high], [row] * 2, color=styles[name]["color"], linewidth=1.6)
        axis.plot([value], [row], markersize=7, **styles[name])
        axis.annotate(
            interval(pair["gap"], "+.4f"),
            (value, row),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREYS[1],
        )
    _one_row_per_arm(axis, list(others), no_difference=0)
    axis.margins(x=0.25)
    axis.set_xlabel(f"loss of {baseline} minus the arm's, nats a token  (→ the arm is ahead)")
    axis.set_title("Gaps with 95 % intervals")


def _one_row_per_arm(axis: Any, arms: list[str], no_difference: float) -> None:
    """Arms from top to bottom, and a line where an arm equals the baseline."""
    axis.axvline(no_difference, color=GREYS[1], linewidth=1)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.2)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, far enough apart to be read, 1 among them."""
    gap = max(math.log(high / low) / 9, 0.015)
    fine = [round(1 + k / 100, 2) for k in range(-9, 10)]
    coarse = [
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1.1,
        1.2,
        1.3,
        1.5,
        1.75,
        2,
        2.5,
        3,
        4,
        5,
    ]
    kept = [1.0]
    for tick in sorted(
        {*fine, *coarse, 7.0, 10.0, 20.0}, key=lambda t: (t not in coarse, abs(t - 1))
    ):
        if low <= tick <= high and all(abs(math.log(tick / other)) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


def _curves(axis: Any, found: Tree, styles: Mapping[str, Tree]) -> None:
    """Training losses of the first seed; who is ahead in the middle may be behind at the end."""
    late: list[float] = []
    for name, arm in found["arms"].items():
        curve = arm["curves"][0]
        if curve:
            tokens, losses = zip(*curve, strict=True)
            smooth = smoothed(tokens, losses)
            axis.plot(tokens, smooth, linewidth=1.5, **{**styles[name], "marker": None})
            late += smooth[len(smooth) // 5 :]
    if late and max(late) > min(late):
        margin = 0.06 * (max(late) - min(late))
        axis.set_ylim(min(late) - margin, max(late) + margin)
    from matplotlib.ticker import EngFormatter

    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlim(left=0)
    axis.set_xlabel("training tokens")
    axis.set_ylabel("training loss (nats a token)")
    axis.set_title(f"Training, seed {found['seeds'][0]} (smoothed; rankings count at the end)")
    axis.grid(axis="y", alpha=0.2)
