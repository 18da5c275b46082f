"""Run recorded vectors of official implementations against our parts.

    python tools/golden.py DIR [--kind NAME]

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


def relative(got: Tensor, reference: Tensor) -> float:
    """max|got - reference| / max|reference|; absolute where the reference is all zeros."""
    if got.shape != reference.shape:
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
    from llmnorm.nn.cache import RaggedCache
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
    assert layer.keys is not None and layer.values is not None
    return [
        (torch.stack(outs), vectors["step/out"]),
        (layer.keys[:, :, :steps], vectors["step/k_cache"]),
        (layer.values[:, :, :steps], vectors["step/v_cache"]),
    ]


# --- optimizers ---


@serves("optimizer/adamw")
def adamw(vectors: Vectors) -> Iterator[Result]:
    """Parameters after every step; the file decays its vector too, so all count as matrices."""
    from llmnorm.optim.adamw import AdamW
    from llmnorm.optim.groups import Groups
    from llmnorm.optim.settings import AdamWSettings

    limits = {"float64": "f64_max_abs", "float32": "f32_max_abs"}
    for precision, dtype in FLOATS.items():
        count = len([key for key in vectors.tensors if re.fullmatch(r"param_\d+", key)])
        parameters = {
            str(i): nn.Parameter(_leaf(vectors[f"param_{i}"], dtype)) for i in range(count)
        }
        optimizer = AdamW(Groups(parameters, {}), AdamWSettings(**vectors.hyperparameters))
        worst, step = 0.0, 0
        while f"grad_{step:03d}/0" in vectors.tensors:
            for name, parameter in parameters.items():
                parameter.grad = vectors[f"grad_{step:03d}/{name}"].to(dtype)
            optimizer.step()
            for name, parameter in parameters.items():
                after = vectors[f"param_after_{step:03d}/{name}"]
                worst = max(worst, largest(parameter.double() - after))
            step += 1
        yield Result(precision, worst, vectors.tolerance[limits[precision]])


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
    options = parser.parse_args(arguments)
    files = sorted(options.directory.glob("*.safetensors"))
    if not files:
        print(f"golden: {options.directory}: no safetensors file", file=sys.stderr)
        return 2
    row = "{:<30} {:<32} {:<22} {:>9} {:>9}  {}"
    print(row.format("file", "kind", "precision", "error", "tolerance", "verdict"))
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
