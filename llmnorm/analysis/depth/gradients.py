"""Gradients by depth: norms per block and matrix, and how far each block is from the identity.

The Jacobian's distance (Sun et al. 2025, arXiv 2502.05795, figure 5) is ||J_l - I||_F^2 / (tokens
hidden), where J_l is the derivative of all real tokens of x_{l+1} by those of x_l. It is estimated
with random signs u, one draw a batch: E |J^T u - u|^2 = ||J - I||_F^2 (Hutchinson).

What would surprise: gradients are of each batch's mean loss without dropout, and norms with running
statistics use theirs without updating them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmnorm.analysis.depth.anatomy import Block, matrices
from llmnorm.analysis.depth.hooks import Place, recorded, wide
from llmnorm.analysis.depth.pieces import Text
from llmnorm.data.loader import IGNORED


def gradients(
    model: nn.Module, blocks: list[Block], text: Text, tick: Callable[[], object]
) -> dict[str, Any]:
    """Gradient norms and Jacobian distances, means over the batches of `text`.

    Args:
        model, blocks: a causal language model in evaluation mode, and its blocks.
        text: where its loss is taken.
        tick: called after every batch.

    Returns:
        `{"batches", "block": [...], "matrices": {name: [...]}, "weights": {name: [...]},
        "jacobian": [...]}`: the gradient's norm of a block's parameters together and of every
        matrix, the matrices' own norms, and ||J - I||^2 / (tokens hidden).
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    parameters = [dict(block.module.named_parameters()) for block in blocks]
    weights = [matrices(block.module) for block in blocks]
    names = list(dict.fromkeys(name for of_block in weights for name in of_block))
    block_norms = torch.zeros(len(blocks), dtype=torch.float64)
    norms = {name: [0.0] * len(blocks) for name in names}
    distances = torch.zeros(len(blocks), dtype=torch.float64)
    places = [Place(block.module, end) for block in blocks for end in ("in", "out")]
    for cpu_batch in text.batches:
        batch = cpu_batch.to(device)
        with recorded(places, graph=True) as seen:
            logits = model(input_ids=batch.ids, use_cache=False).logits
        loss = F.cross_entropy(
            wide(logits).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
        )
        real = batch.real.unsqueeze(-1)
        for layer, block in enumerate(blocks):
            x, y = seen[Place(block.module, "in")], seen[Place(block.module, "out")]
            signs = torch.randint(2, x.shape, generator=generator, device=device)
            u = (2.0 * signs - 1).to(x.dtype) * real
            (pulled,) = torch.autograd.grad(y, x, u, retain_graph=True)
            distances[layer] += float((pulled - u).double().square().sum() / (u.square().sum()))
        flat = [p for own in parameters for p in own.values() if p.requires_grad]
        found = dict(zip(flat, torch.autograd.grad(loss, flat, allow_unused=True), strict=True))
        for layer, own in enumerate(parameters):
            grads = {name: found.get(p) for name, p in own.items()}
            total = sum(float(g.double().square().sum()) for g in grads.values() if g is not None)
            block_norms[layer] += math.sqrt(total)
            for name in weights[layer]:
                norms[name][layer] += _norm(grads, name)
        tick()
    count = len(text.batches)
    return {
        "batches": count,
        "block": (block_norms / count).tolist(),
        "matrices": {
            name: [
                total / count if name in own else None
                for total, own in zip(norms[name], weights, strict=True)
            ]
            for name in names
        },
        "weights": {
            name: [float(own[name].detach().norm()) if name in own else None for own in weights]
            for name in names
        },
        "jacobian": (distances / count).tolist(),
    }


def _norm(grads: dict[str, Any], name: str) -> float:
    """The norm of a parameter's gradient, or of one matrix of a stacked one (`experts.up.3`)."""
    if name in grads:
        grad = grads[name]
    else:
        stack, _, index = name.rpartition(".")
        grad = None if grads[stack] is None else grads[stack][int(index)]
    return 0.0 if grad is None else float(grad.double().norm())
