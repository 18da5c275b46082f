"""A comparison's results for a person: the table, and a page of Markdown around the picture.

A factor of 1.20 [1.05, 1.36] in tokens reads: the baseline needs 1.20 times the tokens for the loss
that the arm reaches, and with 95 % confidence between 1.05 and 1.36 times.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

Tree = Mapping[str, Any]

COLUMNS = (
    "arm",
    "lr",
    "loss",
    "gap in loss",
    "× tokens",
    "resolves",
    "× seconds",
    "verdict",
)


def rows(found: Tree, baseline: str) -> list[list[str]]:
    """The table against one baseline, its own line first; texts by COLUMNS."""
    table = [[baseline, *_own(found["arms"][baseline]), "-", "1", "-", "1", "baseline"]]
    for name, one in found["against"][baseline].items():
        tokens, timing = one["tokens"], one["timing"]
        table.append(
            [
                name,
                *_own(found["arms"][name]),
                interval(one["gap"], "+.4f"),
                interval(tokens) + ("*" if tokens["extrapolated"] else ""),
                factor(tokens["resolvable"]),
                interval(timing["seconds"]) if timing else "-",
                one["verdict"],
            ]
        )
    return table


def _own(arm: Tree) -> list[str]:
    rate = number(arm["lr"], ".3g") if isinstance(arm["lr"], float | int) else str(arm["lr"])
    error = f" ± {arm['standard_error']:.4f}" if math.isfinite(arm["standard_error"]) else ""
    return [rate, "diverged" if math.isinf(arm["loss"]) else f"{arm['loss']:.4f}{error}"]


def text_table(found: Tree, baseline: str) -> str:
    """The table for a terminal."""
    lines = [list(COLUMNS), *rows(found, baseline)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def csv_table(found: Tree) -> str:
    """Every pair's numbers in full, a line each, for a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    figures = ("gap", "tokens", "seconds")
    ends = ("value", "low", "high")
    writer.writerow(
        ["baseline", "arm", "lr", "weight_decay", "loss", "standard_error"]
        + [f"{figure}_{end}" for figure in figures for end in ends]
        + ["resolvable", "verdict"]
    )
    for baseline, arms in found["against"].items():
        for name, one in arms.items():
            arm, timing = found["arms"][name], one["timing"]
            trees = [one["gap"], one["tokens"], timing["seconds"] if timing else {}]
            writer.writerow(
                [baseline, name, arm["lr"], arm["weight_decay"], arm["loss"], arm["standard_error"]]
                + [tree.get(end, "") for tree in trees for end in ends]
                + [one["tokens"]["resolvable"], one["verdict"]]
            )
    return out.getvalue()


def page(found: Tree, title: str, command: str, picture: str) -> str:
    """The report, in Markdown.

    Args:
        command: what makes or continues this comparison.
        picture: file name of the plot beside it.
    """
    parts = [f"# {title}", *(_answers(found, baseline) for baseline in found["against"])]
    parts.append(f"![Losses, factors and learning rates of the arms]({picture})")
    for baseline in found["against"]:
        heading = f" against {baseline}" if len(found["against"]) > 1 else ""
        parts += [f"## Result{heading}", markdown(list(COLUMNS), rows(found, baseline))]
    parts.append(_legend(found))
    if found["notes"]:
        parts.append("## To beware of\n\n" + "\n".join(f"- {note}." for note in found["notes"]))
    parts += ["## Arms", _arms(found)]
    if any(arm["tuning"] for arm in found["arms"].values()):
        parts += ["## Learning rates", _tuning(found)]
    parts += ["## How long", _lengths(found)]
    parts += ["## Protocol", _protocol(found), f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _answers(found: Tree, baseline: str) -> str:
    lines = []
    for name, one in found["against"][baseline].items():
        lines.append(f"- {answer(name, baseline, one, len(found['seeds']))}")
    return "\n".join(lines)


def answer(name: str, baseline: str, one: Tree, seeds: int) -> str:
    """One sentence: is this arm better here?"""
    tokens, timing = one["tokens"], one["timing"]
    if math.isinf(one["gap"]["value"]):
        who = name if one["gap"]["value"] < 0 else baseline
        return f"**{name}** is {one['verdict']}: {who} diverged."
    converted = one["nats_for_e_times_the_length"] > 0
    gap = f"a gap in loss of {interval(one['gap'], '+.4f')}"
    if one["verdict"] == "one seed":
        gave = gap
        if converted:
            gave = f"its factor in tokens against {baseline} was {factor(tokens['value'])}"
        return f"**{name}**: one seed, so nothing is said about chance; {gave}."
    if one["verdict"] == "not resolved":
        says = gap
        if converted:
            says = f"the factor in tokens against {baseline} is {interval(tokens)}"
        if tokens["resolvable"] > 1.005:
            says += f"; from {factor(tokens['resolvable'])} on it could be told from 1"
        return f"**{name}**: no difference that {seeds} paired seeds resolve: {says}."
    if not converted:
        return f"**{name}** is {one['verdict']}: {gap}."
    says = f"{baseline} needs {interval(tokens)} times its tokens for its loss"
    if timing:
        says += f", and {interval(timing['seconds'])} times its seconds on this machine"
    return f"**{name}** is {one['verdict']}: {says}."


def _legend(found: Tree) -> str:
    lines = [
        "`loss`: validation, nats a token, mean ± standard error over the seeds. `gap in loss`: "
        "the baseline's minus the arm's, seed by seed; above 0 the arm is ahead. `× tokens`: the "
        "baseline needs so many times the arm's tokens for the same loss; above 1 the arm is "
        "ahead. `resolves`: the smallest such factor that these seeds tell from 1. `× seconds`: "
        "the same in training time on this machine. Brackets are 95 % intervals by the bootstrap "
        "over paired seeds, widened for their small number."
    ]
    if any(o["tokens"]["extrapolated"] for a in found["against"].values() for o in a.values()):
        lines.append("\\* beyond the lengths that were run.")
    return " ".join(lines)


def _arms(found: Tree) -> str:
    table = []
    for name, arm in found["arms"].items():
        settings = " ".join(f"`{word}`" for word in arm["written"])
        bits = number(arm["bits_per_byte"], ".4f")
        decay = "-" if arm["weight_decay"] is None else number(arm["weight_decay"], ".3g")
        table.append([name, settings or "none: the configuration as it is", decay, bits])
    return markdown(["arm", "settings of its own", "weight decay", "bits per byte"], table)


def _tuning(found: Tree) -> str:
    table = []
    for name, arm in found["arms"].items():
        cells = []
        for point in arm["tuning"]:
            cell = f"{number(point['lr'], '.3g')}: {number(point['loss'], '.4f')}"
            cells.append(f"**{cell}**" if point["lr"] == arm["lr"] else cell)
        if cells:
            table.append([name, str(len(cells)), ", ".join(cells)])
    return markdown(["arm", "runs", "learning rate: final loss (the best is bold)"], table)


def _lengths(found: Tree) -> str:
    table = []
    for baseline, arms in found["against"].items():
        base = found["arms"][baseline]["timing"]["tokens_per_second"]
        table.append([baseline, *_needed(found["tokens"], 1.0, base), "-"])
        for name, one in arms.items():
            timing = one["timing"]
            rate = found["arms"][name]["timing"]["tokens_per_second"]
            equal = interval(timing["gap_at_equal_seconds"], "+.4f") if timing else "-"
            table.append([name, *_needed(found["tokens"], one["tokens"]["value"], rate), equal])
    return markdown(
        ["arm", "tokens a second", "tokens to the baseline's loss", "time", "gap at equal seconds"],
        table,
    )


def _needed(tokens: int, factor: float, rate: float | None) -> list[str]:
    """Speed, and what an arm needs for the baseline's final loss."""
    if not factor > 0 or math.isinf(factor):
        return [f"{rate:,.0f}" if rate else "-", "-", "-"]
    time = _time(tokens / factor / rate) if rate else "-"
    return [f"{rate:,.0f}" if rate else "-", f"{tokens / factor:,.0f}", time]


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _protocol(found: Tree) -> str:
    seeds, tuned = found["seeds"], [a for a in found["arms"].values() if a["tuned"]]
    grid = (
        "Learning rates: a grid a factor 2 apart around each arm's own, one seed that is not used "
        "again, full length; it grows while its best is at an edge. Learning rate times weight "
        "decay is held. "
        if tuned
        else ""
    )
    whose = {"baseline": "the baseline", "arms": "each arm"}.get(found["horizons"])
    nats = {
        f"{one['nats_for_e_times_the_length']:.3f}"
        for arms in found["against"].values()
        for one in arms.values()
        if math.isfinite(one["nats_for_e_times_the_length"])
    }
    worth = f" (e times the length was worth {', '.join(sorted(nats))} nats)" if nats else ""
    converted = (
        f"Gaps in loss become factors by complete runs of {whose} at other lengths{worth}. "
        if whose
        else "No run of another length turns gaps in loss into factors. "
    )
    return (
        f"Every run trains {found['tokens']:,} tokens with its own complete schedule. {grid}"
        f"Seeds {', '.join(map(str, seeds))}: all arms share initial weights and the order of rows "
        f"of each. {converted}Made by llmnorm {', '.join(found['timing']['version'])}; "
        f"{'; '.join(found['timing']['place'])}."
    )


def interval(tree: Tree, form: str = "") -> str:
    """`1.20 [1.05, 1.36]`; without ends where there is one seed; without `form`, a factor's."""

    def show(value: float) -> str:
        return number(value, form) if form else factor(value)

    if math.isnan(tree["low"]):
        return show(tree["value"])
    return f"{show(tree['value'])} [{show(tree['low'])}, {show(tree['high'])}]"


def factor(value: float) -> str:
    """A factor in length: 1.08, 12.3, ∞ (no length is enough)."""
    if not value < 1e4:
        return "-" if math.isnan(value) else "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def number(value: float, form: str) -> str:
    """A number, `-` where there is none, and a word for what has no end."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return format(value, form)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
