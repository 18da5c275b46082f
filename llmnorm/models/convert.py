"""Weights of a Hugging Face directory in and out, a shard at a time.

A directory holds `model.safetensors`, or several shards and `model.safetensors.index.json`. Names
and shapes are checked from the files' headers before anything is copied; then each tensor goes from
the mapped file straight into the parameter that was allocated for it. Writing is the same the other
way round: the tensors of one shard are fetched, written and freed before those of the next.

What would surprise: our parameter names are the stock models' names, so nothing is renamed
(settings: `config/stock.py`). A file may hold a tied head beside its embedding; the two must then
be equal. Nothing is unpickled, so a directory with `pytorch_model.bin` alone is refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmnorm.machine import reading
from llmnorm.models.building import class_of
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.part import InputError, Settings, nearest

MAX_SHARD_BYTES = 2_000_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
# What quantised directories hold beside them: packed numbers and their scales.
_PACKED = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Stored(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class _Index(Settings):
    """What is read of an index of shards."""

    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str]
    """Tensor name -> file name."""


class Weights:
    """The weights of a directory, by the names in its files; headers alone are read at first.

    Args:
        directory: holds safetensors files.
        packed: whether the dtypes of quantised weights are served.

    Attributes:
        tensors: every tensor's dtype and shape.
        files: the files that hold them.
    """

    def __init__(self, directory: Path, *, packed: bool = False) -> None:
        self.directory = directory
        dtypes = _DTYPES | _PACKED if packed else _DTYPES
        self.files = _shards(directory)
        self.tensors: dict[str, Stored] = {}
        self._files: dict[str, Path] = {}
        for file in self.files:
            reading.open_file(file).close()  # safetensors would wait for a named pipe
            try:
                with safe_open(file, framework="pt", device="cpu") as stored:
                    for name in stored.keys():  # noqa: SIM118 (no mapping)
                        header = stored.get_slice(name)
                        dtype = dtypes.get(header.get_dtype())
                        if dtype is None:
                            raise InputError(
                                f"{file}: '{name}' has dtype {header.get_dtype()}, which is not "
                                f"served; known are {', '.join(dtypes)}"
                            )
                        if name in self.tensors:
                            raise InputError(f"{file}: '{name}' is in {self._files[name]} too")
                        self.tensors[name] = Stored(dtype, tuple(header.get_shape()))
                        self._files[name] = file
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file}: cannot be read ({error})") from None

    def read_into(self, into: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into those of `into`, file by file, converting the dtype."""
        for file in dict.fromkeys(self._files[name] for name in into):
            with self.opened() as read, torch.no_grad():
                for name, tensor in into.items():
                    if self._files[name] == file:
                        tensor.copy_(read(name))

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """Context manager: a function that gives a stored tensor, mapped from its file.

        Raises:
            InputError: by that function, where a file cannot be read.
        """
        files: dict[Path, Any] = {}
        with ExitStack() as stack:

            def read(name: str) -> Tensor:
                file = self._files[name]
                try:
                    if file not in files:
                        stored = safe_open(file, framework="pt", device="cpu")
                        files[file] = stack.enter_context(stored)
                    tensor: Tensor = files[file].get_tensor(name)
                except (OSError, SafetensorError) as error:
                    raise InputError(f"{file}: cannot be read ({error})") from None
                return tensor

            yield read


def named_weights(of: nn.Module | Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors that a directory holds for a model: parameters, a tied one once, and buffers.

    Args:
        of: the model, or some of its `named_modules()`, of which what belongs to them themselves.
    """
    modules = dict(of.named_modules()) if isinstance(of, nn.Module) else of
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in modules.items():
        saved = module.state_dict(keep_vars=True).keys()
        own = [*module.named_parameters(recurse=False)]
        own += [(n, b) for n, b in module.named_buffers(recurse=False) if n in saved]
        for name, tensor in own:
            found.setdefault(id(tensor), (f"{prefix}.{name}".removeprefix("."), tensor.detach()))
    return dict(found.values())


def check_weights(config: LlmNormConfig, tensors: Mapping[str, Stored], where: Path) -> list[str]:
    """The names to read for a model of `config`, in the model's order.

    Raises:
        InputError: a tensor is missing, has another shape, or has no place in the model.
    """
    _check_sizes(config, tensors, where)
    try:
        with torch.device("meta"):
            wanted = named_weights(class_of(config)(config))
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond what torch counts
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: no model of this configuration can be made: {reason}") from None
    return compare_names(wanted, tensors, where, ignored=lambda name: _ignored(name, config))


def compare_names(
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Stored],
    where: Path,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """The names of a model's tensors, all of which are stored with their shapes.

    Args:
        wanted: the model's tensors by name.
        tensors: those that are stored.
        where: their directory, for messages.
        ignored: whether a stored tensor may have no place in the model.

    Raises:
        InputError: a tensor is missing, has another shape, or has no place in the model.
    """
    if missing := [name for name in wanted if name not in tensors]:
        hint = nearest(missing[0], list(tensors)[:1000])
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{where}: holds no tensor '{missing[0]}'{more}; {hint}")
    for name, tensor in wanted.items():
        have, want = tensors[name].shape, tuple(tensor.shape)
        if have != want:
            raise InputError(f"{where}: '{name}' has shape {have}, and config.json asks for {want}")
    if unasked := sorted(n for n in tensors if n not in wanted and not ignored(n)):
        more = f" and {len(unasked) - 1} more" if len(unasked) > 1 else ""
        raise InputError(f"{where}: '{unasked[0]}'{more} has no place in the model")
    return list(wanted)


def _check_sizes(config: LlmNormConfig, tensors: Mapping[str, Stored], where: Path) -> None:
    """Compare what makes a model large with the weights, before a model of that size is made.

    Raises:
        InputError: the weights are of fewer or more layers or tokens.
    """
    layers = {int(m[1]) for m in map(_LAYER.search, tensors) if m}
    if layers and len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{where}: holds the weights of {len(layers)} layers, and num_hidden_layers is "
            f"{config.num_hidden_layers}"
        )
    embedding = tensors.get("model.embed_tokens.weight")
    wanted = (config.vocab_size, config.hidden_size)
    if embedding is not None and embedding.shape != wanted:
        raise InputError(
            f"{where}: 'model.embed_tokens.weight' has shape {embedding.shape}, and config.json "
            f"asks for {wanted} (vocab_size, hidden_size)"
        )


def open_weights(directory: Path, config: LlmNormConfig) -> Weights:
    """The weights in `directory`, which are those of a model of `config`.

    Raises:
        InputError: no safetensors file, a damaged one, or tensors that do not fit the model.
    """
    weights = Weights(directory)
    check_weights(config, weights.tensors, directory)
    if config.tie_word_embeddings and "lm_head.weight" in weights.tensors:
        name = "model.embed_tokens.weight"
        both = {n: torch.empty(weights.tensors[n].shape) for n in (name, "lm_head.weight")}
        weights.read_into(both)
        if not torch.equal(*both.values()):
            raise InputError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight is not {name}"
            )
    return weights


def write_weights(
    directory: Path,
    tensors: Mapping[str, Stored],
    read_into: Callable[[Mapping[str, Tensor]], None],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write shards and their index as Hugging Face does, holding one shard at a time.

    Args:
        tensors: what to write, in this order.
        read_into: fills the tensors it is given.
        max_shard_bytes: a shard is closed before it grows beyond this (a larger tensor stands
            alone).
    """
    shards = _plan(tensors, max_shard_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else _SINGLE
        shard = {
            name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype) for name in names
        }
        read_into(shard)
        try:
            save_file(shard, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # gives the system's errors as text
            raise OSError(f"{file}: {error}") from None
        del shard
        file_of |= dict.fromkeys(names, file)
    if shards[1:]:
        total = sum(_bytes(tensors[name]) for name in file_of)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan(tensors: Mapping[str, Stored], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, stored in tensors.items():
        if not shards or _bytes(stored) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= _bytes(stored)
    return shards


def _bytes(stored: Stored) -> int:
    return torch.Size(stored.shape).numel() * stored.dtype.itemsize


def _shards(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        names = set(
            reading.checked(reading.read_object(index), _Index, str(index)).weight_map.values()
        )
        if wrong := sorted(n for n in names if "/" in n or "\\" in n or n.startswith(".")):
            raise InputError(f"{index}: weight_map: '{wrong[0]}' is no file of this directory")
        return [directory / name for name in sorted(names)]
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    pickled = sorted(p.name for p in directory.glob("*.bin"))
    if pickled:
        raise InputError(
            f"{directory}: holds {pickled[0]} but no safetensors file; a .bin file is a pickle, "
            "which can run any code: save the model again with transformers' save_pretrained"
        )
    raise InputError(f"{directory}: holds neither {_SINGLE} nor {_INDEX}")


def _ignored(name: str, config: LlmNormConfig) -> bool:
    """Rotary tables that old files hold, and a tied head (compared by `open_weights`)."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(".rotary_emb.inv_freq")
