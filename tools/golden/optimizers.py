"""Optimizers: trajectories of several steps, orthogonalisation, factors of learning rates.

A trajectory file holds `param_I`, the initial parameter I; `grad_TTT/I`, its gradient at step TTT
(from 0); and `param_after_TTT/I`, the parameter after that step. Our optimizer gets the gradients,
and the error is the largest one over all parameters and steps.

Settings that a header leaves out have the default of the official class, which is written at the
function of the kind.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tools.golden.vectors import (
    Header,
    NotServed,
    Result,
    Vectors,
    built,
    frobenius,
    relative,
    serves,
)

JORDAN = [3.4445, -4.7750, 2.0315]


class Compared(NamedTuple):
    """One parameter before and after one step, (rows, columns) in float64."""

    before: Tensor
    ours: Tensor
    recorded_before: Tensor
    recorded: Tensor


def trajectory(
    vectors: Vectors, dtype: torch.dtype, settings: Any, vector: Any | None
) -> list[list[Compared]]:
    """Feed the recorded gradients; a list of parameters for every step.

    Args:
        settings: of the optimizer over the matrices.
        vector: settings for one-dimensional parameters, as matrices of one column; None: the
            official class has no rule for them.
    """
    starts = {k[6:]: v for k, v in vectors.tensors.items() if re.fullmatch(r"param_\d+", k)}
    for name, start in starts.items():
        if start.ndim not in (1, 2) or (start.ndim == 1 and vector is None):
            takes = "matrices" if vector is None else "matrices and vectors"
            raise NotServed(f"param_{name}", list(start.shape), f"the rule takes {takes}")
    parameters = {
        name: nn.Parameter(_matrix(start).to(dtype, copy=True)) for name, start in starts.items()
    }
    optimizers = [
        _started(chosen, {name: parameters[name] for name in members})
        for chosen, ndim in ((settings, 2), (vector, 1))
        if (members := [name for name in starts if starts[name].ndim == ndim])
    ]
    recorded_before = {name: _matrix(start).double() for name, start in starts.items()}
    steps: list[list[Compared]] = []
    names = {key.split("/")[0] for key in vectors.tensors if key.startswith("grad_")}
    for step in sorted(names, key=lambda name: int(name.removeprefix("grad_"))):
        before = {name: _now(p) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = _matrix(vectors[f"{step}/{name}"]).to(dtype)
        for optimizer in optimizers:
            optimizer(len(steps))
        after = step.replace("grad_", "param_after_")
        recorded = {name: _matrix(vectors[f"{after}/{name}"]).double() for name in parameters}
        steps.append(
            [
                Compared(before[n], _now(p), recorded_before[n], recorded[n])
                for n, p in parameters.items()
            ]
        )
        recorded_before = recorded
    return steps


def _now(parameter: nn.Parameter) -> Tensor:
    """A copy, since the next step changes the parameter in place."""
    return parameter.detach().to(torch.float64, copy=True)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor


def _started(settings: Any, members: dict[str, nn.Parameter]) -> Callable[[int], None]:
    """An optimizer over `members`; the call makes a step (from 0) of it."""
    from llmnorm.optim.groups import Groups

    optimizer = settings.build(Groups(members, {}))
    hyperparameters = settings.hyperparameters(lambda step: 1.0, 1)

    def step(number: int) -> None:
        hyperparameters.set(optimizer.param_groups, number)
        optimizer.step()

    return step


def _optimizer(vectors: Vectors, settings: Any, vector: Any | None = None) -> Iterator[Result]:
    """The precisions that the file has limits for: elements, or Frobenius norms of bf16 products.

    Raises:
        NotServed: the header has a setting that the function of the kind has not read.
    """
    for key, value in vectors.hyperparameters.unread():
        raise NotServed(key, value)
    if "update_rel_frobenius" in vectors.tolerance:
        products = {"precision": "fp32" if "replaced by float32" in vectors.dtype else "bf16"}
        steps = trajectory(
            vectors, vectors["param_0"].dtype, settings.model_copy(update=products), vector
        )
        errors = {
            "update": [
                frobenius(c.ours - c.before, c.recorded - c.recorded_before)
                for step in steps
                for c in step
            ],
            "trajectory": [frobenius(c.ours, c.recorded) for step in steps for c in step],
        }
        for what, found in errors.items():
            tolerance = vectors.tolerance.get(f"{what}_rel_frobenius")
            if tolerance is None:
                continue
            yield Result(
                f"{products['precision']} {what}, {len(steps)} steps", max(found), tolerance
            )
        return
    if hasattr(settings, "precision"):
        settings = settings.model_copy(update={"precision": "fp32"})
    for limit in vectors.limits():
        steps = trajectory(vectors, limit.dtype, settings, vector)
        error = max(limit.measure(c.ours, c.recorded) for step in steps for c in step)
        yield Result(f"{limit.precision}, {len(steps)} steps", error, limit.tolerance)


def _arguments(vectors: Vectors, **defaults: Any) -> dict[str, Any]:
    """The official class's arguments: the header's, else its defaults."""
    return {key: vectors.hyperparameters.get(key, value) for key, value in defaults.items()}


@serves("optimizer/adamw")
def adamw(vectors: Vectors) -> Iterator[Result]:
    """torch.optim.AdamW; it decays vectors too, so all count as matrices."""
    from llmnorm.optim.settings import AdamWSettings

    vectors.hyperparameters.only(amsgrad=False, maximize=False)
    p = _arguments(vectors, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    settings = built(AdamWSettings, p)
    return _optimizer(vectors, settings, settings)


@serves("optimizer/adamp")
def adamp(vectors: Vectors) -> Iterator[Result]:
    """Vectors are never projected: delta 0."""
    from llmnorm.optim.settings import AdamPSettings

    p = _arguments(vectors, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    p |= _arguments(vectors, delta=0.1, wd_ratio=0.1, nesterov=False)
    settings = built(AdamPSettings, p)
    return _optimizer(vectors, settings, settings.model_copy(update={"delta": 0.0}))


@serves("optimizer/conda")
def conda(vectors: Vectors) -> Iterator[Result]:
    """Vectors get the official class's Adam, which is the rule of one column at scale 1."""
    from llmnorm.optim.settings import CondaSettings

    vectors.hyperparameters.only(proj_type="std")
    p = _arguments(vectors, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    p |= _arguments(vectors, scale=1.0, correct_bias=True)
    names = {"refresh_every": "update_proj_gap"}
    p["refresh_every"] = vectors.hyperparameters["update_proj_gap"]
    auxiliary_lr = vectors.hyperparameters.get("aux_lr", p["lr"])
    settings = built(CondaSettings, p, names)
    vector = settings.model_copy(update={"scale": 1.0, "lr": auxiliary_lr})
    yield from _optimizer(vectors, settings, vector)
    for result in _optimizer(vectors, settings.model_copy(update={"basis": "eigh"}), vector):
        yield result._replace(precision=result.precision.replace(",", " eigh,"))


@serves("optimizer/soap")
def soap(vectors: Vectors) -> Iterator[Result]:
    """A vector has no bases."""
    from llmnorm.optim.settings import SOAPSettings

    only = {"precondition_1d": False, "merge_dims": False, "data_format": "channels_first"}
    vectors.hyperparameters.only(**only)
    p = _arguments(vectors, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01)
    p |= _arguments(vectors, precondition_frequency=10, max_precond_dim=10_000, shampoo_beta=-1)
    p |= _arguments(vectors, correct_bias=True, normalize_grads=False)
    if p["shampoo_beta"] < 0:  # the official class's "as the second moment"
        p["shampoo_beta"] = None
    settings = built(SOAPSettings, p)
    return _optimizer(vectors, settings, settings.model_copy(update={"max_precond_dim": 0}))


@serves("optimizer/normuon")
def normuon(vectors: Vectors) -> Iterator[Result]:
    """The preset `official`."""
    from llmnorm.optim.settings import NorMuonSettings

    p = _arguments(vectors, lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True, beta2=0.95)
    p["coefficients"] = _coefficients(vectors.hyperparameters)
    return _optimizer(vectors, built(NorMuonSettings, {"preset": "official", **p}))


@serves("optimizer/muon")
def muon(vectors: Vectors) -> Iterator[Result]:
    """Keller Jordan's."""
    p = _arguments(vectors, lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True)
    return _muon(vectors, p | {"update_rms": "original", "variant": "jordan"})


@serves("optimizer/muon_torch")
def muon_torch(vectors: Vectors) -> Iterator[Result]:
    """torch.optim.Muon."""
    p = _arguments(vectors, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True)
    units = {None: "original", "original": "original", "match_rms_adamw": "match_adamw"}
    vectors.hyperparameters.only(adjust_lr_fn=tuple(units))
    unit = units[vectors.hyperparameters.get("adjust_lr_fn")]
    return _muon(vectors, p | {"update_rms": unit, "variant": "torch"})


@serves("optimizer/muon_moonlight")
def muon_moonlight(vectors: Vectors) -> Iterator[Result]:
    """Moonlight's; its decay is called `wd`."""
    vectors.hyperparameters.only(scale="0.2*sqrt(max(rows,cols))")
    p = _arguments(vectors, lr=1e-3, momentum=0.95, nesterov=True)
    header = vectors.hyperparameters
    p["weight_decay"] = header.get("wd", header.get("weight_decay", 0.1))
    return _muon(vectors, p | {"update_rms": "match_adamw", "variant": "moonlight"})


def _muon(vectors: Vectors, values: dict[str, Any]) -> Iterator[Result]:
    from llmnorm.optim.settings import MuonSettings

    coefficients = _coefficients(vectors.hyperparameters)
    return _optimizer(vectors, built(MuonSettings, values | {"coefficients": coefficients}))


def _coefficients(header: Mapping[str, Any]) -> str:
    """Our name for the polynomials of a header's iteration; left-out figures are Jordan's.

    Its keys are `coefficients`, `steps`, `eps` and `norm_factor`, some of them behind `ns_`.

    Raises:
        NotServed: we have no such iteration.
    """
    from llmnorm.optim.orthogonalize import ITERATIONS, Iteration

    def read(key: str, value: Any) -> tuple[str, Any]:
        found = f"ns_{key}" if f"ns_{key}" in header else key
        return found, header.get(found, value)

    coefficients = read("coefficients", JORDAN)
    one = not isinstance(coefficients[1][0], list)  # the same polynomial at every step
    steps = read("steps", 5 if one else len(coefficients[1]))
    wanted = [coefficients[1]] * steps[1] if one else coefficients[1][: steps[1]]
    factor, eps = read("norm_factor", 1.0), read("eps", 1e-7)
    figures: list[tuple[tuple[str, Any], Callable[[Iteration], bool]]] = [
        (coefficients, lambda it: [list(it.steps[0])] == wanted[:1]),
        (steps, lambda it: [list(polynomial) for polynomial in it.steps] == wanted),
        (factor, lambda it: it.margin == factor[1]),
        (eps, lambda it: it.guard == eps[1]),
    ]
    served = dict(ITERATIONS)
    for (key, value), fits in figures:
        served = {name: iteration for name, iteration in served.items() if fits(iteration)}
        if not served:
            raise NotServed(key, value)
    return next(iter(served))


@serves("function/orthogonalize")
def orthogonalized(vectors: Vectors) -> Iterator[Result]:
    """Every input, also batched; bf16 against float64, relative to what the official code loses."""
    from llmnorm.optim.orthogonalize import orthogonalize

    header = vectors.hyperparameters
    iterations = {key: header[key] for key in header if isinstance(header[key], Header)}
    ours = {key: _coefficients(p) for key, p in iterations.items()}
    for key, value in header.unread():
        raise NotServed(key, value)
    inputs = {key: x if x.ndim == 3 else x.unsqueeze(0) for key, x in vectors.below("x").items()}
    for recorded, coefficients in ours.items():
        name: Any = coefficients
        for limit in vectors.limits():
            short = limit.precision.replace("float", "f")
            errors = [
                limit.measure(
                    orthogonalize(x.to(limit.dtype), coefficients=name),
                    vectors[f"{recorded}_{short}/{key}"].view(x.shape),
                )
                for key, x in inputs.items()
            ]
            yield Result(f"{name} {short}", max(errors), limit.tolerance)
        times = re.search(r"within (\d+(?:\.\d+)?)x", str(vectors.tolerance.get("bf16", "")))
        if times is None:
            continue
        ratios = []
        for key, x in inputs.items():
            got = orthogonalize(x, coefficients=name, dtype=torch.bfloat16).double()
            exact = vectors[f"{recorded}_f64/{key}"].view(x.shape)
            lost = vectors.tolerance["measured"][f"{recorded}/{key}"]["bf16_vs_f64_rel_frobenius"]
            ratios.append(frobenius(got, exact) / lost)
        yield Result(f"{name} bf16, ratio", max(ratios), float(times[1]))


@serves("function/lr_scale")
def lr_scale(vectors: Vectors) -> Iterator[Result]:
    """Factors on the learning rate; DION's sqrt(rows / columns) is no unit of ours."""
    from llmnorm.optim.muon import scale

    lr = vectors.hyperparameters.get("lr", 1.0)
    for key, value in vectors.hyperparameters.unread():
        raise NotServed(key, value)
    # The recorded file says in words: 1e-12, relative.
    limit = float(next(iter(vectors.tolerance.values()), 1e-12))
    units: dict[str, Any] = {
        "torch_original": "original",
        "torch_match_rms_adamw": "match_adamw",
        "moonlight": "match_adamw",
        "dion_rms_norm": "match_adamw",
    }
    shapes = vectors["shapes"].tolist()
    for key, unit in units.items():
        if key in vectors.tensors:
            factors = [lr * scale(unit, *shape) for shape in shapes]
            ours = torch.tensor(factors, dtype=torch.float64)
            yield Result(key, relative(ours, vectors[key]), limit)
