"""Stock Llama and Qwen weights in our class: the same logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
STOCK: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "llama, biases, head_dim, yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rope_parameters": YARN},
        {
            "mixer": {"attention_bias": True},
            "mlp": {"bias": True},
            "head_dim": 10,
            "rope_parameters": YARN,
        },
    ),
    "llama, tied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": 5},
        {"mixer": {"sliding_window": 5}},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {"mixer": {"attention_bias": "qkv"}}),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 8},
        {"mixer": {"qk_norm": True}, "head_dim": 8},
    ),
}


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, LlmNormForCausalLM]:
    config_class, model_class, theirs, ours = STOCK[name]
    torch.manual_seed(0)
    rope = {"rope_theta": 10000.0, **theirs.get("rope_parameters", {"rope_type": "default"})}
    keys = SHAPE | theirs | {"rope_parameters": rope, "rms_norm_eps": 1e-6}
    stock = model_class(config_class(**keys)).to(dtype).eval()
    for parameter in stock.parameters():
        if parameter.ndim == 1:  # gains and offsets away from 1 and 0
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model = LlmNormForCausalLM(LlmNormConfig(**(SHAPE | ours))).to(dtype).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    return stock, model


def lift_to_float64(stock: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms and rotary tables in float32 whatever the dtype; lift both."""

    def norm(self: Any, x: Tensor) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * r)

    for module in stock.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(type(module), "forward", norm)
    rotary = stock.model.rotary_emb  # type: ignore[union-attr]
    dim = stock.model.layers[0].self_attn.head_dim  # type: ignore[union-attr]
    theta = rotary.config.rope_parameters["rope_theta"]
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * frequencies
        whole = torch.cat((angles, angles), -1)
        return whole.cos(), whole.sin()

    monkeypatch.setattr(rotary, "forward", tables)


@pytest.mark.parametrize("name", [n for n in STOCK if "yarn" not in n])
def test_logits_equal_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: transformers' own class on the same weights, its float32 casts lifted."""
    stock, model = pair(name, torch.float64)
    lift_to_float64(stock, monkeypatch)
    ids = torch.randint(0, 97, (3, 29))
    with torch.no_grad():
        expected = stock(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-12)
    assert expected.std() > 0.1  # a difference could show


@pytest.mark.parametrize("name", STOCK)
def test_logits_and_loss_equal_in_float32(name: str) -> None:
    """Oracle: transformers' own class as it is; left padding and labels included."""
    stock, model = pair(name, torch.float32)
    ids = torch.randint(0, 97, (3, 29))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
        expected = stock(ids, labels=labels).loss
        torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=0, atol=1e-5)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        expected = stock(ids, attention_mask=mask).logits
        got = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_gradients_equal_in_float32() -> None:
    """Oracle: backward through transformers' Llama, every parameter."""
    stock, model = pair("llama", torch.float32)
    ids = torch.randint(0, 97, (3, 29))
    stock(ids, labels=ids).loss.backward()
    model.train()(ids, labels=ids).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_packed_rows_equal_in_float32() -> None:
    """Oracle: transformers' own packing, told by the same position_ids."""
    stock, model = pair("llama", torch.float32)
    ids = torch.randint(0, 97, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        expected = stock(ids, position_ids=positions, use_cache=False).logits
        got = model(ids, position_ids=positions).logits
        together = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - together).abs().max() > 1e-2


def test_llama_cast_mode_is_bit_equal_in_bf16() -> None:
    """Oracle: transformers' Llama in bf16, final hidden states of one token (no sum to reorder)."""
    stock, _ = pair("llama", torch.bfloat16)
    config = LlmNormConfig(**SHAPE, norm={"name": "rms", "cast_mode": "llama"})
    model = LlmNormForCausalLM(config).bfloat16().eval()
    model.load_state_dict(stock.state_dict())
    ids = torch.randint(0, 97, (5, 1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
