"""The tables and the plot of generation.py, from its figures."""

import argparse
from pathlib import Path
from typing import Any

from report import Table

COLUMNS = (
    *("tokens/s", "over plain", "over generate", "rounds alone", "predicted", "p"),
    *("drafted a round", "tokens a round", "distinct", "rows as plain at 1"),
)


def tables(figures: dict[str, Any], options: argparse.Namespace) -> list[Table]:
    """The tables of the page."""
    kind = (
        f"{options.threads} thread(s), {'CPU seconds' if options.threads == 1 else 'by the clock'}"
    )
    made = []
    # Of the first temperature: the passes are the same at the others.
    first = [e for e in figures.get("drafts", []) if e["temperature"] == options.temperatures[0]]
    costs = [e["costs"] | {"batch": e["batch"]} for e in first if e["name"] == "draft"]
    if costs:
        widths = list(costs[0]["v"])
        rows = [
            [
                str(e["batch"]),
                f"{e['milliseconds']:.2f}",
                f"{e['c']:.3f}",
                *(f"{e['v'][n]:.2f}" for n in widths),
            ]
            for e in costs
        ]
        columns = ["rows", "ms a step", "c", *(f"v of {n}" for n in widths)]
        made.append(Table(f"c and v of this pair, {kind}", columns, rows))
    for temperature in dict.fromkeys(e["temperature"] for e in figures.get("drafts", [])):
        rows = []
        for e in figures["drafts"]:
            if e["temperature"] != temperature:
                continue
            rows.append([f"{e['name']}, {e['batch']}", *cells(e)])
        how = f"temperature {temperature}, seeded" if temperature else "greedy"
        made.append(Table(f"tokens a second by rows, {how}, {kind}", ["", *COLUMNS], rows))
    if "methods" in figures:
        columns = [
            "tokens/s",
            "over eqspec",
            "rows as plain",
            "grouping rate",
            "copying, share of time",
            "rows copied a row run",
            "padding",
        ]
        keys = ("grouping rate", "realignment share of time", "rows copied a row run")
        rows = [
            [
                f"{e['name']}, {e['prompts']}",
                f"{e['tokens/s']:.1f}",
                f"{e['ratio']:.2f}",
                f"{e['equal']:.0%}",
                *(f"{e[key]:.1%}" if key in e else "" for key in (*keys, "padding share")),
            ]
            for e in figures["methods"]
        ]
        title = f"methods, {figures['methods'][0]['drafted']} drafted tokens, {kind}"
        made.append(Table(title, ["", *columns], rows))
    if "continuous" in figures:
        rows = [
            [e["name"], f"{e['tokens/s']:.1f}", f"{e['ratio']:.2f}", f"{e['equal']:.0%}"]
            for e in figures["continuous"]
        ]
        title = f"{figures['continuous'][0]['prompts']} prompts of uneven length at once, {kind}"
        made.append(Table(title, ["", "tokens/s", "over plain", "rows as plain"], rows))
    if "llama.cpp" in figures:
        plain = {e["batch"]: 1e3 * e["batch"] / e["milliseconds"] for e in costs}
        rows = [
            [str(batch), f"{rate:.1f}", f"{plain[batch]:.1f}", f"{plain[batch] / rate:.2f}"]
            for batch, rate in figures["llama.cpp"].items()
        ]
        title = f"greedy steps alone, without prompts and scheduling, tokens a second, {kind}"
        made.append(Table(title, ["rows", "llama.cpp", "ours", "ours over it"], rows))
    return made


def cells(entry: dict[str, Any]) -> list[str]:
    """An entry's row of a table."""
    formats = {
        "tokens/s": ".1f",
        "ratio": ".2f",
        "over generate": ".2f",
        "rounds over plain": ".2f",
        "predicted": ".2f",
        "p": ".2f",
        "drafted": ".1f",
        "tokens a round": ".2f",
        "distinct": ".0%",
        "equal": ".0%",
    }
    return [format(entry[key], how) if key in entry else "" for key, how in formats.items()]


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw the rates over `generate` by batch, a panel a temperature."""
    from matplotlib.figure import Figure

    temperatures = list(dict.fromkeys(entry["temperature"] for entry in entries))
    figure = Figure(figsize=(6 * len(temperatures), 4.5), layout="constrained")
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        some = [entry for entry in entries if entry["temperature"] == temperature]
        for name in dict.fromkeys(entry["name"] for entry in some):
            points = [(e["batch"], e["over generate"]) for e in some if e["name"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_title("greedy" if not temperature else f"temperature {temperature}, seeded")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows at once")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("tokens a second over transformers' generate")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
