"""A trained run as a model and its tokenizer, for the commands that read one."""

from typing import TYPE_CHECKING

import torch

from llmnorm.config import RunConfig
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormForCausalLM, build_model
from llmnorm.part import InputError
from llmnorm.training.checkpoint import Checkpoints, read_meta
from llmnorm.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_run(
    run: RunDirectory, config: RunConfig, checkpoint: str
) -> "tuple[LlmNormForCausalLM, PreTrainedTokenizerBase]":
    """The model of a checkpoint, in evaluation mode on the configured device, and the tokenizer.

    Args:
        run: the run directory.
        config: its settings.
        checkpoint: `latest`, `best` or a step.

    Raises:
        InputError: there is no such checkpoint, or the tokenizer is gone.
    """
    from transformers import AutoTokenizer

    if not run.tokenizer.is_dir():
        raise InputError(f"{run.tokenizer}: the run has no tokenizer; was it ever trained?")
    checkpoints = Checkpoints(run.checkpoints)
    if not checkpoints.steps():
        raise InputError(
            f"{run.checkpoints}: no checkpoint yet; `llmnorm train {run.path}` makes one"
        )
    if checkpoint not in ("latest", "best") and not checkpoint.isdigit():
        raise InputError(f"--checkpoint: '{checkpoint}' is neither latest, best nor a step")
    found = checkpoints.find(int(checkpoint) if checkpoint.isdigit() else checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    tokens = read_meta(found)["tokens_of_text"]
    model = build_model(LlmNormConfig.from_settings(config.model, **tokens), seed=config.seed)
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    checkpoints.load(found, weights, strict=False)
    cuda = config.training.device != "cpu" and torch.cuda.is_available()
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer
