"""How the stream's variance would grow if the weights were random numbers of the same size.

For independent weights, uniform causal attention and pre-norm blocks (derivation as in Sun et al.
2025, arXiv 2502.05795, section 3 and appendix A.3, with the attention's average written out):

    V_{l+1} = V_l + (w sv2 so2) d s_a^2 (rho_l + (1 - rho_l) h)
                  + (m sd2) (d su2 s_m^2) E[act(z)^2],  z ~ N(0, d sg2 s_m^2)

with d = hidden size, w = heads * head_dim, m = the MLP's inner width; sv2, so2, sg2, su2, sd2 =
mean squares of the entries of v, o, gate, up, down; s_a, s_m = rms of the effective gains of the
two norms; rho_l = mean cosine of two tokens of a document; h = mean of 1/t over the tokens'
positions t, counted from 1. An MLP without a gate has (m sd2) E[act(z)^2], z ~ N(0, d su2 s_m^2).

A model at initialisation follows it (within 20 %: tests/analysis/depth/test_measure.py), linearly
for Pre-LN and logarithmically with LayerNorm Scaling. How far a trained model is from it shows what
training has changed.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import Block, Branch
from llmnorm.analysis.depth.gains import effective_gain
from llmnorm.nn.mixers.contract import Mixer
from llmnorm.nn.mixers.softmax import SoftmaxAttention
from llmnorm.nn.mlp import GELU, SwiGLU
from llmnorm.part import InputError


def predicted_variance(
    blocks: list[Block],
    hidden_size: int,
    *,
    first: float,
    token_cosine: Sequence[float],
    harmonic: float,
) -> list[float]:
    """V_0, ..., V_L by the law.

    Args:
        blocks: the model's blocks.
        hidden_size: d.
        first: V_0.
        token_cosine: rho of x_0, ..., x_L.
        harmonic: h.

    Raises:
        InputError: the law does not hold for such blocks; the message gives the reason.
    """
    variances = [first]
    for block, rho in zip(blocks, token_cosine, strict=False):
        if len(block.branches) != 2:
            raise InputError("its blocks do not have two branches")
        mixer, mlp = block.branches["mixer"], block.branches["mlp"]
        if isinstance(mixer.module, Mixer) and not isinstance(mixer.module, SoftmaxAttention):
            raise InputError(f"{type(mixer.module).__name__} is not softmax attention")
        values = hidden_size * _gain(mixer, hidden_size) ** 2
        spread = rho + (1 - rho) * harmonic
        v, o = _weight(mixer.module, "v_proj"), _weight(mixer.module, "o_proj")
        added = o.shape[-1] * _mean_square(o) * values * _mean_square(v) * spread
        inputs = hidden_size * _gain(mlp, hidden_size) ** 2
        variances.append(variances[-1] + added + _mlp(mlp.module, inputs))
    return variances


def _gain(branch: Branch, hidden_size: int) -> float:
    """The rms of the effective gain of the norm in front of a branch."""
    if branch.norm is None or branch.added is not branch.module or branch.carry != 1:
        raise InputError("its blocks do not have the form x + f(norm(x))")
    return float(effective_gain(branch.norm, hidden_size, 1.0).square().mean().sqrt())


def _mlp(mlp: nn.Module, inputs: float) -> float:
    """The variance that the MLP adds; `inputs` = d times the mean square of its normed input."""
    up, down = _weight(mlp, "up_proj"), _weight(mlp, "down_proj")
    activation = _activation(mlp)
    inner = inputs * _mean_square(up)
    if hasattr(mlp, "gate_proj"):
        gate = inputs * _mean_square(_weight(mlp, "gate_proj"))
        inner *= second_moment(activation, gate)
    else:
        inner = second_moment(activation, inner)
    return down.shape[-1] * _mean_square(down) * inner


def second_moment(activation: Callable[[Tensor], Tensor], variance: float) -> float:
    """E[activation(z)^2] for z ~ N(0, variance)."""
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(activation(z * variance**0.5).square() * density, z))


def _activation(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(mlp, SwiGLU):
        return F.silu
    if isinstance(mlp, GELU):
        return F.gelu
    activation = getattr(mlp, "act_fn", None)  # Hugging Face's name
    if activation is None:
        raise InputError(f"{type(mlp).__name__} has no act_fn")
    return activation


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(getattr(module, name, None), "weight", None)
    if not isinstance(weight, Tensor):
        raise InputError(f"{type(module).__name__} has no {name}")
    return weight


def _mean_square(weight: Tensor) -> float:
    return float(weight.detach().double().square().mean())
