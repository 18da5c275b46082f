"""Opening the model that is inspected: one of ours, or any decoder that transformers loads.

Runs, checkpoints and exported directories are read by exchange/loading.py. Any other directory
("stock") is loaded by transformers as its own class, from its safetensors files alone, and with
attention computed eagerly, so that attention weights can be read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmnorm.config.pretrained import is_stock
from llmnorm.exchange.loading import model_of, open_source
from llmnorm.part import InputError


class Subject(NamedTuple):
    """A model that can be loaded.

    Attributes:
        path: the path that the user gave.
        run: the run that the model belongs to; None for exported and stock directories.
        step: the step of the weights, if they belong to a run.
        ema: whether the weights are the moving average.
        trained_on: identity of the data that the model was trained on, if it is known.
        tokenizer: a tokenizer directory; None if there is none.
        longest: the most positions that the model can read.
        load: returns the model in float32, in evaluation mode.
    """

    path: Path
    run: Path | None
    step: int | None
    ema: bool
    trained_on: str | None
    tokenizer: Path | None
    longest: int
    load: Callable[[], Any]

    @property
    def name(self) -> str:
        """The model's name on the page: `deep, step 12, moving average`."""
        where = self.path if self.run is None else self.run
        step = "" if self.step is None else f", step {self.step}"
        return f"{where.resolve().name}{step}{', moving average' if self.ema else ''}"


def open_subject(path: Path, *, checkpoint: str, ema: bool) -> Subject:
    """The model at `path`; its weights are not loaded yet.

    Args:
        path: run, checkpoint, exported or stock directory.
        checkpoint: which checkpoint of a run: `latest`, `best` or a step.
        ema: take a run's moving average of the weights.

    Raises:
        InputError: there is no model, or it is damaged.
    """
    if is_stock(path):
        if checkpoint != "latest" or ema:
            option = "--ema" if ema else "--checkpoint"
            raise InputError(
                f"{option}: {path} is not a run but a directory with one set of weights; "
                "leave the option out"
            )
        return _stock(path)
    source = open_source(path, checkpoint=checkpoint, ema=ema)
    return Subject(
        path,
        source.run.path if source.run else None,
        source.meta.get("step"),
        ema,
        source.meta.get("data"),
        source.tokenizer,
        source.config.max_position_embeddings,
        lambda: model_of(source, path)[0].float(),
    )


def _stock(path: Path) -> Subject:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # json's, huggingface_hub's or transformers' own
        raise InputError(f"{path}: {_reason(error)}") from None
    _check_size(path, config)
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Subject(
        path,
        None,
        None,
        False,
        None,
        tokenizer,
        # Architectures that read any length have no such setting.
        longest if isinstance(longest, int) else 2**31,
        lambda: _load(path, config),
    )


def _check_size(path: Path, config: Any) -> None:
    """Refuse sizes that no weights in the directory can have, before a model of them is made.

    Raises:
        InputError: its layers or its vocabulary have more numbers than the files have half bytes.
    """
    text, files = config.get_text_config(), list(path.glob("*.safetensors"))
    most = 2 * sum(file.stat().st_size for file in files if file.is_file())
    for key in ("num_hidden_layers", "vocab_size"):
        count, width = getattr(text, key, None), getattr(text, "hidden_size", None)
        if not (files and isinstance(count, int) and isinstance(width, int)):
            continue
        if count * width > most:
            raise InputError(
                f"{path / 'config.json'}: {key} is {count}, which is more than the weights have "
                f"({most // 2:,} bytes)"
            )


def _load(path: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors' or transformers' own
        raise InputError(f"{path}: {_reason(error)}") from None
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{path}: holds no tensor '{missing[0]}'{more}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device)


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "its config.json names Python code (auto_map), which is not run"
    return " ".join(str(error).split())[:300]
