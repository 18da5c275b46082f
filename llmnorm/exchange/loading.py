"""Weights of a run, an exported or a stock directory, as a model and its tokenizer.

A checkpoint names its weights `model.<parameter>` and their moving average `ema.<parameter>`;
Hugging Face directories name them `<parameter>`. `open_source` hides the difference: its callers
(commands, `model.pretrained`, export) see parameter names and copy the tensors that they need.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.checkpoints.format import checksum, copy_into
from llmnorm.config.file import load
from llmnorm.config.manifest import MANIFEST, meta_of_run
from llmnorm.config.pretrained import Pretrained, describe
from llmnorm.exchange.adapted import Trained, adapter_of, beside, quantize_of
from llmnorm.exchange.foreign_source import class_of_run, loaded, of_directory, skeleton_of
from llmnorm.exchange.source import Source, base_path, hash_of, refuse_other_base
from llmnorm.generation.prompts import open_tokenizer
from llmnorm.models.building import class_of, empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import (
    Stored,
    check_weights,
    compare_names,
    named_weights,
    open_weights,
)
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    path: Path,
    *,
    checkpoint: str = "latest",
    ema: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> "tuple[LlmNormForCausalLM, PreTrainedTokenizerBase]":
    """A model in evaluation mode and its tokenizer.

    Args:
        path: a run directory, one of its checkpoints, an exported or a stock directory (which is
            loaded as our class).
        checkpoint: of a run: `latest`, `best` or a step.
        ema: of a run: the moving average of the weights.
        device: `cpu`, `cuda`, or `auto`: a GPU if there is one, but for a run that was trained with
            `training.device: cpu`.
        dtype: `fp32`, `bf16`, or `auto`: that of the files, and float32 for a run.

    Raises:
        InputError: there are no such weights, they do not fit their configuration, there is no
            tokenizer, or no such device.
    """
    source = open_source(path, checkpoint=checkpoint, ema=ema)
    return model_of(source, path, device=device, dtype=dtype)


def model_of(
    source: Source, path: Path, *, device: str = "auto", dtype: str = "auto"
) -> "tuple[LlmNormForCausalLM, PreTrainedTokenizerBase]":
    """As `load_model`, for weights at `path` that `open_source` has opened.

    Those of a class of transformers give a model of that class; the type named here is the usual
    one's.
    """
    tokenizer = tokenizer_of(source, path)
    if device == "auto" and source.run is not None:
        trained = load(source.run.path).config.training.device
        device = "cpu" if trained == "cpu" else "auto"
    if source.kind is not None:
        model: Any = loaded(source, device_of(device), DTYPES.get(dtype) or _own_dtype(source))
        return model, tokenizer
    model = empty_of(source, device_of(device), DTYPES.get(dtype))
    source.read_into(named_weights(model))
    return model.eval(), tokenizer


def device_of(name: str) -> torch.device:
    """The device of that name; `auto`: a GPU if there is one.

    Raises:
        InputError: there is no GPU.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError(
            "generation.device: is cuda, and this machine has no GPU that torch can use; give cpu"
        )
    return torch.device("cuda" if name != "cpu" and there else "cpu")


def empty_of(
    source: Source, device: torch.device | str, dtype: torch.dtype | None = None
) -> LlmNormForCausalLM:
    """The model of our class that the weights belong to, its tensors on `device`, uninitialised.

    Args:
        dtype: of its parameters; None: as wide as the files', float32 for a run.
    """
    return empty_model(source.own, device=device, dtype=dtype or _own_dtype(source))


def _own_dtype(source: Source) -> torch.dtype:
    return torch.float32 if source.run else _widest(source.tensors)


def open_source(
    path: Path,
    *,
    checkpoint: str = "latest",
    ema: bool = False,
    key: str | None = None,
    rank: int = 0,
    world: int = 1,
    classes: str = "auto",
    trust_remote_code: bool = False,
) -> Source:
    """Find the weights at `path` and check that they are whole and fit their configuration.

    Args:
        path: a run directory, one of its checkpoints, an exported or a stock directory.
        checkpoint: of a run: `latest`, `best` or a step.
        ema: of a run: the moving average instead of the weights.
        key: the setting that named the path, for messages; the path itself if None.
        rank, world: this process and how many make this call together.
        classes: whose class a stock directory is loaded as, as `model.classes`.
        trust_remote_code: run the code that lies in a stock directory, where it names some.

    Where the newest checkpoint of a run is damaged, "latest" is the newest whole one; this is
    logged.

    Raises:
        InputError: there are no such weights, or they do not fit their configuration.
    """
    # For `model.pretrained` all modules are imported by now that its configuration names.
    found = describe(path, key or str(path), None if key is None else (), classes=classes)
    if found.run is not None:
        return _of_run(found, found.run, checkpoint, ema, rank, world, parts=key is None)
    if checkpoint != "latest" or ema:
        option = "--ema" if ema else "--checkpoint"
        raise InputError(f"{option}: {path} is no run; it holds one set of weights")
    if found.foreign:
        return of_directory(found, key, trust_remote_code=trust_remote_code)
    config = _configuration(found.config, path / "config.json")
    weights = open_weights(path, config)
    tensors = {name: weights.tensors[name] for name in check_weights(config, weights.tensors, path)}
    first = _first_token(found)
    return Source(
        config,
        tensors,
        weights.read_into,
        found.tokenizer,
        first,
        run=None,
        meta={},
        origin=path,
        contents=lambda: hash_of({file.name: checksum(file) for file in weights.files}),
    )


def _first_token(found: Pretrained) -> int | None:
    """The token that `llmnorm train` put before every document; of others it is not known."""
    stock = found.run is None and found.config.get("export_as") is not None  # it came from one
    token = found.config.get("bos_token_id")
    trained_here = found.config.get("model_type") == "llmnorm" and not stock
    return token if trained_here and isinstance(token, int) else None


def _configuration(values: Mapping[str, Any], file: Path) -> LlmNormConfig:
    """The model's configuration, of a class of model that there is.

    Raises:
        InputError: a value does not fit; the message begins with the file.
    """
    try:
        config: LlmNormConfig = LlmNormConfig.from_dict(dict(values))
        class_of(config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except Exception as error:  # of any kind: transformers checks its own keys
        raise InputError(f"{file}: {' '.join(str(error).split())[:300]}") from None
    return config


def _of_run(
    found: Pretrained,
    run_path: Path,
    checkpoint: str,
    ema: bool,
    rank: int,
    world: int,
    *,
    parts: bool,
) -> Source:
    """Weights of a run; `parts`: import what its config.yaml names from outside the package."""
    if found.checkpoint != "latest" and checkpoint != "latest":
        raise InputError(f"--checkpoint: {found.path} is a checkpoint already; name its run")
    run = RunDirectory(run_path)
    if run.config.is_file() and parts:
        load(run.path)  # imports the run's parts that are not in this package
    name = found.checkpoint if checkpoint == "latest" else checkpoint
    saved = Checkpoints(run.checkpoints, rank=rank, world=world).find(name)
    path, stored_tensors = saved.path, saved.manifest["tensors"]
    meta = meta_of_run(path, saved.manifest)
    kind = None
    if found.foreign:
        config, kind, _ = class_of_run(meta, str(path / MANIFEST))
    else:
        config = _configuration(meta["model"], path / MANIFEST)
    # Buffers have no average: of those the model's own are read.
    prefixes = ("model.", "ema.") if ema else ("model.",)
    names = {
        name.removeprefix(prefix): name
        for prefix in prefixes
        for name in stored_tensors
        if name.startswith(prefix)
    }
    if ema and not any(name.startswith("ema.") for name in names.values()):
        raise InputError(
            f"--ema: {path} holds no moving average; it is kept where training.ema is given"
        )
    if ema:
        refuse_mean(config, f"--ema: {path}")
    stored = {
        name: Stored(getattr(torch, entry["dtype"]), tuple(entry["shape"]))
        for name, entry in ((name, stored_tensors[full]) for name, full in names.items())
    }

    def read_own(into: Mapping[str, Tensor]) -> None:
        copy_into(saved, {names[name]: tensor for name, tensor in into.items()})

    read_into: Callable[[Mapping[str, Tensor]], None] = read_own
    trained = None
    if meta.get("base"):
        base = _base_of(run, path, meta, rank, world)
        where = f"{path / MANIFEST}: meta.config"
        trained = Trained(
            adapter_of(meta, where),
            stored,
            read_own,
            base.origin,
            base.run is not None,
            quantize_of(meta, where),
            new_tokens=range(*meta["base"].get("new_tokens", (0, 0))),
            base_rows=base.config.vocab_size,
        )
        stored, read_into = beside(
            _skeleton(config, kind, path), base.tensors, base.read_into, trained
        )
    if kind is None:
        wanted = check_weights(config, stored, path)
    else:
        wanted = compare_names(named_weights(_skeleton(config, kind, path)), stored, path)
    tensors = {name: stored[name] for name in wanted}
    return Source(
        config,
        tensors,
        read_into,
        found.tokenizer,
        _first_token(found),
        run=run,
        meta=meta,
        origin=path,
        contents=lambda: hash_of({n: f["crc32"] for n, f in saved.manifest["files"].items()}),
        trained=trained,
        kind=kind,
    )


def plain_model(source: Source) -> "PreTrainedModel":
    """The model that the weights belong to, without an adapter, on the meta device."""
    return _skeleton(source.config, source.kind, source.origin)


def _skeleton(
    config: "PreTrainedConfig", kind: "type[PreTrainedModel] | None", path: Path
) -> "PreTrainedModel":
    if kind is not None:
        return skeleton_of(kind, config, where=str(path))
    assert isinstance(config, LlmNormConfig)
    with torch.device("meta"):
        return class_of(config)(config)


def _base_of(
    run: RunDirectory, checkpoint: Path, meta: Mapping[str, Any], rank: int, world: int
) -> Source:
    """The weights beside which a checkpoint of a run was trained.

    Raises:
        InputError: they are not there, or are others now.
    """
    pretrained = Path(meta["config"]["model"].get("pretrained") or meta["base"]["path"])
    if run.config.is_file():  # which knows where a base was moved to
        pretrained = load(run.path).config.model.pretrained or pretrained
    path = base_path(pretrained, meta)
    if not path.is_dir():
        raise InputError(
            f"{checkpoint}: its base {path} is not there; if it was moved: "
            f"llmnorm train {run.path} model.pretrained=NEW"
        )
    settings = meta["config"]["model"]
    source = open_source(
        path,
        rank=rank,
        world=world,
        classes=settings.get("classes", "auto"),
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    refuse_other_base(path, source.contents(), meta, checkpoint)
    return source


def refuse_mean(config: "PreTrainedConfig", who: str) -> None:
    """Raise an InputError if the model's norms keep statistics, which no mean of weights has.

    A mean of weights gives other activations than any of the weights in it. The statistics of the
    newest weights, or their mean, are not those of these activations.

    Args:
        who: how the message begins: the option and the path.
    """
    if not isinstance(config, LlmNormConfig):
        return
    with torch.device("meta"):
        running = [m for m in class_of(config)(config).modules() if isinstance(m, RunningNorm)]
    if running:
        raise InputError(
            f"{who}: model.norm keeps running statistics, which belong to the weights of one step "
            "and not to a mean of weights; take the weights of one checkpoint (--checkpoint)"
        )


def tokenizer_of(source: Source, path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of the weights at `path`, which begins texts as documents in training began."""
    if source.tokenizer is None:
        raise InputError(f"{path}: has no tokenizer (no tokenizer.json)")
    return open_tokenizer(source.tokenizer, first=source.first_token)


def _widest(tensors: Mapping[str, Stored]) -> torch.dtype:
    dtypes = [stored.dtype for stored in tensors.values() if stored.dtype.is_floating_point]
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest
