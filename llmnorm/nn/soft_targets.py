"""Soft targets: the distributions of a frozen model, in the place of labels.

Source: Hinton et al. 2015 (arXiv 1503.02531), at temperature 1. For drafts of speculative decoding:
Zhou et al. 2023 (DistillSpec, arXiv 2310.08461), the forward KL divergence.

With p = softmax(hidden @ weight^T) of the frozen model, and l the logits of the one that is
trained, a token's loss is the cross-entropy between their distributions, and its gradient with
respect to the logits has the form that it has with a label:

    loss      -sum_v p_v log softmax(l)_v = log sum_v exp(l_v) - sum_v p_v l_v
    gradient  softmax(l) - p

So nn/loss.py computes it chunk by chunk as it does with labels, and p exists for a chunk at a time.

What would surprise: the loss cannot reach 0. Its least value is the entropy of p, where l gives p.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmnorm.nn.linear import product
from llmnorm.nn.precision import wide_dtype


@dataclass(frozen=True)
class SoftTargets:
    """What the distributions of some tokens are computed from.

    No tuple: what spreads modules over processes casts and moves the tensors of tuples in a
    module's arguments, and these lie where they are used.

    Attributes:
        hidden: (tokens, teacher_hidden), the frozen model's last hidden states.
        weight: (vocabulary, teacher_hidden), its head.
    """

    hidden: Tensor
    weight: Tensor

    def probabilities(self, part: slice, dtype: torch.dtype) -> Tensor:
        """p of a chunk of the tokens, (chunk, vocabulary) in `dtype`."""
        logits = product(self.hidden[part].to(self.weight.dtype), self.weight)
        return _softmax(logits.to(dtype))


def against(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient softmax(logits) - targets in the logits' dtype, and the losses (tokens,).

    Args:
        targets: p, (tokens, vocabulary) in float32, or float64 for float64 logits.
        logits: (tokens, vocabulary); float32 and float64 are overwritten on a CPU.
    """
    wide = logits.to(wide_dtype(logits.dtype))
    losses = wide.logsumexp(-1) - torch.linalg.vecdot(targets, wide)
    return _softmax(wide).sub_(targets).to(logits.dtype), losses


def _softmax(logits: Tensor) -> Tensor:
    """In the logits' memory on a CPU: new pages for a chunk's take as long as their product."""
    on_cpu = logits.device.type == "cpu"
    return torch.softmax(logits, -1, out=logits) if on_cpu else torch.softmax(logits, -1)
