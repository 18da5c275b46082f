"""Recorded runs of official implementations as tensors, and the ways to measure an error.

A file's header says kind, hyperparameters, source and tolerance. Each file beside this one serves
the kinds of a room: a function takes a `Vectors`, runs the part, and yields `Result`s. The name
given to `@serves` may hold wildcards.
"""

import fnmatch
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor


class Result(NamedTuple):
    """The largest error of one precision and what it may be."""

    precision: str
    error: float
    tolerance: float


class Vectors:
    """One file: its tensors and its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.kind = header["kind"]
        self.hyperparameters: dict[str, Any] = json.loads(header.get("hyperparameters") or "{}")
        try:
            self.tolerance: dict[str, Any] = json.loads(header["tolerance"])
        except json.JSONDecodeError:
            self.tolerance = {}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix/`, by the rest of their names."""
        return {
            key.removeprefix(prefix + "/"): value
            for key, value in self.tensors.items()
            if key.startswith(prefix + "/")
        }


Kind = Callable[[Vectors], Iterator[Result]]
KINDS: dict[str, Kind] = {}
FLOATS = {"float64": torch.float64, "float32": torch.float32}


def serves(pattern: str) -> Callable[[Kind], Kind]:
    """Register the function for kinds that match `pattern`."""

    def register(kind: Kind) -> Kind:
        KINDS[pattern] = kind
        return kind

    return register


def largest(difference: Tensor) -> float:
    """max|difference|; infinite for nan, which comparisons would lose."""
    value = difference.detach().abs().max().item()
    return value if value == value else torch.inf


def relative(got: Tensor | None, reference: Tensor) -> float:
    """max|got - reference| / max|reference|; absolute where the reference is all zeros."""
    if got is None or got.shape != reference.shape:
        return torch.inf
    error = largest(got.double() - reference.double())
    return error if error == torch.inf else error / (largest(reference.double()) or 1.0)


def absolute(got: Tensor | None, reference: Tensor) -> float:
    """max|got - reference|."""
    if got is None or got.shape != reference.shape:
        return torch.inf
    return largest(got - reference)


def frobenius(got: Tensor, reference: Tensor) -> float:
    """|got - reference| / |reference| by Frobenius norms."""
    return float((got - reference).norm() / reference.norm().clamp(min=1e-300))


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that wants a gradient, so that the recorded tensor stays as it is."""
    return tensor.to(dtype, copy=True).requires_grad_()


def grad(leaf: Tensor) -> Tensor:
    """The gradient that a leaf has got."""
    assert leaf.grad is not None
    return leaf.grad


def serving(part: str) -> Kind | None:
    """The function for a kind, if any serves it."""
    return next((run for pattern, run in KINDS.items() if fnmatch.fnmatch(part, pattern)), None)
