"""An objective's figures as text: a sentence, or a table.

    sentence(figures)    -> "loss 3.1416, perplexity 23.14, ..."
    table(figures)       -> a line for each source

Figures are `{name: number, ..., "sources": {source: {name: number, ...}}}`; under "ema" are those
of the averaged weights, in the same form. The objective chooses the names; "loss" is always there.
"""

from typing import Any


def names(figures: dict[str, Any]) -> list[str]:
    """The names of the figures, the loss first."""
    return [name for name in figures if name not in ("sources", "ema")]


def sentence(figures: dict[str, Any]) -> str:
    """The totals in a sentence."""
    return ", ".join(f"{_spoken(name)} {_shown(name, figures[name])}" for name in names(figures))


def table(figures: dict[str, Any]) -> str:
    """The totals and the figures of every source, a line each."""
    rows = {"all": figures, **figures["sources"]}
    width = max(len(name) for name in [*rows, "validation"])
    widths = {name: max(10, len(name) + 2) for name in names(figures)}
    lines = [f"{'validation':{width}}" + "".join(f"{_spoken(n):>{w}}" for n, w in widths.items())]
    for row, found in rows.items():
        cells = "".join(f"{_shown(n, found.get(n)):>{w}}" for n, w in widths.items())
        lines.append(f"{row:{width}}{cells}")
    return "\n".join(lines)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: float | None) -> str:
    """A figure's number; a dash where a source lacks the figure."""
    if value is None:
        return "-"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"
