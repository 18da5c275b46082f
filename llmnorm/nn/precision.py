"""Which precision sums are taken in, whatever the products' precision is."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for statistics, states and losses of `dtype`; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
