"""A picture of the load of experts along runs: a panel a layer, a row an expert.

    figure = picture({"run": {"0": [Load(tokens, shares), ...]}})

Colour is an expert's load times the number of experts: 1 is balanced, 0 an expert that is sent no
token, 4 one that is sent four times its part. All panels share one scale. A measurement is drawn
from the one before it on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmnorm.runs.record import Load

COLUMNS = 6  # panels beside each other
_BALANCED, _LEAST = 1.0, 2.0  # the middle of the scale, and the least that its end is


def picture(loads: Mapping[str, Mapping[str, Sequence[Load]]]) -> Any:
    """The matplotlib figure of the loads of runs, by name and layer."""
    # Without pyplot, so that no display is needed and no global state changes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = [
        [(run, layer, layers[layer]) for layer in list(layers)[first : first + COLUMNS]]
        for run, layers in loads.items()
        for first in range(0, len(layers), COLUMNS)
    ]
    columns = max(map(len, rows))
    figure = Figure(figsize=(2.6 * columns + 2, 2.4 * len(rows) + 1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    largest = max(
        len(load.shares) * max(load.shares) for row in rows for *_, found in row for load in found
    )
    scale = TwoSlopeNorm(_BALANCED, vmin=0.0, vmax=max(_LEAST, largest))
    mesh: Any = None
    for number, row in enumerate(rows):
        for axis in axes[number, len(row) :]:
            axis.set_axis_off()
        for axis, (run, layer, found) in zip(axes[number], row, strict=False):
            experts = len(found[0].shares)
            values = [[experts * load.shares[n] for load in found] for n in range(experts)]
            edges = [0.0, *(load.tokens for load in found)]
            mesh = axis.pcolormesh(
                edges, [n - 0.5 for n in range(experts + 1)], values, cmap="RdBu_r", norm=scale
            )
            axis.set_title(f"{run}, layer {layer}" if len(loads) > 1 else f"layer {layer}")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[number, 0].set_ylabel("expert")
    for axis in axes[-1]:
        axis.set_xlabel("training tokens")
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8)
    bar.set_label("load times experts (1: balanced)")
    title = "Load of the experts"
    figure.suptitle(title if len(loads) > 1 else f"{title}: {next(iter(loads))}")
    return figure
