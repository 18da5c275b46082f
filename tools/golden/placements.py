"""Where norms stand in the block, initial scales, and exact conversions between norms."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tools.golden.vectors import NotServed, Result, Vectors, absolute, built, leaf, relative, serves

# The header's name of a placement -> our settings; `mix` takes its share from the header.
PLACEMENTS: dict[str, dict[str, Any]] = {
    "lns": {"depth_scaling": "lns"},
    "pre": {"placement": "pre"},
    "post": {"placement": "post"},
    "sandwich": {"placement": "sandwich"},
    "peri": {"placement": "peri"},
    "reordered": {"placement": "reordered"},
    "deepnorm": {"placement": "deepnorm"},
    "mix": {"placement": {"name": "mix"}},
    "deeppost_repo": {"placement": "deepnorm"},
}


@serves("placement/lns")
@serves("placement/pre")
@serves("placement/post")
@serves("placement/sandwich")
@serves("placement/peri")
@serves("placement/reordered")
@serves("placement/deepnorm")
@serves("placement/mix*")
@serves("placement/deeppost_repo")
def placement(vectors: Vectors) -> Iterator[Result]:
    """Block outputs, final output, gradients of the input and of weights.

    `deeppost_repo` is DeepNorm's rule with that repository's factor, the same at every depth.
    """
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.modeling import LlmNormModel
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    match = re.fullmatch(r"placement/(\w+?)(?:\((\w+)\))?", vectors.part)
    if match is None:
        raise NotServed("kind", vectors.part)
    name, prefix = match[1], match[2] or match[1].removesuffix("_repo")
    p.only(final_norm="RMSNorm, unscaled", rope="rotate_half (HF Llama)")
    p.ignore("deeppost_alpha", "post_num")
    ours = dict(PLACEMENTS[name])
    if name == "mix":
        ours["placement"] = {"name": "mix", "post": p["post_num"] / p["num_hidden_layers"]}
    shape = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"]
    shape += [key for key in ("num_key_value_heads", "head_dim") if key in p]
    keys = {key: p[key] for key in shape} | ours
    keys |= {"vocab_size": 8, "norm": {"eps": p["rms_norm_eps"]}}
    keys |= {"mixer": {"name": "softmax", "bidirectional": not p.get("causal", True)}}
    keys |= {"rope_parameters": {"rope_theta": p.get("rope_theta", 10_000)}}
    built(ModelSettings, keys)
    for limit in vectors.limits():
        model = LlmNormModel(LlmNormConfig(**keys)).to(limit.dtype)
        weights = vectors.below("weight")
        for key, parameter in model.named_parameters():
            if key != "embed_tokens.weight":
                final = key == "norm.weight"
                theirs = "final_norm.weight" if final else key.removeprefix("layers.")
                parameter.data.copy_(weights[theirs])
        for block in model.layers if name == "deeppost_repo" else ():
            block.alpha = p["deeppost_alpha"]
        worst = max(_placement_errors(model, vectors, prefix, limit.dtype))
        yield Result(limit.precision, worst, limit.tolerance)


def _placement_errors(
    model: Any, vectors: Vectors, name: str, dtype: torch.dtype
) -> Iterator[float]:
    outputs: list[Tensor] = []
    for block in model.layers:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    x = leaf(vectors["x"], dtype)
    out = model(inputs_embeds=x).last_hidden_state
    out.backward(vectors["grad_out"].to(dtype))
    saved = vectors.below(name)
    for number, output in enumerate(outputs, 1):
        yield relative(output, saved[f"hidden_{number}"])
    yield relative(out, saved["out"])
    yield relative(x.grad, saved["grad_x"])
    parameters = dict(model.named_parameters())
    for key, expected in vectors.below(f"{name}/grad_weight").items():
        ours = "norm.weight" if key == "final_norm.weight" else f"layers.{key}"
        yield relative(parameters[ours].grad, expected)


@serves("placement/deepnorm constants")
def deepnorm_constants(vectors: Vectors) -> Iterator[Result]:
    """alpha, and the factor of the initial weights against Xavier's.

    Of models that are decoders or encoders only, for which the paper has the same constants.
    """
    from llmnorm.nn.settings import ModelSettings

    vectors.hyperparameters.ignore("layers")  # the table's first column
    wrong_alpha, wrong_factor, table = 0.0, 0.0, vectors["table"]
    halves = [table[:, [0, *columns]] for columns in (range(1, 5), range(5, table.shape[1]))]
    for layers, alpha, mlp, values, queries in torch.cat([h for h in halves if h.shape[1] == 5]):
        layers, alpha = int(layers), float(alpha)
        settings = ModelSettings(num_hidden_layers=layers, placement="deepnorm")
        block: Any = settings.placement.build(settings, 0)
        wrong_alpha = max(wrong_alpha, abs(block.alpha - alpha))
        mixer = block.self_attn
        for linear, factor in (
            *((mixer.q_proj, queries), (mixer.k_proj, queries), (mixer.v_proj, values)),
            *((mixer.o_proj, values), (block.mlp.up_proj, mlp), (block.mlp.down_proj, mlp)),
        ):
            xavier = (2 / (linear.in_features + linear.out_features)) ** 0.5
            wrong_factor = max(wrong_factor, abs(linear.initial_std / xavier - float(factor)))
    yield Result("float64, alpha", wrong_alpha, vectors.tolerance["alpha"])
    yield Result("float32, beta", wrong_factor, vectors.tolerance["ratios"])


@serves("conversion/preln_prerms_precrms")
def conversion(vectors: Vectors) -> Iterator[Result]:
    """A Pre-LN vision transformer's weights, recentred and compressed."""
    from llmnorm.models.building import build_model
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.convert import named_weights
    from llmnorm.models.equivalence import Weights, convert
    from llmnorm.nn.settings import ModelSettings

    p, saved = vectors.hyperparameters, vectors.below("vit")
    p.ignore("eps", "image", "num_classes", "patch")  # eps: of the functions, see norms.py
    settings = {
        "vocab_size": len(saved["pos_embedding"][0]),
        "hidden_size": p["dim"],
        "intermediate_size": p["mlp_dim"],
        "num_hidden_layers": p["depth"],
        "num_attention_heads": p["heads"],
        "norm": {"name": "layer", "bias": False, "eps": p["eps_vit"]},
        "mixer": {"attention_bias": True},
        "mlp": {"name": "gelu", "bias": True},
    }
    built(ModelSettings, settings, {"num_attention_heads": "heads", "hidden_size": "dim"})
    model = build_model(LlmNormConfig(**settings), seed=0).double()
    tensors = named_weights(model)
    tensors["model.embed_tokens.weight"].copy_(saved["pos_embedding"][0])
    names = {"self_attn.o_proj": "att_out", "mlp.up_proj": "mlp_in", "mlp.down_proj": "mlp_out"}
    for layer in range(p["depth"]):
        for part in ("weight", "bias"):
            block = f"model.layers.{layer}"
            for ours, theirs in names.items():
                tensors[f"{block}.{ours}.{part}"].copy_(saved[f"{theirs}_linear_{part}"][layer])
            inputs = saved[f"att_in_linear_{part}"][layer].chunk(3)
            for ours, values in zip("qkv", inputs, strict=True):
                tensors[f"{block}.self_attn.{ours}_proj.{part}"].copy_(values)
    before = Weights(model.config.settings(), tensors)
    rms, crms = (convert(before, target).tensors for target in ("rms", "crms"))
    embedding = crms["model.embed_tokens.weight"]
    worst = absolute(embedding, saved["compressed_pos_embedding"][0])
    for layer in range(p["depth"]):
        block = f"model.layers.{layer}"
        read = torch.cat([crms[f"{block}.self_attn.{name}_proj.weight"] for name in "qkv"])
        pairs = [(read, "compressed_att_in_linear_weight")]
        pairs.append((crms[f"{block}.mlp.up_proj.weight"], "compressed_mlp_in_linear_weight"))
        for ours, theirs in (("self_attn.o_proj", "att_out"), ("mlp.down_proj", "mlp_out")):
            for part in ("weight", "bias"):
                key = f"{theirs}_linear_{part}"
                pairs.append((rms[f"{block}.{ours}.{part}"], f"zm_{key}"))
                pairs.append((crms[f"{block}.{ours}.{part}"], f"compressed_{key}"))
        worst = max(worst, *(absolute(got, saved[key][layer]) for got, key in pairs))
    yield from (Result(limit.precision, worst, limit.tolerance) for limit in vectors.limits("vit"))
