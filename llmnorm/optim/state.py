"""The state of an optimizer by name, and how a saved state is loaded.

What would surprise: torch's `load_state_dict` puts new tensors in the place of the old ones. Here a
state is a view into a stack, and checkpoints refer to these tensors, so loading copies into them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.optim.fragments import master


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<field>` -> tensor (no copies)."""
    return {
        f"{name}.{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(master(parameter), {}).items()
    }


@torch.no_grad()
def load_in_place(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Copy what `optimizer.state_dict()` returned into the optimizer's own tensors.

    Raises:
        ValueError: it is the state of other parameters or of another rule; nothing has been copied.
    """
    own = optimizer.state_dict()
    for mine, other in zip(own["param_groups"], saved["param_groups"], strict=True):
        if mine["params"] != other["params"]:
            raise ValueError("the saved state belongs to other parameter groups")
    for state in (own["state"], saved["state"]):
        if {i: list(f) for i, f in state.items()} != {i: list(f) for i, f in own["state"].items()}:
            raise ValueError("the saved state has other fields")
    for index, fields in saved["state"].items():
        for field, value in fields.items():
            if value.shape != own["state"][index][field].shape:
                raise ValueError(f"the saved '{field}' has another shape: {tuple(value.shape)}")
    for index, fields in saved["state"].items():
        for field, value in fields.items():
            own["state"][index][field].copy_(value)
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in other.items() if key != "params"})
