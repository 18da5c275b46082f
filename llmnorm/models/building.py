"""A model of a configuration: its class, and its first parameters."""

import torch

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.encoders import LlmNormForMaskedLM, LlmNormForSequenceClassification
from llmnorm.models.initialization import initialize
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.models.pretrained_model import LlmNormPreTrainedModel
from llmnorm.part import InputError, nearest

CLASSES: tuple[type[LlmNormPreTrainedModel], ...] = (
    LlmNormForCausalLM,
    LlmNormForMaskedLM,
    LlmNormForSequenceClassification,
)


def class_of(config: LlmNormConfig) -> type[LlmNormPreTrainedModel]:
    """The model class that `config.architectures` names; the causal language model's if none.

    Raises:
        InputError: it names another one.
    """
    known = {cls.__name__: cls for cls in CLASSES}
    name = (config.architectures or [*known])[0]
    if name not in known:
        raise InputError(f"model configuration: architectures: '{name}'; {nearest(name, [*known])}")
    return known[name]


def build_model(
    config: LlmNormConfig, *, seed: int, device: torch.device | str = "cpu"
) -> LlmNormForCausalLM:
    """A freshly initialised float32 model on `device`, the same numbers on any device.

    Its class is `class_of(config)`; the type named here is the usual one's.
    """
    model = empty_model(config, device=device)
    initialize(model, seed=seed)
    return model


def empty_model(
    config: LlmNormConfig, *, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> LlmNormForCausalLM:
    """A model whose parameters are allocated and hold nothing yet."""
    with torch.device("meta"):
        model: LlmNormForCausalLM = class_of(config)(config).to(dtype)
    model.to_empty(device=torch.device(device))
    model.tie_weights()  # to_empty gave a tied head a tensor of its own
    return model
