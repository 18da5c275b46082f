"""`llmnorm export`: a model directory that other tools read.

    model*.safetensors      the weights, float32 from a run, a shard at a time
    config.json             of our class, with the `auto_map` that names modeling_llmnorm.py (three
                            lines that import the installed package); or of a stock architecture
    generation_config.json  the tokens that end and pad a text
    tokenizer.json, ...     the tokenizer, its chat template too
    README.md               the model card: data, settings, losses, how to load it

Everything is written to a temporary directory beside and renamed at the end. Of an average only the
shard being written and one tensor of one checkpoint are in memory.
"""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from llmnorm.data import tokenizer
from llmnorm.models.convert import MAX_SHARD_BYTES, write_weights
from llmnorm.part import InputError
from llmnorm.stock import to_stock
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.loading import Source, open_source
from llmnorm.training.model_card import model_card


def export(
    path: Path,
    directory: Path,
    *,
    stock: bool = False,
    average: int = 1,
    ema: bool = False,
    checkpoint: str = "latest",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model at `path` to the new or empty `directory`.

    Args:
        path: a run, or a directory that was exported before or holds a stock model.
        stock: write the stock architecture that computes the same instead of ours.
        average: the float32 mean of this many of the run's last checkpoints.
        ema: the moving average of the weights in their place.
        checkpoint: of a run: `latest`, `best` or a step.
        max_shard_bytes: size of a file of weights, and of what is in memory at once.

    Raises:
        InputError: the directory is not empty, the weights are not there or not whole, the stock
            architectures cannot express the model, the disk is full; nothing has been written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is not empty; name a new directory")
    sources = _sources(path, average, ema, checkpoint)
    newest = sources[-1]
    config, architecture = newest.config, "LlmNormForCausalLM"
    if stock:
        architecture, keys = to_stock(config.settings())
        tokens = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        class_name = architecture.replace("ForCausalLM", "Config")
        config = getattr(transformers, class_name)(**keys, **tokens)
    config.architectures = [architecture]
    dtypes = {stored.dtype for stored in newest.tensors.values()}
    config.dtype = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")

    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        write_weights(temporary, newest.tensors, _reader(sources), max_shard_bytes=max_shard_bytes)
        config.save_pretrained(temporary)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(temporary)
        if newest.tokenizer is not None:
            tokenizer.copy(newest.tokenizer, temporary)
        steps = [source.meta["step"] for source in sources if source.meta]
        card = model_card(directory.name, newest, architecture, steps=steps, ema=ema)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for file in temporary.glob("*.safetensors"):  # written for its owner alone
            file.chmod((temporary / "README.md").stat().st_mode)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    total = sum(torch.Size(stored.shape).numel() for stored in newest.tensors.values())
    print(f"{directory}: {architecture}, {total / 1e6:.2f}M parameters, {config.dtype}")


def _sources(path: Path, average: int, ema: bool, checkpoint: str) -> list[Source]:
    """The weights to export, oldest first: one source, or those of the last checkpoints."""
    if average == 1:
        return [open_source(path, checkpoint=checkpoint, ema=ema)]
    if checkpoint != "latest":
        raise InputError("--average: means the last checkpoints; leave --checkpoint out")
    newest = open_source(path, ema=ema)
    if newest.run is None or path != newest.run.path:
        raise InputError(f"--average: {path} is no run; it holds one set of weights")
    steps = Checkpoints(newest.run.checkpoints).steps()
    if len(steps) < average:
        raise InputError(
            f"--average: {path} has {len(steps)} checkpoints ({', '.join(map(str, steps))}), "
            f"not {average}; checkpoint.keep says how many a run keeps"
        )
    return [open_source(path, checkpoint=str(step), ema=ema) for step in steps[-average:]]


def _reader(sources: Sequence[Source]) -> Callable[[Mapping[str, Tensor]], None]:
    """What fills tensors from one source, or with the mean over several."""
    if len(sources) == 1:
        return sources[0].read_into

    def mean(into: Mapping[str, Tensor]) -> None:
        for name, total in into.items():
            sources[-1].read_into({name: total})
            if not total.is_floating_point():
                continue  # a count is the newest one's
            for source in sources[:-1]:
                one = torch.empty_like(total)
                source.read_into({name: one})
                total += one
            total /= len(sources)

    return mean
