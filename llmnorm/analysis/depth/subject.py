"""A model to look at, wherever it lies: ours, or any decoder that transformers loads.

Runs, checkpoints and exported directories go through exchange/loading.py. A stock directory is
loaded as its own class, whatever the architecture, from its safetensors files alone and with
attention computed eagerly, so that its weights can be seen.
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
        path: what the user named.
        run: the run that it belongs to.
        step: of a run: of which step the weights are.
        ema: whether they are the moving average.
        trained_on: identity of the run's data.
        tokenizer: a tokenizer directory.
        longest: positions that it can read.
        load: gives the model in float32, in evaluation mode.
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
        """What it is called on the page."""
        where = self.path if self.run is None else self.run
        step = "" if self.step is None else f", step {self.step}"
        return f"{where.resolve().name}{step}{', moving average' if self.ema else ''}"


def open_subject(path: Path, *, checkpoint: str, ema: bool) -> Subject:
    """Look for a model at `path`.

    Args:
        checkpoint: of a run: `latest`, `best` or a step.
        ema: of a run: the moving average of the weights.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if is_stock(path):
        if checkpoint != "latest" or ema:
            option = "--ema" if ema else "--checkpoint"
            raise InputError(f"{option}: {path} is no run; it holds one set of weights")
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
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of any kind: json's, huggingface_hub's, transformers' own
        raise InputError(f"{path}: {_reason(error)}") from None
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Subject(
        path,
        None,
        None,
        False,
        None,
        tokenizer,
        # Some architectures read any length and say nothing of it.
        longest if isinstance(longest, int) else 2**31,
        lambda: _load(path, config),
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
            output_loading_info=True,
        )
    except Exception as error:  # of any kind: safetensors', transformers' own
        raise InputError(f"{path}: {_reason(error)}") from None
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{path}: holds no tensor '{missing[0]}'{more}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
