"""Norms: outputs, gradients, running statistics of several steps."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.golden.vectors import (
    KINDS,
    Limit,
    NotServed,
    Result,
    Vectors,
    built,
    largest,
    leaf,
    serves,
)


def _norm_cases(vectors: Vectors, operator: str, settings: type) -> Iterator[Result]:
    """Output and gradients in float64; the output in float32, which is what its limit is for."""
    for limit in vectors.limits():
        errors = [0.0]
        for case in vectors.hyperparameters["cases"]:
            if f"norm/{case['op']}" not in KINDS:
                raise NotServed("op", case["op"])
            if case["op"] == operator:
                errors += _norm_errors(vectors.below(case["key"]), case, settings, limit)
            else:
                case.ignore(*case)
        yield Result(limit.precision, max(errors), limit.tolerance)


def _norm_errors(
    saved: dict[str, Tensor], case: Any, settings: type, limit: Limit
) -> Iterator[float]:
    has_bias = {} if case["op"] == "rmsnorm" and "bias" not in saved else {"bias": "bias" in saved}
    norm = built(settings, {"eps": case["eps"], **has_bias}).build(saved["x"].shape[-1])
    norm.to(limit.dtype)
    norm.load_state_dict({key: saved[key] for key in ("weight", "bias") if key in saved}, False)
    x = leaf(saved["x"], limit.dtype)
    out = norm(x)
    yield limit.measure(out, saved["out"])
    if limit.precision != "float64":
        return
    out.backward(saved["grad_out"].to(limit.dtype))
    assert x.grad is not None
    if case["op"] == "rmsnorm" and x.shape[-1] == 1:
        # The difference of two equal terms, of which eps alone survives: the recorded gradient is
        # itself 1.6e-7 off the exact one, so it is compared on the scale of those terms.
        terms = saved["grad_out"] * saved["out"] / saved["x"]
        yield largest(x.grad - saved["grad_x"]) / largest(terms)
    else:
        yield limit.measure(x.grad, saved["grad_x"])
    for name, parameter in norm.named_parameters():
        if name not in saved:
            continue
        assert parameter.grad is not None
        recorded = saved[f"grad_{name}"]
        if case["op"] == "layernorm" and name == "weight" and x.shape[-1] == 1:
            # x - mean is exactly 0; what was recorded is the rounding of that difference, which
            # other processors round otherwise: compared on the scale of its two equal terms.
            terms = saved["grad_out"] * saved["x"] / case["eps"] ** 0.5
            yield largest(parameter.grad - recorded) / largest(terms)
        else:
            yield limit.measure(parameter.grad, recorded)


@serves("norm/layernorm")
def layer_norm(vectors: Vectors) -> Iterator[Result]:
    """Layer norm, with or without an offset."""
    from llmnorm.nn.norms.settings import LayerNormSettings

    return _norm_cases(vectors, "layernorm", LayerNormSettings)


@serves("norm/rmsnorm")
def rms_norm(vectors: Vectors) -> Iterator[Result]:
    """RMS norm."""
    from llmnorm.nn.norms.settings import RMSNormSettings

    return _norm_cases(vectors, "rmsnorm", RMSNormSettings)


@serves("norm/rmsnorm bf16 cast modes")
def rms_norm_cast_modes(vectors: Vectors) -> Iterator[Result]:
    """In units of the last place: `llama` none, `fp32_affine` one (order of the sum)."""
    from llmnorm.nn.norms.settings import RMSNormSettings

    eps = vectors.hyperparameters["eps"]
    cases = sorted({key.split("/")[0] for key in vectors.tensors})
    for mode, allowed in {"llama": 0, "fp32_affine": 1}.items():
        errors = [0.0]
        for number in cases:
            saved = vectors.below(number)
            width, dtype = saved["x"].shape[-1], saved["x"].dtype
            norm = built(RMSNormSettings, {"eps": eps, "cast_mode": mode}).build(width)
            norm.to(saved["weight"].dtype).load_state_dict({"weight": saved["weight"]})
            errors.append(_ulps(norm(saved["x"]), saved[f"out_{mode}"]))
            constant = (re.fullmatch(r"out_const_eps(\d.*)", key) for key in saved)
            for key, own_eps in ((m[0], float(m[1])) for m in constant if m):
                plain = built(RMSNormSettings, {"eps": own_eps, "cast_mode": mode}).build(width)
                errors.append(_ulps(plain.to(dtype)(saved["x_const"]), saved[key]))
        limit = max(allowed, *(v for k, v in vectors.tolerance.items() if k.startswith("max_ulp")))
        yield Result(f"{str(dtype).removeprefix('torch.')} ulp, {mode}", max(errors), limit)


def _ulps(got: Tensor, reference: Tensor) -> float:
    """Distance in steps of a 16-bit dtype: bit patterns of one sign count up with the value."""
    if got.dtype != reference.dtype or got.element_size() != 2:
        return torch.inf
    bits = [t.detach().view(torch.int16).to(torch.int32) for t in (got, reference)]
    ordered = [torch.where(b < 0, -(b & 0x7FFF), b) for b in bits]
    return float((ordered[0] - ordered[1]).abs().max())


@serves("norm/powernorm")
def power_norm(vectors: Vectors) -> Iterator[Result]:
    """Output, gradients and statistics after every step, warm-up included; evaluation."""
    from llmnorm.nn.norms.settings import PowerNormSettings

    names = {"eps": "eps", "forward_decay": "alpha_fwd", "backward_decay": "alpha_bkw"}
    names |= {"warmup": "warmup_iters", "groups": "group_num"}
    assert "warmup_iters" in vectors.hyperparameters, "no warmup_iters: our default is not theirs"
    settings = vectors.settings(PowerNormSettings, names, count_padding=True, allow_leak=True)
    if why := settings.refusal(len(vectors["weight"])):
        raise NotServed("group_num", settings.groups, why)
    remaining = 1 - settings.backward_decay

    def statistics(norm: Any) -> dict[str, Tensor]:
        return {"running_phi": norm.running_square, "ema_gz": norm.running_gradient / remaining}

    begun = {"running_square": vectors.tensors.get("init_running_phi")}
    if (ema := vectors.tensors.get("init_ema_gz")) is not None:
        begun["running_gradient"] = ema * remaining
    # Rows are (length, batch) here.
    return _running(vectors, settings, lambda mask: mask.t(), statistics, begun)


@serves("norm/unified")
def unified_norm(vectors: Vectors) -> Iterator[Result]:
    """Output, gradients and statistics after every step: smoothing, filter, kappa; evaluation."""
    from llmnorm.nn.norms.settings import UnifiedNormSettings

    names = {"eps": "eps", "window": "window_size", "warmup": "warmup_iters"}
    names |= {"momentum": "momentum"}
    outliers = vectors.hyperparameters.get("outlier_filtration", False)
    fixed = {"filter": "official" if outliers else "off", "count_padding": True}
    settings = vectors.settings(UnifiedNormSettings, names, **fixed, allow_leak=True)
    ours = {
        "running_var": "running_square",
        "ema_gz": "running_gradient",
        "buffer_x2": "window_square",
        "buffer_gz": "window_gradient",
    }

    def statistics(norm: Any) -> dict[str, Tensor]:
        return {theirs: getattr(norm, name) for theirs, name in ours.items()}

    begun = {name: vectors.tensors.get(f"init_{theirs}") for theirs, name in ours.items()}
    return _running(vectors, settings, lambda mask: mask, statistics, begun)


def _running(
    vectors: Vectors,
    settings: Any,
    to_rows: Callable[[Tensor], Tensor],
    statistics: Callable[[Any], dict[str, Tensor]],
    begun: dict[str, Tensor | None],
) -> Iterator[Result]:
    """Every step of a norm with running statistics; float32 against the float64 values.

    Args:
        to_rows: a recorded mask -> (batch, length), or any order that x's tokens have.
        statistics: our norm's by the names that the file has for them.
        begun: statistics that the file starts from; None: those of a new norm.
    """
    steps = sorted(key[2:] for key in vectors.tensors if re.fullmatch(r"x_\d+", key))
    if (iterations := vectors.tensors.get("init_iters")) is not None:
        begun["steps"] = iterations.reshape(())
    state = {name: vectors.tensors.get(name) for name in ("weight", "bias")} | begun
    for limit in vectors.limits() if steps else ():
        norm = settings.build(vectors[f"x_{steps[0]}"].shape[-1]).to(limit.dtype)
        norm.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)
        errors = []
        for step in steps:
            pad = vectors.tensors.get(f"pad_mask_{step}")
            norm.begin(None if pad is None else to_rows(~pad))
            x = leaf(vectors[f"x_{step}"], limit.dtype)
            out = norm(x)
            norm.zero_grad()
            out.backward(vectors[f"grad_out_{step}"].to(limit.dtype))
            norm.commit()
            got = {"out": out, "grad_x": x.grad, **statistics(norm)}
            got |= {f"grad_{name}": getattr(norm, name).grad for name in ("weight", "bias")}
            for name, ours in got.items():
                if name in ("out", "grad_x") or f"{name}_{step}" in vectors.tensors:
                    errors.append(limit.measure(ours, vectors[f"{name}_{step}"]))
        if "eval_out" in vectors.tensors:
            errors.append(limit.measure(norm.eval()(x), vectors["eval_out"]))
        yield Result(limit.precision, max(errors), limit.tolerance)


@serves("norm/dyt")
def dynamic_tanh(vectors: Vectors) -> Iterator[Result]:
    """Output and gradients, that of alpha included; with or without an offset."""
    from llmnorm.nn.norms.settings import DyTSettings

    names = ("alpha", "weight", "bias")
    state = {key: vectors[key] for key in names if key in vectors.tensors}
    vectors.hyperparameters.only(channels_last=True)
    settings = vectors.settings(DyTSettings, {"alpha": "alpha_init"}, bias="bias" in state)
    for limit in vectors.limits():
        norm = settings.build(vectors["x"].shape[-1]).to(limit.dtype)
        norm.load_state_dict(state)
        x = leaf(vectors["x"], limit.dtype)
        out = norm(x)
        out.backward(vectors["grad_out"].to(limit.dtype))
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        pairs += [(p.grad, vectors[f"grad_{name}"]) for name, p in norm.named_parameters()]
        worst = max(limit.measure(got, expected) for got, expected in pairs)
        yield Result(limit.precision, worst, limit.tolerance)


@serves("norm/crmsnorm")
def crms_norm(vectors: Vectors) -> Iterator[Result]:
    """Output and gradient; beside it RMS norm and layer norm without gain on the same kind."""
    from llmnorm.nn.norms.settings import CRMSNormSettings, LayerNormSettings, RMSNormSettings

    p = vectors.hyperparameters
    # What the file's vision transformer is made of, for placements.py.
    p.ignore("depth", "dim", "eps_vit", "heads", "image", "mlp_dim", "num_classes", "patch")
    parts: dict[str, Any] = {
        "crms_norm": CRMSNormSettings,
        "rms_norm": RMSNormSettings,
        "layer_norm": LayerNormSettings,
    }
    for limit in vectors.limits("functions"):
        errors = []
        for number, eps in enumerate(p["eps"]):
            for name, settings in parts.items():
                if saved := vectors.below(f"{name}_{number}"):
                    x = leaf(saved["x"], limit.dtype)
                    norm = built(settings, {"eps": eps}).build(x.shape[-1]).to(limit.dtype)
                    out = norm(x)
                    out.backward(saved["grad_out"].to(limit.dtype))
                    errors.append(limit.measure(out, saved["out"]))
                    errors.append(limit.measure(x.grad, saved["grad_x"]))
        yield Result(limit.precision, max(errors), limit.tolerance)
