"""What one checkpoint directory holds; how it comes to be there is `store.py`.

    step_00001000/
      rank_00000.safetensors   one writer each; a key holds the rows that this writer had
      MANIFEST.json            {"format", "crc32", "step", "validation_loss", "meta",
                                "tensors": {name: {"dtype", "shape", "intervals": {file: [a, b]}}},
                                "files": {file: {"bytes", "crc32"}}}

A tensor is whole, or cut along dim 0 into intervals [a, b) of rows; [0, 1) stands for a 0-dim
tensor. The intervals tile the full tensor exactly, so any number of processes reads any interval,
whoever wrote it. No pickle, and nothing here knows of processes.

What would surprise: safetensors returns views of the mapped file, so loading always copies; a 0-dim
tensor has no slices; an empty shard of a non-empty tensor is not written, while a tensor whose full
shape holds a 0 is; the manifest's `crc32` is that of the rest of itself.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmnorm.part import InputError, nearest

FORMAT = 1
MANIFEST = "MANIFEST.json"


class Interval(NamedTuple):
    """Rows [start, start + len(tensor)) of the full tensor of shape `global_shape`."""

    tensor: Tensor
    start: int
    global_shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The row after the last one; a 0-dim tensor counts as one row."""
        return self.start + (self.tensor.shape[0] if self.tensor.dim() else 1)


class Damaged(Exception):
    """A checkpoint that is not whole; the text names the file and what is wrong with it."""


def as_interval(value: Tensor | Interval) -> Interval:
    """A plain tensor is its own full tensor."""
    return value if isinstance(value, Interval) else Interval(value, 0, tuple(value.shape))


def write_file(path: Path, parts: Mapping[str, Interval]) -> dict[str, Any] | None:
    """Write the intervals of one writer to one file and bring it to the disk.

    Returns what the manifest needs to know of it: `{"name", "bytes", "crc32", "tensors": {name:
    {"dtype", "shape", "interval"}}}`; None where there is nothing to write.
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
    sync(path)
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
    """Contiguous CPU tensors without common memory, as `save_file` wants them.

    Only strided, overlapping (tied) and device tensors are copied: the others are written from
    where they are, views into one stack included.
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
    """Put the writers' reports (of `write_file`) together.

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
        _check_tiling(name, entry["shape"][0] if entry["shape"] else 1, entry["intervals"])
    manifest = {
        "format": FORMAT,
        "step": step,
        "validation_loss": validation_loss,
        "meta": meta,
        "tensors": tensors,
        "files": {f["name"]: {"bytes": f["bytes"], "crc32": f["crc32"]} for f in files},
    }
    return {"crc32": _crc_of_json(manifest), **manifest}


def _check_tiling(name: str, rows: int, intervals: dict[str, list[int]]) -> None:
    reached = 0
    for start, stop in sorted(intervals.values()):
        if start != reached:
            what = "no process gave" if start > reached else "two processes gave"
            first, last = sorted((start, reached))
            raise ValueError(f"checkpoint key '{name}': {what} rows [{first}, {last}) of {rows}")
        reached = stop
    if reached != rows:
        what = "no process gave" if reached < rows else "there are no"
        first, last = sorted((reached, rows))
        raise ValueError(f"checkpoint key '{name}': {what} rows [{first}, {last}) of {rows}")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory `path`.

    Raises:
        Damaged: it is missing, unreadable, changed since it was written, or of another format.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        recorded, version = manifest.pop("crc32"), manifest["format"]
    except FileNotFoundError:
        what = f"{file} is missing" if path.is_dir() else f"{path} is missing"
        raise Damaged(what) from None
    except OSError as error:
        raise Damaged(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"{file} is damaged (it is no manifest)") from None
    if recorded != _crc_of_json(manifest):
        raise Damaged(f"{file} is damaged (its checksum differs)")
    if version != FORMAT:
        raise Damaged(f"{file} has format {version}, this version of llmnorm reads {FORMAT}")
    return dict(manifest)


def check_file(file: Path, recorded: Mapping[str, Any], *, contents: bool) -> None:
    """Compare a file with what the manifest recorded; `contents` reads all of it.

    Raises:
        Damaged: it is missing, cut off or changed.
    """
    try:
        size = file.stat().st_size
        if size != recorded["bytes"]:
            cut = "truncated" if size < recorded["bytes"] else "too long"
            raise Damaged(f"{file} is {cut} ({size} bytes instead of {recorded['bytes']})")
        if contents and checksum(file) != recorded["crc32"]:
            raise Damaged(f"{file} is damaged (its checksum differs)")
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None
    except OSError as error:
        raise Damaged(f"{file} cannot be read ({error.strerror})") from None


def find_fault(path: Path, *, contents: bool, share: slice = slice(None)) -> str | None:
    """What is wrong with the checkpoint directory `path`; None where nothing is found.

    Args:
        contents: compare every byte with its checksum; else only look at the sizes.
        share: which of the files, in the order of their names.
    """
    try:
        files = read_manifest(path)["files"]
        for name in sorted(files)[share]:
            check_file(path / name, files[name], contents=contents)
    except Damaged as fault:
        return str(fault)
    return None


def check_names(
    path: Path, manifest: Mapping[str, Any], into: Mapping[str, Tensor | Interval]
) -> list[str]:
    """Refuse, before anything is changed, what `copy_into` could not fill exactly.

    Returns:
        The names that are asked for.

    Raises:
        InputError: a key is not in the checkpoint, or has another dtype or shape there.
    """
    for name, value in into.items():
        part, stored = as_interval(value), manifest["tensors"].get(name)
        if stored is None:
            hint = nearest(name, list(manifest["tensors"])[:1000])
            raise InputError(f"{path}: holds no tensor '{name}'; {hint}")
        have = (stored["dtype"], tuple(stored["shape"]))
        want = (_dtype(part.tensor), tuple(part.global_shape))
        if have != want:
            raise InputError(
                f"{path}: '{name}' is {have[0]} {have[1]} in the checkpoint, "
                f"{want[0]} {want[1]} here"
            )
    return list(into)


def copy_into(
    path: Path, manifest: Mapping[str, Any], into: Mapping[str, Tensor | Interval]
) -> None:
    """Fill the tensors of `into` in place, reading only the rows that they ask for."""
    by_file: dict[str, list[tuple[str, Interval, int, int]]] = {}
    for name, value in into.items():
        part = as_interval(value)
        for file, (start, stop) in manifest["tensors"][name]["intervals"].items():
            if part.start < stop and start < part.stop:
                by_file.setdefault(file, []).append((name, part, start, stop))
    for file, wanted in by_file.items():
        try:
            with safe_open(path / file, framework="pt", device="cpu") as stored, torch.no_grad():
                for name, part, start, stop in wanted:
                    if part.tensor.dim() == 0:
                        part.tensor.copy_(stored.get_tensor(name))
                        continue
                    first, last = max(start, part.start), min(stop, part.stop)
                    rows = stored.get_slice(name)[first - start : last - start]
                    part.tensor[first - part.start : last - part.start].copy_(rows)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path / file}: cannot be read ({error})") from error


def checksum(file: Path) -> str:
    """The file's CRC-32 in hex (3 GB/s: as good as free beside the disk)."""
    crc, block = 0, bytearray(1 << 22)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
    return f"{crc:08x}"


def write_durably(path: Path, text: str) -> None:
    """Write a small file and bring it to the disk."""
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_text(value: Any, levels: int = 2) -> str:
    """JSON with one entry a line down to `levels`: a tensor of the manifest is a line."""
    if levels == 0 or not isinstance(value, dict):
        return json.dumps(value)
    entries = (f"{json.dumps(key)}: {as_text(item, levels - 1)}" for key, item in value.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _crc_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
