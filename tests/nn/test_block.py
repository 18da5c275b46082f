"""Every placement: its rule written out, gradients, depth scaling, initial weights, the law of
variance growth."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model, empty_model
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.norms.depth_scaling import depth_scale
from llmnorm.part import InputError

SHAPE: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.4,
}
N = SHAPE["num_hidden_layers"]
Branch = Callable[[Tensor], Tensor]


def deep(x: Tensor, f: Branch, n: Any) -> Tensor:
    return n[0]((2 * N) ** 0.25 * x + f(x))


# The rule of a branch f with its norms n, and the names of the norms around mixer and MLP.
PRE = (lambda x, f, n: x + f(n[0](x)), [["input"], ["post_attention"]])
POST = (lambda x, f, n: n[0](x + f(x)), [["post_attention"], ["post_feedforward"]])
SANDWICH = (
    lambda x, f, n: x + n[1](f(n[0](x))),
    [["input", "post_attention"], ["pre_feedforward", "post_feedforward"]],
)
RULES: dict[str, Any] = {
    "pre": lambda layer: PRE,
    "post": lambda layer: POST,
    "deepnorm": lambda layer: (deep, POST[1]),
    "sandwich": lambda layer: SANDWICH,
    "peri": lambda layer: SANDWICH,
    "reordered": lambda layer: (lambda x, f, n: x + n[0](f(x)), POST[1]),
    "mix": lambda layer: POST if layer < 1 else PRE,
}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"placement": name} for name in RULES},
    "mix": {"placement": {"name": "mix", "post": 0.4}},
    "pre, lns": {"depth_scaling": "lns"},
    "pre, lns, layer": {"depth_scaling": "lns", "norm": "layer"},
    "pre, lns, crms": {"depth_scaling": "lns", "norm": "crms"},
    "post, dyt": {"placement": "post", "norm": "dyt"},
    "pre, qk-norm": {"mixer": {"name": "softmax", "qk_norm": True}},
}
each = pytest.mark.parametrize("name", MODELS)


def build(name: str, **keys: Any) -> Any:
    """A float64 model with random gains and offsets."""
    config = LlmNormConfig(**(SHAPE | MODELS[name] | keys))
    model = build_model(config, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(draws * 0.3)
    return model.model


@each
def test_the_blocks_follow_the_rule(name: str) -> None:
    """Oracle: the table at the top of block.py on the block's own mixer, MLP and norms, whose
    scale is set to one and written out; the final norm is not scaled."""
    model = build(name)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = model(inputs_embeds=x).last_hidden_state
    context = Context(*model.rotary(torch.arange(5).unsqueeze(0), x.dtype))
    for layer, block in enumerate(model.layers):
        rule, names = RULES[name.split(",")[0]](layer)
        branches = (partial(block.self_attn, context=context), block.mlp)
        for f, around in zip(branches, names, strict=True):
            norms = [copy.deepcopy(getattr(block, f"{norm}_layernorm")) for norm in around]
            for norm in norms:
                norm.scale = 1.0
            if "lns" in name:
                plain = norms[0]
                norms = [lambda y, plain=plain, layer=layer: plain(y) / math.sqrt(layer + 1)]
            x = rule(x, f, norms)
    torch.testing.assert_close(model.norm(x), expected, rtol=0, atol=1e-12)
    assert model.norm.scale == 1.0 if hasattr(model.norm, "scale") else True


@each
def test_gradcheck(name: str) -> None:
    """Oracle: finite differences, of the input and of every norm's gain."""
    model = build(name, num_hidden_layers=2)
    x = torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True)
    gains = {key: value for key, value in model.named_parameters() if "norm" in key}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(gains, values, strict=True))
        return torch.func.functional_call(model, weights, (), {"inputs_embeds": x})[0]

    assert torch.autograd.gradcheck(run, (x, *gains.values()))


@each
def test_cached_tokens_are_the_whole_rows(name: str) -> None:
    """Oracle: the logits of the whole row at once; 1e-12."""
    config = LlmNormConfig(**(SHAPE | MODELS[name]))
    model = build_model(config, seed=0).double().eval()
    ids = torch.randint(0, 31, (2, 6))
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    got = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-12)


def test_scales_survive_the_meta_device() -> None:
    """Oracle: 1, 0.7071, 0.5774 of the layers; the logits of a model that never was on it."""
    config = LlmNormConfig(**(SHAPE | MODELS["pre, lns"]))
    model = empty_model(config, device="cpu")
    plain = LlmNormForCausalLM(config)
    model.load_state_dict(plain.state_dict())
    scales = [block.input_layernorm.scale for block in model.model.layers]
    assert scales == [depth_scale(layer) for layer in range(N)] == [1.0, 2**-0.5, 3**-0.5]
    ids = torch.randint(0, 31, (1, 9))
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    assert not any("scale" in key for key in plain.state_dict())


@pytest.mark.parametrize("removed", [0, 1])
def test_a_norm_keeps_its_layer_when_blocks_before_it_are_removed(removed: int) -> None:
    """Oracle: the model whose removed block adds nothing; renumbering would move the others."""
    model = build("pre, lns")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    bypassed = copy.deepcopy(model)
    for linear in (
        bypassed.layers[removed].self_attn.o_proj,
        bypassed.layers[removed].mlp.down_proj,
    ):
        linear.weight.data.zero_()
    expected = bypassed(inputs_embeds=x).last_hidden_state
    del model.layers[removed]
    got = model(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_qk_norm_cancels_the_scale_of_the_logits() -> None:
    """Oracle: attention weights with and without depth scaling, equal with QK-norm alone."""
    for qk_norm in (True, False):
        weights = []
        for scaling in ("none", "lns"):
            mixer = {"name": "softmax", "qk_norm": qk_norm, "qk_norm_eps": 0}
            model = build("pre", mixer=mixer, depth_scaling=scaling)
            x = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2)).double()
            context = Context(*model.rotary(torch.arange(5).unsqueeze(0), x.dtype))
            block = model.layers[2]
            prepared = block.self_attn.prepare(block.input_layernorm(x), context)
            weights.append(block.self_attn.materialize(prepared, context))
        assert torch.allclose(*weights, rtol=0, atol=1e-12) == qk_norm


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"depth_scaling": "lns", "placement": "post"}, "depth_scaling 'lns' is defined for plac"),
        ({"depth_scaling": "lns", "placement": "mix"}, "not for 'mix'"),
        ({"initialization": "scaled", "placement": "deepnorm"}, "initial weights of its own"),
        ({"placement": "prae"}, "no part is called 'prae'; did you mean 'pre'"),
        ({"norm": "unified"}, "later tokens .* unless norm.allow_leak=true"),
        ({"norm": {"name": "power", "warmup": 2}}, "norm.warmup: .* norm.allow_leak=true"),
        ({"norm": {"name": "power", "groups": 5}}, "norm.groups 5 does not divide hidden_size 12"),
        ({"norm": {"cast_mode": "llama", "bias": True}}, "cast_mode 'llama' has no offset"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], words: str) -> None:
    """Oracle: one line that names the key."""
    with pytest.raises(InputError, match=words):
        LlmNormConfig(**(SHAPE | keys))


def test_depth_scaling_with_scaled_weights_is_said() -> None:
    """Oracle: the note, for the two together only."""
    both = {"depth_scaling": "lns", "initialization": "scaled"}
    (note,) = LlmNormConfig(**(SHAPE | both)).settings().notes()
    assert "model.depth_scaling 'lns' and model.initialization 'scaled'" in note
    for one in both.items():
        assert LlmNormConfig(**(SHAPE | dict([one]))).settings().notes() == []


# Initial weights.


def std_of(model: LlmNormForCausalLM, ending: str) -> float:
    found = [p.flatten() for key, p in model.named_parameters() if key.endswith(ending)]
    return float(torch.cat(found).detach().std())


def test_scaled_and_deepnorm_initial_weights() -> None:
    """Oracle: 0.05 / sqrt(2 N); Xavier's sqrt(2 / (in + out)), (8 N)^-1/4 of it for values."""
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.05}
    scaled = build_model(LlmNormConfig(**shape, initialization="scaled"), seed=0)
    for ending in ("o_proj.weight", "down_proj.weight"):
        assert std_of(scaled, ending) == pytest.approx(0.05 / 8**0.5, rel=0.03)
    for ending in ("q_proj.weight", "v_proj.weight", "up_proj.weight", "lm_head.weight"):
        assert std_of(scaled, ending) == pytest.approx(0.05, rel=0.03)
    deep = build_model(LlmNormConfig(**shape, placement="deepnorm"), seed=0)
    attention, mlp, beta = (2 / 128) ** 0.5, (2 / 224) ** 0.5, 32**-0.25
    for ending in ("q_proj.weight", "k_proj.weight"):
        assert std_of(deep, ending) == pytest.approx(attention, rel=0.03)
    for ending in ("v_proj.weight", "o_proj.weight"):
        assert std_of(deep, ending) == pytest.approx(attention * beta, rel=0.03)
    for ending in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        assert std_of(deep, ending) == pytest.approx(mlp * beta, rel=0.03)
    assert std_of(deep, "lm_head.weight") == pytest.approx(0.05, rel=0.03)


# The law of spec T7: how the residual stream's variance grows over the layers at initialisation.

DEEP: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 64,
    "num_attention_heads": 4,
    "initializer_range": 0.0693,
    "embedding_std": 0.0693,
}
LENGTH = 64


def silu_square(std: float) -> float:
    """E[silu(z)^2] for z normal with this standard deviation, by quadrature."""
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float((F.silu(z * std).square() * density).sum() * (z[1] - z[0]))


def cosine(x: Tensor) -> float:
    """The mean cosine of two different tokens of a row."""
    unit = F.normalize(x - x.mean(-1, keepdim=True), dim=-1)
    total = unit.sum(1).square().sum(-1).mean() - LENGTH
    return float(total / (LENGTH * (LENGTH - 1)))


@pytest.mark.parametrize("scaling", ["none", "lns"])
def test_the_variance_grows_by_the_law(scaling: str) -> None:
    """Oracle: V' = V + (d s2)^2 s^2 [rho + (1 - rho) H / T] + ff s2 (d s2 s^2) E[silu^2], within
    20 % at every layer: linear growth for pre-norm, logarithmic with depth scaling."""
    model = build_model(LlmNormConfig(**DEEP, depth_scaling=scaling), seed=3).model
    streams: list[Tensor] = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].double()))
    with torch.no_grad():
        ids = torch.randint(0, 2048, (8, LENGTH), generator=torch.Generator().manual_seed(0))
        model.layers[-1].register_forward_hook(lambda *call: streams.append(call[-1].double()))
        model(ids)
    measured = [float(x.var(-1, correction=0).mean()) for x in streams]
    gain = 64 * 0.0693**2
    harmonic = sum(1 / t for t in range(1, LENGTH + 1)) / LENGTH
    law = measured[0]
    for layer in range(64):
        square = depth_scale(layer) ** 2 if scaling == "lns" else 1.0
        rho = cosine(streams[layer])
        law += gain**2 * square * (rho + (1 - rho) * harmonic)
        law += 172 * 0.0693**2 * gain * square * silu_square((gain * square) ** 0.5)
        assert measured[layer + 1] == pytest.approx(law, rel=0.2), layer + 1
    growth = measured[64] / measured[8], measured[16] / measured[8]
    assert growth[0] > 7 if scaling == "none" else growth[0] < 3
