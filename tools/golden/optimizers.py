"""Optimizers: trajectories of several steps, orthogonalisation, factors of learning rates."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tools.golden.vectors import Result, Vectors, frobenius, largest, relative, serves


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
            path = max(path, frobenius(ours, recorded))
            change = frobenius(ours - ours_before[name], recorded - before[name])
            update, before[name] = max(update, change), recorded
        step += 1
    return Trajectory(step, largest_error, update, path)


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
            errors["bf16"] = max(errors["bf16"], frobenius(got, exact) / lost)
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
