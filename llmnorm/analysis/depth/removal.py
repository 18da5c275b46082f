"""How much the loss changes without a block, without its mixer, without its MLP.

Source: Sun et al. 2025 (arXiv 2502.05795), figure 1 (performance drop of a removed block), here as
the change of the held-out loss. A removed block returns its input. A removed branch adds zero where
it is added, so that a norm of the sum still acts. Blocks keep their numbers, and so scales that
depend on the depth stay as they are.

Over N rows, row i with n_i tokens and the summed change d_i, the change of the mean loss is
D = sum d / sum n, and its standard error is sqrt(N/(N-1) sum (d_i - D n_i)^2) / sum n (that of a
ratio).

What would surprise: the blocks in front of the removed one are not computed again. They return the
stream that was stored in the complete pass, which halves the work.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import SIDES, Block
from llmnorm.analysis.depth.hooks import (
    Place,
    first,
    logits_of,
    recorded,
    stream_in,
    wide,
    with_first,
)
from llmnorm.analysis.depth.pieces import Batch, Text
from llmnorm.data.loader import IGNORED

KINDS = ("block", *SIDES)


@torch.no_grad()
def removal(
    model: nn.Module, blocks: list[Block], text: Text, tick: Callable[[], object]
) -> dict[str, Any]:
    """The loss, and how much it changes when a block or branch is removed.

    Args:
        model: a causal language model in evaluation mode.
        blocks: its blocks.
        text: the rows to measure on.
        tick: called after every forward pass.

    Returns:
        `{"loss": {"mean", "standard_error"}, "block": {"mean": [...], "standard_error": [...]},
        "mixer": ..., "mlp": ...}`, in nats a token; None where a block has no such branch.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(text.total, dtype=torch.float64)
    losses = torch.zeros(text.total, dtype=torch.float64)
    changes = {kind: torch.zeros(len(blocks), text.total, dtype=torch.float64) for kind in KINDS}
    for cpu_batch in text.batches:
        batch = cpu_batch.to(device)
        with recorded([Place(block.module, "in") for block in blocks]) as seen:
            complete = row_losses(model, batch, text.total)
        streams = [seen[Place(block.module, "in")] for block in blocks]
        counts.index_add_(0, cpu_batch.row, (cpu_batch.labels != IGNORED).sum(-1).double())
        losses += complete
        tick()
        for layer, block in enumerate(blocks):
            with _skipped(blocks[: layer + 1], streams[layer]):
                changes["block"][layer] += row_losses(model, batch, text.total) - complete
            tick()
            for side, branch in block.branches.items():
                with _skipped(blocks[:layer], streams[layer]), _zeroed(branch.added):
                    changes[side][layer] += row_losses(model, batch, text.total) - complete
                tick()
    found: dict[str, Any] = {"loss": dict(zip(_NAMES, _ratio(losses, counts), strict=True))}
    for kind in KINDS:
        pairs: list[tuple[float | None, float | None]] = [
            _ratio(change, counts) if kind in ("block", *block.branches) else (None, None)
            for block, change in zip(blocks, changes[kind], strict=True)
        ]
        found[kind] = dict(zip(_NAMES, map(list, zip(*pairs, strict=True)), strict=True))
    return found


_NAMES = ("mean", "standard_error")


def passes(blocks: list[Block], text: Text) -> int:
    """How many forward passes `removal` makes, and so how often it calls its `tick`."""
    return len(text.batches) * (1 + len(blocks) + sum(len(block.branches) for block in blocks))


def row_losses(model: nn.Module, batch: Batch, rows: int) -> Tensor:
    """The summed loss of every row of the text; 0 for rows of other batches.

    Args:
        rows: rows of the whole text.

    Returns:
        (rows,) float64, on the CPU.
    """
    losses = F.cross_entropy(
        wide(logits_of(model, batch.ids)).flatten(0, 1),
        batch.labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    sums = losses.view_as(batch.labels).double().sum(-1)
    return torch.zeros(rows, dtype=torch.float64).index_add_(0, batch.row.cpu(), sums.cpu())


def _ratio(values: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """sum values / sum counts, and its standard error over rows; None for a single row."""
    mean = values.sum() / counts.sum()
    rows = len(counts)
    if rows < 2:
        return float(mean), None
    spread = (rows / (rows - 1) * (values - mean * counts).square().sum()).sqrt()
    return float(mean), float(spread / counts.sum())


@contextmanager
def _skipped(blocks: Sequence[Block], stream: Tensor) -> Iterator[None]:
    """Inside the `with` the blocks compute nothing, and the last of them returns `stream`."""

    def forward(block: Block, last: bool) -> Callable[..., Any]:
        def skip(*args: Any, **kwargs: Any) -> Any:
            return block.output_with(stream if last else stream_in(args, kwargs))

        return skip

    for block in blocks:
        block.module.forward = forward(block, block is blocks[-1])
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


@contextmanager
def _zeroed(module: nn.Module) -> Iterator[None]:
    """Inside the `with` the module's output is zero."""

    def zero(_: nn.Module, __: Any, output: Any) -> Any:
        return with_first(output, torch.zeros_like(first(output)))

    hook = module.register_forward_hook(zero)
    try:
        yield
    finally:
        hook.remove()
