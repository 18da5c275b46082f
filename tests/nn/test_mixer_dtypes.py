"""Every mixer gives its input's dtype, with sums in float32 or float64; its class refuses what its
settings refuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormModel
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.gated_delta import GatedDeltaNet
from llmnorm.nn.mixers.hydra import Hydra
from llmnorm.nn.mixers.nala import NaLa
from llmnorm.nn.mixers.softmax import SoftmaxAttention
from llmnorm.nn.mixers.ssd import SSD
from llmnorm.nn.settings import ModelSettings
from tests.nn.test_mixers import MIXERS, every

# Relative to the largest output; products and activations are rounded to the dtype on the way.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-4,
    torch.bfloat16: 0.2,
    torch.float16: 0.03,
}


@every(MIXERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_output_has_the_inputs_dtype(mixer: dict[str, Any], dtype: torch.dtype) -> None:
    """Oracle: the dtype, and a float64 copy of the same weights on the same input; gradients have
    the dtypes of what they belong to."""
    torch.manual_seed(0)
    shape = {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    sizes = {"vocab_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 131}
    model = LlmNormModel(LlmNormConfig(**shape, **sizes, mlp="none", mixer=mixer))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.to(dtype)
    x = torch.randn(3, 70, 20).to(dtype)
    (got, gradient), (expected, _) = (_run(m, x) for m in (model, copy.deepcopy(model).double()))
    assert got.dtype == gradient.dtype == dtype
    for parameter in model.layers[0].self_attn.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype]


def _run(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mixer's own output in the model, and the gradient of the model's input."""
    outputs: list[Tensor] = []
    model.layers[0].self_attn.register_forward_hook(lambda *call: outputs.append(call[-1]))
    x = x.to(model.norm.weight.dtype, copy=True).requires_grad_()
    model(inputs_embeds=x).last_hidden_state.sum().backward()
    assert x.grad is not None
    return outputs[0].detach(), x.grad


STATE_SPACE: dict[str, Any] = {
    **{"expand": 2, "head_dim": 4, "state_size": 3, "n_groups": 1, "conv_kernel": 3},
    **{"use_conv_bias": True, "use_bias": False, "norm_eps": 1e-5, "dt_limit": None},
    **{"dt_range": (1e-3, 0.1), "dt_floor": 1e-4},
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
DELTA: dict[str, Any] = {
    **{"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 4, "value_head_dim": 4},
    **{"conv_kernel": 3, "norm_eps": 1e-6},
}


@pytest.mark.parametrize(
    ("part", "right", "wrong", "settings"),
    [
        (SSD, STATE_SPACE, {"head_dim": 3}, {"name": "ssd", "head_dim": 3}),
        (SSD, STATE_SPACE, {"n_groups": 3}, {"name": "ssd", "head_dim": 4, "n_groups": 3}),
        (Hydra, STATE_SPACE, {"head_dim": 3}, {"name": "hydra", "head_dim": 3}),
        (
            *(Hydra, STATE_SPACE, {"conv_kernel": 4}),
            {"name": "hydra", "head_dim": 4, "conv_kernel": 4},
        ),
        (
            GatedDeltaNet,
            DELTA,
            {"num_value_heads": 3},
            {"name": "gated_delta", "num_value_heads": 3},
        ),
        (NaLa, HEADS, {"tau": 0.2}, {"name": "nala", "tau": 0.2}),
        (
            *(SoftmaxAttention, HEADS, {"causal": False, "sliding_window": 3}),
            {"name": "softmax", "bidirectional": True, "sliding_window": 3},
        ),
    ],
)
def test_a_class_refuses_what_its_settings_refuse(
    part: Any, right: dict[str, Any], wrong: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Oracle: the settings, which refuse the same."""
    part(8, **right)
    with pytest.raises((ValueError, AssertionError)):
        part(8, **(right | wrong))
    with pytest.raises(ValueError):
        ModelSettings(hidden_size=8, num_attention_heads=2, mixer=settings)  # type: ignore[arg-type]


def test_a_convolution_that_looks_both_ways_has_a_middle() -> None:
    """Oracle: odd kernels are taken, even ones are refused; of a causal one both are taken."""
    ShortConvolution(4, 3, causal=False)
    ShortConvolution(4, 2)
    with pytest.raises(ValueError, match="odd kernel, got 2"):
        ShortConvolution(4, 2, causal=False)
