"""Run recorded vectors of official implementations against our parts.

    python tools/golden.py DIR [--kind NAME] [--markdown]

DIR holds safetensors files whose header says kind, hyperparameters, source and tolerance. For every
file and precision a line is printed: file, kind, precision, largest error, tolerance, verdict. A
kind that no part serves yet is `no part`. Exit code 1 if an error is above its tolerance.

A kind is added as one function below: it takes a `Vectors`, runs the part, and yields `Result`s.
The name given to `@serves` may hold wildcards. A header may name several parts
(`norm/layernorm,rmsnorm`).
"""

import argparse
import fnmatch
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn


class Result(NamedTuple):
    """The largest error of one precision and what it may be."""

    precision: str
    error: float
    tolerance: float


class Vectors:
    """One file: its tensors and its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.kind = header["kind"]
        self.hyperparameters: dict[str, Any] = json.loads(header.get("hyperparameters") or "{}")
        try:
            self.tolerance: dict[str, Any] = json.loads(header["tolerance"])
        except json.JSONDecodeError:
            self.tolerance = {}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix/`, by the rest of their names."""
        return {
            key.removeprefix(prefix + "/"): value
            for key, value in self.tensors.items()
            if key.startswith(prefix + "/")
        }


Kind = Callable[[Vectors], Iterator[Result]]
KINDS: dict[str, Kind] = {}
FLOATS = {"float64": torch.float64, "float32": torch.float32}


def serves(pattern: str) -> Callable[[Kind], Kind]:
    """Register the function for kinds that match `pattern`."""

    def register(kind: Kind) -> Kind:
        KINDS[pattern] = kind
        return kind

    return register


def largest(difference: Tensor) -> float:
    """max|difference|; infinite for nan, which comparisons would lose."""
    value = difference.detach().abs().max().item()
    return value if value == value else torch.inf


def relative(got: Tensor | None, reference: Tensor) -> float:
    """max|got - reference| / max|reference|; absolute where the reference is all zeros."""
    if got is None or got.shape != reference.shape:
        return torch.inf
    error = largest(got.double() - reference.double())
    return error if error == torch.inf else error / (largest(reference.double()) or 1.0)


# --- norms ---


def _norm_cases(vectors: Vectors, operator: str, settings: type) -> Iterator[Result]:
    """Output and gradients in float64; the output in float32, which is what its limit is for."""
    for precision, key in {"float64": "f64_max_rel", "float32": "f32_max_rel"}.items():
        worst = 0.0
        for case in vectors.hyperparameters["cases"]:
            if case["op"] == operator:
                worst = max(
                    worst, *_norm_errors(vectors.below(case["key"]), case, settings, precision)
                )
        yield Result(precision, worst, vectors.tolerance[key])


def _norm_errors(
    saved: dict[str, Tensor], case: dict[str, Any], settings: type, precision: str
) -> Iterator[float]:
    dtype = FLOATS[precision]
    norm = settings(eps=case["eps"]).build(saved["x"].shape[-1]).to(dtype)
    norm.load_state_dict({key: saved[key] for key in ("weight", "bias") if key in saved})
    x = _leaf(saved["x"], dtype)
    out = norm(x)
    yield relative(out, saved["out"])
    if precision == "float32":
        return
    out.backward(saved["grad_out"].to(dtype))
    assert x.grad is not None
    if case["op"] == "rmsnorm" and x.shape[-1] == 1:
        # The difference of two equal terms, of which eps alone survives: the recorded gradient is
        # itself 1.6e-7 off the exact one, so it is compared on the scale of those terms.
        terms = saved["grad_out"] * saved["out"] / saved["x"]
        yield largest(x.grad - saved["grad_x"]) / largest(terms)
    else:
        yield relative(x.grad, saved["grad_x"])
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        yield relative(parameter.grad, saved[f"grad_{name}"])


@serves("norm/layernorm")
def layer_norm(vectors: Vectors) -> Iterator[Result]:
    """Layer norm."""
    from llmnorm.nn.norms.settings import LayerNormSettings

    return _norm_cases(vectors, "layernorm", LayerNormSettings)


@serves("norm/rmsnorm")
def rms_norm(vectors: Vectors) -> Iterator[Result]:
    """RMS norm."""
    from llmnorm.nn.norms.settings import RMSNormSettings

    return _norm_cases(vectors, "rmsnorm", RMSNormSettings)


@serves("norm/rmsnorm bf16 cast modes")
def rms_norm_cast_modes(vectors: Vectors) -> Iterator[Result]:
    """bf16 in units of the last place: `llama` none, `fp32_affine` one (order of the sum)."""
    from llmnorm.nn.norms.settings import RMSNormSettings

    eps = vectors.hyperparameters["eps"]
    modes: list[tuple[Any, str, float]] = [
        ("llama", "out_llama", 0),
        ("fp32_affine", "out_fp32_affine", 1),
    ]
    for mode, key, allowed in modes:
        worst = 0.0
        for number in sorted({key.split("/")[0] for key in vectors.tensors}):
            saved = vectors.below(number)
            norm = RMSNormSettings(eps=eps, cast_mode=mode).build(saved["x"].shape[-1])
            norm.bfloat16().load_state_dict({"weight": saved["weight"]})
            worst = max(worst, _ulps(norm(saved["x"]), saved[key]))
            if mode == "fp32_affine":
                plain = RMSNormSettings(eps=eps).build(saved["x"].shape[-1]).bfloat16()
                worst = max(worst, _ulps(plain(saved["x_const"]), saved["out_const_eps1e-6"]))
        yield Result(f"bf16 ulp, {mode}", worst, max(allowed, vectors.tolerance["max_ulp_bf16"]))


def _ulps(got: Tensor, reference: Tensor) -> float:
    """Distance in bf16 steps: the bit patterns of one sign count up with the value."""
    bits = [t.detach().view(torch.int16).to(torch.int32) for t in (got, reference)]
    ordered = [torch.where(b < 0, -(b & 0x7FFF), b) for b in bits]
    return float((ordered[0] - ordered[1]).abs().max())


@serves("norm/powernorm")
def power_norm(vectors: Vectors) -> Iterator[Result]:
    """Output, gradients and statistics after every step, warm-up included; evaluation."""
    from llmnorm.nn.norms.settings import PowerNormSettings

    p = vectors.hyperparameters
    settings = PowerNormSettings(
        eps=p["eps"],
        forward_decay=p["alpha_fwd"],
        backward_decay=p["alpha_bkw"],
        warmup=p["warmup_iters"],
        groups=p["group_num"],
        count_padding=True,
        allow_leak=True,
    )

    def statistics(norm: Any, step: str) -> Iterator[tuple[Tensor, Tensor]]:
        yield norm.running_square, vectors[f"running_phi_{step}"]
        yield norm.running_gradient / (1 - p["alpha_bkw"]), vectors[f"ema_gz_{step}"]

    # Rows are (length, batch) here.
    return _running(vectors, settings, lambda mask: mask.t(), statistics)


@serves("norm/unified")
def unified_norm(vectors: Vectors) -> Iterator[Result]:
    """Output, gradients and statistics after every step: smoothing, filter, kappa; evaluation."""
    from llmnorm.nn.norms.settings import UnifiedNormSettings

    p = vectors.hyperparameters
    settings = UnifiedNormSettings(
        eps=p["eps"],
        window=p["window_size"],
        warmup=p["warmup_iters"],
        momentum=p["momentum"],
        filter="official" if p["outlier_filtration"] else "off",
        count_padding=True,
        allow_leak=True,
    )
    names = {
        "running_square": "running_var",
        "running_gradient": "ema_gz",
        "window_square": "buffer_x2",
        "window_gradient": "buffer_gz",
    }

    def statistics(norm: Any, step: str) -> Iterator[tuple[Tensor, Tensor]]:
        for name, theirs in names.items():
            key = f"{theirs}_{step}"
            yield getattr(norm, name), vectors[key]

    begun = {name: vectors[f"init_{theirs}"] for name, theirs in names.items()}
    begun["steps"] = vectors["init_iters"].reshape(())
    return _running(vectors, settings, lambda mask: mask, statistics, begun)


def _running(
    vectors: Vectors,
    settings: Any,
    to_rows: Callable[[Tensor], Tensor],
    statistics: Callable[[Any, str], Iterator[tuple[Tensor, Tensor]]],
    begun: dict[str, Tensor] | None = None,
) -> Iterator[Result]:
    """Every step of a norm with running statistics; float32 against the float64 values."""
    for precision, dtype in FLOATS.items():
        norm = settings.build(len(vectors["weight"])).to(dtype)
        state = {"weight": vectors["weight"], "bias": vectors["bias"], **(begun or {})}
        norm.load_state_dict(state, strict=False)
        measure = relative if precision == "float32" else _absolute
        worst, number = 0.0, 0
        while (step := f"{number:03d}") and f"x_{step}" in vectors.tensors:
            pad = vectors.tensors.get(f"pad_mask_{step}")
            norm.begin(None if pad is None else to_rows(~pad))
            x = _leaf(vectors[f"x_{step}"], dtype)
            out = norm(x)
            norm.zero_grad()
            out.backward(vectors[f"grad_out_{step}"].to(dtype))
            norm.commit()
            pairs = [(out, vectors[f"out_{step}"]), (x.grad, vectors[f"grad_x_{step}"])]
            for name in ("weight", "bias"):
                pairs.append((getattr(norm, name).grad, vectors[f"grad_{name}_{step}"]))
            pairs += statistics(norm, step)
            worst = max(worst, *(measure(got, expected) for got, expected in pairs))
            number += 1
        norm.eval()
        worst = max(worst, measure(norm(x), vectors["eval_out"]))
        key = "f64_max_abs" if precision == "float64" else "f32_max_rel"
        yield Result(precision, worst, vectors.tolerance[key])


def _absolute(got: Tensor | None, reference: Tensor) -> float:
    if got is None or got.shape != reference.shape:
        return torch.inf
    return largest(got - reference)


@serves("norm/dyt")
def dynamic_tanh(vectors: Vectors) -> Iterator[Result]:
    """Output and gradients, that of alpha included."""
    from llmnorm.nn.norms.settings import DyTSettings

    norm = DyTSettings(alpha=vectors.hyperparameters["alpha_init"]).build(16).double()
    norm.load_state_dict({key: vectors[key] for key in ("alpha", "weight", "bias")})
    x = _leaf(vectors["x"], torch.float64)
    out = norm(x)
    out.backward(vectors["grad_out"])
    pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
    pairs += [(p.grad, vectors[f"grad_{name}"]) for name, p in norm.named_parameters()]
    worst = max(_absolute(got, expected) for got, expected in pairs)
    yield Result("float64", worst, vectors.tolerance["f64_max_abs"])


@serves("norm/crmsnorm")
def crms_norm(vectors: Vectors) -> Iterator[Result]:
    """Output and gradient; beside it RMS norm and layer norm without gain on the same kind."""
    from llmnorm.nn.norms.settings import CRMSNormSettings, LayerNormSettings, RMSNormSettings

    parts: dict[str, Any] = {
        "crms_norm": CRMSNormSettings,
        "rms_norm": RMSNormSettings,
        "layer_norm": LayerNormSettings,
    }
    for precision, dtype in FLOATS.items():
        worst = 0.0
        for number, eps in enumerate(vectors.hyperparameters["eps"]):
            for name, settings in parts.items():
                saved = vectors.below(f"{name}_{number}")
                x = _leaf(saved["x"], dtype)
                out = settings(eps=eps).build(x.shape[-1]).to(dtype)(x)
                out.backward(saved["grad_out"].to(dtype))
                pairs = ((out, saved["out"]), (x.grad, saved["grad_x"]))
                worst = max(worst, *(_absolute(got, expected) for got, expected in pairs))
        key = "f64_functions" if precision == "float64" else "f32_functions"
        yield Result(precision, worst, vectors.tolerance[key])


# --- placements ---


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
    x = _leaf(vectors["x"], dtype)
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


# --- conversions ---


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
    worst = _absolute(embedding, saved["compressed_pos_embedding"][0])
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
        worst = max(worst, *(_absolute(got, saved[key][layer]) for got, key in pairs))
    yield Result("float64", worst, vectors.tolerance["f64_vit_max_abs"])


# --- rotary positions and attention ---


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
            x = _leaf(vectors[f"in/{name}"].transpose(1, 2), dtype)
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
        x = _leaf(vectors["x"], dtype)
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

    lengths = tuple(vectors["packed/cu_seqlens"].diff().tolist())
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    cos, sin = rotary(positions, dtype)
    context = Context(cos, sin, documents=lengths)
    return mixer(vectors["packed/x"].to(dtype), context)


def _stepwise(
    vectors: Vectors, mixer: nn.Module, rotary: Any, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Outputs and cache after feeding the first tokens of x one by one."""
    from llmnorm.nn.cache import KeyValues, RaggedCache
    from llmnorm.nn.mixers.contract import Context

    cache, x = RaggedCache(1), vectors["x"].to(dtype)
    steps = len(vectors["step/out"])
    outs = []
    for step in range(steps):
        places = cache.places(len(x), 1, x.device)
        positions = places.index + vectors.hyperparameters["position_offset"]
        cos, sin = rotary(positions, dtype)
        context = Context(cos, sin, places.mask(), causal=places.causal, places=places)
        outs.append(mixer(x[:, step : step + 1], context, cache.layers[0]).squeeze(1))
    layer = cache.layers[0]
    assert isinstance(layer, KeyValues)
    assert layer.keys is not None and layer.values is not None
    return [
        (torch.stack(outs), vectors["step/out"]),
        (layer.keys[:, :, :steps], vectors["step/k_cache"]),
        (layer.values[:, :, :steps], vectors["step/v_cache"]),
    ]


# --- recurrences and mixers made of them ---

LIMITS = {"float64": "float64", "float32": "float32_vs_these_values"}


def _recurrence(
    vectors: Vectors, run: Callable[..., tuple[Tensor, Tensor]], state: str = "initial_state"
) -> Iterator[Result]:
    """A function (inputs by name, state) -> (out, state): both, gradients, and token by token."""
    for precision, dtype in FLOATS.items():
        leaves = {key: _leaf(value, dtype) for key, value in vectors.below("in").items()}
        inputs = {key: value for key, value in leaves.items() if key != state}
        out, after = run(inputs, leaves.get(state))
        torch.autograd.backward(
            [out, after],
            [
                vectors.tensors.get(key, torch.zeros_like(like)).to(dtype)
                for key, like in (("grad_out", out), ("grad_final_state", after))
            ],
        )
        pairs = [(out, vectors["out"]), (after, vectors["final_state"])]
        pairs += [(_grad(leaves[key]), ref) for key, ref in vectors.below("grad_in").items()]
        with torch.no_grad():
            now, outs, states = leaves.get(state), [], []
            for step in range(len(vectors["step/out"])):
                token = {key: value[:, step : step + 1] for key, value in inputs.items()}
                y, now = run(token, now)
                outs.append(y.squeeze(1))
                states.append(now)
        pairs += [(torch.stack(outs), vectors["step/out"])]
        pairs += [(torch.stack(states), vectors["step/state"])]
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


@serves("linear_recurrence/simple_gla")
@serves("linear_recurrence/retention")
@serves("linear_recurrence/linear")
def linear_recurrences(vectors: Vectors) -> Iterator[Result]:
    """The engine of linear attention and SSD; retention's decays are constants."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        decay = t.get("g")
        if "mid/log_decay" in vectors.tensors:
            decay = vectors["mid/log_decay"].to(t["v"].dtype).expand(t["v"].shape[:3])
        scaled = t["q"] * t["q"].shape[-1] ** -0.5
        return linear_recurrence(scaled, t["k"], t["v"], decay, state=state)

    return _recurrence(vectors, run)


@serves("linear_recurrence/gla")
def gated_linear_attention(vectors: Vectors) -> Iterator[Result]:
    """GLA's recurrence, a gate a channel."""
    from llmnorm.nn.mixers.gla import channel_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = t["q"] * t["q"].shape[-1] ** -0.5
        return channel_recurrence(scaled, t["k"], t["v"], t["g"], state=state)

    return _recurrence(vectors, run)


@serves("linear_recurrence/gdn")
@serves("linear_recurrence/delta")
def gated_delta(vectors: Vectors) -> Iterator[Result]:
    """The gated delta rule; the delta rule has no gate."""
    from llmnorm.nn.mixers.gated_delta import delta_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = t["q"] * t["q"].shape[-1] ** -0.5
        return delta_recurrence(scaled, t["k"], t["v"], t["beta"], t.get("g"), state=state)

    return _recurrence(vectors, run)


@serves("gated_deltanet/module")
def gated_deltanet(vectors: Vectors) -> Iterator[Result]:
    """The layer of Qwen3-Next."""
    from llmnorm.nn.mixers.settings import GatedDeltaSettings

    p = vectors.hyperparameters
    part = GatedDeltaSettings(
        num_key_heads=p["num_k_heads"],
        num_value_heads=p["num_v_heads"],
        key_head_dim=p["head_k_dim"],
        value_head_dim=p["head_v_dim"],
        conv_kernel=p["conv_kernel"],
        norm_eps=p["norm_eps"],
    )

    def states(mixer: Any, state: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # Theirs keeps the current input in the window, one more than ours.
        return {"step/state": state[0], "step/conv_state": state[1].mT}

    mids = {"mid/beta": lambda p: p.b, "mid/g": lambda p: p.log_decay, "mid/v": lambda p: p.v}
    mids |= {"mid/z": lambda p: p.z}
    return _module(vectors, part, p["hidden_size"], lambda mixer: None, states, mids)


@serves("mamba2/ssd")
def state_space_dual(vectors: Vectors) -> Iterator[Result]:
    """The engine with Mamba-2's names; its states are (value, key)."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = None if state is None else state.mT
        y, after = linear_recurrence(t["C"], t["B"], t["x_dt"], t["log_decay"], state=state)
        return y, after.mT

    return _recurrence(vectors, run)


@serves("nala/core")
@serves("nala/causal_prefix")
def nala(vectors: Vectors) -> Iterator[Result]:
    """Features, matrix, output and gradients of NaLa's core; causal: packed documents too.

    Their rotation turns neighbouring dimensions, ours the halves of a head: q and k are reordered.
    """
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.linear import LinearParameters
    from llmnorm.nn.mixers.settings import NaLaSettings
    from llmnorm.nn.settings import ModelSettings

    p, causal = vectors.hyperparameters, vectors.kind.endswith("causal_prefix")
    width = p["heads"] * p["head_dim"]
    settings = ModelSettings(
        hidden_size=width, num_attention_heads=p["heads"], head_dim=p["head_dim"]
    )
    part = NaLaSettings(
        bidirectional=not causal,
        query_eps=0,
        eps=p["eps"],
        lam=p["lam"],
        tau=p["tau"],
        conv_kernel=0,
    )
    mixer: Any = part.build(settings, 0)
    halves = _halves(p["head_dim"])
    for precision, dtype in FLOATS.items():
        q, k, v = (_leaf(vectors[f"in/{name}"].transpose(1, 2), dtype) for name in "qkv")
        cos, sin = (vectors[f"in/{t}"][None, :, None, ::2].to(dtype) for t in ("cos", "sin"))
        context = Context(cos, sin)
        parameters = LinearParameters(q[..., halves], k[..., halves], v, None, None)
        out = mixer.mix(parameters, context)
        out.backward(vectors["grad_out"].transpose(1, 2).to(dtype))
        pairs = [(out.transpose(1, 2), vectors["out"])]
        pairs += [
            (_grad(t).transpose(1, 2), vectors[f"grad_in/{name}"])
            for t, name in zip((q, k, v), "qkv", strict=True)
        ]
        if "M" in vectors.tensors:
            pairs.append((mixer.materialize(parameters, context), vectors["M"]))
        names = ("phi_q", "phi_k", "phi_q_rope", "phi_k_rope")
        features = mixer.both_features(parameters.q, parameters.k, cos, sin, None)
        for name, feature in zip(names, features, strict=True):
            both = torch.cat((halves, halves + p["head_dim"]))
            pairs.append((feature.transpose(1, 2), vectors[f"mid/{name}"][..., both]))
        if causal:
            with torch.no_grad():
                lengths = vectors["packed/cu_seqlens"].diff()
                numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
                apart = Context(cos, sin, segments=numbers.expand(len(q), -1))
                pairs.append((mixer.mix(parameters, apart).transpose(1, 2), vectors["out_packed"]))
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


@serves("nala/module")
def nala_module(vectors: Vectors) -> Iterator[Result]:
    """The official layer on a grid; its two-dimensional local convolution stands in for ours."""
    import torch.nn.functional as F

    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.settings import NaLaSettings
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    dim, heads = p["dim"], p["num_heads"]
    settings = ModelSettings(hidden_size=dim, num_attention_heads=heads)
    part = NaLaSettings(
        bidirectional=True,
        bias=True,
        norm="layer",
        norm_eps=p["ln_eps"],
        query_eps=0,
        eps=p["eps"],
        lam=p["lam"],
        tau=p["tau"],
        conv_kernel=0,
    )
    halves = _halves(settings.head_dim)
    rows = torch.cat([halves + head * settings.head_dim for head in range(heads)])
    for precision, dtype in FLOATS.items():
        state = {key: _leaf(value, dtype) for key, value in vectors.below("state").items()}
        own: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            q, k, v, g = state[f"qkvg.{kind}"].chunk(4)
            own |= {f"q_proj.{kind}": q[rows], f"k_proj.{kind}": k[rows], f"v_proj.{kind}": v}
            own |= {f"g_proj.{kind}": g, f"o_proj.{kind}": state[f"out_proj.{kind}"]}
            own[f"norm.{kind}"] = state[f"ln.{kind}"]
        x = _leaf(vectors["x"], dtype)
        cos, sin = (vectors[f"mid/{t}"][None, :, None, ::2].to(dtype) for t in ("cos", "sin"))
        context = Context(cos, sin)
        layer = _Layer(part.build(settings, 0).to(dtype), state, F.conv2d)
        out, matrix = torch.func.functional_call(
            layer, {f"mixer.{key}": value for key, value in own.items()}, (x, context)
        )
        out.backward(vectors["grad_out"].to(dtype))
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"]), (matrix, vectors["M"])]
        pairs += [(state[name].grad, value) for name, value in vectors.below("grad").items()]
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


class _Layer(nn.Module):
    """Our mixer with the official local term, from a grid (batch, dim, height, width) to one."""

    def __init__(self, mixer: Any, state: dict[str, Tensor], convolve: Any) -> None:
        super().__init__()
        self.mixer, self.state, self.convolve = mixer, state, convolve

    def forward(self, grid: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        x = grid.flatten(2).mT
        p = self.mixer.prepare(x, context)
        v = p.v.flatten(2).mT.view_as(grid)
        weight, bias = self.state["lepe.weight"], self.state["lepe.bias"]
        local = self.convolve(v, weight, bias, padding=weight.shape[-1] // 2, groups=len(bias))
        p = p._replace(local=local.flatten(2).mT.reshape_as(p.v))
        out = self.mixer.finish(self.mixer.mix(p, context), x, p)
        return out.mT.view_as(grid), self.mixer.materialize(p, context)


def _halves(head_dim: int) -> Tensor:
    """Dimensions that their rotation pairs as neighbours, in the order in which ours does."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


@serves("mamba2/module")
@serves("mamba2/simple_module")
def mamba2(vectors: Vectors) -> Iterator[Result]:
    """Mamba-2's layer; the simple one norms all channels together whatever the groups."""
    from llmnorm.nn.mixers.settings import SSDSettings
    from llmnorm.nn.mixers.ssd import GroupedRMSNorm

    p = vectors.hyperparameters
    part = SSDSettings(
        state_size=p["d_state"],
        head_dim=p["headdim"],
        expand=p["expand"],
        n_groups=p["ngroups"],
        conv_kernel=p.get("d_conv", 4),
        use_bias=p.get("bias", False),
        norm_eps=p["norm_eps"],
        time_step_limit=p.get("dt_limit"),
    )

    def change(mixer: Any) -> None:
        if vectors.kind == "mamba2/simple_module":
            inner = p["expand"] * p["d_model"]
            mixer.norm = GroupedRMSNorm(inner, groups=1, eps=p["norm_eps"])

    def states(mixer: Any, state: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # Theirs keeps the current input in the window, one more than ours.
        return {"step/ssm_state": state[0].mT, "step/conv_state": state[1].mT}

    mids = {"mid/dt": lambda p: p.dt, "mid/B": lambda p: p.B, "mid/C": lambda p: p.C}
    mids |= {"mid/v": lambda p: p.v}
    return _module(vectors, part, p["d_model"], change, states, mids)


@serves("hydra")
def hydra(vectors: Vectors) -> Iterator[Result]:
    """Hydra's layer; learnable initial states are not offered."""
    from llmnorm.nn.mixers.settings import HydraSettings

    p = vectors.hyperparameters
    if p.get("learnable_init_states"):
        return iter(())
    part = HydraSettings(
        state_size=p["d_state"],
        head_dim=p["headdim"],
        expand=p["expand"],
        n_groups=p["ngroups"],
        conv_kernel=p.get("d_conv", 7),
        use_bias=p.get("bias", False),
        time_step_limit=p.get("dt_limit"),
    )
    mids = {
        "mid/v": lambda p: p.v,
        "mid/delta": lambda p: p.delta,
        "mid/dt_fwd": lambda p: p.forward.dt,
        "mid/B_fwd": lambda p: p.forward.B,
        "mid/C_bwd_flipped": lambda p: p.backward.C.flip(1),
    }
    return _module(vectors, part, p["d_model"], lambda mixer: None, lambda mixer, state: {}, mids)


@serves("matrix_mixer/*")
def matrix_mixer(vectors: Vectors) -> Iterator[Result]:
    """The block of every family: what its matrix is made of, the matrix, output, gradients.

    `derived/*`, where a file has it, is the matrix of the definition that the official code misses.
    """
    from llmnorm.nn.mixers.contract import Context

    state, grads = (_theirs(vectors.below(key)) for key in ("state", "grad"))
    mids = {"v": "v", "z": "z", "y": "y_mixed", "q": "q", "k": "k", "delta": "delta"}
    mids |= {"forward": "forward_conv", "reverse": "reverse_conv"}
    mids |= {"dt": "dt_fwd", "flipped_dt": "dt_bwd_flipped"}
    for precision, dtype in FLOATS.items():
        nothing = torch.zeros(1, 1, 1, 1, dtype=dtype)
        mixer = _of_a_family(vectors, state, official=True).to(dtype)
        x, context = _leaf(vectors["x"], dtype), Context(nothing, nothing)
        p, out = mixer.prepare(x, context), mixer(x, context)
        out.backward(vectors["grad_out"].to(dtype))
        ours = {"v": p.v, "z": p.z, "y": mixer.mix(p, context).flatten(2)}
        ours |= p.made._asdict() if hasattr(p.made, "_asdict") else {}
        if "mid/dt_fwd" in vectors.tensors:
            ours |= {"dt": p.made.forward.dt, "flipped_dt": p.made.backward.dt.flip(1)}
        matrix = mixer.materialize(p, context)
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        pairs += [(matrix, vectors["M"].expand_as(matrix))]
        pairs += [
            (ours[key], vectors[f"mid/{name}"])
            for key, name in mids.items()
            if f"mid/{name}" in vectors.tensors
        ]
        pairs += [(weight.grad, grads[key]) for key, weight in mixer.named_parameters()]
        for definition in vectors.below("derived").values():
            right = _of_a_family(vectors, state, official=False).to(dtype)
            matrix = right.materialize(right.prepare(x, context), context)
            pairs.append((matrix, definition.expand_as(matrix)))
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


def _of_a_family(vectors: Vectors, state: dict[str, Tensor], *, official: bool) -> Any:
    """Our mixer of the file's family, with its weights; as the official code, or as defined."""
    from llmnorm.nn.mixers.settings import MatrixSettings
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    name = vectors.kind.removeprefix("matrix_mixer/")[:-3].removesuffix("_nondft")
    if "matrix_mixer.dft_matrix" in state:
        name = "dft"
    family: dict[str, Any] = {"name": name}
    if name not in ("dense", "dft"):
        family["data_dependent"] = p["is_data_dependent"]
    if name not in ("dense", "dft", "toeplitz"):
        family["qk_dim"] = p["qk_dim"]
    if name in ("toeplitz", "vandermonde", "cauchy", "low_rank"):
        family["official_compat"] = official
    part = MatrixSettings.model_validate(
        {"family": family, "expand": p["expand"], "head_dim": p["headdim"]}
    )
    mixer: Any = part.build(
        ModelSettings(hidden_size=p["d_model"], max_position_embeddings=p["max_seq_len"]), 0
    )
    own = {key: value for key, value in mixer.state_dict().items() if key.endswith("log_eps")}
    fixed = ("matrix_mixer.dft_matrix",)
    mixer.load_state_dict(own | {key: value for key, value in state.items() if key not in fixed})
    return mixer


def _theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars get an axis; learned frequencies the names and axes of other families' q and k."""
    found = {}
    for key, value in tensors.items():
        if key.endswith(("q_bias", "k_bias")):
            key, value = key.replace("_bias", "_matrix"), value.permute(2, 0, 1)
        found[key] = value.reshape(1) if value.ndim == 0 else value
    return found


def _module(
    vectors: Vectors,
    part: Any,
    hidden_size: int,
    change: Callable[[Any], None],
    states: Callable[[Any, tuple[Tensor, ...]], dict[str, Tensor]],
    mids: dict[str, Callable[[Any], Tensor]],
) -> Iterator[Result]:
    """A recurrent layer: parameters, matrix, output, gradients, packed documents, decoding."""
    from llmnorm.nn.cache import RaggedCache
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.settings import ModelSettings

    settings = ModelSettings(hidden_size=hidden_size, num_attention_heads=1)
    for precision, dtype in FLOATS.items():
        nothing = torch.zeros(1, 1, 1, 1, dtype=dtype)
        mixer = part.build(settings, 0)
        change(mixer)
        mixer.to(dtype).load_state_dict(vectors.below("state"))
        x, context = _leaf(vectors["x"], dtype), Context(nothing, nothing)
        parameters, out = mixer.prepare(x, context), mixer(x, context)
        out.backward(vectors["grad_out"].to(dtype))
        y = mixer.mix(parameters, context)
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        pairs += [(mixer.materialize(parameters, context), vectors["M"])]
        pairs += [(y.reshape(vectors["mid/y_mixed"].shape), vectors["mid/y_mixed"])]
        pairs += [(get(parameters), vectors[key]) for key, get in mids.items()]
        grads = vectors.below("grad")
        pairs += [(weight.grad, grads[name]) for name, weight in mixer.named_parameters()]
        with torch.no_grad():
            if "packed/x" in vectors.tensors:
                lengths = vectors["packed/cu_seqlens"].diff()
                numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths).unsqueeze(0)
                apart = Context(nothing, nothing, segments=numbers)
                packed = mixer(vectors["packed/x"].to(dtype), apart)
                pairs.append((packed, vectors["packed/out"]))
            cache, steps = RaggedCache([mixer.new_cache()]), vectors.tensors.get("step/out", ())
            for step in range(len(steps)):
                token = x[:, step : step + 1]
                places = cache.places(len(x), 1, x.device)
                here = Context(nothing, nothing, places=places)
                pairs.append((mixer(token, here, cache.layers[0]).squeeze(1), steps[step]))
                for key, state in states(mixer, cache.layers[0].state).items():  # type: ignore
                    pairs.append((state, vectors[key][step][..., -state.shape[-1] :]))
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


@serves("linear_recurrence/linear_norm")
def linear_attention(vectors: Vectors) -> Iterator[Result]:
    """Linear attention's sums with given features; their eps is on the sum, ours on the mean."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    for precision, dtype in FLOATS.items():
        leaves = {key: _leaf(value, dtype) for key, value in vectors.below("in").items()}
        q, k, v = leaves["q"] * leaves["q"].shape[-1] ** -0.5, leaves["k"], leaves["v"]
        y, after = linear_recurrence(q, k, v, state=leaves["initial_state"])
        one = v.new_ones(()).expand(*v.shape[:3], 1)
        total, _ = linear_recurrence(q, k, one, state=leaves["initial_z"][..., None])
        out = y / (total + 1e-10)
        out.backward(vectors["grad_out"].to(dtype))
        pairs = [(out, vectors["out"]), (after, vectors["final_state"])]
        pairs += [(_grad(leaves[key]), ref) for key, ref in vectors.below("grad_in").items()]
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


# --- optimizers ---


class Trajectory(NamedTuple):
    """How far a run is from the recorded one, over all parameters and steps.

    Attributes:
        steps: how many were compared.
        largest: max|parameter - recorded|.
        update: of one step's change, |ours - recorded| / |recorded| (Frobenius).
        path: the same of the parameters themselves.
    """

    steps: int
    largest: float
    update: float
    path: float


def trajectory(vectors: Vectors, dtype: torch.dtype, build: Callable[..., Any]) -> Trajectory:
    """Feed the recorded gradients; a vector is a matrix of one column.

    Args:
        build: named matrices, and whether they are vectors -> an optimizer over them.
    """
    starts = {k[6:]: v for k, v in vectors.tensors.items() if re.fullmatch(r"param_\d+", k)}
    shape = {name: (*start.shape, 1)[:2] for name, start in starts.items()}
    parameters = {
        name: nn.Parameter(start.to(dtype, copy=True).view(shape[name]))
        for name, start in starts.items()
    }
    optimizers = [
        build({name: parameters[name] for name in members}, vector)
        for vector in (False, True)
        if (members := [name for name in starts if (starts[name].ndim == 1) == vector])
    ]
    before = {name: start.double().view(shape[name]) for name, start in starts.items()}
    step, largest_error, update, path = 0, 0.0, 0.0, 0.0
    while f"grad_{step:03d}/0" in vectors.tensors:
        ours_before = {name: p.detach().double() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = vectors[f"grad_{step:03d}/{name}"].to(dtype).view(shape[name])
        for optimizer in optimizers:
            optimizer.step()
        for name, parameter in parameters.items():
            ours = parameter.detach().double()
            recorded = vectors[f"param_after_{step:03d}/{name}"].double().view(shape[name])
            largest_error = max(largest_error, largest(ours - recorded))
            path = max(path, _frobenius(ours, recorded))
            change = _frobenius(ours - ours_before[name], recorded - before[name])
            update, before[name] = max(update, change), recorded
        step += 1
    return Trajectory(step, largest_error, update, path)


def _frobenius(got: Tensor, reference: Tensor) -> float:
    return float((got - reference).norm() / reference.norm().clamp(min=1e-300))


def _optimizer(vectors: Vectors, settings: Any, vector: Any | None = None) -> Iterator[Result]:
    """Whatever precisions the file has limits for.

    Args:
        settings: of the optimizer over the matrices; products in the file's precision.
        vector: settings for one-dimensional parameters, as matrices of one column.
    """
    from llmnorm.optim.groups import Groups

    def build(members: dict[str, nn.Parameter], is_vector: bool) -> Any:
        chosen: Any = vector if is_vector else settings
        if hasattr(chosen, "precision"):
            precision = "bf16" if "bf16" in vectors.path.stem else "fp32"
            chosen = chosen.model_copy(update={"precision": precision})
        return chosen.build(Groups(members, {}))

    limits = {
        "f64_max_abs": ("float64", torch.float64),
        "f32_max_abs": ("float32", torch.float32),
        "max_abs": ("float32", torch.float32),
    }
    for key, (precision, dtype) in limits.items():
        if key in vectors.tolerance:
            found = trajectory(vectors, dtype, build)
            yield Result(f"{precision}, {found.steps} steps", found.largest, vectors.tolerance[key])
    if "update_rel_frobenius" in vectors.tolerance:
        found = trajectory(vectors, vectors["param_0"].dtype, build)
        for what, error in (("update", found.update), ("trajectory", found.path)):
            tolerance = vectors.tolerance[f"{what}_rel_frobenius"]
            yield Result(f"bf16 {what}, {found.steps} steps", error, tolerance)


@serves("optimizer/adamw")
def adamw(vectors: Vectors) -> Iterator[Result]:
    """The file decays its vector too, so all count as matrices."""
    from llmnorm.optim.settings import AdamWSettings

    settings = AdamWSettings(**vectors.hyperparameters)
    return _optimizer(vectors, settings, settings)


@serves("optimizer/adamp")
def adamp(vectors: Vectors) -> Iterator[Result]:
    """Vectors are never projected: AdamW."""
    from llmnorm.optim.settings import AdamPSettings, AdamWSettings

    p = vectors.hyperparameters
    same = {key: p[key] for key in ("lr", "betas", "eps", "weight_decay")}
    return _optimizer(vectors, AdamPSettings(**p), AdamWSettings(**same))


@serves("optimizer/conda")
def conda(vectors: Vectors) -> Iterator[Result]:
    """Vectors get the official class's Adam, which is the rule of one column at scale 1."""
    from llmnorm.optim.settings import CondaSettings

    p = vectors.hyperparameters
    settings = CondaSettings(
        **{key: p[key] for key in ("lr", "betas", "eps", "weight_decay", "scale")},
        refresh_every=p["update_proj_gap"],
    )
    vector = settings.model_copy(update={"scale": 1.0, "lr": p["aux_lr"]})
    results = list(_optimizer(vectors, settings, vector))
    eigh = list(_optimizer(vectors, settings.model_copy(update={"basis": "eigh"}), vector))
    yield from results
    yield from (r._replace(precision=r.precision.replace(",", " eigh,")) for r in eigh)


@serves("optimizer/soap")
def soap(vectors: Vectors) -> Iterator[Result]:
    """A vector has no bases."""
    from llmnorm.optim.settings import SOAPSettings

    keys = ("lr", "betas", "eps", "weight_decay", "precondition_frequency", "max_precond_dim")
    settings = SOAPSettings(**{key: vectors.hyperparameters[key] for key in keys})
    vector = settings.model_copy(update={"max_precond_dim": 0})
    return _optimizer(vectors, settings, vector)


@serves("optimizer/normuon")
def normuon(vectors: Vectors) -> Iterator[Result]:
    """The preset `official`."""
    from llmnorm.optim.settings import NorMuonSettings

    keys = ("lr", "momentum", "nesterov", "beta2", "weight_decay")
    p = {key: vectors.hyperparameters[key] for key in keys}
    return _optimizer(vectors, NorMuonSettings(preset="official", **p))


@serves("optimizer/muon*")
def muon(vectors: Vectors) -> Iterator[Result]:
    """Keller Jordan's, torch's and Moonlight's: momentum's form and guard differ below float32."""
    from llmnorm.optim.settings import MuonSettings

    p = vectors.hyperparameters
    like_adamw = p.get("adjust_lr_fn") == "match_rms_adamw" or "scale" in p
    settings = MuonSettings(
        lr=p["lr"],
        momentum=p["momentum"],
        nesterov=p["nesterov"],
        weight_decay=p.get("weight_decay", p.get("wd")),
        update_rms="match_adamw" if like_adamw else "original",
    )
    return _optimizer(vectors, settings)


@serves("function/orthogonalize")
def orthogonalized(vectors: Vectors) -> Iterator[Result]:
    """Every input, also batched; bf16 against float64, relative to what the official code loses."""
    from llmnorm.optim.orthogonalize import orthogonalize

    names: dict[str, Any] = {"ns5": "jordan", "polar_express": "polar_express"}
    for recorded, ours in names.items():
        errors = {"f64": 0.0, "f32": 0.0, "bf16": 0.0}
        for key, x in vectors.below("x").items():
            stack = x if x.ndim == 3 else x.unsqueeze(0)
            exact = vectors[f"{recorded}_f64/{key}"].view(stack.shape)
            for short, dtype in (("f64", torch.float64), ("f32", torch.float32)):
                got = orthogonalize(stack.to(dtype), coefficients=ours)
                reference = vectors[f"{recorded}_{short}/{key}"].view(stack.shape)
                errors[short] = max(errors[short], largest(got.double() - reference))
            got = orthogonalize(stack, coefficients=ours, dtype=torch.bfloat16).double()
            lost = vectors.tolerance["measured"][f"{recorded}/{key}"]["bf16_vs_f64_rel_frobenius"]
            errors["bf16"] = max(errors["bf16"], _frobenius(got, exact) / lost)
        for short, key in (("f64", "f64_max_abs"), ("f32", "f32_max_abs")):
            yield Result(f"{ours} {short}", errors[short], vectors.tolerance[key])
        yield Result(f"{ours} bf16, ratio", errors["bf16"], 2.0)


@serves("function/lr_scale")
def lr_scale(vectors: Vectors) -> Iterator[Result]:
    """Factors on the learning rate."""
    from llmnorm.optim.muon import scale

    shapes = vectors["shapes"].tolist()
    for key, kind in (
        ("torch_original", "original"),
        ("torch_match_rms_adamw", "match_adamw"),
        ("moonlight", "match_adamw"),
    ):
        ours = torch.tensor([scale(kind, *shape) for shape in shapes], dtype=torch.float64)  # type: ignore[arg-type]
        yield Result(key, relative(ours, vectors[key]), 1e-12)


# --- measures ---


@serves("measure/farms")
def farms(vectors: Vectors) -> Iterator[Result]:
    """Pooled eigenvalues and Hill's exponent from the middle one on, of every weight.

    Their other start (`xmin_peak`, of the nearest fit) and learning rates are not ours.
    """
    from llmnorm.analysis.depth.spectra import hill, window_eigenvalues

    eigenvalues, alphas = 0.0, 0.0
    for number, config in enumerate(vectors.hyperparameters["configs"]):
        if config["fix_fingers"] != "xmin_mid":
            continue
        for index, alpha in enumerate(vectors[f"alpha_{number}"].tolist()):
            pooled = window_eigenvalues(
                vectors[f"weight_{index}"],
                window=config["num_row_samples"],
                ops=config["sampling_ops_per_dim"],
            )
            reference = vectors[f"eigs_{number}/{index}"]
            eigenvalues = max(eigenvalues, relative(pooled, reference))
            alphas = max(alphas, abs(hill(pooled) - alpha))
    yield Result("eigenvalues", eigenvalues, vectors.tolerance["eigs_max_rel"])
    yield Result("alpha", alphas, vectors.tolerance["alpha_max_abs"])


# --- the command ---


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that wants a gradient, so that the recorded tensor stays as it is."""
    return tensor.to(dtype, copy=True).requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def parts_of(kind: str) -> list[str]:
    """`norm/layernorm,rmsnorm` -> [norm/layernorm, norm/rmsnorm]."""
    parts: list[str] = []
    for group in kind.split(";"):
        room, slash, names = group.strip().partition("/")
        parts += [f"{room}/{name.strip()}" for name in names.split(",")] if slash else [room]
    return parts


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of safetensors files")
    parser.add_argument("--kind", default="*", help="only this kind, e.g. rope/yarn or 'rope/*'")
    parser.add_argument("--markdown", action="store_true", help="print the table for a page")
    options = parser.parse_args(arguments)
    files = sorted(options.directory.glob("*.safetensors"))
    if not files:
        print(f"golden: {options.directory}: no safetensors file", file=sys.stderr)
        return 2
    row = "{:<32} {:<32} {:<25} {:>9} {:>9}  {}"
    if options.markdown:
        row = "| {} | {} | {} | {} | {} | {} |"
    print(row.format("file", "kind", "precision", "error", "tolerance", "verdict"))
    if options.markdown:
        print(row.format(*["---"] * 6))
    failed = False
    for path in files:
        vectors = Vectors(path)
        for part in parts_of(vectors.kind):
            if not fnmatch.fnmatch(part, options.kind):
                continue
            served = [run for pattern, run in KINDS.items() if fnmatch.fnmatch(part, pattern)]
            if not served:
                print(row.format(path.stem, part, "", "", "", "no part"))
                continue
            for result in served[0](vectors):
                good = result.error <= result.tolerance
                failed |= not good
                numbers = (f"{result.error:.1e}", f"{result.tolerance:.1e}")
                verdict = "ok" if good else "ABOVE TOLERANCE"
                print(row.format(path.stem, part, result.precision, *numbers, verdict))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
