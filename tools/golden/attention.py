"""Rotary positions and softmax attention, whole, packed and step by step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tools.golden.vectors import Header, Result, Vectors, built, leaf, serves


@serves("rope/*")
def rope(vectors: Vectors) -> Iterator[Result]:
    """Tables, rotated queries and keys, gradients of one kind of scaling."""
    from llmnorm.nn.mixers.rotary import Rotary, rotate

    p = vectors.hyperparameters
    p.ignore("num_attention_heads", "num_key_value_heads", "positions")  # seen in the tensors
    parameters = _rope_parameters(p)
    rotary = Rotary(parameters, p["head_dim"], p["max_position_embeddings"])
    for precision, dtype, tolerance, measure in vectors.limits():
        cos, sin = rotary(vectors["in/position_ids"], dtype)
        worst = 0.0
        for key, table in (("mid/cos", cos), ("mid/sin", sin)):
            worst = max(worst, measure(torch.cat((table, table), -1).squeeze(2), vectors[key]))
        for name, suffix in (("q", ""), ("k", "_k")):
            x = leaf(vectors[f"in/{name}"].transpose(1, 2), dtype)
            out = rotate(x, cos, sin)
            out.backward(vectors[f"grad_out{suffix}"].to(dtype).transpose(1, 2))
            assert x.grad is not None
            worst = max(worst, measure(out.transpose(1, 2), vectors[f"out{suffix}"]))
            worst = max(worst, measure(x.grad.transpose(1, 2), vectors[f"grad_in/{name}"]))
        yield Result(precision, worst, tolerance)


def _rope_parameters(p: Header) -> Any:
    """Our settings of the rotary positions; the header may have keys that only we lack."""
    from llmnorm.nn.settings import RopeParameters

    given = dict(p["rope_parameters"])
    return built(RopeParameters, given, {key: f"rope_parameters.{key}" for key in given})


@serves("attention/gqa_rope")
def attention(vectors: Vectors) -> Iterator[Result]:
    """Output, weights, gradients, packed documents, and one token at a time through the cache."""
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.rotary import Rotary
    from llmnorm.nn.mixers.settings import SoftmaxSettings
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    p.ignore("attn_implementation", "position_offset")  # the positions are recorded
    mixer_keys = ("attention_bias", "sliding_window", "qk_norm", "qk_norm_eps")
    part = vectors.settings(SoftmaxSettings, {key: key for key in mixer_keys})
    shape = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {key: key for key in (*shape, "max_position_embeddings")}
    rope_parameters = _rope_parameters(p)
    settings = vectors.settings(ModelSettings, sizes, rope_parameters=rope_parameters, mixer=part)
    rotary = Rotary(settings.rope_parameters, settings.head_dim, settings.max_position_embeddings)
    for precision, dtype, tolerance, measure in vectors.limits():
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
            (parameters.k.transpose(1, 2), vectors["mid/k_rope"]),
            (mixer.mix(parameters, context).flatten(2), vectors["mid/y_mixed"]),
        ]
        if "M" in vectors.tensors:
            pairs.append((mixer.materialize(parameters, context), vectors["M"]))
        grads = vectors.below("grad")
        pairs += [(weight.grad, grads[name]) for name, weight in mixer.named_parameters()]
        with torch.no_grad():
            if "packed/x" in vectors.tensors:
                pairs.append((_packed(vectors, mixer, rotary, dtype), vectors["packed/out"]))
            if "step/out" in vectors.tensors:
                pairs += _stepwise(vectors, mixer, rotary, dtype)
        worst = max(measure(got, reference) for got, reference in pairs)
        yield Result(precision, worst, tolerance)


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
        positions = places.index + vectors.hyperparameters.get("position_offset", 0)
        cos, sin = rotary(positions, dtype)
        context = Context(cos, sin, Cached(places))
        outs.append(mixer(x[:, step : step + 1], context, cache.layers[0]).squeeze(1))
    layer = cache.layers[0]
    assert isinstance(layer, KeyValues)
    assert layer.keys is not None and layer.values is not None
    return [
        (torch.stack(outs), vectors["step/out"]),
        (layer.keys[:, :, :steps], vectors["step/k_cache"]),
        (layer.values[:, :, :steps], vectors["step/v_cache"]),
    ]
