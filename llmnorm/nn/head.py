"""The head of a language model: logits, or the loss itself (loss.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.loss import (
    NewRows,
    cross_entropy,
    linear_cross_entropy,
    token_gradients,
    token_losses,
)
from llmnorm.nn.soft_targets import SoftTargets


class LanguageHead(Linear):
    """The output head: logits, or the loss itself when labels are given.

    The loss is computed inside this module's forward, where wrappers that shard parameters have the
    weight whole. Where somebody compiles or exports the whole model, it is computed from all logits
    at once. `compiled` (set by who compiles the blocks): on a GPU one kernel makes the logits'
    gradient and the losses.

    `new_rows` (n, hidden), set by models/new_rows.py, are used in the place of the rows of the
    weight from `first_new` on; None: there are none.
    """

    compiled = False
    first_new = 0
    new_rows: nn.Parameter | None

    def __init__(self, hidden_size: int, vocab_size: int, *, bias: bool = False) -> None:
        super().__init__(hidden_size, vocab_size, bias=bias)
        self.register_parameter("new_rows", None)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        items: Tensor | float | None = None,
        soft_targets: SoftTargets | None = None,
        *,
        each: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (..., vocabulary) of hidden (..., hidden), or the loss against labels (...).

        With soft targets of the same tokens, laid end to end, it is the loss against these.

        With `each`, which takes hidden (tokens, hidden) and labels (tokens,): the loss of every
        token and its gradient by the token's hidden state, or without gradients (`torch.no_grad`)
        the losses alone. The products are then made in hidden's precision, and nothing is recorded.
        """
        new = None if self.new_rows is None else NewRows(self.first_new, self.new_rows)
        if each:
            assert labels is not None
            alone = token_gradients if torch.is_grad_enabled() else token_losses
            weight = self.weight.detach().to(hidden.dtype)
            bias = None if self.bias is None else self.bias.detach().to(hidden.dtype)
            return alone(hidden.detach(), weight, labels, bias=bias, new_rows=new)
        whole = torch.compiler.is_compiling() and soft_targets is None  # by somebody else
        if labels is None or whole:
            logits = super().forward(hidden)
            if new is not None:
                offset = None if self.bias is None else self.bias[new.place]
                own = F.linear(hidden, new.values, offset).to(logits.dtype)
                logits = logits.slice_scatter(own, -1, new.place.start, new.place.stop)
            return logits if labels is None else cross_entropy(logits, labels, items)
        return linear_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            labels.flatten(),
            items,
            bias=self.bias,
            new_rows=new,
            soft_targets=soft_targets,
            compiled=self.compiled and hidden.is_cuda,
        )
