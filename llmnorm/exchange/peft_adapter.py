"""A directory that PEFT or `llmnorm export` wrote, on a loaded model: the option `--adapter`."""

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.machine import reading
from llmnorm.models.adapters import peft_package
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# torch's words for a tensor of another shape, which loading a state dict meets
_OTHER_SHAPE = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def with_adapter(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """The model with PEFT's layers, in evaluation mode; `model` itself is changed.

    A model gets rows for tokens that an adapter brings with rows of their own.

    Raises:
        InputError: the directory is no adapter, or not one of this model; PEFT is not installed.
    """
    if not (adapter / "adapter_config.json").is_file():
        cure = "it is no adapter"
        if (adapter / "config.yaml").is_file():
            cure = (
                "it is a run: name it in the model's place, or give what "
                f"`llmnorm export {adapter} DIR` writes"
            )
        raise InputError(f"--adapter: {adapter} has no adapter_config.json; {cure}")
    config = reading.read_object(adapter / "adapter_config.json", "--adapter")
    weights = adapter / "adapter_model.safetensors"
    reading.open_file(weights, "--adapter").close()  # a .bin file is a pickle
    peft = peft_package()
    try:
        rows = config.get("trainable_token_indices") or []
        ids = itertools.chain(*rows.values()) if isinstance(rows, dict) else rows
        needed = max(map(int, ids), default=-1) + 1
        if needed > model.config.vocab_size:
            model.resize_token_embeddings(needed, mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # of any kind: another architecture, other shapes, a damaged file
        reason = " ".join(str(error).split())[:300]
        if shapes := _OTHER_SHAPE.search(str(error)):
            name, theirs, ours = shapes.groups()
            reason = f"{name} has shape {theirs} there and {ours} beside this model"
        raise InputError(f"--adapter: {adapter} does not fit the model: {reason}") from None
