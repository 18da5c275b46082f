"""A run's model of a class of transformers: on the meta device, what of it is trained, its weights.

What `training/model.py` does for our classes. Its messages are that file's where a run cannot be
what it was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoint
from llmnorm.config.adapter import LowRankSettings, quantized_refusal
from llmnorm.config.stock import Tokens
from llmnorm.config.tree import RunConfig
from llmnorm.exchange.foreign_source import class_of_run
from llmnorm.exchange.loading import open_source
from llmnorm.exchange.source import Source, base_path, refuse_other_base
from llmnorm.models import nf4
from llmnorm.models.adapters import PeftFiles, is_adapter, loaded_name, set_first_values
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import Foreign, Head, Rows, Ways, empty_foreign, skeleton
from llmnorm.models.foreign_adapters import foreign_targets, inject_in_blocks
from llmnorm.models.four_bit_layers import share_left_out, stored_in_four_bits
from llmnorm.models.frozen import freeze, narrow
from llmnorm.models.fused import fused_rows
from llmnorm.models.looks import WIDTH, Looks, look
from llmnorm.models.router_loss import coefficient
from llmnorm.nn.experts import stacked_modules
from llmnorm.objectives.apart import padding
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.optim.build import describe_matrices
from llmnorm.optim.groups import split
from llmnorm.optim.settings import AdamWSettings
from llmnorm.parallel.processes import Parallel, local
from llmnorm.part import InputError
from llmnorm.training.model import Base, RunModel, refuse_weights_that_cannot_fit


def foreign_model(
    config: RunConfig,
    objective: Objective,
    parallel: Parallel,
    start: Checkpoint | None,
    ends: Tokens,
) -> RunModel:
    """The run's model of a class of transformers; arguments are those of `run_model`.

    Raises:
        InputError: the directory cannot be read, or has no class that can be trained so; the
            vocabulary is too small for the tokenizer, the context longer than the model's; the
            tokenizer wants tokens that the model has no rows for; a mixture's balancing loss or its
            load is asked for and cannot be had; the base is another one than the checkpoint names;
            or `model.quantize` is asked of several processes.
    """
    if config.model.quantize is not None and parallel.sharding != "none":
        raise InputError(quantized_refusal(config.model.quantize, parallel.sharding))
    if start is not None and not config.freezes:
        found = class_of_run(start.meta, str(start.path))
        model = empty_foreign(found.kind, found.config, dropout=config.model.dropout == "config")
        _finish(config, objective, model, ends)
        refuse_weights_that_cannot_fit(model, parallel)
        return RunModel(model, lambda modules: None, None)  # the checkpoint has all weights
    source, path = _source(config, parallel, start)
    assert source.kind is not None
    model = empty_foreign(source.kind, source.config, dropout=config.model.dropout == "config")
    _finish(config, objective, model, ends)
    base, first = None, None
    if config.freezes:
        base = Base(source.origin.absolute(), source.contents(), range(0))
        if start is not None and start.meta.get("base"):
            refuse_other_base(base.path, base.hash, start.meta, start.path)
        parallel.say(choose_trained(config, model))
    adapter = config.adapter
    if isinstance(adapter, LowRankSettings) and adapter.start is not None and start is None:
        first = PeftFiles(adapter.start)
        first.check(model, adapter)
    refuse_weights_that_cannot_fit(model, parallel)

    def fill(modules: Mapping[str, nn.Module]) -> None:
        named = named_weights(modules)
        loaded = {loaded_name(n): t for n, t in named.items() if not is_adapter(n)}
        own = {n for n, _ in model.named_parameters() if not is_adapter(n)}
        lacking = own & named.keys() - {n for n in named if loaded_name(n) in source.tensors}
        assert not lacking, f"no weights for {sorted(lacking)[:3]}"
        source.read_into({n: t for n, t in loaded.items() if n in source.tensors})
        nf4.fill(
            modules, lambda into: source.read_into({loaded_name(n): t for n, t in into.items()})
        )
        set_first_values(modules, seed=config.seed)
        if first is not None:
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            first.read_into({n: t for n, t in named.items() if n in trained})

    parallel.say(f"weights from {path}, as transformers' {source.kind.__name__}")
    if source.kind.__module__.startswith("transformers_modules."):
        parallel.say(f"model.trust_remote_code: the code that lies in {path} is run")
    return RunModel(model, fill, base)


def outline_of_foreign(config: RunConfig) -> Foreign:
    """The run's model on the meta device: shapes without numbers; headers of files are read."""
    assert config.model.pretrained is not None
    source = open_source(
        config.model.pretrained,
        key="model.pretrained",
        classes="transformers",
        trust_remote_code=config.model.trust_remote_code,
    )
    assert source.kind is not None
    model = empty_foreign(source.kind, source.config)
    _look_for_fused(config, model)
    if config.freezes:
        choose_trained(config, model)
    return model


def choose_trained(config: RunConfig, model: Foreign) -> str:
    """Put the run's adapter into a model on the meta device, and freeze what the run freezes.

    Returns:
        What is to be said of it.

    Raises:
        InputError: a target of the adapter is not there, nothing is left to train, or no layer can
            be stored in few bits.
    """
    note = f"training.trainable: {config.trainable}"
    plain = skeleton(model.kind, model.saved_config)
    if isinstance(config.adapter, LowRankSettings):
        blocks = [*model.units()]
        targets = foreign_targets(plain, config.adapter, blocks)
        inject_in_blocks(model, config.adapter, targets.names, blocks, targets.stacks)
        note = targets.describe()
    freeze(model, norms=config.trainable == "norms", new_head=False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"training.trainable: '{config.trainable}', but the model has none with weights; "
            "nearest: adapter=lora"
        )
    if config.model.quantize is not None:
        stored = stored_in_four_bits(plain)
        if not stored:
            raise InputError(
                f"model.quantize: {model.kind.__name__} has no linear layer in its blocks that "
                f"'{config.model.quantize}' stores; leave it out"
            )
        nf4.quantize(model, stored)
        note += f"\n{share_left_out(plain, stored)}"
    if config.training.precision == "bf16":
        narrow(model)
    return note


def looked_at(config: RunConfig, model: Foreign, parallel: Parallel) -> Looks:
    """Look at the run's model, laid out and with its weights, and say what was seen.

    Raises:
        InputError: it cannot be trained right; the message says why.
    """
    found = look(
        model,
        autocast=parallel.autocast,
        gradient=parallel.gradient,
        recomputes=config.parallel.activation_checkpointing,
        dropout=config.model.dropout == "config",
    )
    model.ways = _agreed(found.ways, parallel)
    parallel.say(f"{model.kind.__name__}, as it was found to be:\n{found.table()}")
    if not isinstance(config.optimizer, AdamWSettings):
        parallel.say(f"  {'optimizer':{WIDTH}}  {describe_matrices(split(model))}")
    return found


def _agreed(ways: Ways, parallel: Parallel) -> Ways:
    """The most careful way that a process has found, in case a GPU's last bits have parted them."""
    orders = get_args(Rows), get_args(Head)
    own = torch.tensor([order.index(way) for order, way in zip(orders, ways, strict=True)])
    everyone = parallel.gather(own.to(parallel.device)).view(-1, len(orders))
    rows, head = everyone.amax(0).tolist()
    return Ways(orders[0][rows], orders[1][head])


def say_first_step(
    config: RunConfig, model: Foreign, first: list[MicroBatch], finite: bool, parallel: Parallel
) -> None:
    """Print what the rehearsal of the first step has shown.

    Raises:
        InputError: its loss or its gradient is not finite.
    """
    if not finite:
        raise InputError(
            f"training.precision: '{config.training.precision}': the first step's loss or gradient "
            f"in {model.kind.__name__} is not finite"
        )
    parallel.say(
        f"  {'gradient':{WIDTH}}  of the first step, finite in {config.training.precision}"
    )
    if model.apart:
        padded, every = padding(first)
        parallel.say(f"  {'padding':{WIDTH}}  {padded / every:.1%} of the first step's tokens")


def refuse_unused(
    without: Sequence[str], trained: Sequence[tuple[str, nn.Parameter]], parallel: Parallel
) -> None:
    """Refuse weights that a step leaves without a gradient; every process must call it.

    A layer whose forward pass is not called, or whose weight is read past an adapter around it,
    would be saved as if it had been trained.

    Args:
        without: the names of trained parameters that got none.
        trained: all of them, each as the optimizer sees it, with the gradient of a step.

    Raises:
        InputError: names a weight without one, or a kind of layer whose adapters have zeros alone.
    """
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        cure = (
            "leave that layer out of adapter.targets, or that stack out of adapter.parameters"
            if is_adapter(without[0])
            else "the class does not use it here; train with adapter=lora"
        )
        raise InputError(
            f"training.trainable: '{without[0]}'{more} gets no gradient from a step; {cure}"
        )
    factors = [(n, p) for n, p in trained if n.endswith(".lora_B.default.weight")]
    if not factors:
        return
    sums = [local(p.grad).abs().sum() for _, p in factors if p.grad is not None]
    found = parallel.reduce(torch.stack(sums).float()).tolist()
    kinds: dict[str, float] = {}
    for (name, _), size in zip(factors, found, strict=True):
        kind = loaded_name(name).split(".lora_B.")[0].rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0.0) + size
    if idle := [kind for kind, size in kinds.items() if size == 0]:
        raise InputError(
            f"adapter.targets: the adapters around '{idle[0]}' get gradients of 0 alone from a "
            "step, so the model does not use them; leave that layer out"
        )


def _source(config: RunConfig, parallel: Parallel, start: Checkpoint | None) -> tuple[Source, Path]:
    """The weights of `model.pretrained`, or where those lie that the checkpoint names."""
    path = config.model.pretrained
    assert path is not None
    if config.freezes:
        path = base_path(path, start.meta if start else {})
        if start is not None and not path.is_dir():
            raise InputError(
                f"model.pretrained: {path}, the base of this run, is not there; if it was moved: "
                f"llmnorm train {config.run_dir} model.pretrained=NEW"
            )
    source = open_source(
        path,
        key="model.pretrained",
        rank=parallel.rank,
        world=parallel.world,
        classes="transformers",
        trust_remote_code=config.model.trust_remote_code,
    )
    return source, path


def _finish(config: RunConfig, objective: Objective, model: Foreign, ends: Tokens) -> None:
    """Compare the model with the data and the settings, and give it the run's end tokens."""
    data, name, path = objective.data, model.kind.__name__, config.model.pretrained
    if data.new_tokens:
        raise InputError(
            "tokenizer.chat_template: needs special tokens that the tokenizer does not have, and "
            f"{name} of transformers gets no rows for new ones; leave the key out, or name a "
            "template of the tokenizer's own tokens"
        )
    rows = model.get_input_embeddings().num_embeddings
    if rows < data.vocab_size:
        raise InputError(
            f"model.pretrained: {path} has {rows} embedding rows, the tokenizer {data.vocab_size} "
            "tokens; leave the tokenizer section out to use its own, or give it that many "
            "(transformers: resize_token_embeddings)"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and config.data.context_length > longest:
        raise InputError(
            f"data.context_length {config.data.context_length} is more than the {longest} "
            f"positions of {path} (max_position_embeddings)"
        )
    if config.parallel.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise InputError(
            f"parallel.activation_checkpointing: {name} of transformers cannot be recomputed; "
            "leave it out"
        )
    model.router_loss = coefficient(config.model.router_loss, model)
    if config.logging.health_every is not None and not stacked_modules(model):
        raise InputError(
            "logging.health_every: a class of transformers tells the load of its experts alone, "
            f"and {name} has none; leave it out"
        )
    for each in (model.config, model.saved_config):
        each.eos_token_id = ends
    model.saved_config.architectures = [name]
    _look_for_fused(config, model)


def _look_for_fused(config: RunConfig, model: Foreign) -> None:
    """Find the fused projections of a model on the meta device, if a rule wants matrices."""
    if not isinstance(config.optimizer, AdamWSettings):
        model.fused = fused_rows(model)
