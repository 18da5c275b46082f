"""Weights that have been found and checked, but not read yet; and those that a run names by path.

`open_source` (loading.py) makes them of any directory. A run that freezes weights, or learns from
others, names these by their path and the hash of their files.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from llmnorm.exchange.adapted import Trained
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import Stored
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Source(NamedTuple):
    """Weights that have been found and checked, but not read yet.

    Attributes:
        config: the model's configuration, of our classes or of one of transformers.
        tensors: dtype and shape of the model's tensors, by parameter name, in the model's order.
        read_into: fills the tensors that it is given, by parameter name.
        tokenizer: a tokenizer directory, None where there is none.
        first_token: the token that began every document in training; None where that is not known,
            and the tokenizer decides.
        run: the run that the weights belong to; None for exported and stock directories.
        meta: what the checkpoint holds beside tensors; empty for exported and stock directories.
        origin: the directory that the weights lie in; of a run the checkpoint.
        contents: gives a hash of their files, which it reads.
        trained: of a run that has left weights as they were, what it has trained; else None.
        kind: the class of transformers that the weights belong to; None for our classes.
    """

    config: "PreTrainedConfig"
    tensors: dict[str, Stored]
    read_into: Callable[[Mapping[str, Tensor]], None]
    tokenizer: Path | None
    first_token: int | None
    run: RunDirectory | None
    meta: dict[str, Any]
    origin: Path
    contents: Callable[[], str]
    trained: Trained | None = None
    kind: "type[PreTrainedModel] | None" = None

    @property
    def own(self) -> LlmNormConfig:
        """The configuration of a model of our classes."""
        assert isinstance(self.config, LlmNormConfig)
        return self.config

    def refuse_foreign(self, who: str) -> None:
        """Raise an InputError for a model of a class of transformers; `who` begins it."""
        if self.kind is not None:
            raise InputError(
                f"{who}: is a {self.kind.__name__} of transformers and not of llmnorm's own class, "
                "which this needs"
            )


def refuse_other_base(path: Path, found: str, meta: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise an InputError if the base at `path` is not the one that a checkpoint names.

    Args:
        found: the hash of its files.
        meta: of the checkpoint.
    """
    named = meta["base"]
    if found != named["hash"]:
        raise InputError(
            f"{path}: holds other weights than the base that {checkpoint} was trained beside: the "
            f"hash of its files is {found}, and that of {named['path']} was {named['hash']}; bring "
            "that base back"
        )


def base_path(pretrained: Path, meta: Mapping[str, Any]) -> Path:
    """Where the base of a run lies that freezes weights.

    Args:
        pretrained: the run's `model.pretrained`, which may have been changed since `meta`.
        meta: of a checkpoint of the run; empty before there is one.

    Returns:
        As `path_of_named`.
    """
    then = meta["config"]["model"].get("pretrained") if meta else None
    return path_of_named(meta.get("base"), then, pretrained)


def path_of_named(named: Mapping[str, Any] | None, then: str | None, now: Path) -> Path:
    """Where weights lie that a run reads at every start, and that its checkpoints name.

    Args:
        named: their path and hash in a checkpoint; None where it names none.
        then: the setting that gave their directory, as the checkpoint holds it.
        now: the same setting today.

    Returns:
        The path in `named`, so that weights of a run that was trained further are read at the step
        that it had; else, where that is gone or the setting was changed, `now`.
    """
    if named is None or str(now) != then:
        return now
    path = Path(named["path"])
    return path if path.is_dir() else now


def hash_of(checksums: Mapping[str, str]) -> str:
    """One hash of files, from their names and checksums."""
    text = "".join(f"{name} {checksums[name]}\n" for name in sorted(checksums))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
