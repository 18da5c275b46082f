"""Figures of a model's mixers on one micro-batch: what `logging.health_every` writes down.

    health(model, inputs, parallel)     -> {"0": {"entropy": 0.93, ...}, "1": {...}}

Layers are counted from 0, and left out where a mixer has no figures (nn/mixers/health.py says what
they mean). Every process looks at a micro-batch of its own; what they find becomes one number.

What would surprise: it is a forward pass of its own, without gradients and dropout. Blocks that are
compiled run as they are written, so that nothing is compiled for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.nn.mixers.contract import Mixer
from llmnorm.parallel.processes import Parallel


@torch.no_grad()
def health(
    model: nn.Module, inputs: Mapping[str, Any], parallel: Parallel
) -> dict[str, dict[str, float]]:
    """The figures; all processes call it together.

    Args:
        model: its mode is as before afterwards.
        inputs: the model's arguments, labels among them, on this process's device.
    """
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
    """What the processes found as one number."""
    if name.startswith("min_"):
        return float(values.amin())
    return float(values.amax() if name.startswith("max_") else values.mean())
