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
        chosen = vector if is_vector else settings
        if "bf16" in vectors.path.stem and not is_vector:
            chosen = chosen.model_copy(update={"precision": "bf16"})
        elif hasattr(chosen, "precision"):
            chosen = chosen.model_copy(update={"precision": "fp32"})
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
    row = "{:<32} {:<32} {:<25} {:>9} {:>9}  {}"
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
