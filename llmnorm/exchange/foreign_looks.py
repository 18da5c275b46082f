"""`llmnorm doctor DIR`: how a directory of transformers would be trained, by running it."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from llmnorm.config.pretrained import describe
from llmnorm.exchange.loading import open_source
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import empty_foreign
from llmnorm.models.looks import look
from llmnorm.models.router_loss import coefficient
from llmnorm.parallel.shards import fill_and_shard


def report(path: Path) -> str:
    """What the looks find in a stock directory, whole on one device, in float32.

    Args:
        path: holds a model of transformers.

    Raises:
        InputError: it holds none that can be trained; the message says why.
    """
    foreign = describe(path, str(path), (), classes="auto").foreign
    source = open_source(path, classes="transformers")
    assert source.kind is not None
    model = empty_foreign(source.kind, source.config)
    model.router_loss = coefficient("auto", model)

    def fill(modules: Mapping[str, nn.Module]) -> None:
        source.read_into(named_weights(modules))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fill_and_shard(model, fill, device, None)
    found = look(model, autocast=nullcontext, recomputes=False)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    recomputed = "yes" if model.supports_gradient_checkpointing else "no"
    own = (
        "transformers' own class"
        if foreign
        else "llmnorm's own class; this is how transformers' (model.classes=transformers) would be"
    )
    return (
        f"{path}: {source.kind.__name__}, {numbers / 1e6:.2f}M parameters in {len(model.units())} "
        f"blocks\n{found.table()}\n"
        f"  blocks can be recomputed (parallel.activation_checkpointing): {recomputed}\n"
        f"  model.classes=auto trains it as {own}"
    )
