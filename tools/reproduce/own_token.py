"""How much of what untrained mixers give out is each token itself, rather than the others."""

from typing import Any

import torch
from torch import Tensor

from llmnorm.config.tree import RunConfig
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import build_model
from llmnorm.nn.mixers.contract import Mixer


def own_share(matrix: Tensor, v: Tensor) -> float:
    """|M_ii v_i|^2 as a share of it and |sum of M_ij v_j over j != i|^2, both summed over all i.

    Shapes: matrix (batch, heads, length, length), v (batch, length, heads, value_dim).
    """
    own = matrix.diagonal(dim1=2, dim2=3).transpose(1, 2)[..., None] * v
    others = torch.einsum("bhij,bjhv->bihv", matrix, v) - own
    mine, theirs = float(own.square().sum()), float(others.square().sum())
    return mine / (mine + theirs)


@torch.no_grad()
def own_token(config: RunConfig) -> float:
    """`own_share`, mean of the layers of a run's model before training, on random tokens."""
    vocabulary = config.tokenizer.vocab_size
    settings = LlmNormConfig.from_settings(
        config.model, vocab_size=vocabulary, architectures=[config.objective.architecture]
    )
    model = build_model(settings, seed=0).eval()
    shares: list[float] = []

    def look(mixer: Mixer, given: tuple[Any, ...]) -> None:
        x, context = given[:2]
        parameters = mixer.prepare(x, context)
        matrix = mixer.materialize(parameters, context)
        v = parameters.v.repeat_interleave(matrix.shape[1] // parameters.v.shape[2], 2)
        shares.append(own_share(matrix, v))

    for module in model.modules():
        if isinstance(module, Mixer):
            module.register_forward_pre_hook(look)
    generator = torch.Generator().manual_seed(0)
    model(torch.randint(vocabulary, (4, config.data.context_length), generator=generator))
    return sum(shares) / len(shares)
