"""Weights of classes of transformers as a `Source`: of a stock directory, and of a run.

A run's checkpoints name its tensors as the model does, so nothing is converted there; the
configuration in its manifest says which class it is of.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmnorm.checkpoints.format import checksum
from llmnorm.config.pretrained import Pretrained
from llmnorm.exchange.foreign_class import ForeignClass, foreign_class
from llmnorm.exchange.foreign_weights import ForeignWeights
from llmnorm.exchange.source import Source, hash_of
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import skeleton
from llmnorm.models.frozen import kept_wide
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def skeleton_of(
    kind: "type[PreTrainedModel]",
    config: "PreTrainedConfig",
    *,
    where: str,
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """A model of a class of transformers: parameters on the meta device, buffers with values.

    Args:
        config: of the class; it is copied.
        where: how a message begins.
        dtype: of the parameters; some stay in float32 where the class wants it.

    Raises:
        InputError: the class cannot be made of this configuration.
    """
    try:
        model = skeleton(kind, config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    wide = kept_wide(model, dtype)
    for name, parameter in model.named_parameters():
        if not wide(name):
            parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    return model


def of_directory(found: Pretrained, key: str | None, *, trust_remote_code: bool) -> Source:
    """The weights of a stock directory.

    Args:
        found: of another class than ours.
        key: what named it, for messages.
        trust_remote_code: as in `foreign_class`.

    Raises:
        InputError: transformers has no causal language model for it, or its weights do not fit.
    """
    path = found.path
    config, kind, quantization = foreign_class(path, key, trust_remote_code=trust_remote_code)
    config.eos_token_id = found.config.get("eos_token_id")
    skeleton = skeleton_of(kind, config, where=str(path / "config.json"))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    weights = ForeignWeights(path, skeleton, quantization, dtype)
    return Source(
        config,
        weights.tensors,
        weights.read_into,
        found.tokenizer,
        first_token=None,
        run=None,
        meta={},
        origin=path,
        contents=lambda: hash_of({file.name: checksum(file) for file in weights.files}),
        kind=kind,
    )


def class_of_run(meta: Mapping[str, Any], where: str) -> ForeignClass:
    """The class and configuration of a checkpoint of a run.

    Args:
        meta: of the checkpoint.
        where: its manifest, for messages.

    Raises:
        InputError: this transformers does not have the class; or its code lies in a directory that
            is gone.
    """
    # Mamba's time_step_limit is infinite, which is a mapping in JSON.
    values = transformers.PreTrainedConfig._decode_special_floats(dict(meta["model"]))
    settings = meta["config"]["model"]
    if settings.get("trust_remote_code"):
        base = Path(settings["pretrained"])
        if not base.is_dir():
            raise InputError(f"{where}: the code of its model lies in {base}, which is not there")
        found = foreign_class(base, where, trust_remote_code=True)
        return found._replace(config=type(found.config).from_dict(values), quantization=None)
    name = values["model_type"]
    kind = None
    if name in CONFIG_MAPPING:
        config = CONFIG_MAPPING[name].from_dict(values)
        kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
        if kind is None:  # a text model that only its image-text model's type leads to
            named = getattr(transformers, (config.architectures or [""])[0], None)
            kind = named if getattr(named, "config_class", None) is type(config) else None
    if kind is None:
        raise InputError(
            f"{where}: meta.model: transformers {transformers.__version__} has no causal language "
            f"model '{name}'"
        )
    return ForeignClass(config, kind, None)


def loaded(source: Source, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of the class itself, with its weights, in evaluation mode."""
    assert source.kind is not None
    model = skeleton_of(source.kind, source.config, where=str(source.origin), dtype=dtype)
    made: dict[int, nn.Parameter] = {}  # of parameters that are tied: one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device)
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(empty))
    model.to(device)  # buffers
    source.read_into(named_weights(model))
    return model.eval()
