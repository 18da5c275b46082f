"""Linear layers that hold several projections: found by what their class does with the output."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmnorm.models.foreign import empty_foreign
from llmnorm.models.fused import fused_rows
from tests.families import class_of, configuration, tiny

HEADS = (32, 16, 16)  # rows of q, k and v: 4 and 2 heads of 8
# The layer, the rows of its projections, and the module whose output they make; GPT-2 and MPT have
# as many key as query heads.
CUT: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    "phi3": {
        "model.layers.0.self_attn.qkv_proj": (HEADS, "model.layers.0.self_attn"),
        "model.layers.0.mlp.gate_up_proj": ((48, 48), "model.layers.0.mlp"),
    },
    "glm4": {"model.layers.0.mlp.gate_up_proj": ((48, 48), "model.layers.0.mlp")},
    "gpt2": {"transformer.h.0.attn.c_attn": ((32, 32, 32), "transformer.h.0.attn")},
    "mpt": {"transformer.blocks.0.attn.Wqkv": ((32, 32, 32), "transformer.blocks.0.attn")},
}
# q, k and v of a head stand next to each other.
ALTERNATING = {
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention"),
    "bloom": ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention"),
}


def found(family: str, **other: object) -> dict[str, tuple[int, ...]]:
    """What the look finds in a tiny model on the meta device."""
    config = configuration(family, **other)
    return fused_rows(empty_foreign(class_of(config), config))


@pytest.mark.parametrize("family", CUT)
def test_projections_are_cut_where_the_class_cuts_them(family: str) -> None:
    """Oracle: the heads and the inner size of the configuration, in both layers; no other layer."""
    expected = {name: rows for name, (rows, _) in CUT[family].items()}
    second = {name.replace(".0.", ".1."): rows for name, rows in expected.items()}
    assert found(family) == expected | second


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "falcon_h1"])
def test_plain_projections_are_not_cut(family: str) -> None:
    """Oracle: classes with a layer for each projection; Falcon-H1 scales what its mixer cuts."""
    assert found(family) == {}


@pytest.mark.parametrize("family", ALTERNATING)
def test_what_alternates_from_head_to_head_cannot_be_told(family: str) -> None:
    """Oracle: the name of the layer, of which nothing is cut."""
    rows = found(family)
    assert rows[ALTERNATING[family][0]] == () and not any(rows.values())


def output_without(family: str, layer: str, outer: str, first: int, last: int) -> Tensor:
    """What a module gives when some outputs of a layer inside it are zero; biases are zero."""
    torch.manual_seed(0)
    model = tiny(family) if family in ("phi3", "gpt2") else made(family)
    weight, kept = model.get_submodule(layer).weight, []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        rows = weight.mT if isinstance(model.get_submodule(layer), Conv1D) else weight
        rows[first:last] = 0

        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        model.get_submodule(outer).register_forward_hook(keep)
        model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    return kept[0]


def made(family: str) -> nn.Module:
    """A tiny model of a family that tests/families.py has no settings for."""
    return AutoModelForCausalLM.from_config(configuration(family)).eval()


@pytest.mark.parametrize(
    ("family", "layer"), [(family, layer) for family, layers in CUT.items() for layer in layers]
)
def test_without_its_last_projection_a_module_gives_nothing(family: str, layer: str) -> None:
    """Oracle: attention without values, and up times 0, are 0, whatever the class calls the rows.

    The rows below the last projection leave something.
    """
    rows, outer = CUT[family][layer]
    start, every = sum(rows[:-1]), sum(rows)
    assert not output_without(family, layer, outer, start, every).any()
    assert output_without(family, layer, outer, start + rows[-1] // 2, every).any()


@pytest.mark.parametrize("family", ["gpt_neox"])
def test_without_the_last_third_of_alternating_rows_a_module_gives_something(family: str) -> None:
    """Oracle: the same measurement, of a class that was not cut."""
    layer, outer = ALTERNATING[family]
    assert output_without(family, layer, outer, 64, 96).any()


def test_a_class_that_asks_for_a_number_is_answered() -> None:
    """Oracle: Phi-3 with LongRoPE, which compares the largest position with a length."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    rows = found("phi3", rope_parameters=scaling, original_max_position_embeddings=64)
    assert rows["model.layers.1.self_attn.qkv_proj"] == HEADS


def test_what_was_seen_before_a_failure_counts_for_layers_of_the_same_kind() -> None:
    """Oracle: GPT-2 whose second block fails; without any pass the layers are suspected only."""
    config = configuration("gpt2")
    model = empty_foreign(class_of(config), config)
    layers = [f"transformer.h.{n}.attn.c_attn" for n in (0, 1)]

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no numbers")

    model.transformer.h[1].forward = fails
    assert fused_rows(model) == dict.fromkeys(layers, (32, 32, 32))
    model.transformer.h[0].forward = fails
    assert fused_rows(model) == dict.fromkeys(layers, ())


def test_the_model_is_left_as_it_was() -> None:
    """Oracle: its modules and hooks; parameters stay on the meta device, buffers keep values."""
    config = configuration("qwen3_moe")
    model = empty_foreign(class_of(config), config)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert fused_rows(model) == {}
    assert all(p.is_meta for p in model.parameters())
    assert buffers and all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
