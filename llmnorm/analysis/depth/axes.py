"""Axes of `llmnorm inspect`'s pictures: lines, bands, scales and legends.

Values are a list with an entry per block (or stream); None is not drawn. A logarithmic axis cannot
show zeros; they become triangles at its bottom, marked by the matplotlib gid "zero".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmnorm.analysis.plots import GREYS

Values = Sequence[float | None]
INK = "#222831"
SOLID: dict[str, Any] = {"linestyle": "-", "marker": "o"}
DASHED: dict[str, Any] = {"linestyle": "--", "marker": "s", "markerfacecolor": "white"}


def with_nan(values: Values) -> list[float]:
    """The values with nan for None, which matplotlib leaves out."""
    return [math.nan if value is None else value for value in values]


def marker_size(count: int) -> float:
    """A marker's size at which `count` neighbours do not touch."""
    return max(1.8, min(5.0, 150 / max(count, 1)))


def draw_line(
    axis: Any, values: Values, colour: str, style: Mapping[str, Any], *, start: int = 1
) -> None:
    """Draw values over `start`, `start` + 1, ..., and a triangle at each zero."""
    numbers = with_nan(values)
    at = list(range(start, start + len(numbers)))
    shape = {"linewidth": 1.7, "markersize": marker_size(len(numbers)), "markeredgewidth": 1.1}
    axis.plot(at, numbers, color=colour, markeredgecolor=colour, **shape, **style)
    zeros = [x for x, value in zip(at, numbers, strict=True) if value == 0]
    if zeros:
        below = axis.get_xaxis_transform()
        axis.plot(
            zeros, [0.03] * len(zeros), "v", color=colour, transform=below, gid="zero", markersize=6
        )


def draw_band(axis: Any, low: Values, high: Values, colour: str) -> None:
    """Fill the area between two lists of values over blocks 1, 2, ..."""
    at = range(1, len(low) + 1)
    axis.fill_between(at, with_nan(low), with_nan(high), color=colour, alpha=0.13, linewidth=0)


def finish(
    axis: Any,
    title: str,
    *,
    log: bool = False,
    kinds: Sequence[tuple[str, Mapping[str, Any]]] = (),
    below: str = "block",
    grid: bool = True,
) -> None:
    """Set title, scale, legend and everything that is alike on all axes; called last.

    Args:
        log: a logarithmic scale, where any value is positive.
        kinds: (name, style) of the legend's entries, drawn in grey; fewer than two: no legend.
        below: label of the x axis.
        grid: horizontal lines.
    """
    from matplotlib.lines import Line2D

    axis.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    axis.set_xlabel(below, color=INK)
    positive = any((line.get_ydata() > 0).any() for line in _data_lines(axis)) if log else False
    if positive:
        _log_scale(axis)
    else:
        for mark in [line for line in axis.lines if line.get_gid() == "zero"]:
            mark.remove()
    axis.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GREYS[0])
    axis.tick_params(colors=INK, labelsize=9, color=GREYS[0])
    if grid:
        axis.grid(axis="y", color=GREYS[0], alpha=0.45, linewidth=0.7)
        axis.set_axisbelow(True)
    whole_numbers(axis.xaxis)
    if len(kinds) > 1:
        handles = [
            Line2D([], [], **{"color": GREYS[1], "linewidth": 1.5, "markersize": 4.5, **style})
            for _, style in kinds
        ]
        axis.legend(handles, [name for name, _ in kinds], frameon=False, fontsize=9, loc="best")


def _data_lines(axis: Any) -> list[Any]:
    """The axis's lines without the triangles of zeros, their data as floats."""
    import numpy as np

    lines = [line for line in axis.lines if line.get_gid() != "zero"]
    for line in lines:
        line.set_ydata(np.asarray(line.get_ydata(), dtype=float))
    return lines


def _log_scale(axis: Any) -> None:
    """A logarithmic axis whose labels are plain numbers: 1, 2, 5 where it spans little."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.set_yscale("log", nonpositive="mask")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1,)
    narrow = decades < 0.9
    axis.yaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=steps, numticks=9))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=9))
