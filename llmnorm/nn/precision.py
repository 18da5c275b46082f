"""Which precision sums are taken in, whatever the products' precision is."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for statistics, states and losses of `dtype`; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """What a projection of x comes out in: autocast's dtype where that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(device: str) -> AbstractContextManager[None]:
    """A context in which autocast is off for devices of this type.

    Where it is off already, or there is none (the meta device), nothing is done: switching it off
    costs 4 us, and a decode step has two norms a layer.
    """
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING
