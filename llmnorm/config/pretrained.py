"""What a directory of weights holds: the run it belongs to, the model's settings, the tokenizer.

Five kinds of directory hold weights: a run (its newest whole checkpoint), one checkpoint of a run
(RUN/checkpoints/step_N), a model of our class that `llmnorm export` or `save_pretrained` wrote, a
stock Llama, Mistral, Qwen2 or Qwen3, and any other model of transformers. The last is "foreign":
it stays a model of transformers' class, as do runs that train it. Only JSON is read here, so that a
mistake is answered before torch is loaded.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, field_validator

from llmnorm.config.foreign import brought
from llmnorm.config.manifest import (
    MANIFEST,
    Damaged,
    directory_of,
    meta_of_run,
    read_manifest,
    steps_in,
)
from llmnorm.config.modules import refuse_unimported
from llmnorm.config.stock import DoesNotFit, Tokens, all_tokens, from_stock
from llmnorm.machine import reading
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import Imports, InputError, Settings, explain, nearest, one_line

# What may be set beside `model.pretrained`: it does not change what the loaded weights compute.
FREE = ("dropout", "embedding_dropout", "export_as", "max_position_embeddings")


class Pretrained(NamedTuple):
    """What is known of a directory of weights.

    Attributes:
        path: the directory.
        run: the run directory that it is or belongs to; None for exported and stock directories.
        checkpoint: which checkpoint of the run: "latest" or a step's number.
        config: `LlmNormConfig`'s keys, token ids and the like included; `eos_token_id` holds the
            end tokens of generation_config.json too.
        tokenizer: the directory that holds tokenizer.json, None where there is none.
        foreign: the model is of a class of transformers, and `config` has that class's keys.
    """

    path: Path
    run: Path | None
    checkpoint: str
    config: dict[str, Any]
    tokenizer: Path | None
    foreign: bool = False

    @property
    def architectures(self) -> list[str] | None:
        """The model class, in Hugging Face's key; None: the causal language model."""
        return self.config.get("architectures")

    @property
    def model(self) -> dict[str, Any]:
        """The keys of `config` that are `ModelSettings`'."""
        if self.foreign:
            return brought(self.config)
        return {k: v for k, v in self.config.items() if k in ModelSettings.model_fields}

    def admits(self, key: str, value: Any) -> bool:
        """Whether the weights compute the same with the model setting `key: value`."""
        if self.foreign:
            return key == "dropout" or self.model.get(key) == value
        own = _settings(self.model)
        scaled = own.rope_parameters.rope_type in ("dynamic", "longrope")  # by the longest context
        if key in FREE and not (key == "max_position_embeddings" and scaled):
            return True
        try:
            other = _settings(self.model | {key: value})
        except ValidationError:
            return False
        return bool(getattr(own, key) == getattr(other, key))


class Bookkeeping(Settings):
    """Hugging Face's keys of our config.json that are read beside the model's settings."""

    model_config = ConfigDict(extra="ignore")

    architectures: Annotated[list[str], Field(min_length=1)] | None = None
    """The model class."""
    dtype: str | None = None
    """The weights' dtype."""
    torch_dtype: str | None = None
    """The same, in older files."""
    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    pad_token_id: Tokens = None
    num_labels: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None

    @field_validator("dtype", "torch_dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value.removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"'{value}' is no dtype of weights; {nearest(value, _DTYPES)}")
        return value


class _Generation(Settings):
    """The key of generation_config.json that is read."""

    model_config = ConfigDict(extra="ignore")

    eos_token_id: Tokens = None


_DTYPES = ["float32", "bfloat16", "float16", "float64", "auto"]


def describe(
    path: Path, key: str, imports: Collection[str] | None = None, *, classes: str | None = None
) -> Pretrained:
    """Find out which kind of directory `path` is and what it holds.

    Args:
        key: the setting or command that the path was given to, for messages (`model.pretrained`).
        imports: for `model.pretrained`, the modules that the configuration names under `imports`;
            None for a command, which imports the parts of a run's own config.yaml.
        classes: the run's `model.classes`; None: a model of a class of transformers is refused.

    Raises:
        InputError: it holds no weights that can be loaded; the message says what it lacks.
    """
    if not path.is_dir():
        raise InputError(f"{key}: there is no directory {path}")
    cure = "add --import {module}" if imports is None else "add `imports: [{module}]`"
    if step := re.fullmatch(r"step_(\d+)", path.name):
        if not (path / MANIFEST).is_file():
            raise InputError(f"{key}: {path} has no {MANIFEST}, so it is no checkpoint")
        run = path.parent.parent
        found = Pretrained(path, run, str(int(step[1])), _of_checkpoint(path, key), _tokenizer(run))
        file = path / MANIFEST
    elif (path / "config.yaml").is_file():
        run = path
        found = Pretrained(path, path, "latest", _of_newest(path, key), _tokenizer(path))
        file = path / "config.yaml"
    else:
        return _exported(path, key, cure, imports or (), classes)
    if found.config.get("model_type") not in (None, "llmnorm"):
        if classes in (None, "own"):
            raise InputError(f"{key}: {path} {_foreign_run(found.config)}")
        return found._replace(foreign=True)
    if classes == "transformers":
        raise InputError(f"{key}: {path} {_ALREADY_OWN}")
    if imports is not None or not (run / "config.yaml").is_file():
        refuse_unimported(found.model, f"{key}: {file}", cure, imports or ())
    return found


_ALREADY_OWN = "is of llmnorm's own class, not of one of transformers; leave model.classes out"


def _foreign_run(config: dict[str, Any]) -> str:
    """Why a run of a class of transformers cannot be had as one of ours."""
    name = (config.get("architectures") or [config["model_type"]])[0]
    return f"is of transformers' class {name}, not of llmnorm's own"


def _exported(
    path: Path, key: str, cure: str, imports: Collection[str], classes: str | None
) -> Pretrained:
    """What an exported or a stock directory holds."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(
            f"{key}: {path} has neither config.yaml (a run) nor config.json (an exported model)"
        )
    where = f"{key}: {file}"
    config = reading.read_object(file, key)
    ends: list[Tokens] = [config.get("eos_token_id")]
    foreign = False
    if config.get("model_type") == "llmnorm":
        if classes == "transformers":
            raise InputError(f"{key}: {path} {_ALREADY_OWN}")
        reading.checked(config, Bookkeeping, where)
    elif classes == "transformers":
        foreign = True
    else:
        try:
            config = from_stock(config, where)
        except DoesNotFit as error:
            if classes == "own":
                raise InputError(
                    f"{error}; model.classes=transformers trains it as the class that "
                    "transformers has for it"
                ) from None
            if classes is None:
                raise
            foreign = True
    generation = path / "generation_config.json"
    if generation.exists():
        values = reading.read_object(generation, key)
        reading.checked(values, _Generation, f"{key}: {generation}")
        ends.append(values.get("eos_token_id"))
    # What the stock class takes for the end token by default counts only where no file names one.
    if (named := all_tokens(*ends)) is not None:
        config = config | {"eos_token_id": named}
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    found = Pretrained(path, None, "latest", config, tokenizer, foreign)
    if foreign:
        return found
    refuse_unimported(found.model, where, cure, imports)
    _check_model(found.model, where)
    return found


def refuse_encoder(architectures: list[str] | None, who: str, what: str) -> None:
    """Raise an InputError unless `architectures` names a causal language model.

    Args:
        architectures: of a configuration; None: a causal language model.
        who: how the message begins: the option or command, and the path.
        what: what needs a causal language model, as the message's subject and verb
            ("text is continued by").
    """
    if architectures and "ForCausalLM" not in architectures[0]:
        raise InputError(
            f"{who} is of class {architectures[0]}; {what} a causal language model, which predicts "
            "the next token from those before it"
        )


def is_stock(path: Path) -> bool:
    """Whether `path` holds a model of another class than ours, of any architecture."""
    file = path / "config.json"
    if not file.is_file() or (path / "config.yaml").is_file():
        return False
    try:
        return reading.read_object(file).get("model_type") not in (None, "llmnorm")
    except InputError:
        return False


def _of_newest(run: Path, key: str) -> dict[str, Any]:
    """The model's configuration in the newest manifest that is whole; all hold the same one.

    Whoever loads the weights goes by the same rule, compares the files too, and says what was
    passed over (`checkpoints/store.py`).
    """
    directory, faults = run / "checkpoints", []
    for step in reversed(steps_in(directory)):
        path = directory / directory_of(step)
        try:
            manifest = read_manifest(path)
        except Damaged as fault:
            faults.append(str(fault))
        else:
            return _model_of(path, manifest, key)
    if faults:
        raise InputError(f"{key}: {'; '.join(faults)}; no checkpoint is whole")
    raise InputError(f"{key}: {run} has no checkpoint yet; `llmnorm train {run}` makes one")


def _of_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """The model's configuration in a checkpoint's manifest; files are compared on loading."""
    try:
        return _model_of(path, read_manifest(path), key)
    except Damaged as fault:
        raise InputError(f"{key}: {fault}") from None


def _model_of(path: Path, manifest: dict[str, Any], key: str) -> dict[str, Any]:
    config: dict[str, Any] = meta_of_run(path, manifest)["model"]
    if config.get("model_type") not in (None, "llmnorm"):
        return config
    where = f"{key}: {path / MANIFEST}: meta.model"
    reading.checked(config, Bookkeeping, where)
    _check_model({k: v for k, v in config.items() if k in ModelSettings.model_fields}, where)
    return config


def _settings(model: dict[str, Any]) -> ModelSettings:
    """The settings, without importing what they name."""
    return ModelSettings.model_validate(model, context={"imports": Imports.OPAQUE})


def _check_model(model: dict[str, Any], where: str) -> None:
    try:
        _settings(model)
    except ValidationError as error:
        raise InputError(f"{where}: {one_line(explain(error, ModelSettings)[:3])}") from None


def _tokenizer(run: Path) -> Path | None:
    return run / "tokenizer" if (run / "tokenizer" / "tokenizer.json").is_file() else None
