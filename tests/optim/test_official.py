"""The official codes' arithmetic step by step in float64, written apart from ours.

One loop over matrices per rule, plain PyTorch, in the order of operations of the official code. The
settings that have no recorded vector of their own are held here; tolerance 1e-12.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.optim.settings import (
    AdamPSettings,
    CondaSettings,
    MuonSettings,
    NorMuonSettings,
    SOAPSettings,
)
from tests.optim.rules import SHAPES, Run, draw, gradients

STEPS = 9
GRADS = gradients(SHAPES, STEPS)
WEIGHTS = {name: draw(*shape, seed=9) for name, shape in SHAPES.items()}
WARMUP = {"from": 0.5, "to": 0.9, "steps": 4}


def newton_schulz(u: Tensor, floor: bool) -> Tensor:
    """Five steps of Jordan's polynomial; the norm plus 1e-7, or at least 1e-7."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm().clamp(min=1e-7) if floor else x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def muon(w: Tensor, grads: list[Tensor], s: Any) -> list[Tensor]:
    """KellerJordan/Muon, torch.optim.Muon or Moonlight's Muon."""
    w, m, path = w.clone(), torch.zeros_like(w), []
    for step, g in enumerate(grads):
        mu = 0.5 + (0.9 - 0.5) * min(step / 4, 1)
        if s.variant == "moonlight":
            m = mu * m + g
            u = g + mu * m if s.nesterov else m
        else:
            m = mu * m + (1 - mu) * g
            u = (1 - mu) * g + mu * m if s.nesterov else m
        o = newton_schulz(u, floor=s.variant == "torch")
        w = w * (1 - s.lr * s.weight_decay) - s.lr * 0.2 * max(w.shape) ** 0.5 * o
        path.append(w)
    return path


def normuon(w: Tensor, grads: list[Tensor], s: Any) -> list[Tensor]:
    """zichongli5/NorMuon, normuon.py."""
    w, m, v, path = w.clone(), torch.zeros_like(w), torch.zeros(len(w), 1).double(), []
    for step, g in enumerate(grads):
        mu = 0.5 + (0.9 - 0.5) * min(step / 4, 1)
        m = mu * m + (1 - mu) * g
        o = newton_schulz((1 - mu) * g + mu * m, floor=False)
        v = s.beta2 * v + (1 - s.beta2) * o.square().mean(1, keepdim=True)
        hat = o / (v.sqrt() + 1e-10)
        hat = hat * (o.norm() / (hat.norm() + 1e-10)) * max(1, w.shape[0] / w.shape[1]) ** 0.5
        w = w * (1 - s.lr * s.weight_decay) - s.lr * hat
        path.append(w)
    return path


def conda(w: Tensor, grads: list[Tensor], s: Any) -> list[Tensor]:
    """jie040109/Conda, conda.py and projector.py."""
    w, m, v, path = w.clone(), torch.zeros_like(w), torch.zeros_like(w), []
    b1, b2 = s.betas
    for step, g in enumerate(grads):
        m = b1 * m + (1 - b1) * g
        if step % s.refresh_every == 0:
            left, _, right = torch.linalg.svd(m, full_matrices=False)
        tall = w.shape[0] >= w.shape[1]
        rotated_g, rotated_m = (g @ right.T, m @ right.T) if tall else (left.T @ g, left.T @ m)
        v = b2 * v + (1 - b2) * rotated_g**2
        t, size = step + 1, s.lr
        if s.correct_bias:
            size = size * (1 - b2**t) ** 0.5 / (1 - b1**t)
        n = rotated_m / (v.sqrt() + s.eps)
        w = w - size * s.scale * (n @ right if tall else left @ n)
        w = w - s.lr * s.weight_decay * w
        path.append(w)
    return path


def adamp(w: Tensor, grads: list[Tensor], s: Any) -> list[Tensor]:
    """clovaai/AdamP, adamp.py."""
    w, m, v, path = w.clone(), torch.zeros_like(w), torch.zeros_like(w), []
    b1, b2 = s.betas
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        denominator = v.sqrt() / (1 - b2**t) ** 0.5 + s.eps
        p = (b1 * m + (1 - b1) * g if s.nesterov else m) / denominator
        factor = 1.0
        for rows in (len(w), 1):
            gv, wv, pv = g.reshape(rows, -1), w.reshape(rows, -1), p.reshape(rows, -1)
            cosines = torch.nn.functional.cosine_similarity(gv, wv, dim=1, eps=s.eps).abs()
            if cosines.max() < s.delta / wv.shape[1] ** 0.5:
                unit = wv / (wv.norm(dim=1, keepdim=True) + s.eps)
                p = (pv - unit * (unit * pv).sum(1, keepdim=True)).view_as(w)
                factor = s.wd_ratio
                break
        w = w * (1 - s.lr * s.weight_decay * factor) - s.lr / (1 - b1**t) * p
        path.append(w)
    return path


def soap(w: Tensor, grads: list[Tensor], s: Any) -> list[Tensor]:
    """nikhilvyas/SOAP, soap.py; the momentum rotated back and forth at every refresh."""
    w, m, v, path = w.clone(), torch.zeros_like(w), torch.zeros_like(w), []
    (b1, b2), b = s.betas, s.betas[1] if s.shampoo_beta is None else s.shampoo_beta
    sides = [n <= s.max_precond_dim for n in w.shape]
    grams = [torch.zeros(n, n).double() for n in w.shape]
    bases: list[Tensor] = []

    def rotated(x: Tensor, back: bool = False) -> Tensor:
        left, right = bases
        if sides[0]:
            x = (left if back else left.T) @ x
        return x @ (right.T if back else right) if sides[1] else x

    for t, g in enumerate(grads):
        if t:
            g_rotated = rotated(g)
            m, v = b1 * m + (1 - b1) * g_rotated, b2 * v + (1 - b2) * g_rotated**2
            size = s.lr
            if s.correct_bias:
                size = size * (1 - b2**t) ** 0.5 / (1 - b1**t)
            n = rotated(m / (v.sqrt() + s.eps), back=True)
            if s.normalize_grads:
                n = n / (1e-30 + (n**2).mean() ** 0.5)
            w = w - size * n
            w = w - s.lr * s.weight_decay * w
        grams = [b * x + (1 - b) * y for x, y in zip(grams, (g @ g.T, g.T @ g), strict=True)]
        if not t:
            bases = [torch.linalg.eigh(x)[1].flip(1) for x in grams]
        elif t % s.precondition_frequency == 0:
            m = rotated(m, back=True)
            for side in (i for i in (0, 1) if sides[i]):
                order = (
                    (bases[side].T @ grams[side] @ bases[side]).diagonal().argsort(descending=True)
                )
                v = v[order] if side == 0 else v[:, order]
                bases[side] = torch.linalg.qr(grams[side] @ bases[side][:, order])[0]
            m = rotated(m)
        path.append(w)
    return path


CASES: dict[str, tuple[Any, Any]] = {
    **{
        f"muon {variant}{'' if nesterov else ' without Nesterov'}": (
            muon,
            MuonSettings(variant=variant, nesterov=nesterov, momentum=WARMUP, lr=0.05),
        )
        for variant in ("jordan", "torch", "moonlight")
        for nesterov in (True, False)
    },
    "normuon": (normuon, NorMuonSettings(momentum=WARMUP)),
    "conda": (conda, CondaSettings(refresh_every=3)),
    "conda without bias correction": (conda, CondaSettings(refresh_every=3, correct_bias=False)),
    "adamp": (adamp, AdamPSettings(delta=1.0)),
    "adamp with Nesterov": (adamp, AdamPSettings(delta=1.0, nesterov=True, lr=0.05)),
    "soap": (soap, SOAPSettings(precondition_frequency=2, max_precond_dim=8)),
    "soap, other rate of the Gram matrices": (
        soap,
        SOAPSettings(precondition_frequency=2, max_precond_dim=8, shampoo_beta=0.8),
    ),
    "soap without bias correction": (
        soap,
        SOAPSettings(precondition_frequency=3, max_precond_dim=8, correct_bias=False),
    ),
    "soap with normalised steps": (
        soap,
        SOAPSettings(precondition_frequency=2, max_precond_dim=8, normalize_grads=True),
    ),
    "soap with normalised steps, without bias correction": (
        soap,
        SOAPSettings(
            precondition_frequency=2, max_precond_dim=8, normalize_grads=True, correct_bias=False
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_setting_is_the_official_arithmetic(case: str) -> None:
    """Oracle: the loops above, on gradients of three sizes."""
    official, settings = CASES[case]
    for size in (1.0, 1e-3) if "muon" in case else (1.0,):
        grads = [{k: size * g for k, g in step.items()} for step in GRADS]
        paths = {k: official(w, [g[k] for g in grads], settings) for k, w in WEIGHTS.items()}
        run = Run(settings, WEIGHTS)
        hyperparameters = settings.hyperparameters(lambda step: 1.0, STEPS)
        for step, grad in enumerate(grads):
            hyperparameters.set(run.optimizer.param_groups, step)
            for k, w in run.step(grad).items():
                assert (w - paths[k][step]).abs().max() < 1e-12, f"{k}, step {step}"


def test_every_new_setting_changes_the_steps() -> None:
    """Oracle: the first and last weights of the plain rule, which must differ by more than the
    tolerance above."""
    for name, plain in (("muon jordan", "muon torch"), ("muon torch", "muon moonlight")):
        one, other = (
            CASES[n][0](WEIGHTS["tall"], [g["tall"] for g in GRADS], CASES[n][1])
            for n in (name, plain)
        )
        assert (one[-1] - other[-1]).abs().max() > 1e-10
    for rule in ("conda", "adamp", "soap"):
        paths = {
            n: f(WEIGHTS["wide"], [g["wide"] for g in GRADS], s)
            for n, (f, s) in CASES.items()
            if n.startswith(rule)
        }
        ends = [p[-1] for p in paths.values()]
        for number, end in enumerate(ends):
            assert all((end - e).abs().max() > 1e-6 for e in ends[:number]), list(paths)[number]
