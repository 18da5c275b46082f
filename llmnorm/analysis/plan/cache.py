"""The memory of a server's cache, by the arithmetic with which an engine makes or refuses one."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmnorm.config.tree import RunConfig
from llmnorm.generation.cache_memory import BESIDE, layer_bytes

GIB = 2**30
DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


def cache_bytes(config: RunConfig) -> int:
    """Bytes of the cache of a server of the run's model, as its `generation` section asks for it.

    Numbers of `auto` are float32, as a run's are. A draft is not counted.
    """
    settings = config.generation
    tokens = settings.context or config.model.max_position_embeddings
    dtype = DTYPES[settings.dtype]
    mixers, row = config.model.mixers(), 0
    kinds = {repr(mixer): mixers.index(mixer) for mixer in mixers}
    with FakeTensorMode():  # no memory is taken
        for name, layer in kinds.items():
            cache = mixers[layer].build(config.model, layer).new_cache()
            count = sum(repr(mixer) == name for mixer in mixers)
            row += count * layer_bytes(cache, tokens, 0, dtype, torch.device("cpu"))
    return (settings.slots + BESIDE) * row


def cache_line(config: RunConfig) -> str:
    """What the plan prints of it."""
    settings = config.generation
    tokens = settings.context or config.model.max_position_embeddings
    return (
        f"a server's cache: {settings.slots} slots of {tokens} tokens, "
        f"{cache_bytes(config) / GIB:.3f} GiB"
    )
