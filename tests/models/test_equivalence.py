"""Conversions between norms: the same logits in float64, or the reason why not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmnorm.config.stock import to_stock
from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.convert import named_weights
from llmnorm.models.equivalence import (
    Weights,
    centre_gpt2,
    convert,
    depth_factors,
)
from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.norms.identity import Identity
from llmnorm.part import InputError

SHAPE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
BIASES: dict[str, Any] = {
    "mixer": {"name": "softmax", "attention_bias": True},
    "mlp": {"name": "gelu", "bias": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, gelu": BIASES,
    "lns": {"depth_scaling": "lns"},
    "qk-norm, grouped": {"mixer": {"qk_norm": True}, "num_key_value_heads": 1},
}
each = pytest.mark.parametrize("variant", VARIANTS)
IDS = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(0))


def build(*, final_offset: bool = False, **keys: Any) -> LlmNormForCausalLM:
    """A float64 model with random gains, offsets and biases."""
    model = build_model(LlmNormConfig(**(SHAPE | keys)), seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(draws * 0.3)
    final: Any = model.model.norm
    if getattr(final, "bias", None) is not None and not final_offset:
        final.bias.data.zero_()
    return model


def weights_of(model: LlmNormForCausalLM) -> Weights:
    return Weights(model.config.settings(), named_weights(model))


def model_of(weights: Weights) -> LlmNormForCausalLM:
    model = LlmNormForCausalLM(LlmNormConfig.from_settings(weights.settings)).double().eval()
    own = named_weights(model)
    assert own.keys() == weights.tensors.keys()
    for name, tensor in own.items():
        tensor.copy_(weights.tensors[name])
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    assert found.std() > 0.1  # a difference could show
    return found


@each
def test_pre_ln_to_rms_to_crms_and_back(variant: str) -> None:
    """Oracle: the logits of the Pre-LN model, 1e-12 in float64, at every stage."""
    model = build(norm="layer", **VARIANTS[variant])
    expected = logits(model)
    weights = weights_of(model)
    for target, width in (
        *(("centred", 16), ("rms", 16), ("crms", 15), ("rms", 16)),
        *(("layer", 16), ("crms", 15), ("layer", 16)),
    ):
        weights = convert(weights, target)
        assert weights.settings.hidden_size == width
        converted = model_of(weights)
        norms = {type(m).__name__.lower() for m in converted.model.modules() if isinstance(m, Norm)}
        name = {"centred": "layernorm"}.get(target, f"{target}norm")
        assert norms - {"rmsnorm"} <= {name} and name in norms
        torch.testing.assert_close(logits(converted), expected, rtol=0, atol=1e-12)


@each
def test_an_offset_of_the_final_norm_stays_in_the_norms(variant: str) -> None:
    """Oracle: the Pre-LN logits; as CRMSNorm, which has no offset, it is refused."""
    model = build(norm="layer", final_offset=True, **VARIANTS[variant])
    weights = convert(weights_of(model), "rms")
    assert weights.settings.norm.bias  # type: ignore[union-attr]
    torch.testing.assert_close(logits(model_of(weights)), logits(model), rtol=0, atol=1e-12)
    back = convert(weights, "layer")
    torch.testing.assert_close(logits(model_of(back)), logits(model), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="--to crms: the final norm has an offset"):
        convert(weights, "crms")


def test_gradients_are_the_same() -> None:
    """Oracle: the input gradient of the Pre-LN model, whose rows have no mean, on zero-mean inputs;
    1e-12."""
    model = build(norm="layer")
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)).requires_grad_()
    found = []
    for one in (model, model_of(convert(weights_of(model), "rms"))):
        upstream = torch.randn(2, 7, 37, generator=torch.Generator().manual_seed(2)).double()
        (gradient,) = torch.autograd.grad(one(inputs_embeds=x).logits, x, upstream)
        found.append(gradient - gradient.mean(-1, keepdim=True))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_a_tied_head_is_kept_where_it_may_be_and_refused_where_not() -> None:
    """Oracle: logits of the tied Pre-LN model."""
    model = build(norm={"name": "layer", "bias": False}, tie_word_embeddings=True)
    with pytest.raises(InputError, match="--to rms|--to centred: the tied head .*--untie"):
        convert(weights_of(model), "rms")
    expected = logits(model)
    for target in ("centred", "rms", "crms"):
        converted = convert(weights_of(model), target, untie=True)
        assert not converted.settings.tie_word_embeddings
        torch.testing.assert_close(logits(model_of(converted)), expected, rtol=0, atol=1e-12)
    model.model.norm.weight.data.fill_(1.7)
    expected, converted = logits(model), convert(weights_of(model), "rms")
    assert converted.settings.tie_word_embeddings and "lm_head.weight" not in converted.tensors
    torch.testing.assert_close(logits(model_of(converted)), expected, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="--to crms: the head reads what .*--untie"):
        convert(weights_of(model), "crms")


@pytest.mark.parametrize(
    ("keys", "target", "words"),
    [
        ({}, "crms", "gives the residual stream a mean, which RMS norm sees"),
        ({}, "layer", "'model.embed_tokens.weight' gives the residual stream a mean"),
        ({}, "rms", "the norm is 'rms', not layer or crms"),
        ({}, "centred", "'rms' sees the mean"),
        ({"norm": "dyt"}, "crms", "the norm is 'dyt'"),
        ({"norm": "layer", "placement": "post"}, "rms", "not pre-norm"),
        ({"norm": "layer", "placement": "peri"}, "rms", "not pre-norm"),
        ({"norm": "layer"}, "identity", "'layer' has statistics of the token"),
        ({"norm": "power"}, "identity", "'power' has statistics of the token"),
        ({"depth_scaling": "lns"}, "lns", "model.depth_scaling is 'lns' already"),
        ({}, "unscaled", "model.depth_scaling is 'none' already"),
        ({"norm": "crms", "depth_scaling": "lns"}, "unscaled", "'crms' has no gain"),
    ],
)
def test_where_the_algebra_does_not_hold(keys: dict[str, Any], target: str, words: str) -> None:
    """Oracle: one line with the reason."""
    with pytest.raises(InputError, match=words) as error:
        convert(weights_of(build(**keys)), target)
    assert str(error.value).startswith(f"--to {target}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("norm", ["rms", "layer", "dyt"])
def test_depth_scaling_into_the_gains_and_out_again(norm: str) -> None:
    """Oracle: the logits of the scaled model; its own gains after the way back."""
    model = build(norm=norm, depth_scaling="lns")
    folded = convert(weights_of(model), "unscaled")
    assert folded.settings.depth_scaling == "none"
    torch.testing.assert_close(logits(model_of(folded)), logits(model), rtol=0, atol=1e-12)
    back = convert(folded, "lns")
    for name, tensor in back.tensors.items():
        torch.testing.assert_close(tensor, weights_of(model).tensors[name], rtol=1e-15, atol=0)
    factors = depth_factors(model.config.settings())
    assert factors["model.layers.2.input_layernorm.weight"] == 3**-0.5
    assert not any(name.startswith(("model.norm", "model.layers.0.")) for name in factors)


def test_a_folded_model_may_lose_blocks() -> None:
    """Oracle: the scaled model with the same block taken out, its scales kept."""
    model = build(depth_scaling="lns")
    folded = model_of(convert(weights_of(model), "unscaled"))
    for one in (model, folded):
        del one.model.layers[1]
    torch.testing.assert_close(logits(folded), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["plain", "biases, gelu", "lns"])
def test_unified_folds_away(variant: str, tied: bool) -> None:
    """Oracle: the trained model's logits in evaluation; no norm is left, none runs."""
    norm = {"name": "unified", "allow_leak": True, "warmup": 2}
    model = build(final_offset=True, norm=norm, tie_word_embeddings=tied, **VARIANTS[variant])
    model.train()
    for _ in range(4):
        model(IDS, labels=IDS).loss.backward()
    expected = logits(model.eval())
    if tied:
        with pytest.raises(InputError, match="--to identity: the head takes in"):
            convert(weights_of(model), "identity")
    folded = model_of(convert(weights_of(model), "identity", untie=tied))
    torch.testing.assert_close(logits(folded), expected, rtol=0, atol=1e-12)
    norms = [m for m in folded.modules() if isinstance(m, Norm)]
    assert norms and all(isinstance(m, Identity) for m in norms)
    with torch.profiler.profile() as profile, torch.no_grad():
        folded(IDS)
    names = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in names or "aten::linear" in names
    assert not [n for n in names if "norm" in n or "rsqrt" in n or "var" in n]


def test_a_centred_gpt2_is_the_same_and_its_norms_are_rms_norms() -> None:
    """Oracle: transformers' GPT2LMHeadModel in float64, learned positions and biases included; with
    RMS norm written over its layer norm, the same again."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    expected = logits(model)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config.tie_word_embeddings = False
    for prefix in ("", "transformer."):
        cut = {k.removeprefix("" if prefix else "transformer."): v for k, v in tensors.items()}
        got = centre_gpt2(cut)
        centred = GPT2LMHeadModel(config).double().eval()
        names = {
            k if k == "lm_head.weight" or prefix else f"transformer.{k}": v for k, v in got.items()
        }
        centred.load_state_dict(names)
        torch.testing.assert_close(logits(centred), expected, rtol=0, atol=1e-12)
    for norm in [m for m in centred.modules() if isinstance(m, torch.nn.LayerNorm)]:
        norm.forward = lambda x, n=norm: (  # type: ignore[method-assign, misc]
            torch.nn.functional.rms_norm(x, n.weight.shape, n.weight, n.eps) + n.bias
        )
    torch.testing.assert_close(logits(centred), expected, rtol=0, atol=1e-12)


def test_pre_ln_with_biases_becomes_a_stock_llama() -> None:
    """Oracle: LlamaForCausalLM with attention_bias and mlp_bias; 1e-5 in float32."""
    model = build(norm="layer", mixer={"name": "softmax", "attention_bias": True})
    weights = convert(weights_of(model), "rms")
    architecture, keys = to_stock(weights.settings)
    assert architecture == "LlamaForCausalLM" and keys["attention_bias"] and keys["mlp_bias"]
    llama = LlamaForCausalLM(LlamaConfig(**keys)).eval()
    llama.load_state_dict({k: v.float() for k, v in weights.tensors.items()})
    torch.testing.assert_close(logits(llama).double(), logits(model), rtol=0, atol=1e-5)
