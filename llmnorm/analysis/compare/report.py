"""A comparison's results as text: the table, and a Markdown page around the picture.

"1.20 [1.05, 1.36]" under "× tokens" means: to reach the arm's loss, the baseline needs 1.20 times
the arm's tokens, and with 95 % confidence between 1.05 and 1.36 times.

`found` is everywhere what `results.results` returned; `pair` is its entry of one arm against one
baseline.
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
    """The table against one baseline, by COLUMNS; the baseline's own line is the first."""
    table = [[baseline, *_lr_and_loss(found["arms"][baseline]), "-", "1", "-", "1", "baseline"]]
    for name, pair in found["against"][baseline].items():
        tokens, timing = pair["tokens"], pair["timing"]
        table.append(
            [
                name,
                *_lr_and_loss(found["arms"][name]),
                interval(pair["gap"], "+.4f"),
                interval(tokens) + ("*" if tokens["extrapolated"] else ""),
                factor(tokens["resolvable"]),
                interval(timing["seconds"]) if timing else "-",
                pair["verdict"],
            ]
        )
    return table


def _lr_and_loss(arm: Tree) -> list[str]:
    rate = number(arm["lr"], ".3g") if isinstance(arm["lr"], float | int) else str(arm["lr"])
    error = f" ± {arm['standard_error']:.4f}" if math.isfinite(arm["standard_error"]) else ""
    return [rate, "diverged" if math.isinf(arm["loss"]) else f"{arm['loss']:.4f}{error}"]


def text_table(found: Tree, baseline: str) -> str:
    """The table against one baseline, for a terminal."""
    lines = [list(COLUMNS), *rows(found, baseline)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def csv_table(found: Tree) -> str:
    """All numbers of every baseline and arm, a line a pair, for a spreadsheet."""
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
        for name, pair in arms.items():
            arm, timing = found["arms"][name], pair["timing"]
            trees = [pair["gap"], pair["tokens"], timing["seconds"] if timing else {}]
            writer.writerow(
                [baseline, name, arm["lr"], arm["weight_decay"], arm["loss"], arm["standard_error"]]
                + [tree.get(end, "") for tree in trees for end in ends]
                + [pair["tokens"]["resolvable"], pair["verdict"]]
            )
    return out.getvalue()


def page(found: Tree, title: str, command: str, picture: str) -> str:
    """The report, in Markdown.

    Args:
        found: what `results` returned.
        title: its heading.
        command: the command line that makes or continues this comparison.
        picture: file name of the picture, which is in the same directory.
    """
    parts = [f"# {title}", *(_answers(found, baseline) for baseline in found["against"])]
    parts.append(f"![Losses, factors and learning rates of the arms]({picture})")
    for baseline in found["against"]:
        heading = f" against {baseline}" if len(found["against"]) > 1 else ""
        parts += [f"## Result{heading}", markdown(list(COLUMNS), rows(found, baseline))]
    parts.append(_legend(found))
    if found["notes"]:
        parts.append("## Caveats\n\n" + "\n".join(f"- {note}." for note in found["notes"]))
    parts += ["## Arms", _arms(found)]
    if any(arm["tuning"] for arm in found["arms"].values()):
        parts += ["## Learning rates", _tuning(found)]
    parts += ["## How long", _lengths(found)]
    parts += ["## Protocol", _protocol(found), f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _answers(found: Tree, baseline: str) -> str:
    lines = []
    for name, pair in found["against"][baseline].items():
        lines.append(f"- {answer(name, baseline, pair, len(found['seeds']))}")
    return "\n".join(lines)


def answer(name: str, baseline: str, pair: Tree, seeds: int) -> str:
    """A sentence that answers: is the arm `name` better than the baseline here?

    Args:
        pair: the arm's entry in `found["against"][baseline]`.
        seeds: the number of paired seeds.
    """
    tokens, timing, verdict = pair["tokens"], pair["timing"], pair["verdict"]
    if math.isinf(pair["gap"]["value"]):
        diverged = name if pair["gap"]["value"] < 0 else baseline
        return f"**{name}** is {verdict}: {diverged} diverged."
    converted = pair["nats_for_e_times_the_length"] > 0
    gap = f"a gap in loss of {interval(pair['gap'], '+.4f')}"
    if verdict == "one seed":
        reason = gap
        if converted:
            reason = f"its factor in tokens against {baseline} was {factor(tokens['value'])}"
        return f"**{name}**: one seed, so nothing is known about chance; {reason}."
    if verdict == "not resolved":
        reason = gap
        if converted:
            reason = f"the factor in tokens against {baseline} is {interval(tokens)}"
        if tokens["resolvable"] > 1.005:
            reason += (
                f"; a factor of {factor(tokens['resolvable'])} or more could have been told from 1"
            )
        return f"**{name}**: no difference that {seeds} paired seeds resolve: {reason}."
    if not converted:
        return f"**{name}** is {verdict}: {gap}."
    reason = f"{baseline} needs {interval(tokens)} times the tokens of {name} for the same loss"
    if timing:
        reason += f", and {interval(timing['seconds'])} times the seconds on this machine"
    return f"**{name}** is {verdict}: {reason}."


def _legend(found: Tree) -> str:
    lines = [
        "`loss`: final validation loss in nats a token, mean ± standard error over the seeds. `gap "
        "in loss`: the baseline's loss minus the arm's, seed by seed; above 0 the arm is ahead. `× "
        "tokens`: how many times the arm's tokens the baseline needs for the same loss; above 1 "
        "the arm is ahead. `resolves`: the smallest factor that these seeds could tell from 1. `× "
        "seconds`: the factor in training time on this machine. Brackets are 95 % intervals by the "
        "bootstrap over paired seeds, widened for the small number of seeds."
    ]
    pairs = [pair for arms in found["against"].values() for pair in arms.values()]
    if any(pair["tokens"]["extrapolated"] for pair in pairs):
        lines.append("\\*: the factor lies beyond the lengths that were run.")
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
        for name, pair in arms.items():
            timing = pair["timing"]
            rate = found["arms"][name]["timing"]["tokens_per_second"]
            equal = interval(timing["gap_at_equal_seconds"], "+.4f") if timing else "-"
            table.append([name, *_needed(found["tokens"], pair["tokens"]["value"], rate), equal])
    return markdown(
        ["arm", "tokens a second", "tokens to the baseline's loss", "time", "gap at equal seconds"],
        table,
    )


def _needed(tokens: int, factor: float, rate: float | None) -> list[str]:
    """An arm's speed, and the tokens and the time that it needs for the baseline's final loss."""
    if not factor > 0 or math.isinf(factor):
        return [f"{rate:,.0f}" if rate else "-", "-", "-"]
    time = _time(tokens / factor / rate) if rate else "-"
    return [f"{rate:,.0f}" if rate else "-", f"{tokens / factor:,.0f}", time]


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _protocol(found: Tree) -> str:
    seeds, tuned = found["seeds"], [a for a in found["arms"].values() if a["tuned"]]
    grid = (
        "Each arm's learning rate is tuned on a grid around its own, a factor 2 apart, with one "
        "seed that is not used again, at full length; the grid grows while its best rate is the "
        "lowest or highest. Learning rate times weight decay stays what the arm wrote. "
        if tuned
        else ""
    )
    varied = {"baseline": "the baseline", "arms": "each arm"}.get(found["horizons"])
    nats = {
        f"{pair['nats_for_e_times_the_length']:.3f}"
        for arms in found["against"].values()
        for pair in arms.values()
        if math.isfinite(pair["nats_for_e_times_the_length"])
    }
    worth = f" (e times the length was worth {', '.join(sorted(nats))} nats)" if nats else ""
    converted = (
        f"Gaps in loss are converted into factors by complete runs of {varied} at other "
        f"lengths{worth}. "
        if varied
        else "No arm ran at another length, so gaps in loss are not converted into factors. "
    )
    return (
        f"Every run trains {found['tokens']:,} tokens with its own complete schedule. {grid}"
        f"Seeds {', '.join(map(str, seeds))}: for each of them all arms have the same initial "
        "weights and order of rows. "
        f"{converted}Made by llmnorm {', '.join(found['timing']['version'])}; "
        f"{'; '.join(found['timing']['place'])}."
    )


def interval(tree: Tree, form: str = "") -> str:
    """`1.20 [1.05, 1.36]`, or `1.20` where there is one seed.

    Args:
        form: format of the numbers; left out, they are factors (see `factor`).
    """

    def show(value: float) -> str:
        return number(value, form) if form else factor(value)

    if math.isnan(tree["low"]):
        return show(tree["value"])
    return f"{show(tree['value'])} [{show(tree['low'])}, {show(tree['high'])}]"


def factor(value: float) -> str:
    """A factor in length: 1.08, 12.3; ∞ from 10,000 on (no length is enough), - for nan."""
    if not value < 1e4:
        return "-" if math.isnan(value) else "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def number(value: float, form: str) -> str:
    """A number in this format; `-` for nan, `∞` and `-∞` for infinities."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return format(value, form)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
