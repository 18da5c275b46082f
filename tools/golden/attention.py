"""Rotary positions and softmax attention, whole, packed and step by step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tools.golden.vectors import FLOATS, Result, Vectors, leaf, relative, serves


@serves("rope/*")
def rope(vectors: Vectors) -> Iterator[Result]:
    """Tables, rotated queries and keys, gradients of one kind of scaling."""
    from llmnorm.nn.mixers.rotary import Rotary, rotate
    from llmnorm.nn.settings import RopeParameters

    p = vectors.hyperparameters
    rotary = Rotary(
        RopeParameters(**p["rope_parameters"]), p["head_dim"], p["max_position_embeddings"]
    )
    limits = {"float64": "float64", "float32": "float32_vs_these_values"}
    for precision, dtype in FLOATS.items():
        cos, sin = rotary(vectors["in/position_ids"], dtype)
        worst = 0.0
        for key, table in (("mid/cos", cos), ("mid/sin", sin)):
            worst = max(worst, relative(torch.cat((table, table), -1).squeeze(2), vectors[key]))
        for name, suffix in (("q", ""), ("k", "_k")):
            x = leaf(vectors[f"in/{name}"].transpose(1, 2), dtype)
            out = rotate(x, cos, sin)
            out.backward(vectors[f"grad_out{suffix}"].to(dtype).transpose(1, 2))
            assert x.grad is not None
            worst = max(worst, relative(out.transpose(1, 2), vectors[f"out{suffix}"]))
            worst = max(worst, relative(x.grad.transpose(1, 2), vectors[f"grad_in/{name}"]))
        yield Result(precision, worst, vectors.tolerance[limits[precision]])


@serves("attention/gqa_rope")
def attention(vectors: Vectors) -> Iterator[Result]:
    """Output, weights, gradients, packed documents, and one token at a time through the cache."""
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.rotary import Rotary
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    shape = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    settings = ModelSettings.model_validate(
        {key: p[key] for key in shape}
        | {"rope_parameters": p["rope_parameters"]}
        | {"mixer": {"name": "softmax", "attention_bias": p["attention_bias"]}}
    )
    rotary = Rotary(settings.rope_parameters, settings.head_dim, settings.max_position_embeddings)
    limits = {"float64": "float64", "float32": "float32_vs_these_values"}
    for precision, dtype in FLOATS.items():
        mixer = settings.mixers()[0].build(settings, 0).to(dtype)
        mixer.load_state_dict(vectors.below("state"))
        x = leaf(vectors["x"], dtype)
        context = Context(*rotary(vectors["mid/position_ids"], dtype))
        parameters = mixer.prepare(x, context)
        out = mixer(x, context)
        out.backward(vectors["grad_out"].to(dtype))
        pairs = [
            (out, vectors["out"]),
            (x.grad, vectors["grad_x"]),
            (mixer.materialize(parameters, context), vectors["M"]),
            (parameters.k.transpose(1, 2), vectors["mid/k_rope"]),
            (mixer.mix(parameters, context).flatten(2), vectors["mid/y_mixed"]),
        ]
        grads = vectors.below("grad")
        pairs += [(weight.grad, grads[name]) for name, weight in mixer.named_parameters()]
        with torch.no_grad():
            pairs.append((_packed(vectors, mixer, rotary, dtype), vectors["packed/out"]))
            pairs += _stepwise(vectors, mixer, rotary, dtype)
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[limits[precision]])


def _packed(vectors: Vectors, mixer: nn.Module, rotary: Any, dtype: torch.dtype) -> Tensor:
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.visibility import packed

    lengths = tuple(vectors["packed/cu_seqlens"].diff().tolist())
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    cos, sin = rotary(positions, dtype)
    context = Context(cos, sin, packed(lengths, 1, positions.device))
    return mixer(vectors["packed/x"].to(dtype), context)


def _stepwise(
    vectors: Vectors, mixer: nn.Module, rotary: Any, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Outputs and cache after feeding the first tokens of x one by one."""
    from llmnorm.nn.cache import KeyValues, RaggedCache
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.visibility import Cached

    cache, x = RaggedCache(1), vectors["x"].to(dtype)
    steps = len(vectors["step/out"])
    outs = []
    for step in range(steps):
        places = cache.places(len(x), 1, x.device)
        positions = places.index + vectors.hyperparameters["position_offset"]
        cos, sin = rotary(positions, dtype)
        context = Context(cos, sin, Cached(places, places.mask()))
        outs.append(mixer(x[:, step : step + 1], context, cache.layers[0]).squeeze(1))
    layer = cache.layers[0]
    assert isinstance(layer, KeyValues)
    assert layer.keys is not None and layer.values is not None
    return [
        (torch.stack(outs), vectors["step/out"]),
        (layer.keys[:, :, :steps], vectors["step/k_cache"]),
        (layer.values[:, :, :steps], vectors["step/v_cache"]),
    ]
