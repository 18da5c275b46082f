"""Which layers are stored in 4 bits, against transformers' own choice and against hand counts."""

from importlib.util import find_spec
from typing import Any

import pytest
from torch import nn
from transformers import BitsAndBytesConfig

from llmnorm.models.foreign import skeleton
from llmnorm.models.four_bit_layers import share_left_out, skipped_by_name, stored_in_four_bits
from tests.families import class_of, configuration

# Stacks, a router that is a linear layer (wg), transposed layers, layers with a state.
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gpt2": {},
    "mamba2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},  # layers outside of the blocks
}


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra quant")
@pytest.mark.parametrize("family", MORE)
def test_they_are_those_that_transformers_stores_when_told_what_to_skip(family: str) -> None:
    """Oracle: the layers that transformers replaces in a model without numbers."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from llmnorm.models.nf4 import bitsandbytes

    bitsandbytes()
    config = configuration(family, **MORE[family])
    model = skeleton(class_of(config), config)
    stored = stored_in_four_bits(model)
    skipped = skipped_by_name(model, stored)
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    replaced = replace_with_bnb_linear(model, skipped, settings)
    theirs = [n for n, m in replaced.named_modules() if type(m).__name__ == "Linear4bit"]
    assert stored == theirs
    assert "lm_head" in skipped and ("wg" in skipped) == (family == "hunyuan_v1_moe")


def test_the_share_left_out_is_that_of_the_shape() -> None:
    """Oracle: a count by hand of two layers of four experts, in 96 rows of 32."""
    config = configuration("qwen3_moe")
    model = skeleton(class_of(config), config)
    stored = stored_in_four_bits(model)
    assert {name.rpartition(".")[2] for name in stored} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    experts = 2 * 4 * 3 * 24 * 32
    rest = 2 * 96 * 32 + 2 * 4 * 32 + 5 * 32 + 4 * 8
    total = attention + experts + rest
    assert share_left_out(model, stored) == (
        f"model.quantize: 0.01M of {total / 1e6:.2f}M numbers are stored in NF4; "
        f"{1 - attention / total:.0%} stay as they are, {experts / total:.0%} in stacks of experts"
    )


def test_a_shared_weight_and_a_class_with_a_pass_of_its_own_are_left_out() -> None:
    """Oracle: a Llama whose two layers have one v_proj, and whose down_proj is of another class."""

    class Other(nn.Linear):
        pass

    config = configuration("llama")
    model = skeleton(class_of(config), config)
    first, second = (model.get_submodule(f"model.layers.{n}.self_attn") for n in (0, 1))
    second.v_proj.weight = first.v_proj.weight
    model.get_submodule("model.layers.1.mlp.down_proj").__class__ = Other
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert left - {*stored_in_four_bits(model)} == {
        "lm_head",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    }
