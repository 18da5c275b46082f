"""Which parameter gets which rule: the only place that decides it.

Hidden matrices (2-D weights inside the blocks) go to the matrix rule and decay; embeddings, head,
norms, biases and scalars are auxiliary: they go to AdamW, with a learning rate of their own and
without decay. A tied head is the embedding. Frozen parameters belong to nobody.
"""

from typing import NamedTuple

import torch
from torch import nn


class Groups(NamedTuple):
    """Trainable parameters by name, each in exactly one group."""

    matrices: dict[str, nn.Parameter]
    auxiliary: dict[str, nn.Parameter]


def split(model: nn.Module) -> Groups:
    """Sort the trainable parameters of a Hugging Face model (or of any module) into groups."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    groups = Groups({}, {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and id(parameter) not in outside
            (groups.matrices if hidden else groups.auxiliary)[name] = parameter
    return groups


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter>.<field>` -> tensor (no copies)."""
    return {
        f"{name}.{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }
