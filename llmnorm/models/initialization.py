"""Initial weights, reproducible from one number.

Linear layers: normal with std `initializer_range`, or the std that the block sets (`initialization:
scaled`, DeepNorm), offsets zero; the embedding: normal with std `embedding_std`; any other module
with parameters of its own (norms, a part's own) by its `reset_parameters()`.

Every module has a generator of its own, seeded by (seed, module name), and numbers are drawn in
float32 on the CPU: the weights depend on nothing else, be it the global random state, the device,
the dtype, the order of modules or the number of processes.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.nn.linear import Linear
from llmnorm.part import InputError


@runtime_checkable
class HasReset(Protocol):
    """A module that says itself how its parameters begin."""

    def reset_parameters(self) -> None:
        """Set them, drawing from torch's default generator of the CPU."""


@torch.no_grad()
def initialize(
    model: PreTrainedModel, *, seed: int, modules: Mapping[str, nn.Module] | None = None
) -> None:
    """Set every parameter of `model`, or only those that belong to `modules`, in place.

    Args:
        modules: some of `model.named_modules()`.
    """
    done: set[int] = set()
    for name, module in (dict(model.named_modules()) if modules is None else modules).items():
        # transformers' mark, without which `post_init` would draw the weights again.
        module._is_hf_initialized = True  # type: ignore[assignment]
        own = [p for p in module.parameters(recurse=False) if id(p) not in done]
        if own:  # a tied head has none left
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            initialize_module(module, model.config, int.from_bytes(digest[:8], "little"))
            done.update(id(p) for p in own)


@torch.no_grad()
def initialize_module(module: nn.Module, config: LlmNormConfig, seed: int) -> None:
    """Set the parameters that belong to `module` itself."""
    if isinstance(module, nn.Linear | nn.Embedding):
        std = module.initial_std if isinstance(module, Linear) else None  # the block sets it
        if std is None:
            embedding = isinstance(module, nn.Embedding)
            std = config.embedding_std if embedding else config.initializer_range
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(module.weight.shape, generator=generator, device="cpu")
        module.weight.copy_(draws.mul_(std))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        return
    # A part's own parameters: its reset_parameters() draws from torch's default generator, and on
    # the CPU, since a GPU's gives other numbers.
    if not isinstance(module, HasReset):
        raise InputError(
            f"{type(module).__name__} has parameters but no reset_parameters() to initialise them"
        )
    own = [*module.parameters(recurse=False)]
    places = [p.data for p in own]
    for parameter in own:
        parameter.data = torch.empty_like(parameter, device="cpu")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also formats a traceback for a GPU that has not begun: 1 ms.
        torch.default_generator.manual_seed(seed % 2**63)
        module.reset_parameters()
    for parameter, place in zip(own, places, strict=True):
        parameter.data = place.copy_(parameter)
