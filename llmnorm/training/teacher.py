"""The frozen model that a run learns from (`objective.teacher`): found, compared, loaded.

A checkpoint names it by its path and by the hash of its files, as it does a base (model.py).
Another teacher is refused when the run goes on; one that was moved is found by
`objective.teacher=NEW`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.config.tree import RunConfig
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.exchange.loading import empty_of, open_source
from llmnorm.exchange.source import Source, path_of_named
from llmnorm.machine.memory import refuse_what_cannot_fit
from llmnorm.models.convert import named_weights
from llmnorm.models.frozen import narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.objectives.contract import Objective
from llmnorm.objectives.teacher import KEY, Teacher
from llmnorm.parallel.processes import Parallel
from llmnorm.parallel.shards import fill_and_shard
from llmnorm.part import InputError


class NamedTeacher(NamedTuple):
    """The teacher of a run, as its checkpoints name it.

    Attributes:
        path: where its weights lie; of a run the checkpoint.
        hash: of their files.
    """

    path: Path
    hash: str


def give_teacher(
    config: RunConfig, objective: Objective, parallel: Parallel, meta: Mapping[str, Any]
) -> NamedTeacher | None:
    """Load the teacher that the configuration names, whole, and hand it to the objective.

    Its weights are stored in the dtype of the products that they make (models/frozen.py).

    Args:
        meta: of the run's newest checkpoint; empty before there is one.

    Returns:
        What checkpoints are to say of it; None where the objective learns from none.

    Raises:
        InputError: it is not there, is another one than `meta` names, has other tokens than the
            run, or cannot be read.
    """
    directory = config.objective.teacher_directory
    if directory is None:
        return None
    named = meta.get("teacher")
    then = meta["config"]["objective"].get("teacher") if named else None
    path = path_of_named(named, then, directory)
    if named and not path.is_dir():
        raise InputError(
            f"{KEY}: {path}, the teacher of this run, is not there; if it was moved: "
            f"llmnorm train {config.run_dir} {KEY}=NEW"
        )
    source = open_source(path, key=KEY, rank=parallel.rank, world=parallel.world)
    found = NamedTeacher(source.origin.absolute(), source.contents())
    if named and found.hash != named["hash"]:
        raise InputError(
            f"{KEY}: {found.path}: holds other weights than the teacher of this run: the hash of "
            f"its files is {found.hash}, and that of {named['path']} was {named['hash']}; bring "
            "that teacher back, or start another run"
        )
    _refuse_other_tokens(config, objective, source, path)
    model = _on_meta(config, source)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if parallel.device.type == "cpu":  # a GPU refuses by itself
        refuse_what_cannot_fit(weights, f"{KEY}: the weights")
    fill_and_shard(
        model, lambda modules: source.read_into(named_weights(modules)), parallel.device, None
    )
    objective.learn_from(Teacher(model, parallel.autocast))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    parallel.say(f"learns from {found.path}: {numbers / 1e6:.2f}M parameters on each process")
    return found


def outline_of_teacher(config: RunConfig) -> LlmNormForCausalLM | None:
    """The teacher on the meta device, as a run stores it; None where there is none.

    Raises:
        InputError: its weights are not there, or do not fit their configuration.
    """
    directory = config.objective.teacher_directory
    return None if directory is None else _on_meta(config, open_source(directory, key=KEY))


def _on_meta(config: RunConfig, source: Source) -> LlmNormForCausalLM:
    model = empty_of(source, "meta").requires_grad_(False)
    if config.training.precision == "bf16":
        narrow(model)
    return model


def _refuse_other_tokens(
    config: RunConfig, objective: Objective, source: Source, path: Path
) -> None:
    """Compare the teacher's tokens, and the rows of its head, with the run's.

    Raises:
        InputError: they are not the same.
    """
    if source.tokenizer is None:
        raise InputError(f"{KEY}: {path}: has no tokenizer (no tokenizer.json)")
    data = objective.data
    own = TextEncoder(data.tokenizer_directory).spellings
    theirs = TextEncoder(source.tokenizer, KEY).spellings
    if own != theirs:
        differing = len(dict(own.items() ^ theirs.items()))
        raise InputError(
            f"{KEY}: {path}: has another tokenizer: {differing} tokens are not the run's; add "
            f"tokenizer.path={source.tokenizer}"
        )
    rows = config.model.vocab_size
    rows = data.vocab_size if rows == "auto" else max(rows, data.vocab_size)
    if rows != source.config.vocab_size:
        raise InputError(
            f"{KEY}: {path}: has {source.config.vocab_size} rows in its head, the run's model "
            f"{rows}; add model.vocab_size={source.config.vocab_size}"
        )
