"""A checkpoint's MANIFEST.json, checked before anything else of the checkpoint is read.

    {"format", "crc32", "step", "validation_loss", "meta",
     "tensors": {name: {"dtype", "shape", "intervals": {file: [a, b]}}},
     "files": {file: {"bytes", "crc32"}}}

`crc32` is the checksum of the manifest without that field. It finds damage, not forgery: anybody
can compute it. So this file checks all that reading relies on: that the intervals tile every
tensor (memory that no file fills would be loaded as it is), that each file is large enough for its
rows, and that file names lead nowhere else. `checkpoints/format.py` compares the files themselves.

It is on the ground floor, because `model.pretrained` reads a model's settings before torch is
loaded (`pretrained.py`), by the same rule as everything that reads weights later.
"""

import errno
import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from llmnorm.machine import reading
from llmnorm.part import InputError, Settings, explain, one_line

FORMAT = 1
MANIFEST = "MANIFEST.json"
STEP = re.compile(r"step_(\d{8,})")  # the name of a checkpoint's directory
# Torch's names of dtypes that safetensors stores, with the bytes of an element.
ITEM_BYTES = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8, "bool": 1},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1},
    **{"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1},
}
FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*\.safetensors$")]
Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class Damaged(InputError):
    """A checkpoint that is not whole; the text names the file and what is wrong with it."""


class _Strict(Settings):
    model_config = ConfigDict(strict=True)  # 3.0 and "3" are no whole numbers


class FileEntry(_Strict):
    """What the manifest says of a file."""

    bytes: Size
    """Its size."""
    crc32: Checksum
    """Its checksum."""


class TensorEntry(_Strict):
    """What the manifest says of a tensor."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: list[Size]
    """Of the whole tensor."""
    intervals: dict[FileName, Annotated[list[Size], Field(min_length=2, max_length=2)]]
    """The rows [a, b) that each file holds; of a 0-dim tensor [0, 1)."""

    @model_validator(mode="after")
    def _check(self) -> "TensorEntry":
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype '{self.dtype}' is none that a checkpoint holds")
        check_tiling(self.shape, self.intervals)
        return self


class Manifest(_Strict):
    """The whole of a manifest."""

    format: Literal[1]
    crc32: Checksum
    step: Size
    validation_loss: float | None
    meta: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        needed = dict.fromkeys(self.files, 0)
        for name, entry in self.tensors.items():
            row = math.prod(entry.shape[1:]) * ITEM_BYTES[entry.dtype]
            for file, (start, stop) in entry.intervals.items():
                if file not in needed:
                    raise ValueError(f"tensors.{name}: lies in {file}, which files does not list")
                needed[file] += (stop - start) * row
        for file, size in needed.items():
            if size > self.files[file].bytes:
                raise ValueError(f"files.{file}: is too small for the {size} bytes of its tensors")
        return self


class BaseMeta(_Strict):
    """The weights that a run leaves as they are."""

    path: str
    """Where they lie; of a run the checkpoint."""
    hash: str
    """Of their files."""
    new_tokens: list[Annotated[int, Field(ge=1)]] = Field(default=[], min_length=2, max_length=2)
    """The first id of the tokens that were new to them, and the id behind the last."""


class StageMeta(_Strict):
    """A stage of a run (data/run_data.py)."""

    row: Size
    """The run's row that it begins with."""
    weights: dict[str, Size]
    """Of the sources, by their names."""
    setting: int | None
    """Which of `data.stages` it is; None where a run further up has read it."""


class BranchMeta(_Strict):
    """Where a run has branched from another."""

    path: str
    """The checkpoint."""
    step: Size
    """Its step."""
    data: str
    """The identity of the data that the other had read."""
    row: Size
    """The branch's first row."""
    anew: bool
    """Whether the branch counts its rows from 0, since they are others than its parent's."""


class RunMeta(_Strict):
    """What a run's checkpoint holds beside tensors (`training/keeping.py` writes it)."""

    model_config = ConfigDict(extra="allow")

    step: Size
    row: Size
    tokens: Size
    skipped_steps: Size
    skipped_in_a_row: Size
    skipped_spikes: Size = 0
    spikes_in_a_row: Size = 0
    window: list[list[float]] = []
    best_loss: float | None = None
    best_step: Size = 0
    not_better: Size = 0
    evaluated_step: Size = 0
    seconds: float
    data: Annotated[str, StringConstraints(pattern=r"^[\w-]+$")]
    environment: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    sources: list[dict[str, Any]]
    llmnorm: str
    base: BaseMeta | None = None
    stages: Annotated[list[StageMeta], Field(min_length=1)] | None = None
    branches: list[BranchMeta] = []


def steps_in(directory: Path) -> list[int]:
    """The steps that have a checkpoint in a directory, ascending; only names are looked at.

    Raises:
        InputError: the directory is a file, or may not be read: that is not "no checkpoint".
    """
    if not os.path.lexists(directory):
        return []
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        what = "is no directory" if error.errno == errno.ENOTDIR else reading.reason(error)
        raise InputError(f"{directory}: {what}; checkpoints are kept there") from None
    steps = {int(match[1]) for match in map(STEP.fullmatch, names) if match}
    return sorted(step for step in steps if directory_of(step) in names)


def directory_of(step: int) -> str:
    """The name of the directory of a step's checkpoint."""
    return f"step_{step:08d}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory `path`; no other file is looked at.

    Raises:
        Damaged: it is missing, cannot be read, was changed since it was written, is of another
            format or of another step, or describes tensors that no file holds.
    """
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise Damaged(f"{file if path.is_dir() else path} is missing")
    try:
        manifest = reading.read_object(file)
    except InputError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise Damaged(f"{file} is damaged ({reason})") from None
    recorded = manifest.get("crc32")
    if recorded is not None and recorded != checksum_of(manifest):
        raise Damaged(f"{file} is damaged (its checksum differs)")
    version = manifest.get("format")
    if isinstance(version, int) and version != FORMAT:
        raise Damaged(f"{file} has format {version}, this version of llmnorm reads {FORMAT}")
    if wrong := _problem(Manifest, manifest):
        raise Damaged(f"{file} is damaged ({wrong})")
    named = STEP.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise Damaged(f"{path} was renamed: it is the checkpoint of step {manifest['step']}")
    return manifest


def meta_of_run(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has saved beside the tensors, with "step" and "validation_loss".

    Raises:
        InputError: it is not what a run saves: a key is missing or of another type.
    """
    meta = {**manifest["meta"], "step": manifest["step"]}
    if wrong := _problem(RunMeta, meta):
        raise InputError(f"{path / MANIFEST}: meta.{wrong}; no run has written this checkpoint")
    return {**meta, "validation_loss": manifest["validation_loss"]}


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """CRC-32 of a manifest without its own `crc32`, 8 hexadecimal digits."""
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def check_tiling(shape: list[int], intervals: Mapping[str, list[int]]) -> None:
    """Check that intervals [start, stop) of rows cover a tensor of `shape` once.

    Raises:
        ValueError: they leave a hole, overlap, or reach beyond its rows.
    """
    rows = shape[0] if shape else 1
    reached = 0
    for start, stop in sorted(intervals.values()):
        if start != reached or stop < start:
            what = "two processes gave" if min(start, stop) < reached else "no process gave"
            first, last = sorted((min(start, stop), reached))
            raise ValueError(f"{what} rows [{first}, {last}) of {rows}")
        reached = stop
    if reached != rows:
        what = "no process gave" if reached < rows else "there are no"
        first, last = sorted((reached, rows))
        raise ValueError(f"{what} rows [{first}, {last}) of {rows}")


def _problem(cls: type[Settings], value: Mapping[str, Any]) -> str | None:
    """The first mistake in a JSON object; None if there is none."""
    try:
        cls.model_validate(value)
    except ValidationError as error:
        return one_line(explain(error, cls)[:1])
    return None
