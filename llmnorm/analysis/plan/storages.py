"""Counting the bytes of a program that runs without numbers.

    with FakeTensorMode(), Storages() as storages, fused_attention():
        give_storages(model)              # which was on the meta device
        model(...)                        # storages.live, storages.peak

torch's FakeTensorMode gives tensors shapes and no numbers, and every storage is counted from its
making to its end. So whatever a mixer, a norm, an adapter or recomputation keeps for the backward
pass is counted by the code that keeps it; there is no second list of it here.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmnorm.nn.norms import rms_cpu
from llmnorm.nn.precision import wide_dtype


class Storages(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, for as long as it lives.

    Attributes:
        live: bytes now.
        peak: the most that were live.
        number: what a program is told that reads a number of a tensor; it fails if None, since the
            tensors have no numbers. One that reads a condition is told that it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.number: int | None = None
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation, its results counted."""
        if func is torch.ops.aten._local_scalar_dense.default and self.number is not None:
            return args[0].dtype == torch.bool or self.number
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention keeps what fused kernels keep; without numbers torch would take another.

    torch's function is replaced, since its modes for functions do not reach what is recomputed in a
    backward pass.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: _Attention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@contextmanager
def whole_norms(device: str) -> Iterator[None]:
    """Inside, a GPU's RMS norm takes all rows at once; a CPU's takes as many as its cache holds."""
    with patch.object(rms_cpu, "PIECE", rms_cpu.PIECE if device == "cpu" else 2**62):
        yield


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q)
        normaliser = q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype))
        ctx.save_for_backward(q, k, v, mixed, normaliser)
        return mixed

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def give_storages(model: nn.Module) -> None:
    """Fake tensors in the place of those on the meta device; tied ones stay one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    new = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(new, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
