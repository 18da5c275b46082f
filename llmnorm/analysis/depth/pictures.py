"""The pictures of `llmnorm inspect`: a PNG per question, with all models in it.

A colour is a model: blue the first, orange the second. Where a model has two lines, solid circles
are the mixer (or the first figure) and dashed squares the MLP (or the second). Blocks are counted
from 1; 0 is the embedding.
"""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llmnorm.analysis.depth.axes import (
    DASHED,
    INK,
    SOLID,
    draw_band,
    draw_line,
    finish,
    marker_size,
    whole_numbers,
    with_nan,
)
from llmnorm.analysis.plots import COLOURS, GREYS

WIDTH, HEIGHT, DPI = 11.0, 3.9, 150


def pictures(models: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """All PNGs by name.

    Args:
        models: one or two, as inspect.json holds them.
    """
    drawings = {
        "variance": _variance,
        "removal": _removal,
        "angles": _angles,
        "gradients": _gradients,
        "ranks": _ranks,
        "attention": _attention,
        "spectra": _spectra,
        "gains": _gains,
    }
    return {name: _picture(models, draw) for name, draw in drawings.items()}


def _picture(models: Sequence[Mapping[str, Any]], draw: Any) -> bytes:
    # Without pyplot, so that no display is needed and no global state changes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    draw(figure, models)
    if len(models) > 1:
        handles = [Line2D([], [], linewidth=3, color=COLOURS[i]) for i in range(len(models))]
        names = [_shorter(model["name"], 60) for model in models]
        figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _variance(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    for colour, f in _coloured(models):
        if law := f.get("variance_law"):
            left.plot(range(len(law)), law, color=colour, linestyle=(0, (4, 2)), linewidth=1.2)
        draw_line(left, f["variance"], colour, SOLID, start=0)
        draw_line(right, f["branch_ratio"]["mixer"], colour, SOLID)
        draw_line(right, f["branch_ratio"]["mlp"], colour, DASHED)
    law = any("variance_law" in model["figures"] for model in models)
    kinds = [("measured", SOLID)] + [
        ("if the weights were noise", {"linestyle": (0, (4, 2))})
    ] * law
    finish(left, "Variance of the residual stream", log=True, kinds=kinds)
    finish(right, "Energy of a branch / energy of the stream", log=True, kinds=_SIDES)


def _removal(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    everything: list[float] = []
    for number, (colour, f) in enumerate(_coloured(models)):
        shift = 0.16 * (number - (len(models) - 1) / 2) * (len(models) > 1)
        for axis, kind, style in (
            (left, "block", SOLID),
            (right, "mixer", SOLID),
            (right, "mlp", DASHED),
        ):
            mean = with_nan(f["removal"][kind]["mean"])
            error = with_nan(f["removal"][kind]["standard_error"])
            error = [0.0 if e != e else 2 * e for e in error]
            ends = [m + e * way for m, e in zip(mean, error, strict=True) for way in (-1, 1)]
            everything += [value for value in ends if value == value]
            at = [n + shift for n in range(1, len(mean) + 1)]
            size = marker_size(len(mean))
            bars = axis.errorbar(at, mean, yerr=error, fmt="none", ecolor=colour, elinewidth=1.3)
            bars[2][0].set_alpha(0.45)
            shape = {"color": colour, "markeredgecolor": colour, "markersize": size}
            axis.plot(at, mean, linewidth=1.4, **shape, **style)
    for axis in (left, right):
        axis.axhline(0, color=GREYS[1], linewidth=0.8, zorder=0)
    if everything:
        _loss_scale(left, everything)
    finish(left, "Loss without a block, minus loss (nats a token)")
    finish(right, "Without its mixer, without its MLP", kinds=_SIDES)
    right.tick_params(labelleft=True)


def _loss_scale(axis: Any, values: Sequence[float]) -> None:
    """A linear scale, or one logarithmic on both sides of 0 where few blocks have most of the loss.

    That is: where the largest value is more than 20 times the median.
    """
    from matplotlib.ticker import SymmetricalLogLocator

    low, high = min(values), max(values)
    middle = statistics.median(map(abs, values))
    margin = 0.05 * (high - low)
    if middle > 0 and max(high, -low) > 20 * middle:
        linear = 10.0 ** round(math.log10(middle))
        axis.set_yscale("symlog", linthresh=linear, linscale=0.7)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
        axis.yaxis.set_major_formatter("{x:g}")
        margin = 0.15 * linear
        high *= 1.4 if high > linear else 1
        low *= 1.4 if low < -linear else 1
    axis.set_ylim(min(low, 0) - margin, max(high, 0) + margin)


def _angles(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    import numpy as np

    axes = figure.subplots(1, len(models) + 1, width_ratios=[*[1] * len(models), 1.25])
    highest = max(max(map(max, model["figures"]["angular_distance"])) for model in models)
    for axis, model in zip(axes, models, strict=False):
        matrix = model["figures"]["angular_distance"]
        layers = len(matrix) - 1
        skipped = np.full((layers, layers), np.nan)  # (blocks skipped, first block)
        for n in range(1, layers + 1):
            for first in range(layers + 1 - n):
                skipped[n - 1, first] = matrix[first][first + n]
        edge = (0.5, layers + 0.5, 0.5, layers + 0.5)
        drawn = axis.imshow(
            skipped,
            origin="lower",
            extent=edge,
            aspect="auto",
            cmap="magma",
            vmin=0,
            vmax=highest or 1,
            interpolation="nearest",
        )
        title = "Angle across n blocks (of π)" if len(models) == 1 else _shorter(model["name"])
        finish(axis, title, below="first of the n blocks", grid=False)
        axis.set_ylabel("n", rotation=0, labelpad=8, color=INK)
        whole_numbers(axis.yaxis)
    bar = figure.colorbar(drawn, ax=list(axes[: len(models)]), shrink=0.9, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=GREYS[0])
    for colour, f in _coloured(models):
        matrix = f["angular_distance"]
        draw_line(axes[-1], [matrix[n][n + 1] for n in range(len(matrix) - 1)], colour, SOLID)
    finish(axes[-1], "Angle across one block (of π)")
    axes[-1].set_ylim(bottom=0)


def _gradients(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    distance = models[-1]["figures"].get("weight_distance")  # of the second from the first
    axes = figure.subplots(1, 3 if distance else 2)
    for colour, f in _coloured(models):
        draw_line(axes[0], f["gradients"]["block"], colour, SOLID)
        draw_line(axes[1], f["gradients"]["jacobian"], colour, SOLID)
    finish(axes[0], "Norm of the gradient of a block", log=True)
    finish(axes[1], "Distance of the Jacobian from 1", log=True)
    if distance:
        draw_line(axes[2], distance["block"], INK, SOLID)
        finish(axes[2], "Distance of the weights", log=True)


def _ranks(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    for colour, f in _coloured(models):
        draw_line(left, f["effective_rank"], colour, SOLID, start=0)
        draw_line(right, f["participation_ratio"], colour, SOLID, start=0)
        draw_line(right, f["stable_rank"], colour, DASHED, start=0)
    finish(left, "Effective rank of the stream")
    left.set_ylim(bottom=0)
    kinds = [("participation ratio", SOLID), ("stable rank", DASHED)]
    finish(right, "Its rank by energy", log=True, kinds=kinds)


def _attention(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    for colour, f in _coloured(models):
        entropy = f["attention_entropy"]
        draw_band(left, entropy["lowest"], entropy["highest"], colour)
        draw_line(left, entropy["mean"], colour, SOLID)
        draw_line(right, f["token_cosine"], colour, SOLID, start=0)
    finish(left, "Entropy of attention / entropy of uniform attention")
    left.set_ylim(0, 1.03)
    finish(right, "Mean cosine of two tokens of a document")
    right.axhline(0, color=GREYS[1], linewidth=0.8, zorder=0)


def _spectra(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    for colour, f in _coloured(models):
        found = f["spectra"]
        for matrix in found["matrices"].values():
            for axis, key in ((left, "alpha"), (right, "spectral_norm")):
                values = with_nan(matrix[key])
                at = range(1, len(values) + 1)
                axis.plot(at, values, "o", color=colour, alpha=0.22, markersize=3.2, mew=0)
        draw_line(left, found["alpha"], colour, SOLID)
        norms = [matrix["spectral_norm"] for matrix in found["matrices"].values()]
        by_block = [[n for n in block if n is not None] for block in zip(*norms, strict=True)]
        draw_line(right, [statistics.mean(block) for block in by_block], colour, SOLID)
    kinds = [("mean of the block", SOLID), ("a matrix", {"marker": "o", "linestyle": "none"})]
    finish(left, "Tail exponent of the weights (FARMS)", kinds=kinds)
    finish(right, "Largest singular value of the weights", log=True)


def _gains(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    roles = list(dict.fromkeys(role for model in models for role in model["figures"]["gains"]))
    axes = figure.subplots(1, max(1, len(roles)), squeeze=False, sharey=True)[0]
    longest = max(model["layers"] for model in models)
    highest = 1.0
    for axis, role in zip(axes, roles, strict=False):
        for colour, f in _coloured(models):
            if gain := f["gains"].get(role):
                draw_band(axis, gain["low"], gain["high"], colour)
                draw_line(axis, gain["rms"], colour, SOLID)
                highest = max([highest, *(v for v in gain["high"] + gain["rms"] if v is not None)])
        at = range(1, longest + 1)
        axis.plot(at, [n**-0.5 for n in at], color=GREYS[2], linestyle=":", linewidth=1.4)
        kinds = [("rms", SOLID), ("1 / √block", {"linestyle": ":", "color": GREYS[2]})]
        title = f"Gain of the norm {role}" if len(roles) < 3 else role.capitalize()
        finish(axis, _shorter(title, 40), kinds=kinds if role == roles[0] else ())
        axis.tick_params(labelleft=True)
    axes[0].set_ylim(0, 1.06 * highest)
    if not roles:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "the blocks have no norms", ha="center", color=GREYS[2])


_SIDES = [("mixer", SOLID), ("MLP", DASHED)]


def _coloured(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(COLOURS[i], model["figures"]) for i, model in enumerate(models)]


def _shorter(name: str, length: int = 30) -> str:
    """The end of a long name, by which paths can be told apart."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
