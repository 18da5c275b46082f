"""The run's model on the meta device, what of it is trained, and the weights that it begins with.

A run whose weights are all trained needs `model.pretrained` once, before its first checkpoint. A
run that freezes some needs it at every start, since its checkpoints hold what is trained alone.
They name their base by its path and by the hash of its files: another base is refused, and one that
was moved is found by `model.pretrained=NEW`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoint
from llmnorm.config.adapter import ALL_LINEAR, LowRankSettings, quantized_refusal
from llmnorm.config.pretrained import FREE
from llmnorm.config.stock import Tokens
from llmnorm.config.tree import RunConfig
from llmnorm.exchange.loading import open_source
from llmnorm.exchange.source import Source, base_path, refuse_other_base
from llmnorm.machine.memory import refuse_what_cannot_fit
from llmnorm.models import nf4
from llmnorm.models.adapters import (
    PeftFiles,
    inject,
    is_adapter,
    loaded_name,
    set_first_values,
    target_modules,
)
from llmnorm.models.building import class_of, empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import named_weights
from llmnorm.models.frozen import freeze, narrow
from llmnorm.models.initialization import initialize
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.models.new_rows import EMBEDDING, HEAD, add_new_rows, set_new_rows
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.settings import ModelSettings
from llmnorm.objectives.contract import Objective
from llmnorm.parallel.processes import Fill, Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.models.foreign import Foreign


class Base(NamedTuple):
    """The weights that a run leaves as they are.

    Attributes:
        path: where they lie; of a run the checkpoint.
        hash: of their files.
        new_tokens: the ids of tokens that its tokenizer lacks, whose rows are trained.
    """

    path: Path
    hash: str
    new_tokens: range


class RunModel(NamedTuple):
    """A run's model before it is laid out.

    Attributes:
        model: on the meta device, in training mode.
        fill: gives the tensors of modules their first values.
        base: what is frozen of it, if something is.
    """

    model: "LlmNormForCausalLM | Foreign"
    fill: Fill
    base: Base | None


def run_model(
    config: RunConfig,
    objective: Objective,
    parallel: Parallel,
    start: Checkpoint | None,
    ends: Tokens,
) -> RunModel:
    """The run's model, and the function that gives it its first weights.

    Drawn weights are the same numbers on every process and device. A pretrained model's head is
    loaded only if its objective is the run's; else it is drawn.

    Args:
        start: the checkpoint that will replace what is trained; None at the run's first step.
        ends: the tokens that end a text.

    Raises:
        InputError: the vocabulary is too small for the tokenizer; new tokens cannot have rows;
            `model.pretrained` or `adapter.from` cannot be read, does not fit, or is not what the
            checkpoint names; or `model.quantize` is asked of several processes.
    """
    if config.model.quantize is not None and parallel.sharding != "none":
        raise InputError(quantized_refusal(config.model.quantize, parallel.sharding))
    data = objective.data
    new = range(data.vocab_size - data.new_tokens, data.vocab_size)
    settings = _settings(config, objective, ends)
    model = empty_model(settings, device="meta").train()
    pretrained = config.model.pretrained
    if pretrained is None or (start is not None and not config.freezes):
        refuse_weights_that_cannot_fit(model, parallel)
        return RunModel(
            model, lambda modules: initialize(model, seed=config.seed, modules=modules), None
        )
    path, base = pretrained, None
    if config.freezes:
        path = base_path(pretrained, start.meta if start else {})
        if start is not None and not path.is_dir():
            raise InputError(
                f"model.pretrained: {path}, the base of this run, is not there; if it was moved: "
                f"llmnorm train {config.run_dir} model.pretrained=NEW"
            )
    source = open_source(path, key="model.pretrained", rank=parallel.rank, world=parallel.world)
    new_head = not (config.objective.keeps_head and class_of(source.own) is class_of(settings))
    if new:
        _check_new_tokens(model, new_head)
    if config.freezes:
        base = Base(source.origin.absolute(), source.contents(), new)
        _check_base(config, source, base, start)
        choose_trained(config, model, new_head=new_head, new_tokens=new)
    first: PeftFiles | None = None
    adapter = config.adapter
    if isinstance(adapter, LowRankSettings) and adapter.start is not None and start is None:
        first = PeftFiles(adapter.start)
        first.check(model, adapter, new)
    refuse_weights_that_cannot_fit(model, parallel)
    prefix = f"{model.base_model_prefix}."

    def fill(modules: Mapping[str, nn.Module]) -> None:
        named = named_weights(modules)
        loaded = {loaded_name(n): t for n, t in named.items() if not is_adapter(n)}
        if new_head:
            plain = {
                n: m
                for n, m in modules.items()
                if not (is_adapter(f"{n}.weight") or isinstance(m, nf4.NF4Linear))
            }
            initialize(model, seed=config.seed, modules=plain)
            loaded = {n: t for n, t in loaded.items() if n.startswith(prefix)}
        # Of embedding and head the base may lack the last rows.
        rows = source.config.vocab_size
        source.read_into({n: t[:rows] if n in (EMBEDDING, HEAD) else t for n, t in loaded.items()})
        if new:
            set_new_rows(named, new)
        nf4.fill(
            modules, lambda into: source.read_into({loaded_name(n): t for n, t in into.items()})
        )
        set_first_values(modules, seed=config.seed)
        if first is not None:
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            first.read_into({n: t for n, t in named.items() if n in trained})

    note = ", but a new head: it had another objective" if new_head else ""
    parallel.say(f"weights from {path}{note}")
    if new and start is None:
        parallel.say(
            f"the rows of {len(new)} new tokens ({new.start} to {new.stop - 1}) begin at the mean "
            "of the others"
        )
    return RunModel(model, fill, base)


def choose_trained(
    config: RunConfig, model: LlmNormForCausalLM, *, new_head: bool, new_tokens: range = range(0)
) -> None:
    """Put the run's adapter into a model on the meta device, and freeze what the run freezes.

    What is frozen is stored for the products that it makes (models/frozen.py), or in few bits; rows
    of new tokens are parameters of their own beside it (models/new_rows.py).

    Args:
        new_head: train what stands behind the base model, since it was not loaded.
        new_tokens: the ids of tokens that the base's tokenizer lacks.

    Raises:
        InputError: a target of the adapter is not there, or is the head beside new tokens; these
            cannot have rows; nothing is left to train.
    """
    if new_tokens:
        _check_new_tokens(model, new_head)
    in_blocks = target_modules(model, ALL_LINEAR)
    if isinstance(config.adapter, LowRankSettings):
        inject(model, config.adapter)
    if config.freezes:
        if new_tokens:
            if not isinstance(model.get_output_embeddings(), LanguageHead):
                raise InputError(
                    "adapter.targets: 'lm_head' cannot have an adapter beside rows of new tokens, "
                    "which tokenizer.chat_template needs here; leave it out"
                )
            add_new_rows(model, new_tokens)
        freeze(model, norms=config.trainable == "norms", new_head=new_head)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                f"training.trainable: '{config.trainable}', but the model has none with weights; "
                "nearest: adapter=lora"
            )
        if config.model.quantize is not None:
            nf4.quantize(model, in_blocks)
        if config.training.precision == "bf16":
            narrow(model)


def _check_new_tokens(model: LlmNormForCausalLM, new_head: bool) -> None:
    if new_head or not isinstance(model, LlmNormForCausalLM):
        raise InputError(
            "tokenizer.chat_template: needs special tokens that the tokenizer does not have, which "
            "only a causal language model beside its own head gets rows for; leave the key out"
        )


def _settings(config: RunConfig, objective: Objective, ends: Tokens) -> LlmNormConfig:
    """The model's configuration, sized by the data.

    Raises:
        InputError: the vocabulary is too small for the tokenizer.
    """
    rows, pretrained, data = config.model.vocab_size, config.model.pretrained, objective.data
    if rows != "auto" and pretrained is not None and rows >= data.vocab_size - data.new_tokens:
        rows = max(rows, data.vocab_size)  # the run's model has more than its base
    if rows != "auto" and rows < data.vocab_size:
        if pretrained is not None:
            cure = "leave the tokenizer section out to use its own"
            if config.tokenizer.path == pretrained:  # it is its own
                cure = f"give it {data.vocab_size} (transformers: resize_token_embeddings)"
            raise InputError(
                f"model.pretrained: {pretrained} has {rows} embedding rows, the tokenizer "
                f"{data.vocab_size} tokens; {cure}"
            )
        raise InputError(
            f"model.vocab_size: {rows} is less than the tokenizer's {data.vocab_size}; "
            "leave it out, or give at least that"
        )
    settings: LlmNormConfig = LlmNormConfig.from_settings(
        config.model,
        vocab_size=data.vocab_size if rows == "auto" else rows,
        bos_token_id=data.bos,
        eos_token_id=ends,
        pad_token_id=data.pad,
        architectures=[config.objective.architecture],
        **objective.model_keys(),
    )
    return settings


def refuse_weights_that_cannot_fit(model: nn.Module, parallel: Parallel) -> None:
    """Raise an InputError if this process's part of a model is larger than the memory."""
    if parallel.device.type == "cpu":  # a GPU refuses by itself
        weights = sum(parameter.nbytes for parameter in model.parameters())
        weights += sum(t.nbytes for layer in nf4.layers(model).values() for t in layer.four_bits)
        refuse_what_cannot_fit(
            weights // (parallel.world if parallel.spread else 1), "model: the weights"
        )


def _check_base(config: RunConfig, source: Source, base: Base, start: Checkpoint | None) -> None:
    """Compare a base with the run's settings, and with the one that a checkpoint names.

    Raises:
        InputError: it is another one; the message says what differs.
    """
    ours, theirs = config.model, source.own.settings()
    changed = [
        f"{name} ({getattr(ours, name)} in the run, {getattr(theirs, name)} there)"
        for name in ModelSettings.model_fields
        if name not in FREE and getattr(ours, name) != getattr(theirs, name)
    ]
    if changed:
        raise InputError(
            f"model.pretrained: {base.path} is another model than the base of this run: "
            f"{', '.join(changed[:3])}"
        )
    if start is not None and start.meta.get("base"):
        refuse_other_base(base.path, base.hash, start.meta, start.path)
