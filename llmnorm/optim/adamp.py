"""AdamP: Heo et al. 2021, arXiv 2006.08217, Algorithm 2; official code clovaai/AdamP.

AdamW that removes the radial part of the step from weights whose scale does not matter.

Shapes: G, M, V, W and the result (n, rows, columns).

    P = M / (sqrt(V) / sqrt(1 - b2^t) + eps)             (Nesterov: b1 M + (1 - b1) G in M's place)
    rows:   if max_i |cos(G_i, W_i)| < delta / sqrt(columns), every row P_i is projected
    layer:  else, if |cos(G, W)| < delta / sqrt(rows columns), P is projected as one vector
    projected:  P <- P - w <w, P>, w = W / (|W| + eps);  wd <- wd wd_ratio
    W <- W (1 - lr wd) - lr / (1 - b1^t) P

What would surprise:
- The test looks at the gradient, but the projection changes Adam's direction P.
- A gradient that has nothing to do with W passes the layer's test by chance in 8 % of the steps,
  whatever the size of the matrix. Only weights before a norm (q and k with qk_norm, outputs that
  are normed) pass it at every step. For a plain Llama AdamP is AdamW with about 7 % less decay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from llmnorm.optim.stacks import Decay, Hyperparameters, State


@dataclass(frozen=True)
class AdamP:
    """The rule; its fields are those of `AdamPSettings`."""

    betas: tuple[float, float]
    eps: float
    delta: float
    wd_ratio: float
    nesterov: bool

    decay: ClassVar[Decay] = "inside"
    scalars: ClassVar[tuple[str, ...]] = ("step",)

    def fields(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The state of one matrix: name -> shape."""
        return {"momentum": (rows, columns), "second_moment": (rows, columns)}

    def update(
        self,
        grad: Tensor,
        state: State,
        hyperparameters: Hyperparameters,
        weight: Tensor | None = None,
    ) -> Tensor:
        """What is subtracted from the weights, (n, rows, columns)."""
        assert weight is not None
        lr, weight_decay = hyperparameters.lr, hyperparameters.weight_decay
        (beta1, beta2), t = self.betas, int(state["step"]) + 1
        momentum = state["momentum"].lerp_(grad, 1 - beta1)
        second_moment = state["second_moment"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = second_moment.sqrt().div_((1 - beta2**t) ** 0.5).add_(self.eps)
        step = (grad.lerp(momentum, beta1) if self.nesterov else momentum) / denominator

        by_row = self._scale_invariant(grad, weight)
        by_layer = ~by_row & self._scale_invariant(grad.flatten(1), weight.flatten(1))
        tests: list[tuple[Tensor, int | tuple[int, ...]]] = [(by_row, -1), (by_layer, (-2, -1))]
        for projected, dims in tests:
            if projected.any():
                step -= projected * _radial(step, weight, dims, self.eps)
        factor = 1 - (1 - self.wd_ratio) * (by_row | by_layer).to(weight.dtype)
        return step.mul_(lr / (1 - beta1**t)).add_(factor * weight, alpha=lr * weight_decay)

    def _scale_invariant(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Whether every vector along the last axis is nearly orthogonal to its gradient, (n, 1, 1).

        Args:
            grad, weight: (n, rows, columns) for the test of rows, (n, rows * columns) for that of
                the layer.
        """
        cosines = F.cosine_similarity(grad, weight, dim=-1, eps=self.eps).abs()
        largest = cosines.flatten(1).amax(1) if cosines.ndim > 1 else cosines
        return (largest < self.delta / grad.shape[-1] ** 0.5).view(-1, 1, 1)


def _radial(step: Tensor, weight: Tensor, dims: int | tuple[int, ...], eps: float) -> Tensor:
    """The part of a step, (n, rows, columns), along the weight; `dims` are those of one vector."""
    direction = weight / (weight.norm(dim=dims, keepdim=True) + eps)
    return direction * (direction * step).sum(dims, keepdim=True)
