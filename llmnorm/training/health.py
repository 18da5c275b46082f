"""Figures of a model's mixers on one micro-batch, for `logging.health_every`.

    health(model, inputs, parallel)     -> {"0": {"entropy": 0.93, ...}, "1": {...}}

Layers are counted from 0; a layer is left out if its mixer has no figures. nn/mixers/health.py
describes the figures. Every process measures a micro-batch of its own, and the results are combined
into one number. Of a class of transformers it is the load of the experts (expert_load.py).

What would surprise: this is one more forward pass, without gradients and dropout. Compiled blocks
run uncompiled in it, so that nothing is compiled for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.models.foreign import Foreign
from llmnorm.nn.mixers.contract import Mixer
from llmnorm.parallel.processes import Parallel
from llmnorm.training.expert_load import expert_load


@torch.no_grad()
def health(
    model: nn.Module, inputs: Mapping[str, Any], parallel: Parallel
) -> Mapping[str, Mapping[str, float | list[float]]]:
    """The figures of each layer; every process must call it.

    Args:
        model: its mode is restored afterwards.
        inputs: the model's arguments, labels among them, on this process's device.
    """
    if isinstance(model, Foreign):
        return expert_load(model, inputs, parallel)
    found: list[dict[str, Tensor]] = []

    def look(mixer: Mixer, given: tuple[Any, ...]) -> None:
        x, context = given[:2]
        parameters = mixer.prepare(x, context)
        with torch.autocast(x.device.type, enabled=False):
            found.append(mixer.health(parameters, context))

    hooks = [
        mixer.register_forward_pre_hook(look)
        for mixer in model.modules()
        if isinstance(mixer, Mixer)
    ]
    was_training = model.training
    model.eval()
    try:
        with parallel.autocast(), torch.compiler.set_stance("force_eager"):
            model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    names = [(layer, name) for layer, figures in enumerate(found) for name in figures]
    if not names:
        return {}
    mine = torch.stack([found[layer][name].float() for layer, name in names])
    everyone = parallel.gather(mine).view(-1, len(names)).unbind(1)
    result: dict[str, dict[str, float]] = {}
    for (layer, name), values in zip(names, everyone, strict=True):
        result.setdefault(str(layer), {})[name] = _together(name, values)
    return result


def _together(name: str, values: Tensor) -> float:
    """The processes' values of a figure as one: the minimum, the maximum or the mean."""
    if name.startswith("min_"):
        return float(values.amin())
    return float(values.amax() if name.startswith("max_") else values.mean())
