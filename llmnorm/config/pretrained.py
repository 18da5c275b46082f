"""What a directory of weights holds: the run it belongs to, the model's settings, the tokenizer.

Four kinds of directory hold weights: a run (its newest whole checkpoint), one checkpoint of a run
(RUN/checkpoints/step_N), a model of our class that `llmnorm export` or `save_pretrained` wrote, and
a stock Llama, Mistral, Qwen2 or Qwen3. Only JSON is read here, so that a mistake is answered before
torch is loaded.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from llmnorm.config.stock import from_stock
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError

# What may be set beside `model.pretrained`: it does not change what the loaded weights compute.
FREE = ("dropout", "embedding_dropout", "export_as", "max_position_embeddings")


class Pretrained(NamedTuple):
    """What is known of a directory of weights.

    Attributes:
        path: the directory.
        run: the run directory that it is or belongs to; None for exported and stock directories.
        checkpoint: which checkpoint of the run: "latest" or a step's number.
        config: `LlmNormConfig`'s keys, token ids and the like included.
        tokenizer: the directory that holds tokenizer.json, None where there is none.
    """

    path: Path
    run: Path | None
    checkpoint: str
    config: dict[str, Any]
    tokenizer: Path | None

    @property
    def architectures(self) -> list[str] | None:
        """The model class, in Hugging Face's key; None: the causal language model."""
        return self.config.get("architectures")

    @property
    def model(self) -> dict[str, Any]:
        """The keys of `config` that are `ModelSettings`'."""
        return {k: v for k, v in self.config.items() if k in ModelSettings.model_fields}

    def admits(self, key: str, value: Any) -> bool:
        """Whether the weights compute the same with the model setting `key: value`."""
        own = ModelSettings.model_validate(self.model)
        scaled = own.rope_parameters.rope_type in ("dynamic", "longrope")  # by the longest context
        if key in FREE and not (key == "max_position_embeddings" and scaled):
            return True
        try:
            other = ModelSettings.model_validate(self.model | {key: value})
        except ValidationError:
            return False
        return bool(getattr(own, key) == getattr(other, key))


def describe(path: Path, key: str) -> Pretrained:
    """Find out which kind of directory `path` is and what it holds.

    Args:
        key: the setting or command that the path was given to, for messages (`model.pretrained`).

    Raises:
        InputError: it holds no weights that can be loaded; the message says what it lacks.
    """
    if not path.is_dir():
        raise InputError(f"{key}: there is no directory {path}")
    if step := re.fullmatch(r"step_(\d+)", path.name):
        if not (path / "MANIFEST.json").is_file():
            raise InputError(f"{key}: {path} has no MANIFEST.json, so it is no checkpoint")
        run = path.parent.parent
        return Pretrained(path, run, str(int(step[1])), _model_of(path, key), _tokenizer(run))
    if (path / "config.yaml").is_file():
        manifests = sorted(path.glob("checkpoints/step_*/MANIFEST.json"), reverse=True)
        if not manifests:
            raise InputError(
                f"{key}: {path} has no checkpoint yet; `llmnorm train {path}` makes one"
            )
        config = _model_of_newest([file.parent for file in manifests], key)
        return Pretrained(path, path, "latest", config, _tokenizer(path))
    file = path / "config.json"
    if not file.is_file():
        raise InputError(
            f"{key}: {path} has neither config.yaml (a run) nor config.json (an exported model)"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError):
        raise InputError(f"{key}: {file} is no JSON mapping") from None
    if config.get("model_type") != "llmnorm":
        config = from_stock(config, f"{key}: {file}")
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    return Pretrained(path, None, "latest", config, tokenizer)


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
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") not in (None, "llmnorm")


def _model_of_newest(checkpoints: list[Path], key: str) -> dict[str, Any]:
    """The model's configuration in the first manifest that can be read; all hold the same one."""
    for checkpoint in checkpoints[:-1]:
        with suppress(InputError):  # loading passes a damaged checkpoint over, too, and says so
            return _model_of(checkpoint, key)
    return _model_of(checkpoints[-1], key)


def _model_of(checkpoint: Path, key: str) -> dict[str, Any]:
    """The model's configuration in a checkpoint's manifest; checksums are compared on loading."""
    file = checkpoint / "MANIFEST.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["meta"]["model"])
    except (OSError, ValueError):
        raise InputError(f"{key}: {file} is damaged (it is no manifest)") from None
    except (KeyError, TypeError):
        raise InputError(f"{key}: {file} does not hold the model's configuration") from None


def _tokenizer(run: Path) -> Path | None:
    return run / "tokenizer" if (run / "tokenizer" / "tokenizer.json").is_file() else None
