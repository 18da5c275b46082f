"""The validation rows that `llmnorm eval` and `llmnorm inspect` read.

A run has rows of its own. For a directory without a run (an exported model), `--data` names the
corpus, and the model's own tokenizer makes the rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.data.packed import PackedData
from llmnorm.data.settings import TokenizerSettings, TrainedOn
from llmnorm.objectives.contract import Objective
from llmnorm.objectives.settings import CausalLMSettings, ObjectiveSettings
from llmnorm.objectives.settings import Objective as ObjectivePart
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError, Settings, part_classes

# The sections of the configuration that these commands read, so that overrides have an effect.
SECTIONS = ("data", "evaluation", "training", "parallel")


def configuration(
    command: str,
    path: Path,
    run: Path | None,
    data: Path | None,
    overrides: Sequence[str],
    *,
    otherwise: str = "",
) -> RunConfig:
    """The configuration whose rows are read.

    Args:
        command: the command's name, for messages.
        path: what the user has named, for messages.
        run: the run that the weights belong to, if there is one.
        data: a configuration or run that is read instead (`--data`).
        overrides: `key=value` for either.
        otherwise: what the user could give instead of `--data`, for the message.

    Raises:
        InputError: there is neither `run` nor `data`, or an override would have no effect.
    """
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in SECTIONS:
            raise InputError(
                f"command line: '{override}' would change nothing here; {command} reads the "
                f"sections {', '.join(SECTIONS)}"
            )
    where = data or run
    if where is not None:
        return load(where, overrides).config
    if overrides:
        raise InputError(
            f"{command}: {path} is no run; settings such as '{overrides[0]}' need --data"
        )
    raise InputError(
        f"{command}: {path} is no run; name the text by --data CONFIG_OR_RUN{otherwise}"
    )


def validation_objective(
    path: Path,
    config: RunConfig,
    parallel: Parallel,
    *,
    data: Path | None,
    architecture: str,
    longest: int,
    tokenizer: Path | None,
    trained_on: str | None,
) -> Objective:
    """The objective to evaluate, on the run's own rows or on those of `data`.

    Args:
        path: what the user has named, for messages.
        config: from `configuration`.
        parallel: this process.
        data: the configuration or run that `config` was read from, if it is not the run's own.
        architecture: the name of the model's class.
        longest: how many positions the model has.
        tokenizer: the model's tokenizer directory.
        trained_on: identity of the data that the run was trained on.

    Raises:
        InputError: the rows are longer than the model's positions; there is no tokenizer; `data` is
            of another objective than the model; or the run's configuration now gives other data
            than it was trained on.
    """
    if config.data.context_length > longest:
        raise InputError(
            f"data.context_length: {config.data.context_length} is more than the model's {longest} "
            f"positions; add data.context_length={longest}"
        )
    command = f"llmnorm data {path}"
    if data is not None:
        if tokenizer is None:
            raise InputError(f"{path}: has no tokenizer (no tokenizer.json)")
        template = config.tokenizer.model_dump(include={"chat_template", "template_arguments"})
        own: dict[str, Settings] = {"tokenizer": TokenizerSettings(path=tokenizer, **template)}
        if config.objective.architecture != architecture:
            own["objective"] = _default_objective(architecture, data)
        config = config.model_copy(update=own)
        command = f"llmnorm data {data} tokenizer.path={tokenizer}"
    own_data = None
    if data is None and trained_on:
        own_data = TrainedOn(path, trained_on, otherwise="name it by --data")
    objective = config.objective.build(
        config, alone=parallel.world == 1, command=command, trained_on=own_data
    )
    found = objective.data
    if data is None and trained_on != found.identity:
        raise InputError(
            f"{path}: was trained on the data {trained_on}, its configuration now gives "
            f"{found.identity} ({found.directory}); restore the corpus, or name it by --data"
        )
    return objective


def validation_data(
    path: Path,
    config: RunConfig,
    parallel: Parallel,
    *,
    data: Path | None,
    longest: int,
    tokenizer: Path | None,
    trained_on: str | None,
) -> PackedData:
    """The packed text for a causal language model; arguments as in `validation_objective`.

    Raises:
        InputError: as there; or the rows are no packed text.
    """
    objective = validation_objective(
        path,
        config,
        parallel,
        data=data,
        architecture=CausalLMSettings.architecture,
        longest=longest,
        tokenizer=tokenizer,
        trained_on=trained_on,
    )
    if not isinstance(objective.data, PackedData):
        raise InputError(
            f"{data or path}: trains on conversations, and packed text is needed here; name some "
            "by --data CONFIG"
        )
    return objective.data


def _default_objective(architecture: str, data: Path) -> ObjectiveSettings:
    """The objective that trains a model class, with its default settings.

    Raises:
        InputError: there is none, or it has settings without a default.
    """
    for cls in part_classes(get_args(ObjectivePart)[0]).values():
        if issubclass(cls, ObjectiveSettings) and cls.architecture == architecture:
            try:
                return cls()
            except ValidationError:
                break
    raise InputError(f"--data: {data} has another objective than the model, {architecture}")
