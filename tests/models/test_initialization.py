"""Initial weights: a function of the seed and the names alone."""

import subprocess
import sys

import pytest
import torch

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.initialization import initialize


def config(**keys: object) -> LlmNormConfig:
    return LlmNormConfig(
        **{"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | keys
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_meta_build_is_bit_equal_to_a_cpu_build(tied: bool, norm: str) -> None:
    """Oracle: a model constructed on the CPU and initialised with the same seed."""
    keys = {"tie_word_embeddings": tied, "norm": norm, "mixer": {"attention_bias": True}}
    torch.manual_seed(123)
    plain = LlmNormForCausalLM(config(**keys))
    initialize(plain, seed=5)
    torch.manual_seed(456)
    built = build_model(config(**keys), seed=5)
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    states = plain.state_dict(), built.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    ids = torch.randint(0, 500, (2, 9))
    assert torch.equal(plain.eval()(ids).logits, built.eval()(ids).logits)


def test_global_random_state_is_neither_read_nor_moved() -> None:
    """Oracle: the generator's state before and after; equal weights from two global states."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build_model(config(), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = build_model(config(), seed=0)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_process_draws_the_same() -> None:
    """Oracle: a fresh interpreter with its own hash seed."""
    code = (
        "from llmnorm.models import LlmNormConfig\n"
        "from llmnorm.models.building import build_model\n"
        "c = LlmNormConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2,"
        " num_attention_heads=4)\n"
        "print(sum(p.double().abs().sum() for p in build_model(c, seed=3).parameters()).item())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    model = build_model(config(), seed=3)
    here = sum(p.double().abs().sum() for p in model.parameters()).item()
    assert float(out.stdout.split()[-1]) == here


def test_scales() -> None:
    """Oracle: the configuration's standard deviations; seeds differ, gains one, offsets zero."""
    model = build_model(
        config(initializer_range=0.05, embedding_std=0.5, mixer={"attention_bias": True}), seed=0
    )
    other = build_model(config(initializer_range=0.05, embedding_std=0.5), seed=1)
    draws = []
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert bool((parameter == 1).all())
        else:
            std = 0.5 if "embed" in name else 0.05
            assert abs(parameter.std() / std - 1) < 0.05, name
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
            draws.append(parameter.flatten()[0].item() / std)
    assert len(set(draws)) == len(draws)  # no two weights share their draws


def test_float64_models_hold_the_same_numbers() -> None:
    """Oracle: the float32 weights, widened."""
    wide = LlmNormForCausalLM(config()).double()
    initialize(wide, seed=9)
    for a, b in zip(wide.parameters(), build_model(config(), seed=9).parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0)


def test_rotary_tables_survive_the_meta_device() -> None:
    """Oracle: logits of a model that never was on it, with positions that matter."""
    built = build_model(config(initializer_range=0.1), seed=0).eval()
    plain = LlmNormForCausalLM(config(initializer_range=0.1)).eval()
    plain.load_state_dict(built.state_dict())
    ids = torch.randint(0, 500, (1, 9))
    assert torch.equal(built(ids).logits, plain(ids).logits)
    moved = torch.arange(9).unsqueeze(0) * 2
    assert not torch.equal(built(ids, position_ids=moved).logits, built(ids).logits)
