"""All measurements of `llmnorm inspect`.

    figure                                                 where
    residual variance, mean square, branch ratios          streams.py, variance_law.py
    angular distances of all pairs of streams              streams.py
    loss without a block, its mixer, its MLP               removal.py
    gradient norms, by block and matrix; update ratios     gradients.py, weight_distance.py
    distance of a block's Jacobian from the identity       gradients.py
    effective rank, participation ratio, stable rank       streams.py
    tail exponents (FARMS), spectral norms, stable ranks   spectra.py
    attention entropy, mean cosine of two tokens           streams.py
    effective gains of the norms                           gains.py

Source: Sun et al. 2025, "The Curse of Depth" (arXiv 2502.05795), which asks which blocks do any
work. Everything is measured on held-out text, in float32 with float64 sums, without dropout. A
figure that an architecture does not offer is left out, and the reason is given.

Shapes: lists have an entry per block (L) or per stream (L + 1: x_0 is the embedding, x_l the output
of block l, counted from 1, and x_L what the final norm reads).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from llmnorm.analysis.depth.anatomy import SIDES, Block, anatomy
from llmnorm.analysis.depth.gains import gains
from llmnorm.analysis.depth.gradients import gradients
from llmnorm.analysis.depth.hooks import Place, recorded
from llmnorm.analysis.depth.pieces import Text
from llmnorm.analysis.depth.removal import passes, removal
from llmnorm.analysis.depth.spectra import block_spectra
from llmnorm.analysis.depth.streams import Streams
from llmnorm.analysis.depth.variance_law import predicted_variance
from llmnorm.part import InputError

SHORT = 64  # tokens a line on which blocks and branches are found


def measure(model: Any, text: Text, *, name: str) -> dict[str, Any]:
    """All figures of a causal language model on `text`.

    Args:
        model: in float32 and evaluation mode.
        text: the rows to measure on.
        name: the model's name beside the progress bar.

    Returns:
        `{"figures": {...}, "absent": {figure: reason}, "dead": [block, ...], "findings": [sentence,
        ...]}`; blocks are counted from 1.

    Raises:
        InputError: the model is not a causal decoder made of blocks.
    """
    device = next(model.parameters()).device
    longest = max(text.batches, key=lambda batch: batch.ids.shape[1])
    beginnings = longest.ids[:, :SHORT].to(device)
    blocks = anatomy(model, beginnings)
    hidden_size = model.config.get_text_config().hidden_size
    total = 2 * len(text.batches) + passes(blocks, text) + len(blocks)
    with tqdm(total=total, desc=name, unit="pass", disable=None) as bar:
        streams = Streams(blocks, hidden_size, device)
        for cpu_batch in text.batches:
            batch = cpu_batch.to(device)
            streams.add(partial(model, input_ids=batch.ids, use_cache=False), batch)
            bar.update()
        figures = streams.figures()
        absent = dict(streams.absent)
        figures["removal"] = removal(model, blocks, text, bar.update)
        figures["gradients"] = gradients(model, blocks, text, bar.update)
        figures["spectra"] = block_spectra(blocks, bar.update)
    figures["gains"] = gains(blocks, hidden_size, _input_sizes(model, blocks, beginnings))
    if not figures["gains"]:
        absent["gains"] = "the blocks have no norms of their own"
    for side in SIDES:
        lacking = [number for number, block in enumerate(blocks, 1) if side not in block.branches]
        if lacking:
            kind = type(blocks[lacking[0] - 1].module).__name__
            absent[side] = (
                f"{spans(lacking)} ({kind}): no child of the block has an output that is added to "
                "the stream"
            )
    if "mixer" in absent:
        absent.setdefault("attention_entropy", absent["mixer"])
    try:
        figures["variance_law"] = predicted_variance(
            blocks,
            hidden_size,
            first=figures["variance"][0],
            token_cosine=figures["token_cosine"],
            harmonic=streams.harmonic / streams.tokens,
        )
    except InputError as error:
        absent["variance_law"] = str(error)
    found = {"figures": figures, "absent": absent, "dead": dead_blocks(figures)}
    return {**found, "findings": findings(figures)}


def dead_blocks(figures: dict[str, Any]) -> list[int]:
    """Blocks, counted from 1, whose output is their input: no angle, no change of the loss."""
    removed, angles = figures["removal"]["block"]["mean"], figures["angular_distance"]
    return [
        layer + 1
        for layer, change in enumerate(removed)
        if abs(change) < 1e-9 and angles[layer][layer + 1] < 1e-7
    ]


def findings(figures: dict[str, Any]) -> list[str]:
    """What the figures show, in sentences; blocks are counted from 1."""
    removed, errors = (figures["removal"]["block"][key] for key in ("mean", "standard_error"))
    layers = len(removed)
    dead = dead_blocks(figures)
    sentences = []
    if dead:
        verb = "are" if len(dead) > 1 else "is"
        sentences.append(f"{spans(dead).capitalize()} {verb} dead: the stream is not changed.")
    for side, label in (("mixer", "mixer"), ("mlp", "MLP")):
        ratios = figures["branch_ratio"][side]
        idle = [n for n, r in enumerate(ratios, 1) if r is not None and r < 1e-12]
        if idle := [n for n in idle if n not in dead]:
            sentences.append(f"The {label} of {spans(idle)} adds nothing.")
    known = [(d, e) for d, e in zip(removed, errors, strict=True) if e is not None]
    if len(known) == layers:
        idle = [n for n, (d, e) in enumerate(known, 1) if abs(d) <= 2 * e and n not in dead]
        harm = [n for n, (d, e) in enumerate(known, 1) if d < -2 * e]
        if idle:
            sentences.append(
                f"Without {spans(idle)} (removed one at a time) the loss changes by less than two "
                "standard errors."
            )
        if harm:
            sentences.append(
                f"Without {spans(harm)} (removed one at a time) the loss is lower by more than two "
                "standard errors."
            )
        if not (dead or idle or harm):
            sentences.append(
                f"Each of the {layers} blocks lowers the loss by more than two standard errors."
            )
    worth = [max(0.0, d) for d in removed]
    if layers > 1 and any(d > 2 * (e or 0) for d, e in zip(removed, errors, strict=True)):
        deep = sum(worth[(layers + 1) // 2 :]) / sum(worth)
        sentences.append(
            f"The deeper half of the blocks accounts for {100 * deep:.0f} % of the summed cost of "
            "removing single blocks."
        )
    start, end = figures["variance"][0], figures["variance"][-1]
    if start > 0:
        sentences.append(
            f"The stream's variance goes from {start:.3g} to {end:.3g} ({end / start:.3g} times)."
        )
    return sentences


def spans(numbers: Sequence[int]) -> str:
    """[2] -> "block 2"; [1, 2, 3, 7] -> "blocks 1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts]
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


@torch.no_grad()
def _input_sizes(
    model: Any, blocks: list[Block], ids: torch.Tensor
) -> dict[torch.nn.Module, float]:
    """Root mean square of each norm's input on tokens (batch, length)."""
    places = [Place(norm, "in") for block in blocks for norm in block.norms.values()]
    with recorded(places) as seen:
        model(input_ids=ids, use_cache=False)
    return {place.module: float(seen[place].square().mean().sqrt()) for place in places}
