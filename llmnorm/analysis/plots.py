"""Pictures of a run: its loss over tokens, and its bits per byte beside gzip's and xz's.

    plot_run(Path("runs/quickstart"), Path("loss.png"), references)
    python -m llmnorm.analysis.plots RUN      prints the table and writes RUN/plots/loss.png

`references` are rates in bits per byte of the same validation text, by who reached them:
`{"gzip -9": {"all": 2.60, "code": 2.11, ...}, "xz -9e": {...}}`; "all" is the mean over the sources
weighted by their training bytes, as in metrics.jsonl.

What would surprise: the smoothed line is a mean over tokens (memory: 1/50 of the run), not over
lines, so `logging.every` does not change it; the loss axis leaves out the first few percent of the
fall, which would flatten all that follows.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.config import RunConfig
from llmnorm.config_file import load
from llmnorm.data.packed import PackedData
from llmnorm.data.packing import find
from llmnorm.part import InputError
from llmnorm.training.run_directory import RunDirectory

References = Mapping[str, Mapping[str, float]]

ALL = "all"  # the row that stands for every source, weighted by training bytes
MODEL = "this run"
# Okabe and Ito's palette, which colour-blind readers can tell apart; references are greys.
BLUE, ORANGE = "#0072B2", "#D55E00"
GREYS = ("#C4C4C4", "#404040", "#808080")


class Record(NamedTuple):
    """What metrics.jsonl holds: a point a logged step, a point an evaluation."""

    tokens: list[int]
    losses: list[float]
    validation_tokens: list[int]
    validation_losses: list[float]
    bits_per_byte: dict[str, float]  # of the last evaluation: ALL first, then source by source


def read_metrics(path: Path) -> Record:
    """Read a run's metrics.jsonl; a last line that is still being written is left out.

    Raises:
        InputError: the file is missing, holds no metrics or a line that is none of ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{path} cannot be read: {reason}") from None
    record = Record([], [], [], [], {})
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            if "validation" in entry:
                figures = entry["validation"]
                record.validation_tokens.append(int(entry["tokens"]))
                record.validation_losses.append(float(figures["loss"]))
                rates = {name: one["bits_per_byte"] for name, one in figures["sources"].items()}
                record.bits_per_byte.clear()
                record.bits_per_byte.update({ALL: float(figures["bits_per_byte"]), **rates})
            elif entry.get("loss") is not None and math.isfinite(entry["loss"]):
                record.tokens.append(int(entry["tokens"]))
                record.losses.append(float(entry["loss"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            if not line.endswith("\n"):
                break
            raise InputError(
                f"{path}, line {number}: not a line of metrics: {line[:60]!r}"
            ) from None
    if not record.tokens and not record.validation_tokens:
        raise InputError(f"{path} holds no loss yet; train the run first")
    return record


def compression(packed: PackedData) -> dict[str, dict[str, float]]:
    """The bits per byte of `gzip -9` and `xz -9e` on the validation text, one stream a source."""
    rates = {
        "gzip -9": {
            s.name: 8 * s.validation_gzip_bytes / s.validation_bytes for s in packed.sources
        },
        "xz -9e": {s.name: 8 * s.validation_xz_bytes / s.validation_bytes for s in packed.sources},
    }
    total = sum(s.bytes for s in packed.sources)
    return {
        who: {ALL: sum(s.bytes * rate[s.name] for s in packed.sources) / total, **rate}
        for who, rate in rates.items()
    }


def losses_against(
    bits_per_byte: Mapping[str, float], references: References
) -> dict[str, list[str]]:
    """Who is ahead of the run, and on which sources; whoever is nowhere ahead is left out."""
    ahead = {
        who: [name for name, rate in bits_per_byte.items() if rates.get(name, math.inf) < rate]
        for who, rates in references.items()
    }
    return {who: names for who, names in ahead.items() if names}


def table(bits_per_byte: Mapping[str, float], references: References) -> str:
    """The rates as text, a line a source, and a last line that names who is behind where."""
    columns = {MODEL: bits_per_byte, **references}
    width = max(len(name) for name in [*bits_per_byte, "bits per byte"])
    lines = [f"{'bits per byte':{width}}" + "".join(f"{who:>10}" for who in columns)]
    for name in bits_per_byte:
        cells = (columns[who].get(name) for who in columns)
        numbers = (f"{cell:>10.3f}" if cell is not None else f"{'-':>10}" for cell in cells)
        lines.append(f"{name:{width}}" + "".join(numbers))
    if references:
        lines.append(_verdict(bits_per_byte, references))
    return "\n".join(lines)


def _verdict(bits_per_byte: Mapping[str, float], references: References) -> str:
    ahead = losses_against(bits_per_byte, references)
    if not ahead:
        return f"ahead of {' and '.join(references)} on every source"
    named = {
        who: "every source" if len(names) == len(bits_per_byte) else ", ".join(map(_label, names))
        for who, names in ahead.items()
    }
    return "; ".join(f"behind {who} on {names}" for who, names in named.items())


def _label(name: str) -> str:
    return "all sources" if name == ALL else name


def plot_run(run_dir: Path, output: Path, references: References | None = None) -> None:
    """Draw a run's loss over tokens and, once it was evaluated, its bits per byte by source.

    Args:
        run_dir: the run directory; its metrics.jsonl is read.
        output: the picture to write (.png, .pdf, .svg).
        references: rates to draw beside the run's, as `compression` returns them.

    Raises:
        InputError: there are no metrics, or the picture cannot be written.
    """
    record = read_metrics(run_dir / "metrics.jsonl")
    # The object interface draws without a display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if record.bits_per_byte else 1
    figure = Figure(figsize=(6.4 * panels, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_loss(axes[0], record)
    if record.bits_per_byte:
        _draw_rates(axes[1], record.bits_per_byte, references or {})
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(run_dir.resolve().name, fontsize=13, fontweight="bold")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise InputError(f"{output} cannot be written: {error}") from None


def _draw_loss(axis: Any, record: Record) -> None:
    from matplotlib.ticker import EngFormatter

    if record.tokens:
        smooth = smoothed(record.tokens, record.losses)
        axis.plot(record.tokens, record.losses, color=BLUE, alpha=0.25, linewidth=0.8)
        axis.plot(record.tokens, smooth, color=BLUE, linewidth=1.8, label="training (smoothed)")
        settled = [*smooth[len(smooth) // 20 :], *record.validation_losses]
        low, high = min(settled), max(settled)
        if high > low:
            axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    if record.validation_tokens:
        last = record.validation_losses[-1]
        axis.plot(
            record.validation_tokens,
            record.validation_losses,
            color=ORANGE,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=f"validation (last: {last:.3f})",
        )
    axis.set_xlabel("training tokens")
    axis.set_ylabel("loss (nats a token)")
    axis.set_title("Loss", fontsize=11)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False)


def _draw_rates(axis: Any, bits_per_byte: Mapping[str, float], references: References) -> None:
    columns = {MODEL: bits_per_byte, **references}
    colours = dict(zip(columns, (BLUE, *GREYS), strict=False))
    height = 0.8 / len(columns)
    names = list(bits_per_byte)
    for place, (who, rates) in enumerate(columns.items()):
        known = [(row, rates[name]) for row, name in enumerate(names) if name in rates]
        bars = axis.barh(
            [row + (place - (len(columns) - 1) / 2) * height for row, _ in known],
            [rate for _, rate in known],
            height=height * 0.92,
            color=colours[who],
            label=who,
        )
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), map(_label, names))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.12)
    axis.set_xlabel("bits per byte of validation text (less is better)")
    title = _verdict(bits_per_byte, references).replace("; ", "\n") if references else ""
    axis.set_title(f"{title[:1].upper()}{title[1:]}" if title else "Bits per byte", fontsize=11)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(columns))


def smoothed(tokens: list[int], losses: list[float]) -> list[float]:
    """An exponential mean over 2 % of the tokens, over fewer at the start where the loss falls."""
    longest = 0.02 * (tokens[-1] - tokens[0])
    total = weight = 0.0
    before, means = tokens[0], []
    for token, loss in zip(tokens, losses, strict=True):
        memory = max(1.0, min(longest, 0.2 * (token - tokens[0])))
        keep = math.exp(-(token - before) / memory)
        total, weight = keep * total + loss, keep * weight + 1.0
        means.append(total / weight)
        before = token
    return means


def _references(config: RunConfig) -> References:
    """What gzip and xz reach on the run's validation text; nothing where the corpus is gone."""
    try:
        packed = find(config.data, config.tokenizer)
    except InputError as error:
        print(f"llmnorm: note: without gzip and xz: {error}", file=sys.stderr)
        return {}
    return compression(packed) if packed else {}


def main(arguments: list[str] | None = None) -> int:
    """Print a run's table and write its plots/loss.png."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        print("usage: python -m llmnorm.analysis.plots RUN", file=sys.stderr)
        return 2
    run = RunDirectory(Path(given[0]))
    try:
        references = _references(load(run.config).config)
        record = read_metrics(run.metrics)
        output = run.plots / "loss.png"
        plot_run(run.path, output, references)
    except InputError as error:
        print(f"llmnorm: error: {error}", file=sys.stderr)
        return 2
    if record.bits_per_byte:
        print(table(record.bits_per_byte, references))
    print(f"plot: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
