"""Rows of new tokens, the only ones of embedding and head that are trained beside frozen weights.

    model.embed_tokens.weight      (vocabulary, hidden), frozen, in the dtype of its products
    model.embed_tokens.new_rows    (n, hidden), float32, trained: the rows of the last n tokens
    lm_head.new_rows               the head's, where it is not tied; the same parameter where it is

A row of `new_rows` is used in the place of the weight's at every look-up and in every logit. So its
gradient is made by itself (nn/loss.py), and neither gradient nor optimizer state has the size of
the embedding. Under every sharding the two are parameters of one module: a wrapper that gathers the
frozen weight for a forward pass gathers the rows with it, and nothing else need know of them.

What would surprise:
- New tokens have the ids behind the tokenizer's last one. A base may have more rows than its
  tokenizer has tokens (Qwen's has); then the ids are those of rows that are there, else the run's
  model has more rows than its base. Either way a new row begins at the mean of the rows of the
  tokens before it: what nobody has trained is no better place to begin.
- The weight's own rows of new tokens stay at that mean and are never used.
- With `training.trainable: all` there is no such parameter: it is a larger embedding.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.head import LanguageHead
from llmnorm.nn.precision import wide_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW_ROWS = "new_rows"
_AT_ONCE = 1 << 12  # rows that are widened together to take their mean


class EmbeddingWithNewRows(nn.Embedding):
    """An embedding, some of whose rows are a parameter of their own.

    Args:
        weight: (vocabulary, hidden), of another embedding.
        new: the ids of new tokens.
    """

    def __init__(self, weight: nn.Parameter, new: range) -> None:
        super().__init__(weight.shape[0], weight.shape[1], device="meta")
        self.weight = weight
        self.first_new = new.start
        self.new_rows = _rows_beside(weight, new)

    def forward(self, input: Tensor) -> Tensor:
        """ids (...) -> (..., hidden), in the dtype of the new rows."""
        rows = self.new_rows
        number = input - self.first_new
        is_new = (number >= 0) & (number < len(rows))
        found = F.embedding(input, self.weight).to(rows.dtype)
        own = F.embedding(number.clamp(0, len(rows) - 1), rows)
        return torch.where(is_new.unsqueeze(-1), own, found)


def add_new_rows(model: "PreTrainedModel", new: range) -> None:
    """Give embedding and head of a causal language model rows of new tokens, in place.

    Args:
        model: on the meta device; the rows hold nothing yet.
        new: the ids of new tokens, rows of the embedding.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight
    assert isinstance(weight, nn.Parameter) and isinstance(head, LanguageHead)
    model.set_input_embeddings(EmbeddingWithNewRows(weight, new))
    head.first_new = new.start
    head.new_rows = _rows_beside(head.weight, new)
    tie_new_rows(model)


def tie_new_rows(model: "PreTrainedModel") -> None:
    """Make embedding and head share their new rows, if there are any and the weights are shared."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    has_rows = isinstance(embedding, EmbeddingWithNewRows) and isinstance(head, LanguageHead)
    if has_rows and head.weight is embedding.weight:
        head.new_rows = embedding.new_rows


def is_new_rows(name: str) -> bool:
    """Whether a parameter is rows of new tokens."""
    return name.rpartition(".")[2] == NEW_ROWS


def rows_name(weight: str) -> str:
    """The name of the new rows of embedding or head, by that of the weight."""
    return weight.removesuffix("weight") + NEW_ROWS


@torch.no_grad()
def set_new_rows(named: Mapping[str, Tensor], new: range) -> None:
    """Set the rows of new tokens to the mean of the rows before them.

    Args:
        named: some of a model's weights by name; of embedding and head the rows of other tokens
            are loaded.
        new: the ids of new tokens.
    """
    for name in (EMBEDDING, HEAD):
        if name not in named:
            continue
        weight, rows = named[name], named.get(rows_name(name))
        total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for part in weight[: new.start].split(_AT_ONCE):
            total += part.double().sum(0)
        mean = total / new.start
        weight[new.start : new.stop] = mean.to(weight.dtype)
        if rows is not None:
            rows.copy_(mean)


def _rows_beside(weight: Tensor, new: range) -> nn.Parameter:
    shape = (len(new), weight.shape[1])
    return nn.Parameter(torch.empty(shape, dtype=wide_dtype(weight.dtype), device=weight.device))
