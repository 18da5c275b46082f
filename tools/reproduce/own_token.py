"""How much of an untrained mixer's output comes from the token at the same position."""

from typing import Any

import torch
from torch import Tensor

from llmnorm.config.tree import RunConfig
from llmnorm.models.building import build_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.nn.mixers.contract import Mixer


def own_share(matrix: Tensor, v: Tensor) -> float:
    """O / (O + R) with O = sum_i |M_ii v_i|^2 and R = sum_i |sum_{j != i} M_ij v_j|^2.

    Shapes: matrix (batch, heads, length, length), v (batch, length, heads, value_dim).
    """
    own = matrix.diagonal(dim1=2, dim2=3).transpose(1, 2)[..., None] * v
    others = torch.einsum("bhij,bjhv->bihv", matrix, v) - own
    own_energy, other_energy = float(own.square().sum()), float(others.square().sum())
    return own_energy / (own_energy + other_energy)


@torch.no_grad()
def own_token(config: RunConfig) -> float:
    """The mean `own_share` over the layers of a run's model before training, on random tokens."""
    vocabulary = config.tokenizer.vocab_size
    settings = LlmNormConfig.from_settings(
        config.model, vocab_size=vocabulary, architectures=[config.objective.architecture]
    )
    model = build_model(settings, seed=0).eval()
    shares: list[float] = []

    def measure(mixer: Mixer, arguments: tuple[Any, ...]) -> None:
        x, context = arguments[:2]
        parameters = mixer.prepare(x, context)
        matrix = mixer.materialize(parameters, context)
        v = parameters.v.repeat_interleave(matrix.shape[1] // parameters.v.shape[2], 2)
        shares.append(own_share(matrix, v))

    for module in model.modules():
        if isinstance(module, Mixer):
            module.register_forward_pre_hook(measure)
    generator = torch.Generator().manual_seed(0)
    model(torch.randint(vocabulary, (4, config.data.context_length), generator=generator))
    return sum(shares) / len(shares)
