"""Linear cross-entropy in chunks: the loss of a language model's head without its full logits.

Shapes: hidden (tokens, hidden), weight (vocabulary, hidden), bias of an encoder's head
(vocabulary,), labels (tokens,), of which -100 is not counted.

The logits exist for one chunk of tokens at a time. The forward pass computes the gradients of
`hidden`, `weight` and bias too, while it has a chunk's softmax(logits) - onehot(label). So logits
are computed once, and what is kept for the backward pass has the size of `hidden` and `weight`.

Surprises: the weight's gradient is accumulated in float32 (float64 for float64) over the chunks
also where the products are bf16; the division by the number of tokens is applied to narrow tensors,
not to the logits; gradients are made only for inputs that want them.

Some rows of the head may be parameters of their own beside a frozen weight (models/new_rows.py).
Their logits take the place of the weight's; their gradient is that of these columns alone, so that
nothing of the weight's size is made for them.

In the place of the labels there may be the distributions of a frozen model (soft_targets.py). The
labels then say which tokens count, and nothing else.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.linear import (
    add_weight_gradient,
    fills_memory,
    product,
    sum_of_weight_gradients,
)
from llmnorm.nn.precision import product_dtype, wide_dtype
from llmnorm.nn.soft_targets import SoftTargets, against

IGNORED = -100


class NewRows(NamedTuple):
    """Rows in the place of some rows of a weight (vocabulary, hidden).

    Attributes:
        first: the row of the weight whose place the first of them takes.
        values: (n, hidden), float32 (or float64).
    """

    first: int
    values: Tensor

    @property
    def place(self) -> slice:
        """The rows of the weight, which are columns of the logits."""
        return slice(self.first, self.first + len(self.values))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    items: Tensor | float | None = None,
    *,
    bias: Tensor | None = None,
    new_rows: NewRows | None = None,
    soft_targets: SoftTargets | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Sum of the real labels' cross-entropies over `items`, a scalar in float32 (or float64).

    Args:
        hidden: (tokens, hidden), last hidden states.
        weight: (vocabulary, hidden), the head.
        labels: (tokens,), already shifted; -100 is not counted.
        items: what to divide by, e.g. the real labels of all micro batches and processes; the real
            labels of this call if None (1 if there are none).
        bias: (vocabulary,), added to the logits.
        new_rows: rows that are used in the place of some of the weight's, which get no gradient.
        soft_targets: distributions over the vocabulary that the tokens are held against; where a
            label is -100, they count no more than it does.
        chunk: tokens at a time; `chunk_size` if None.
        compiled: let torch's compiler fuse what is done to the logits; not with soft targets.
    """
    device = hidden.device.type
    dtype = product_dtype(weight)
    if items is None:
        items = (labels != IGNORED).sum().clamp(min=1)
    scale = 1 / torch.as_tensor(items, dtype=wide_dtype(dtype), device=hidden.device)
    chunk = chunk or chunk_size(weight)
    # Decided here: inside the Function, needs_input_grad is true also under torch.no_grad().
    wanted = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias, new_rows.values if new_rows else None)
    ]
    first, rows = new_rows or (0, None)
    with torch.autocast(device, enabled=False):
        return _Loss.apply(
            *(hidden, weight, bias, rows, first, labels, scale, chunk, dtype, wanted, compiled),
            soft_targets,
        )


def cross_entropy(logits: Tensor, labels: Tensor, items: Tensor | float | None = None) -> Tensor:
    """The same loss from logits (..., vocabulary) that are there already, labels (...)."""
    total = F.cross_entropy(
        logits.flatten(0, -2).to(wide_dtype(logits.dtype)),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return total / ((labels != IGNORED).sum().clamp(min=1) if items is None else items)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    new_rows: NewRows | None = None,
) -> Tensor:
    """The cross-entropy of every token (tokens,), 0 where the label is -100; without gradients.

    Arguments are those of `linear_cross_entropy`.
    """
    return _each_token(hidden, weight, labels, bias, new_rows, None)


@torch.no_grad()
def token_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    new_rows: NewRows | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and the gradient of each by its own row of `hidden`, (tokens, hidden)."""
    gradient = torch.zeros_like(hidden)
    return _each_token(hidden, weight, labels, bias, new_rows, gradient), gradient


def _each_token(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    new_rows: NewRows | None,
    gradient: Tensor | None,
) -> Tensor:
    """The losses; their gradients are written into `gradient` (tokens, hidden)."""
    chunk, own = chunk_size(weight), None if new_rows is None else new_rows.values.to(weight.dtype)
    parts = list[Tensor]()
    for first in range(0, len(labels), chunk):
        part = slice(first, first + chunk)
        logits = _logits(hidden[part], weight, bias)
        if new_rows is not None and own is not None:
            offset = None if bias is None else bias[new_rows.place]
            logits[:, new_rows.place] = _logits(hidden[part], own, offset)
        if gradient is None:
            parts.append(_softmax(logits, labels[part])[1])
            del logits  # before the next chunk's are made
            continue
        by_logits, losses = _by_parts(logits, labels[part])
        del logits
        by_logits.mul_((labels[part] != IGNORED).to(by_logits.dtype).unsqueeze(1))
        if new_rows is not None and own is not None:
            gradient[part] += product(by_logits[:, new_rows.place], own.t())
            by_logits[:, new_rows.place] = 0
        gradient[part] += product(by_logits, weight.t())
        parts.append(losses)
        del by_logits
    return torch.cat(parts) if parts else hidden.new_zeros(0)


# Logits of a chunk: few on a CPU, whose caches are small, many on a GPU, to keep it busy.
LOGITS = {"cpu": 2**21, "cuda": 2**26}


def chunk_size(weight: Tensor, device: str | None = None) -> int:
    """Tokens at a time, from device and vocabulary alone: LOGITS, but at least 512 tokens.

    Args:
        weight: (vocabulary, hidden).
        device: its kind; the weight's own if None.

    Measured on a CPU, forward and backward (tools/bench/nn.py): re-reading the weight's gradient
    costs 6 % at 256 tokens and a vocabulary of 32k against 512; beyond 512, and for a vocabulary of
    4k from 128 on, nothing is gained.
    """
    return max(512, LOGITS.get(device or weight.device.type, LOGITS["cuda"]) // len(weight))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, memory: Tensor | None = None
) -> Tensor:
    """Logits (tokens, vocabulary), written into the first rows of `memory` if that is given."""
    out = None if memory is None else memory[: len(hidden)]
    logits = product(hidden.to(weight.dtype), weight, out)
    return logits if bias is None else logits.add_(bias)


def _softmax(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (tokens, vocabulary) and losses (tokens,), in float32 or float64.

    The normaliser is taken from the largest logit and its probability, log sum exp(l) = max l -
    log(max p), which cannot underflow as -log(p[label]) can: two reads instead of a pass of exp.
    """
    wide = wide_dtype(logits.dtype)
    largest = logits.amax(-1).to(wide)
    picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if logits.dtype == wide and logits.device.type == "cpu":
        # In the logits' memory: half of it, and a tenth less time where memory is new.
        probabilities = torch.softmax(logits, -1, out=logits)
    else:
        probabilities = F.softmax(logits, -1, dtype=wide)
    normaliser = largest - probabilities.amax(-1).log_()
    return probabilities, (normaliser - picked).masked_fill_(labels == IGNORED, 0)


def _by_parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) - onehot(labels) in the logits' dtype, and the losses (tokens,)."""
    dtype = logits.dtype
    gradient, losses = _softmax(logits, labels)
    rows = torch.arange(len(labels), device=labels.device)
    gradient[rows, labels.clamp(min=0)] -= 1
    return gradient.to(dtype), losses


def _in_one_expression(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `_by_parts` computes, in a form that torch's compiler makes one kernel of."""
    wide = logits.to(wide_dtype(logits.dtype))
    label = labels.clamp(min=0).unsqueeze(-1)
    normaliser = wide.logsumexp(-1, keepdim=True)
    losses = (normaliser - wide.gather(-1, label)).squeeze(-1).masked_fill(labels == IGNORED, 0)
    hit = torch.arange(wide.shape[-1], device=labels.device) == label
    return ((wide - normaliser).exp() - hit.to(wide.dtype)).to(logits.dtype), losses


@cache
def _one_kernel() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`_in_one_expression`, compiled; not at import, where it would load torch's compiler."""
    return torch.compile(_in_one_expression)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        first_new: int,
        labels: Tensor,
        scale: Tensor,
        chunk: int,
        dtype: torch.dtype,
        wanted: list[bool],
        compiled: bool,
        soft: SoftTargets | None,
    ) -> Tensor:
        wide = wide_dtype(dtype)
        head = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        own = None if rows is None else rows.to(dtype)
        place = slice(first_new, first_new + (0 if rows is None else len(rows)))
        wants_hidden, wants_weight, wants_bias, wants_rows = wanted
        total = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = sum_of_weight_gradients(weight, wide) if wants_weight else None
        bias_grad = weight.new_zeros(len(weight), dtype=wide) if wants_bias else None
        rows_grad = torch.zeros_like(rows) if rows is not None and wants_rows else None
        real = (labels != IGNORED).to(wide).mul_(scale).unsqueeze(1)
        work = _one_kernel() if compiled else _by_parts
        # New pages for 64 MiB of logits cost a fifth of their product (nn/linear.py, CHOICES).
        keeps = dtype == wide and fills_memory(hidden[:chunk].to(dtype), head)
        memory: Tensor | None = None
        for first in range(0, len(labels), chunk):
            part = slice(first, first + chunk)
            logits = _logits(hidden[part], head, offset, memory)
            if own is not None:
                own_offset = None if offset is None else offset[place]
                logits[:, place] = _logits(hidden[part], own, own_offset)
            if soft is not None:
                gradient, losses = against(soft.probabilities(part, wide), logits)
                losses.masked_fill_(labels[part] == IGNORED, 0)
            elif any(wanted):
                gradient, losses = work(logits, labels[part])
            else:
                total += _softmax(logits, labels[part])[1].sum()
                continue
            del logits
            total += losses.sum()
            if bias_grad is not None:
                bias_grad += (real[part].t() @ gradient.to(wide)).squeeze(0)
            own_gradient = None
            if own is not None:
                own_gradient = gradient[:, place].clone()
                gradient[:, place] = 0  # the weight's rows there have no part in these logits
            if rows_grad is not None and own_gradient is not None:
                rows_grad += own_gradient.to(wide).t() @ hidden[part].to(wide).mul(real[part])
            if hidden_grad is not None:
                part_grad = product(gradient, head.t()).to(wide)
                if own is not None and own_gradient is not None:
                    part_grad += product(own_gradient, own.t())
                hidden_grad[part] = part_grad.mul_(real[part])
            if weight_grad is not None:
                scaled = hidden[part].to(wide).mul(real[part]).to(dtype)
                add_weight_gradient(weight_grad, gradient, scaled)
            memory = gradient if keeps else None
            del gradient  # unless kept, it goes before the next chunk's logits are made
        if weight_grad is not None:
            weight_grad = weight_grad.contiguous()
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad, rows_grad)
        ctx.weight_dtype = weight.dtype
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad, rows_grad = ctx.saved_tensors
        # loss.backward() gives 1: nothing to scale. On a GPU, asking would wait for it.
        if grads[0].device.type == "cpu" and grads[0] == 1 and ctx.weight_dtype == grads[0].dtype:
            return hidden_grad, weight_grad, bias_grad, rows_grad, *(None,) * 8
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * grads[0]).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * grads[0]).to(ctx.weight_dtype)
        if bias_grad is not None:
            bias_grad = (bias_grad * grads[0]).to(ctx.weight_dtype)
        if rows_grad is not None:
            rows_grad = rows_grad * grads[0]
        return hidden_grad, weight_grad, bias_grad, rows_grad, *(None,) * 8
