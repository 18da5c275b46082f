"""The files of one checkpoint directory; `store.py` moves such directories into place.

    step_00001000/
      rank_00000.safetensors   written by process 0: the rows that it holds of each tensor
      MANIFEST.json            what they hold; config/manifest.py has its keys

A tensor is stored whole, or cut along dim 0 into intervals [a, b) of rows; a 0-dim tensor has the
interval [0, 1). The intervals tile the full tensor exactly. So a reader can ask for any rows,
however many processes wrote them. Nothing is pickled, and this file knows nothing of processes.

What would surprise: safetensors returns views of the mapped file, so loading always copies. A 0-dim
tensor has no slices. A writer without rows of a tensor leaves it out, unless the full shape holds a
0.
"""

import ctypes
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmnorm.config.manifest import FORMAT, Damaged, check_tiling, checksum_of, read_manifest
from llmnorm.part import InputError, nearest

# Safetensors' names of dtypes -> torch's.
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool"},
    **{
        f"{kind}{n}": f"{name}{n}"
        for kind, name in (("I", "int"), ("U", "uint"))
        for n in (8, 16, 32, 64)
    },
}


PIECE = 2**26
_BEGIN, _WAIT = 2, 1 | 4  # of sync_file_range(2)
_sync_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_range is not None:
    _sync_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class Interval(NamedTuple):
    """Rows [start, start + len(tensor)) of the full tensor of shape `global_shape`."""

    tensor: Tensor
    start: int
    global_shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The row after the last one; a 0-dim tensor counts as one row."""
        return self.start + (self.tensor.shape[0] if self.tensor.dim() else 1)


class Checkpoint(NamedTuple):
    """A checkpoint directory and the manifest that was read there, once."""

    path: Path
    manifest: dict[str, Any]

    @property
    def meta(self) -> dict[str, Any]:
        """What was saved beside the tensors, with "step" and "validation_loss"."""
        own = {key: self.manifest[key] for key in ("step", "validation_loss")}
        return {**self.manifest["meta"], **own}


def as_interval(value: Tensor | Interval) -> Interval:
    """A plain tensor is its own full tensor."""
    return value if isinstance(value, Interval) else Interval(value, 0, tuple(value.shape))


def write_file(path: Path, parts: Mapping[str, Interval]) -> dict[str, Any] | None:
    """Write the intervals of one process to one file; `sync` makes it durable.

    Returns:
        The file's entry for `make_manifest`: `{"name", "bytes", "crc32", "tensors": {name:
        {"dtype", "shape", "interval"}}}`; None where there is nothing to write.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    parts = {n: p for n, p in parts.items() if p.stop > p.start or 0 in p.global_shape}
    if not parts:
        return None
    for name, part in parts.items():
        assert tuple(part.tensor.shape[1:]) == tuple(part.global_shape[1:]), name
    try:
        save_file(_separate({name: part.tensor for name, part in parts.items()}), path)
    except SafetensorError as error:  # gives the system's errors as text
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        raise
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "crc32": checksum(path),
        "tensors": {
            name: {
                "dtype": _dtype(part.tensor),
                "shape": list(part.global_shape),
                "interval": [part.start, part.stop],
            }
            for name, part in parts.items()
        },
    }


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory; `save_file` accepts no others.

    Only strided, overlapping (tied) and device tensors are copied. The others are written from
    their own memory, also where they are views into one stack.
    """
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(found, key=lambda name: found[name].data_ptr()):
        tensor = found[name]
        if tensor.nbytes and tensor.data_ptr() < end:
            found[name] = tensor.clone()
        else:
            end = max(end, tensor.data_ptr() + tensor.nbytes)
    return found


def make_manifest(
    step: int,
    meta: dict[str, Any],
    validation_loss: float | None,
    written: list[dict[str, Any] | None],
) -> dict[str, Any]:
    """The manifest of a checkpoint whose files `write_file` has written.

    Args:
        step: number of steps that the state has been trained for.
        meta: JSON values to store beside the tensors.
        validation_loss: of this state, None where it was not evaluated.
        written: what `write_file` returned on each process.

    Raises:
        ValueError: the intervals of a key leave a hole, overlap, or disagree in dtype or shape.
    """
    files = [report for report in written if report is not None]
    tensors: dict[str, Any] = {}
    for file in files:
        for name, part in file["tensors"].items():
            entry = {"dtype": part["dtype"], "shape": part["shape"], "intervals": {}}
            entry = tensors.setdefault(name, entry)
            if (part["dtype"], part["shape"]) != (entry["dtype"], entry["shape"]):
                raise ValueError(
                    f"checkpoint key '{name}': {part['dtype']} {part['shape']} in {file['name']}, "
                    f"{entry['dtype']} {entry['shape']} before it"
                )
            entry["intervals"][file["name"]] = part["interval"]
    for name, entry in tensors.items():
        try:
            check_tiling(entry["shape"], entry["intervals"])
        except ValueError as error:
            raise ValueError(f"checkpoint key '{name}': {error}") from None
    manifest = {
        "format": FORMAT,
        "step": step,
        "validation_loss": validation_loss,
        "meta": meta,
        "tensors": tensors,
        "files": {f["name"]: {"bytes": f["bytes"], "crc32": f["crc32"]} for f in files},
    }
    return _with_checksum(manifest)


def with_loss(manifest: Mapping[str, Any], validation_loss: float) -> dict[str, Any]:
    """A manifest that was read, with another validation loss, to be written again."""
    return _with_checksum({**manifest, "validation_loss": validation_loss})


def _with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"crc32": checksum_of(manifest), **{k: manifest[k] for k in manifest if k != "crc32"}}


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`; of its files only the manifest is looked at.

    Raises:
        Damaged: as `read_manifest`.
    """
    return Checkpoint(path, read_manifest(path))


def check_file(file: Path, recorded: Mapping[str, Any], *, contents: bool) -> None:
    """Compare a file with its entry in the manifest.

    Args:
        recorded: `{"bytes", "crc32"}`.
        contents: read the whole file and compare its checksum; else only its size.

    Raises:
        Damaged: it is missing, cut off or changed.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # a named pipe would be read for ever
            raise Damaged(f"{file} is damaged (it is no file)")
        size = found.st_size
        if size != recorded["bytes"]:
            cut = "truncated" if size < recorded["bytes"] else "too long"
            raise Damaged(f"{file} is {cut} ({size} bytes instead of {recorded['bytes']})")
        if contents and checksum(file) != recorded["crc32"]:
            raise Damaged(f"{file} is damaged (its checksum differs)")
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None
    except OSError as error:
        raise Damaged(f"{file} cannot be read ({error.strerror})") from None


def check_files(checkpoint: Checkpoint, *, contents: bool, share: slice = slice(None)) -> None:
    """Compare a checkpoint's files with its manifest.

    Args:
        contents: compare every byte with its checksum; else only look at the sizes.
        share: the files to look at, of all in the order of their names.

    Raises:
        Damaged: a file is missing, cut off or changed.
    """
    files = checkpoint.manifest["files"]
    for name in sorted(files)[share]:
        check_file(checkpoint.path / name, files[name], contents=contents)


def check_names(checkpoint: Checkpoint, into: Mapping[str, Tensor | Interval]) -> None:
    """Check, before anything is changed, that `copy_into` can fill every tensor exactly.

    Raises:
        InputError: the checkpoint has no tensor of that name, or it has another dtype or shape.
    """
    path, tensors = checkpoint.path, checkpoint.manifest["tensors"]
    for name, value in into.items():
        part, stored = as_interval(value), tensors.get(name)
        if stored is None:
            hint = nearest(name, list(tensors)[:1000])
            raise InputError(f"{path}: holds no tensor '{name}'; {hint}")
        have = (stored["dtype"], tuple(stored["shape"]))
        want = (_dtype(part.tensor), tuple(part.global_shape))
        if have != want:
            raise InputError(
                f"{path}: '{name}' is {have[0]} {have[1]} in the checkpoint, "
                f"{want[0]} {want[1]} here"
            )


def copy_into(checkpoint: Checkpoint, into: Mapping[str, Tensor | Interval]) -> None:
    """Fill the tensors of `into` in place; only the rows that they ask for are read.

    The names must have passed `check_names`.

    Raises:
        InputError: a file cannot be read; some tensors may have been filled by then.
    """
    tensors = checkpoint.manifest["tensors"]
    by_file: dict[str, list[tuple[str, Interval, int, int]]] = {}
    for name, value in into.items():
        part = as_interval(value)
        for file, (start, stop) in tensors[name]["intervals"].items():
            if part.start < stop and start < part.stop:
                by_file.setdefault(file, []).append((name, part, start, stop))
    for file, wanted in by_file.items():
        path = checkpoint.path / file
        try:
            with safe_open(path, framework="pt", device="cpu") as stored, torch.no_grad():
                for name, part, start, stop in wanted:
                    _check_stored(path, stored, name, tensors[name], stop - start)
                    if part.tensor.dim() == 0:
                        part.tensor.copy_(stored.get_tensor(name))
                        continue
                    first, last = max(start, part.start), min(stop, part.stop)
                    rows = stored.get_slice(name)[first - start : last - start]
                    part.tensor[first - part.start : last - part.start].copy_(rows)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error


def _check_stored(path: Path, stored: Any, name: str, entry: Mapping[str, Any], rows: int) -> None:
    """Check that an open file holds `rows` rows of a tensor, as its `entry` in the manifest says.

    Raises:
        InputError: it holds others. Copied as they are, one row would become every row.
    """
    have = _header(stored, name)
    want = (entry["dtype"], ((rows, *entry["shape"][1:]) if entry["shape"] else ()))
    if have != want:
        found = "no such tensor" if have is None else f"{have[0]} {have[1]}"
        raise InputError(
            f"{path}: the manifest says that '{name}' is {want[0]} {want[1]} there; it holds "
            f"{found}"
        )


def _header(stored: Any, name: str) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape of a tensor in an open safetensors file; None where it is not in there."""
    try:
        header = stored.get_slice(name)
    except SafetensorError:
        return None
    return _DTYPES.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape())


def checksum(file: Path) -> str:
    """The file's CRC-32 in hex; zlib computes about 3 GB/s, more than most disks read."""
    crc, block = 0, bytearray(1 << 22)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
    return f"{crc:08x}"


def write_durably(path: Path, text: str) -> None:
    """Write a small file and fsync it."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path, advance: Callable[[], None] = lambda: None) -> None:
    """Fsync a file, or a directory's entries.

    Args:
        advance: called after every 64 MiB that have reached the disk; a slow one takes minutes for
            a large file, in which nobody could tell it from one that hangs.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size > PIECE and _sync_range is not None:
            _sync_range(descriptor, 0, 0, _BEGIN)  # of the whole file, so that the disk is busy
            for start in range(0, size, PIECE):
                if _sync_range(descriptor, start, PIECE, _BEGIN | _WAIT):
                    break  # this file system has no such call
                advance()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_text(value: Any, levels: int = 2) -> str:
    """JSON with one entry a line down to `levels`, so that each tensor of a manifest is a line."""
    if levels == 0 or not isinstance(value, dict):
        return json.dumps(value)
    entries = (f"{json.dumps(key)}: {as_text(item, levels - 1)}" for key, item in value.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
