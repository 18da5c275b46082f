"""Norms: outputs, gradients, running statistics of several steps."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.golden.vectors import FLOATS, Result, Vectors, absolute, largest, leaf, relative, serves


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
    x = leaf(saved["x"], dtype)
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
        recorded = saved[f"grad_{name}"]
        if case["op"] == "layernorm" and name == "weight" and x.shape[-1] == 1:
            # x - mean is exactly 0; what was recorded is the rounding of that difference, which
            # other processors round otherwise: compared on the scale of its two equal terms.
            terms = saved["grad_out"] * saved["x"] / case["eps"] ** 0.5
            yield largest(parameter.grad - recorded) / largest(terms)
        else:
            yield relative(parameter.grad, recorded)


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
        measure = relative if precision == "float32" else absolute
        worst, number = 0.0, 0
        while (step := f"{number:03d}") and f"x_{step}" in vectors.tensors:
            pad = vectors.tensors.get(f"pad_mask_{step}")
            norm.begin(None if pad is None else to_rows(~pad))
            x = leaf(vectors[f"x_{step}"], dtype)
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


@serves("norm/dyt")
def dynamic_tanh(vectors: Vectors) -> Iterator[Result]:
    """Output and gradients, that of alpha included."""
    from llmnorm.nn.norms.settings import DyTSettings

    norm = DyTSettings(alpha=vectors.hyperparameters["alpha_init"]).build(16).double()
    norm.load_state_dict({key: vectors[key] for key in ("alpha", "weight", "bias")})
    x = leaf(vectors["x"], torch.float64)
    out = norm(x)
    out.backward(vectors["grad_out"])
    pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
    pairs += [(p.grad, vectors[f"grad_{name}"]) for name, p in norm.named_parameters()]
    worst = max(absolute(got, expected) for got, expected in pairs)
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
                x = leaf(saved["x"], dtype)
                out = settings(eps=eps).build(x.shape[-1]).to(dtype)(x)
                out.backward(saved["grad_out"].to(dtype))
                pairs = ((out, saved["out"]), (x.grad, saved["grad_x"]))
                worst = max(worst, *(absolute(got, expected) for got, expected in pairs))
        key = "f64_functions" if precision == "float64" else "f32_functions"
        yield Result(precision, worst, vectors.tolerance[key])
