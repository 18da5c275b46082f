"""`llmnorm export`: write a model directory that other tools read.

    model*.safetensors      the weights; those of a run are float32, of a merged adapter its base's
    config.json             of our class, with the `auto_map` that names modeling_llmnorm.py (three
                            lines that import the installed package); or of a stock architecture
    generation_config.json  the tokens that end and pad a text
    tokenizer.json, ...     the tokenizer, its chat template too; it begins every text with what
                            began every document in training
    README.md               the model card: data, settings, losses, how to load it

A run that has trained an adapter gives what PEFT reads instead (adapter_directory.py), or with
`--merge` such a directory, in the dtype of its base. Of a model of a class of transformers the
directory is as `save_pretrained` writes it: names and shapes of tensors are those on disk.

All files are written to a temporary directory next to the target, which is renamed at the end.
Weights move file by file: in memory are the tensors of the file that is being written, and for an
average one more tensor.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.config.modules import outside_modules
from llmnorm.config.pretrained import refuse_encoder
from llmnorm.config.stock import KINDS, to_stock
from llmnorm.data import tokenizer
from llmnorm.exchange.adapter_directory import write_adapter
from llmnorm.exchange.directories import check_empty, new_directory
from llmnorm.exchange.foreign_weights import on_disk
from llmnorm.exchange.loading import open_source, plain_model, refuse_mean
from llmnorm.exchange.model_card import model_card
from llmnorm.exchange.source import Source
from llmnorm.generation.prompts import begin_with
from llmnorm.machine import reading
from llmnorm.machine.files import write_whole
from llmnorm.models.building import class_of
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import MAX_SHARD_BYTES, Stored, write_weights
from llmnorm.models.equivalence import depth_factors
from llmnorm.part import InputError


def export(
    path: Path,
    directory: Path,
    *,
    stock: bool = False,
    average: int = 1,
    ema: bool = False,
    checkpoint: str = "latest",
    merge: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model at `path` to the new or empty `directory`; of an adapter's run the adapter.

    Args:
        path: a run, or a directory that was exported before or holds a stock model.
        stock: write the stock architecture that computes the same instead of ours.
        average: export the float32 mean of this many of the run's last checkpoints.
        ema: export the moving average of the weights instead of the weights.
        checkpoint: of a run: `latest`, `best` or a step.
        merge: write the whole model of a run that has trained an adapter, in the dtype of its base.
        max_shard_bytes: size of a file of weights, and of what is in memory at once.

    Raises:
        InputError: the directory is not empty, the weights are not there or not whole, the stock
            architectures cannot express the model, a mean is asked for where the norms keep
            statistics, there is no adapter to merge, the disk is full; nothing has been written.
    """
    check_empty(directory)
    sources = open_sources(path, average=average, ema=ema, checkpoint=checkpoint)
    newest = sources[-1]
    has_adapter = newest.trained is not None and newest.trained.adapter is not None
    if merge and not has_adapter:
        raise InputError(f"--merge: {path} has no adapter; leave it out")
    if has_adapter and not merge:
        if stock or average > 1:
            option = "--stock" if stock else "--average"
            raise InputError(f"{option}: {path} is an adapter; add --merge for a whole model")
        write_adapter(newest, directory, ema=ema)
        return
    config, read_into, tensors = newest.config, reader(sources), newest.tensors
    model = None
    if newest.kind is not None:
        if stock:
            newest.refuse_foreign(f"--stock: {path}")
        model, architecture = plain_model(newest), newest.kind.__name__
        model.generation_config = _generation(newest, model)
        tensors, read_into = on_disk(model, tensors, read_into)
    else:
        architecture = class_of(newest.own).__name__
    if stock:
        refuse_encoder(config.architectures, f"--stock: {path}", "the stock architectures are of")
        settings = newest.own.settings()
        architecture, keys = to_stock(settings)
        tokens = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        class_name = architecture.replace("ForCausalLM", "Config")
        config = getattr(transformers, class_name)(**keys, **tokens)
        read_into = folding(read_into, depth_factors(settings))
    config.architectures = [architecture]
    steps = [source.meta["step"] for source in sources if source.meta]
    write_directory(
        directory,
        config,
        tensors,
        read_into,
        tokenizer_directory=newest.tokenizer,
        first_token=newest.first_token,
        card=model_card(directory.name, newest, architecture, steps=steps, ema=ema),
        model=model,
        max_shard_bytes=max_shard_bytes,
    )


def write_directory(
    directory: Path,
    config: transformers.PreTrainedConfig,
    tensors: Mapping[str, Stored],
    read_into: Callable[[Mapping[str, Tensor]], None],
    *,
    tokenizer_directory: Path | None,
    first_token: int | None,
    card: str,
    model: transformers.PreTrainedModel | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory under a temporary name, and rename it.

    Args:
        directory: the target; new or empty.
        config: of the model, its `architectures` set; `dtype` is set here.
        tensors: the weights' dtypes and shapes.
        read_into: fills the tensors that it is given, by name.
        tokenizer_directory: the tokenizer to copy, if there is one.
        first_token: the token that its copy begins texts with; None: as the tokenizer does.
        card: README.md.
        model: of a class of transformers, which has more files: how it generates, and code of its
            own; None: of our classes.
        max_shard_bytes: as in `write_weights`.

    Raises:
        InputError: the disk is full or not writable; nothing has been written.
    """
    dtypes = {stored.dtype for stored in tensors.values() if stored.dtype.is_floating_point}
    config.dtype = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
    with new_directory(directory, card) as temporary:
        write_weights(temporary, tensors, read_into, max_shard_bytes=max_shard_bytes)
        config.save_pretrained(temporary)
        _add_older_rope(temporary / "config.json")
        generation = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        if model is not None:
            generation = model.generation_config or generation
            if getattr(config, "auto_map", None):
                for each in (model, config):
                    custom_object_save(each, temporary)  # the files that define it
        generation.save_pretrained(temporary)
        if tokenizer_directory is not None:
            tokenizer.copy(tokenizer_directory, temporary)
            if first_token is not None:
                begin_with(temporary, first_token, where=tokenizer_directory)
    total = sum(torch.Size(stored.shape).numel() for stored in tensors.values())
    (architecture,) = config.architectures or ["model"]
    print(f"{directory}: {architecture}, {total / 1e6:.2f}M parameters, {config.dtype}")
    for module in outside_modules(_settings(config)):
        print(f"it needs your module {module}: llmnorm generate {directory} --import {module}")


def _generation(source: Source, model: transformers.PreTrainedModel) -> GenerationConfig | None:
    """How a model generates: as its base's file says, which a run's checkpoints lack."""
    settings = source.meta.get("config", {}).get("model", {})
    base = Path(
        source.trained.base if source.trained else settings.get("pretrained", source.origin)
    )
    generation = model.generation_config
    if (base / "generation_config.json").is_file():
        generation = GenerationConfig.from_dict(
            reading.read_object(base / "generation_config.json")
        )
    if generation is not None:
        generation.eos_token_id = source.config.eos_token_id
    return generation


def _settings(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The model's settings as plain values; empty for stock classes, which have no parts."""
    return config.settings().model_dump(mode="json") if isinstance(config, LlmNormConfig) else {}


def _add_older_rope(file: Path) -> None:
    """Write rotary positions in the keys of transformers 4 too, where our classes are stock ones.

    There `rope_theta` and `rope_scaling` stand at the top level. Readers that know these alone
    would take the default for a theta that they do not find, and say nothing.
    """
    tree = reading.read_object(file)
    rope = tree.get("rope_parameters")
    if tree["model_type"] not in KINDS or not isinstance(rope, dict):
        return
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    tree["rope_theta"] = rope["rope_theta"]
    if scaling.get("rope_type", "default") != "default":
        tree["rope_scaling"] = scaling
    write_whole(file, json.dumps(tree, indent=2, sort_keys=True) + "\n")


def open_sources(path: Path, *, average: int, ema: bool, checkpoint: str) -> list[Source]:
    """The weights to export, oldest first: one source, or those of the last checkpoints.

    The arguments are those of `export`, and so are the errors.
    """
    if average == 1:
        return [open_source(path, checkpoint=checkpoint, ema=ema)]
    if checkpoint != "latest":
        raise InputError("--average: means the last checkpoints; leave --checkpoint out")
    newest = open_source(path, ema=ema)
    if newest.run is None or path != newest.run.path:
        raise InputError(f"--average: {path} is no run; it holds one set of weights")
    refuse_mean(newest.config, f"--average: {path}")
    last = newest.meta["step"]  # newer ones are damaged, which open_source has logged
    steps = [step for step in Checkpoints(newest.run.checkpoints).steps() if step <= last]
    if len(steps) < average:
        raise InputError(
            f"--average: {path} has {len(steps)} checkpoints ({', '.join(map(str, steps))}), "
            f"not {average}; checkpoint.keep says how many a run keeps"
        )
    older = [open_source(path, checkpoint=str(step), ema=ema) for step in steps[-average:-1]]
    return [*older, newest]


def folding(
    read_into: Callable[[Mapping[str, Tensor]], None], factors: Mapping[str, float]
) -> Callable[[Mapping[str, Tensor]], None]:
    """A reader as `read_into`, which multiplies the norms' gains by their depth scales."""

    def read(into: Mapping[str, Tensor]) -> None:
        read_into(into)
        for name in into.keys() & factors.keys():
            into[name].mul_(factors[name])

    return read


def reader(sources: Sequence[Source]) -> Callable[[Mapping[str, Tensor]], None]:
    """A function that fills tensors from one source, or with the mean over several."""
    if len(sources) == 1:
        return sources[0].read_into

    def mean(into: Mapping[str, Tensor]) -> None:
        for name, tensor in into.items():
            sources[-1].read_into({name: tensor})
            if not tensor.is_floating_point():
                continue  # a count is taken from the newest checkpoint
            total = torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            sources[-1].read_into({name: total})
            for source in sources[:-1]:
                other = torch.empty_like(total)
                source.read_into({name: other})
                total += other
            tensor.copy_(total / len(sources))

    return mean
