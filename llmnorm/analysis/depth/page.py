"""The page of `llmnorm inspect`: one HTML file, complete in itself.

Pictures are embedded. Texts from outside (names of runs, reasons) are escaped.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmnorm.analysis.plots import COLOURS
from llmnorm.machine.doctor import version

# Picture -> its heading, and what it shows and how it is read.
SECTIONS = {
    "variance": (
        "How the stream grows",
        "Every block adds to the residual stream. <b>Left:</b> the variance over the channels, "
        "mean over tokens, after each block (0: the embedding). Dashed: what independent random "
        "weights of the same size would give; a model before training follows this line. "
        "<b>Right:</b> the energy that a branch adds, over the energy of what it is added to. A "
        "ratio that falls towards 0 is the curse of depth: deep blocks hardly change the stream.",
    ),
    "removal": (
        "The loss without a block",
        "The held-out loss without one block (which returns its input), without its mixer alone, "
        "and without its MLP alone, minus the whole model's loss. Bars are two standard errors "
        "over rows: where a bar crosses 0, removing the block makes no measurable difference.",
    ),
    "angles": (
        "How far a block turns the stream",
        "The mean angle between the stream before and after n blocks in a row, over all tokens, in "
        "units of π: 0 is no turn, ½ a right angle. Dark rows far to the right are sequences of "
        "blocks that could be cut out.",
    ),
    "gradients": (
        "The gradients that reach a block",
        "<b>Left:</b> the norm of the loss's gradient with respect to all weights of a block, "
        "mean over batches. <b>Second:</b> ‖J − 1‖² / dimension, J the block's Jacobian over all "
        "tokens: 0 for a block that returns its input. <b>Third</b>, for two models of one shape: "
        "‖W′ − W‖ / ‖W‖ from the first to the second, for two checkpoints the change between them.",
    ),
    "ranks": (
        "How many directions the stream uses",
        "Ranks of the centred stream over all tokens. <b>Left:</b> the effective rank, exp of the "
        "entropy of its singular values. <b>Right:</b> participation ratio and stable rank, which "
        "count by energy and are small where a few directions have most of it.",
    ),
    "attention": (
        "Where attention looks",
        "<b>Left:</b> the entropy of attention weights, as a share of uniform attention's (1: all "
        "earlier tokens alike); the band is from the lowest to the highest head. <b>Right:</b> the "
        "mean cosine of two tokens of a document; near 1 all tokens have become alike.",
    ),
    "spectra": (
        "The spectra of the weights",
        "<b>Left:</b> the tail exponent of each matrix's spectrum, from square windows of one size "
        "(FARMS), so that wide and square matrices can be compared. Random matrices of any shape "
        "have about 2.1; smaller is a heavier tail. <b>Right:</b> largest singular values.",
    ),
    "gains": (
        "The gains of the norms",
        "The effective gain of every norm, depth scaling included: rms over channels, with a band "
        "from the 10th to the 90th percentile. Dotted: 1/√block, the rule of LayerNorm Scaling; a "
        "model with this scaling that has left the line has undone it in training.",
    ),
}
RELATED = {  # picture -> the figures in it that an architecture may lack
    "variance": ("variance_law", "mixer", "mlp"),
    "removal": ("mixer", "mlp"),
    "attention": ("attention_entropy",),
    "gains": ("gains",),
}
NAMES = {
    "variance_law": "dashed line",
    "mixer": "mixer",
    "mlp": "MLP",
    "attention_entropy": "entropy",
    "gains": "gains",
}
STYLE = """
:root { --ink: #222831; --soft: #66707c; --line: #e4e7eb; --paper: #ffffff; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 78ch; }
.lead, .note { color: var(--soft); }
.note { font-size: 14px; }
section, .model { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 24px 28px; margin-top: 20px; }
.models { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); }
.model { border-top: 4px solid var(--colour); }
.model h2 { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 10px 18px;
  margin: 14px 0 16px; }
dt { color: var(--soft); font-size: 12.5px; }
dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums; }
ul { margin: 0; padding-left: 20px; }
li { margin: 3px 0; }
img { width: 100%; height: auto; display: block; margin-top: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; margin-top: 10px; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px;
  background: var(--colour); }
.dead td { background: #fff1ec; }
footer { color: var(--soft); font-size: 13px; margin-top: 28px; }
code { font-size: 0.92em; }
@media print { body { background: white; } section, .model { break-inside: avoid; } }
"""


def page(models: Sequence[Mapping[str, Any]], drawn: Mapping[str, bytes]) -> str:
    """The page's HTML.

    Args:
        models: one or two, as inspect.json holds them.
        drawn: the PNGs by name.
    """
    title = " and ".join(str(model["name"]) for model in models)
    body = [
        f"<h1>{escape(title)}</h1>",
        '<p class="lead">What every block does, measured on held-out text.</p>',
        f'<div class="models">{"".join(map(_model, models, COLOURS))}</div>',
        *(_section(name, drawn[name], models) for name in SECTIONS),
        *map(_table, models, COLOURS),
        _footer(models),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: depth</title>\n<style>{STYLE}</style>\n"
        f"<main>\n{chr(10).join(body)}\n</main>\n</html>\n"
    )


def _model(model: Mapping[str, Any], colour: str) -> str:
    loss = model["figures"]["removal"]["loss"]
    facts = {
        "loss": _with_error(loss["mean"], loss["standard_error"]),
        "blocks": model["layers"],
        "width": model["hidden_size"],
        "parameters": _short(model["parameters"]),
        "tokens": f"{model['tokens']:,}",
        "rows": sum(model["rows"].values()),
    }
    cells = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    findings = "".join(f"<li>{escape(sentence)}</li>" for sentence in model["findings"])
    return (
        f'<div class="model" style="--colour: {colour}"><h2>{escape(model["name"])}</h2>'
        f'<div class="note">{escape(model["architecture"])} · <code>{escape(model["weights"])}'
        f"</code></div><dl>{cells}</dl><ul>{findings}</ul></div>"
    )


def _section(name: str, png: bytes, models: Sequence[Mapping[str, Any]]) -> str:
    heading, text = SECTIONS[name]
    missing = [
        f"{escape(model['name'])}: {NAMES[key]} not measured: {escape(model['absent'][key])}."
        for model in models
        for key in RELATED.get(name, ())
        if key in model["absent"]
    ]
    notes = "".join(f'<p class="note">{line}</p>' for line in missing)
    data = base64.b64encode(png).decode()
    return (
        f'<section id="{name}"><h2>{heading}</h2><p>{text}</p>{notes}'
        f'<img alt="{heading}" src="data:image/png;base64,{data}"></section>'
    )


def _table(model: Mapping[str, Any], colour: str) -> str:
    f = model["figures"]
    heads = (
        *("block", "variance", "mixer ratio", "MLP ratio", "loss without", "angle", "gradient"),
        *("‖J − 1‖²", "eff. rank", "entropy", "α"),
    )
    rows = []
    for n in range(model["layers"]):
        change = f["removal"]["block"]["mean"][n]
        error = f["removal"]["block"]["standard_error"][n]
        cells = [
            str(n + 1),
            _figure(f["variance"][n + 1]),
            _figure(f["branch_ratio"]["mixer"][n]),
            _figure(f["branch_ratio"]["mlp"][n]),
            _with_error(change, error, sign="+"),
            f"{f['angular_distance'][n][n + 1]:.4f}",
            _figure(f["gradients"]["block"][n]),
            _figure(f["gradients"]["jacobian"][n]),
            f"{f['effective_rank'][n + 1]:.1f}",
            _figure(f["attention_entropy"]["mean"][n]),
            _figure(f["spectra"]["alpha"][n]),
        ]
        mark = ' class="dead"' if n + 1 in model["dead"] else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<section><h2><span class="dot" style="--colour: {colour}"></span>'
        f'{escape(model["name"])}</h2><div class="scroll"><table><tr>{head}</tr>'
        f"{''.join(rows)}</table></div></section>"
    )


def _footer(models: Sequence[Mapping[str, Any]]) -> str:
    texts = []
    for model in models:
        rows = ", ".join(f"{count} of {escape(name)}" for name, count in model["rows"].items())
        texts.append(
            f"{escape(model['name'])}: {model['tokens']:,} labelled tokens in "
            f"{sum(model['rows'].values())} rows ({rows}), gradients over "
            f"{model['figures']['gradients']['batches']} batches, windows of at most "
            f"{model['figures']['spectra']['window']} for the spectra."
        )
    if len({model["data"] for model in models}) > 1:
        texts.append("The two read different tokens, so their losses cannot be compared.")
    return (
        f"<footer>{' '.join(texts)} In float32 with float64 sums, without dropout. Numbers: "
        f"<code>inspect.json</code>. llmnorm {escape(version())}.</footer>"
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _with_error(value: float, error: float | None, *, sign: str = "") -> str:
    return format(value, f"{sign}.4f") + ("" if error is None else f" ± {error:.4f}")


def _short(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
