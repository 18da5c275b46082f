"""Whose validation rows a command reads (`llmnorm eval`, `llmnorm inspect`).

A run has its rows. A directory without a run is told by `--data` which corpus to use, and its own
tokenizer makes the rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.data.packed import PackedData
from llmnorm.data.settings import TokenizerSettings
from llmnorm.objectives.contract import Objective
from llmnorm.objectives.settings import CausalLMSettings, ObjectiveSettings
from llmnorm.objectives.settings import Objective as ObjectivePart
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError, Settings, part_classes

SECTIONS = ("data", "evaluation", "training", "parallel")  # that settings may be given of


def configuration(
    command: str,
    path: Path,
    run: Path | None,
    data: Path | None,
    overrides: Sequence[str],
    *,
    otherwise: str = "",
) -> RunConfig:
    """Whose rows are read, and how.

    Args:
        command: its name, for messages.
        path: what the user named.
        run: the run that the weights belong to.
        data: the configuration or run that is read instead.
        overrides: of the settings of either.
        otherwise: what the user could give instead of `--data`, for the message.

    Raises:
        InputError: there is neither run nor `data`, or a setting would change nothing.
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
    """What is measured on which rows: a run's own, or the text of `data` in the model's tokens.

    Args:
        path: what the user named, for messages.
        config: from `configuration`.
        parallel: this process.
        data: the configuration or run that `config` was read from, if it is not the run's own.
        architecture: the model's class.
        longest: the model's positions.
        tokenizer: the model's tokenizer directory.
        trained_on: identity of the data that the run was trained on.

    Raises:
        InputError: the rows are longer than the model's positions, there is no tokenizer, the model
            is of another objective, or the run was trained on other data than its configuration now
            gives.
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
        own: dict[str, Settings] = {"tokenizer": TokenizerSettings(path=tokenizer)}
        if config.objective.architecture != architecture:
            own["objective"] = _usual(architecture, data)
        config = config.model_copy(update=own)
        command = f"llmnorm data {data} tokenizer.path={tokenizer}"
    objective = config.objective.build(config, alone=parallel.world == 1, command=command)
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
    """The rows of a causal language model; arguments as `validation_objective`'s."""
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
    assert isinstance(objective.data, PackedData)
    return objective.data


def _usual(architecture: str, data: Path) -> ObjectiveSettings:
    """The objective of a model class with its defaults, where it needs nothing else."""
    for cls in part_classes(get_args(ObjectivePart)[0]).values():
        if issubclass(cls, ObjectiveSettings) and cls.architecture == architecture:
            try:
                return cls()
            except ValidationError:
                break
    raise InputError(f"--data: {data} has another objective than the model, {architecture}")
