"""Where norms stand in the block, initial scales, and exact conversions between norms."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.golden.vectors import FLOATS, Result, Vectors, absolute, leaf, relative, serves

MIX = {"name": "mix", "post": 0.25}  # the first of the file's four layers


# Kind -> the file's name for it, and our settings.
PLACEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "placement/lns": ("lns", {"depth_scaling": "lns"}),
    "placement/pre": ("pre", {"placement": "pre"}),
    "placement/mix(post_pre)": ("post_pre", {"placement": MIX}),
    "placement/post": ("post", {"placement": "post"}),
    "placement/sandwich": ("sandwich", {"placement": "peri"}),
}


@serves("placement/deeppost_repo")
def deep_post(vectors: Vectors) -> Iterator[Result]:
    """DeepNorm's rule with that repository's factor, which is the same at every depth."""
    alpha = vectors.hyperparameters["deeppost_alpha"]
    return _placement(vectors, "deeppost", {"placement": "deepnorm"}, alpha)


def _placement(
    vectors: Vectors, name: str, ours: dict[str, Any], alpha: float | None = None
) -> Iterator[Result]:
    """Block outputs, final output, gradients of the input and of weights."""
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.modeling import LlmNormModel

    p = vectors.hyperparameters
    shape = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    keys = {"vocab_size": 8, "norm": {"eps": p["rms_norm_eps"]}, **{key: p[key] for key in shape}}
    weights = vectors.below("weight")
    for precision, dtype in FLOATS.items():
        model = LlmNormModel(LlmNormConfig(**(keys | ours))).to(dtype)
        for key, parameter in model.named_parameters():
            if key != "embed_tokens.weight":
                final = key == "norm.weight"
                theirs = "final_norm.weight" if final else key.removeprefix("layers.")
                parameter.data.copy_(weights[theirs])
        for block in model.layers if alpha is not None else ():
            block.alpha = alpha
        limit = "f64_max_rel" if precision == "float64" else "f32_max_rel"
        worst = max(_placement_errors(model, vectors, name, dtype))
        yield Result(precision, worst, vectors.tolerance[limit])


for _kind, (_name, _ours) in PLACEMENTS.items():
    serves(_kind)(partial(_placement, name=_name, ours=_ours))


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
    """alpha, and the factor of the initial weights against Xavier's, of decoders."""
    from llmnorm.nn.settings import ModelSettings

    wrong_alpha = wrong_factor = 0.0
    for layers, alpha, mlp, values, queries in vectors["table"][:, :5].tolist():
        settings = ModelSettings(num_hidden_layers=int(layers), placement="deepnorm")
        block: Any = settings.placement.build(settings, 0)
        wrong_alpha = max(wrong_alpha, abs(block.alpha - alpha))
        mixer = block.self_attn
        for linear, factor in (
            *((mixer.q_proj, queries), (mixer.k_proj, queries), (mixer.v_proj, values)),
            *((mixer.o_proj, values), (block.mlp.up_proj, mlp), (block.mlp.down_proj, mlp)),
        ):
            xavier = (2 / (linear.in_features + linear.out_features)) ** 0.5
            wrong_factor = max(wrong_factor, abs(linear.initial_std / xavier - factor))
    yield Result("float64, alpha", wrong_alpha, 1e-12)
    yield Result("float32, beta", wrong_factor, 1e-6)


@serves("conversion/preln_prerms_precrms")
def conversion(vectors: Vectors) -> Iterator[Result]:
    """A Pre-LN vision transformer's weights, recentred and compressed."""
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.convert import named_weights
    from llmnorm.models.equivalence import Weights, convert
    from llmnorm.models.modeling import build_model

    p, saved = vectors.hyperparameters, vectors.below("vit")
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
    yield Result("float64", worst, vectors.tolerance["f64_vit_max_abs"])
