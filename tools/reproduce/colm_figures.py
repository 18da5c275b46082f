"""The numbers of tools/reproduce/colm.py's runs, as a tree, as tables and as a picture.

    measured(protocol, objective, records)   the tree, which is result.json
    table(found), draw(found, ...)           of the tree
    spread(found)                            how much seeds differ, of the pilot

Losses are in nats a token. `mixture` weights the sources as the plain arm draws their rows, `mean`
weights them alike; `exact_match` is the mean over the sources. A difference is the mean over the
paired seeds, with an interval as `llmnorm compare` makes it (analysis/compare/statistics.py).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from arms import mean_and_error

from llmnorm.analysis.compare.ledger import Record
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.analysis.compare.report import interval, markdown
from llmnorm.analysis.compare.statistics import gap_interval, t_quantile
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.flops import flops_per_token
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.objectives.contract import Objective
from llmnorm.selection.settings import SelectionSettings
from llmnorm.training.selecting import forwards

# What is asked, in the order in which it is read; then every arm against WIDER.
DIFFERENCES = (
    ("colm", "stratified"),
    ("gradient", "stratified"),
    ("loss", "stratified"),
    ("stratified", "reweighted"),
    ("reweighted", "plain"),
    ("random", "plain"),
)
WIDER = "plain_2b"  # it reads as many rows as the selections


def mixture_of(objective: Objective) -> dict[str, float]:
    """Each source's share of the rows that a plain run reads."""
    sources = objective.data.sources
    total = sum(source.weight for source in sources)
    return {source.name: source.weight / total for source in sources}


def measured(
    protocol: Protocol, objective: Objective, records: Mapping[str, Record]
) -> dict[str, Any]:
    """All numbers of the finished runs: of each arm, and the differences.

    Args:
        protocol: its runs are all made.
        objective: the rows of the plain arm.
        records: by key.
    """
    mixture, losses = mixture_of(objective), {key: r.final for key, r in records.items()}
    arms: dict[str, Any] = {}
    for name, config in protocol.configs.items():
        lr = protocol.best_lr(name, losses) if protocol.tuned(name) else None
        runs = {run.seed: records[run.key] for run in protocol.paired(name, lr)}
        steps = protocol.steps[name]
        arms[name] = {
            "lr": protocol.centre(name) if lr is None else lr,
            "rows_read": steps * config.pool,
            "rows_trained": steps * config.training.rows,
            "operations": operations(protocol, objective, name),
            "runs": {str(seed): of_a_run(r, mixture) for seed, r in runs.items()},
        }
    every = [run["figures"] for arm in arms.values() for run in arm["runs"].values()]
    figures = list(dict.fromkeys(figure for found in every for figure in found))
    against = [(arm, WIDER) for arm in arms if arm not in (WIDER, "random")]
    differences = [
        {"arm": arm, "other": other}
        | {figure: _difference(arms[arm], arms[other], figure) for figure in figures}
        for arm, other in (*DIFFERENCES, *against)
        if arm in arms and other in arms
    ]
    return {"mixture": mixture, "arms": arms, "differences": differences}


def of_a_run(record: Record, mixture: Mapping[str, float]) -> dict[str, Any]:
    """A run's numbers; the losses of one that diverged are infinite.

    Args:
        record: of the run.
        mixture: each source's share.
    """
    found = record.figures.get("sources", {})
    sources = {name: found[name]["loss"] if found else math.inf for name in mixture}
    figures = {
        "mixture": sum(share * sources[name] for name, share in mixture.items()),
        "mean": mean(sources.values()),
    }
    if found and all("exact_match" in found[name] for name in mixture):
        figures["exact_match"] = mean(found[name]["exact_match"] for name in mixture)
    return {
        "figures": figures,
        "sources": sources,
        "seconds": record.seconds,
        "memory_bytes": record.memory_bytes,
    }


def operations(protocol: Protocol, objective: Objective, arm: str) -> float:
    """Operations of an arm's run, by counting; those of an adapter are left out.

    A row that is measured costs forward passes, one that is trained on a backward pass too.
    """
    config, tokens = protocol.configs[arm], protocol.row_tokens[arm]
    settings = LlmNormConfig.from_settings(
        config.model,
        vocab_size=objective.data.vocab_size,
        architectures=[config.objective.architecture],
    )
    with torch.device("meta"):
        model = LlmNormForCausalLM(settings)
    share = objective.head_share
    a_pass = flops_per_token(model, round(tokens), head_share=share) / 3
    passes = 0.0
    if isinstance(config.selection, SelectionSettings):
        passes = forwards(model, objective, config.selection)
    model.requires_grad_(not config.freezes)
    trained = flops_per_token(model, round(tokens), head_share=share)
    a_step = config.training.rows * trained + config.pool * passes * a_pass
    return protocol.steps[arm] * tokens * a_step


def _difference(arm: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> Any:
    """The mean of arm - other over the seeds that both have, with its 95 % interval."""
    seeds = [seed for seed in arm["runs"] if seed in other["runs"]]
    own, its = (
        np.array([of["runs"][seed]["figures"].get(figure, math.nan) for seed in seeds])
        for of in (arm, other)
    )
    return gap_interval(own, its)._asdict()


def table(found: Mapping[str, Any]) -> str:
    """The arms, the losses of their sources, and the differences, in Markdown.

    Args:
        found: what `measured` returned.
    """
    arms, shares = found["arms"], found["mixture"]
    matched = any("exact_match" in pair for pair in found["differences"])
    head = ["arm", "lr", "loss of the mixture", "mean of the sources"]
    head += ["exact match"] * matched
    head += ["rows read", "rows trained on", "operations", "seconds", "memory"]
    rows, sources = [], []
    for name, arm in arms.items():
        runs = list(arm["runs"].values())
        digits = {"mixture": 4, "mean": 4} | ({"exact_match": 3} if matched else {})
        cells = [
            mean_and_error([run["figures"].get(figure, math.nan) for run in runs], places)
            for figure, places in digits.items()
        ]
        costs = [
            f"{arm['rows_read']:,}",
            f"{arm['rows_trained']:,}",
            f"{arm['operations']:.3g}",
            f"{mean(run['seconds'] or math.nan for run in runs):.0f}",
            f"{mean(run['memory_bytes'] or math.nan for run in runs) / 2**20:.0f} MiB",
        ]
        rows.append([name, f"{arm['lr']:.3g}", *cells, *costs])
        of_sources = [mean_and_error([run["sources"][s] for run in runs], 4) for s in shares]
        sources.append([name, *of_sources])
    heads = [f"{name} ({100 * share:.1f} %)" for name, share in shares.items()]
    figures = {"mixture": "loss of the mixture", "mean": "mean of the sources"}
    figures |= {"exact_match": "exact match"} if matched else {}
    differences = [
        [f"{pair['arm']} - {pair['other']}", *(_interval(pair[f]) for f in figures)]
        for pair in found["differences"]
    ]
    return "\n\n".join(
        [
            markdown(head, rows),
            markdown(["loss of", *heads], sources),
            markdown(["difference", *figures.values()], differences),
        ]
    )


def _interval(tree: Mapping[str, Any]) -> str:
    """A difference as text; result.json has null and "infinity" among its numbers."""
    numbers = {end: math.nan if value is None else float(value) for end, value in tree.items()}
    return interval(numbers, "+.4f")


def spread(found: Mapping[str, Any]) -> str:
    """How much seeds differ, and what difference that many of them would show.

    Args:
        found: what `measured` returned of the pilot.
    """
    plain = [run["figures"]["mixture"] for run in found["arms"]["plain"]["runs"].values()]
    lines = [f"loss of the mixture, plain, a seed each: {', '.join(f'{x:.4f}' for x in plain)}"]
    if len(plain) > 1:
        deviation, n = stdev(plain), len(plain)
        least = t_quantile(n - 1) * deviation * math.sqrt(2 / n)
        lines.append(
            f"standard deviation {deviation:.4f}; where pairing does not help, {n} seeds show a "
            f"difference (95 %) from about {least:.4f} on: if less is asked, train longer or give "
            "more --seeds"
        )
    for pair in found["differences"]:
        shown = _interval(pair["mixture"])
        lines.append(f"{pair['arm']} - {pair['other']}, which differ in their rows alone: {shown}")
    return "\n".join(lines)


def draw(found: Mapping[str, Any], output: Path, title: str) -> None:
    """The picture: differences with their intervals, and the losses of the sources beside plain's.

    Args:
        found: what `measured` returned.
        output: the picture to write.
        title: its heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llmnorm.analysis.plots import COLOURS, GREYS, save

    figure = Figure(figsize=(11, 5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    pairs = found["differences"][::-1]
    for place, pair in enumerate(pairs):
        gap = pair["mixture"]
        ends = [gap["low"], gap["high"]] if math.isfinite(gap["low"]) else [gap["value"]] * 2
        left.plot(ends, [place, place], color=COLOURS[0], linewidth=2)
        left.plot([gap["value"]], [place], "o", color=COLOURS[0])
    left.axvline(0, color=GREYS[2], linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(pairs)), [f"{pair['arm']} - {pair['other']}" for pair in pairs])
    left.set_xlabel("nats a token; below 0 the first is better")
    left.set_title("Loss of the mixture, differences (95 %)", loc="left")
    means = {
        name: [mean(run["sources"][s] for run in arm["runs"].values()) for s in found["mixture"]]
        for name, arm in found["arms"].items()
    }
    for place, (name, losses) in enumerate(means.items()):
        gaps = [loss - plain for loss, plain in zip(losses, means["plain"], strict=True)]
        style = "o-" if place < len(COLOURS) else "s--"
        right.plot(gaps, style, color=COLOURS[place % len(COLOURS)], label=name, markersize=4)
    labels = [f"{name}\n{100 * share:.1f} %" for name, share in found["mixture"].items()]
    right.set_xticks(range(len(labels)), labels)
    right.set_title("Loss of a source minus plain's", loc="left")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    save(figure, output)
