"""What one type of model can do here, found out by two processes: for tools/models_table.py.

A tiny random model of the class is looked at as a run looks at it, gets adapters that change what
it computes, is written, and read again by plain transformers and PEFT; then both processes hold a
part of it and take a step. Whatever fails is a reason in the place of a yes.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.config.adapter import LoraSettings
from llmnorm.exchange.foreign_source import skeleton_of
from llmnorm.exchange.foreign_weights import ForeignWeights, on_disk
from llmnorm.models.adapters import WEIGHTS, is_adapter, loaded_name, peft_name, write_config
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import Foreign, empty_foreign
from llmnorm.models.foreign_adapters import foreign_targets, inject_in_blocks
from llmnorm.models.looks import look
from llmnorm.parallel.shards import fill_and_shard, make_mesh, shard
from llmnorm.part import InputError

SMALL = 5e-4  # of the largest number: what rounding explains in a random model of these sizes
LORA = LoraSettings(rank=2)
VOCABULARY, LENGTH = 96, 24
LARGEST = 5_000_000  # numbers of a model


def probe(name: str, of: Callable[[str], Any], directory: Path, rank: int, world: int) -> None:
    """Find out what a type can do; the first process writes `row.json` into `directory`."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=240),
        )
    row: dict[str, Any] = {}

    def note(key: str, work: Callable[[], Any]) -> Any:
        """What `work` returns, which is kept; a reason where it fails."""
        try:
            row[key] = work()
        except Exception as error:  # of any kind: it is the class's own code
            reason = " ".join(str(error).split())[:160]
            told = isinstance(error, InputError | ValueError)
            row[key] = reason if told else f"{type(error).__name__}: {reason}"
            return None
        finally:
            if rank == 0:
                (directory / "row.json").write_text(json.dumps(row))
        return row[key]

    made: list[PreTrainedModel] = []

    def class_name() -> str:
        made.append(random_model(of, name))
        return type(made[0]).__name__

    if note("class", class_name) is None:
        return
    (plain,) = made
    config, state = plain.config, plain.state_dict()

    def foreign() -> Foreign:
        model = empty_foreign(type(plain), config)
        fill_and_shard(model, partial(fill, state), torch.device("cpu"), None)
        return model

    ways: list[Any] = []

    def looked() -> list[str]:
        ways.append(look(foreign(), autocast=nullcontext, gradient=gradient).ways)
        return list(ways[0])

    if note("ways", looked) is None:
        return
    if rank == 0:
        note("recomputation", lambda: recomputed(foreign()))
        note("saved", lambda: saved(plain))
        note("adapter", lambda: adapted(plain, config, state))
    note("sharded", lambda: sharded(foreign(), config, state, type(plain), ways[0], rank))


def random_model(of: Callable[[str], Any], name: str) -> PreTrainedModel:
    """A model whose weights are large enough that its logits reach 20."""
    torch.manual_seed(0)
    config, kind = of(name)
    numbers = sum(p.numel() for p in skeleton_of(kind, config, where=name).parameters())
    if numbers > LARGEST:
        raise ValueError(f"{numbers / 1e6:.0f}M numbers: its sizes have names that are not known")
    model: PreTrainedModel = kind(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in key:
                parameter.normal_(std=0.2)
        largest = logits(model).abs().max()
        if not bool(largest.isfinite()):
            raise ValueError("logits of random weights are not finite")
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            head.weight.mul_(20 / float(largest))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of the same tokens always."""
    found: Tensor = model.eval()(input_ids=tokens()[:1], use_cache=False).logits
    return found


def tokens() -> Tensor:
    """(2, length) ids."""
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def fill(state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    """Give modules without an adapter their weights."""
    with torch.no_grad():
        for name, tensor in named_weights(modules).items():
            if not isinstance(tensor, DTensor):  # tied to one that is filled and sharded already
                tensor.copy_(state[name])


def gradient(loss: Tensor, tensor: Tensor) -> Tensor:
    """Of a loss by a tensor."""
    (found,) = torch.autograd.grad(loss, tensor)
    return found


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, over the largest number.

    Raises:
        ValueError: it is more than rounding explains.
    """
    off = float((found - wanted).abs().max() / wanted.abs().max())
    if not off <= SMALL:
        raise ValueError(f"differs by {off:.1e}")
    return off


def _told(found: Tensor, wanted: Tensor) -> float | str:
    try:
        return difference(found, wanted)
    except ValueError as error:
        return str(error)


def recomputed(model: Foreign) -> bool:
    """Whether recomputed blocks give the gradients that they give without it."""
    if not model.supports_gradient_checkpointing:
        raise ValueError("the class cannot be recomputed")
    for block in model.units().values():
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False
        )
    look(model, autocast=nullcontext, gradient=gradient, recomputes=True)
    return True


def saved(plain: PreTrainedModel) -> bool:
    """Whether weights go in and out as `save_pretrained` has them."""
    with tempfile.TemporaryDirectory() as place:
        plain.save_pretrained(place)
        files = load_file(Path(place) / "model.safetensors")
        skeleton = skeleton_of(type(plain), plain.config, where="it")
        weights = ForeignWeights(Path(place), skeleton)
        into = {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in weights.tensors.items()}
        weights.read_into(into)
        state = plain.state_dict()
        if wrong := [n for n, tensor in into.items() if not tensor.equal(state[n])]:
            raise ValueError(f"'{wrong[0]}' is read wrong")
        names, write = on_disk(skeleton, weights.tensors, weights.read_into)
        if names.keys() != files.keys():
            raise ValueError(f"other names: {sorted(names.keys() ^ files.keys())[:2]}")
        out = {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in names.items()}
        write(out)
        if wrong := [n for n, tensor in out.items() if not tensor.equal(files[n])]:
            raise ValueError(f"'{wrong[0]}' is written wrong")
    return True


def adapted(
    plain: PreTrainedModel, config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Layers with and without an adapter; what is without a gradient; plain PEFT and its merge.

    Layers without a gradient would stop a run, so the rest is what is compared with PEFT.
    """
    skeleton = skeleton_of(type(plain), config, where="it")
    targets = foreign_targets(skeleton, LORA, [*empty_foreign(type(plain), config).units()])
    names = targets.names
    model = with_adapter(plain, config, state, names)
    idle = without_gradient(model)
    if idle:
        names = [name for name in names if name.rpartition(".")[2] not in idle]
        if not names:
            raise ValueError(f"no layer with a gradient: {', '.join(idle)}")
        model = with_adapter(plain, config, state, names)
    row: dict[str, Any] = {
        "layers": len(names),
        "left_out": sorted({name.rpartition(".")[2] for name in targets.left_out}),
        "without_gradient": idle,
    }
    return row | in_plain_tools(plain, model, skeleton)


def with_adapter(
    plain: PreTrainedModel,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    names: list[str],
) -> Foreign:
    """A model with adapters around some layers that change what it computes."""
    model = empty_foreign(type(plain), config)
    inject_in_blocks(model, LORA, names, [*model.units()])
    draw = torch.Generator().manual_seed(2)

    def values(modules: Mapping[str, nn.Module]) -> None:
        with torch.no_grad():
            for name, tensor in named_weights(modules).items():
                if is_adapter(name):
                    tensor.normal_(std=0.1, generator=draw)
                else:
                    tensor.copy_(state[loaded_name(name)])

    fill_and_shard(model, values, torch.device("cpu"), None)
    return model


def without_gradient(model: Foreign) -> list[str]:
    """Last names of layers whose adapters a backward pass leaves as they are."""
    loss = model(input_ids=tokens(), use_cache=False).logits.float().logsumexp(-1).sum()
    loss.backward()
    return sorted(
        {
            name.split(".lora_B.")[0].rpartition(".")[2]
            for name, parameter in model.named_parameters()
            if ".lora_B." in name and (parameter.grad is None or not bool(parameter.grad.any()))
        }
    )


def in_plain_tools(
    plain: PreTrainedModel, model: Foreign, skeleton: PreTrainedModel
) -> dict[str, float | str]:
    """How far an exported adapter is from the model in plain PEFT, and merged in transformers."""
    import peft

    expected = logits(model)
    row: dict[str, float | str] = {}
    place = Path(tempfile.mkdtemp())
    try:
        trained = {n: p.detach() for n, p in model.named_parameters() if is_adapter(n)}
        write_config(place, LORA, model=skeleton, trained=trained, base="BASE")
        save_file({peft_name(n): t for n, t in trained.items()}, place / WEIGHTS)
        plain.save_pretrained(place / "base")
        base = type(plain).from_pretrained(place / "base", dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, place)
        row["peft"] = _told(logits(loaded), expected)
        row["merged"] = _told(logits(loaded.merge_and_unload()), expected)
    finally:
        shutil.rmtree(place)
    return row


def sharded(
    whole: Foreign,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    kind: type[PreTrainedModel],
    ways: Any,
    rank: int,
) -> float:
    """A step of two processes, each with a part of the weights and a row, against one with both."""
    ids = tokens()
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    items = float((labels != -100).sum())
    whole.ways = ways
    wanted = whole(input_ids=ids, shift_labels=labels, num_items_in_batch=items).loss
    wanted.backward()
    part = empty_foreign(kind, config)
    mesh = make_mesh(torch.device("cpu"), 1)
    unit = partial(shard, mesh=mesh, waiting=nullcontext)
    fill_and_shard(part, partial(fill, state), torch.device("cpu"), unit)
    part.ways = ways
    own = slice(rank, rank + 1)
    loss = part(input_ids=ids[own], shift_labels=labels[own], num_items_in_batch=items).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    off = difference(total, wanted.detach())
    gradients = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    for name, parameter in part.named_parameters():
        found = None if parameter.grad is None else parameter.grad.full_tensor()  # type: ignore[attr-defined]
        if name in gradients:
            assert found is not None, f"'{name}' has no gradient"
            scale = max(float(gradients[name].abs().max()), 1e-3)
            if float((found - gradients[name]).abs().max()) > 10 * SMALL * scale:
                raise ValueError(f"the gradient of '{name}' differs")
    return off


def main(name: str, of: Callable[[str], Any], directory: Path, rank: int, world: int) -> None:
    """`probe`, in a process that ends at once: a teardown would wait for one that is gone."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        probe(name, of, directory, rank, world)
    finally:
        os._exit(0)
