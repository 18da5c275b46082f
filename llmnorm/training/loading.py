"""A trained run as a model and its tokenizer, for the commands that read one."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmnorm.config import RunConfig
from llmnorm.data import packing
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.part import InputError
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_run(
    path: Path, config: RunConfig, checkpoint: str
) -> "tuple[LlmNormForCausalLM, PreTrainedTokenizerBase]":
    """The model of a checkpoint in evaluation mode, on the configured device, and the tokenizer.

    Args:
        path: the run directory.
        config: its settings.
        checkpoint: `latest`, `best` or a step.

    Raises:
        InputError: no such checkpoint, or the tokenizer is gone.
    """
    from transformers import AutoTokenizer
