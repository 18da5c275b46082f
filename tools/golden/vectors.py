"""Recorded runs of official implementations, their headers, and the ways to measure an error.

A file is a safetensors file whose header says `kind`, `hyperparameters` (JSON), `source`, `dtype`
and `tolerance` (JSON; a few files: words). Every file of this folder serves the kinds of one room:
a function takes a `Vectors`, runs our part and yields `Result`s. `@serves(PATTERN)` registers it;
the pattern may hold wildcards.

A function takes sizes and settings from the header and nowhere else. `Header` remembers what was
read, and a setting that no line of the function has read is reported as not served: so a setting
that we lack cannot be dropped in silence.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from torch import Tensor


class Result(NamedTuple):
    """The largest error of one precision, and the largest one that is allowed."""

    precision: str
    error: float
    tolerance: float


class NotServed(Exception):
    """The file was recorded with a setting that our part does not have."""

    def __init__(self, key: str, value: Any, why: str = "") -> None:
        super().__init__(f"{key}={_plain(value)}{f' ({why})' if why else ''}")


class Header(Mapping[str, Any]):
    """Hyperparameters by name; remembers which ones were read, in nested mappings too."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {key: _nested(value) for key, value in values.items()}
        self._read: set[str] = set()
        self._ignored: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """What nobody has read: names such as `cases.0.affine`, and values."""
        for key, value in self._values.items():
            if key in self._ignored:
                continue
            if key not in self._read:
                yield prefix + key, value
                continue
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Header):
                    place = f"{key}.{number}." if isinstance(value, list) else f"{key}."
                    yield from item.unread(prefix + place)

    def ignore(self, *keys: str) -> None:
        """Leave `keys` out: they say how the tensors were drawn or how large they are."""
        self._ignored.update(keys)

    def only(self, **served: Any) -> None:
        """Refuse other values of settings that our part has at one value (a tuple: at any of them).

        Raises:
            NotServed: the header has one of the keys with another value.
        """
        for key, values in served.items():
            allowed = values if isinstance(values, tuple) else (values,)
            if key in self and self[key] not in allowed:
                raise NotServed(key, self[key])


class Limit(NamedTuple):
    """One precision that a header has a tolerance for."""

    precision: str
    dtype: torch.dtype
    tolerance: float
    measure: Callable[[Tensor | None, Tensor], float]


class Vectors:
    """One file: its tensors and its header.

    Attributes:
        kind: the header's; it may name several parts.
        part: the one that is compared.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.kind = header["kind"]
        self.part = part or self.kind
        self.dtype = header.get("dtype", "")
        hyperparameters = json.loads(header.get("hyperparameters") or "{}")
        self.hyperparameters = Header(
            hyperparameters if isinstance(hyperparameters, dict) else {"cases": hyperparameters}
        )
        self.hyperparameters.ignore("seed", "batch", "seqlen", "docs")
        try:
            self.tolerance: dict[str, Any] = json.loads(header["tolerance"])
        except json.JSONDecodeError:  # "alpha 1e-12; ratios 1e-6 (float32 weights)"
            found = re.findall(r"([a-z_]+) (\d\S*e-\d+)", header["tolerance"])
            self.tolerance = {name: float(number) for name, number in found}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix/`, by the rest of their names."""
        return {
            key.removeprefix(prefix + "/"): value
            for key, value in self.tensors.items()
            if key.startswith(prefix + "/")
        }

    def limits(self, suffix: str = "") -> list[Limit]:
        """The precisions that the header has a tolerance for, and how each is measured.

        Args:
            suffix: of the keys of a file with several tolerances: "functions" for `f64_functions`.

        Raises:
            NotServed: there is none that this runner knows.
        """
        found = []
        for key, limit in self.tolerance.items():
            if known := _limit(key, suffix, self.dtype):
                found.append(Limit(known[0], FLOATS[known[0]], float(limit), known[1]))
        if not found:
            raise NotServed("tolerance", sorted(self.tolerance))
        return found

    def settings(self, part: type[Any], names: Mapping[str, str], **fixed: Any) -> Any:
        """Settings of our part from the header: `names` has our field -> the header's key.

        A key that the header lacks keeps our default, which is then the official code's too.

        Raises:
            NotServed: our part refuses a value.
        """
        p = self.hyperparameters
        given = {ours: p[theirs] for ours, theirs in names.items() if theirs in p}
        return built(part, given | fixed, names)


def built(part: type[BaseModel], values: Mapping[str, Any], names: Mapping[str, str] = {}) -> Any:
    """`part` of these values.

    Raises:
        NotServed: the part refuses them, with the header's name (`names`) of the value.
    """
    try:
        return part.model_validate({key: _bare(value) for key, value in values.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        why, location = first["msg"].removeprefix("Value error, "), [str(x) for x in first["loc"]]
        if not location:  # a pair of settings, of which the message names the one at fault first
            words = [word for word in re.findall(r"\w+", why) if word in values]
            location = words[:1] or [next(iter(values))]
        field, *rest = location
        value = first["input"] if first["loc"] else values[field]
        raise NotServed(".".join([names.get(field, field), *rest]), value, why) from None


Kind = Callable[[Vectors], Iterator[Result]]
KINDS: dict[str, Kind] = {}
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def serves(pattern: str) -> Callable[[Kind], Kind]:
    """Register the function for kinds that match `pattern`."""

    def register(kind: Kind) -> Kind:
        KINDS[pattern] = kind
        return kind

    return register


def serving(part: str) -> Kind | None:
    """The function for a kind, if any serves it."""
    return next((run for pattern, run in KINDS.items() if fnmatch.fnmatch(part, pattern)), None)


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
    return largest(got.double() - reference.double())


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


def _limit(key: str, suffix: str, dtype: str) -> tuple[str, Callable[..., float]] | None:
    """Precision and measure of a tolerance's key; None: it is no limit, or another part's.

    `float64`, `float32_vs_these_values` (the mixers' files): relative. `f64_max_abs`,
    `f32_max_rel`, `bf16_max_rel`: by their names. `max_abs`, `max_rel`: in the file's own dtype.
    """
    if not suffix and (name := key.removesuffix("_vs_these_values")) in FLOATS:
        return name, relative
    short = {"f64": "float64", "f32": "float32", "bf16": "bfloat16"}
    own = next((name for name in FLOATS if dtype.startswith(name)), "float32")
    if suffix:
        match = re.fullmatch(rf"(f64|f32|bf16)_{suffix}(_max_abs)?", key)
        return (short[match[1]], absolute) if match else None
    match = re.fullmatch(r"(?:(f64|f32|bf16)_)?max_(abs|rel)", key)
    if match is None:
        return None
    precision = short[match[1]] if match[1] else own
    return precision, absolute if match[2] == "abs" else relative


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return Header(value)
    return [_nested(item) for item in value] if isinstance(value, list) else value


def _bare(value: Any) -> Any:
    """Mappings as dicts, which pydantic wants; all of their keys count as read."""
    if isinstance(value, Mapping):
        return {key: _bare(item) for key, item in value.items()}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> str:
    return str(_bare(value))
