"""NaP: constant norms, and what they do to the effective learning rate."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from llmnorm.optim import nap
from llmnorm.optim.adamw import AdamW
from llmnorm.optim.settings import MuonSettings
from tests.optim.rules import RULES, SHAPES, Run, draw, gradients


@pytest.mark.parametrize("name", RULES)
def test_norms_stay_what_they_were(name: str) -> None:
    """Oracle: the initial Frobenius norms; the direction is that of the plain step."""
    weights = {k: draw(*shape, seed=2) for k, shape in SHAPES.items()}
    settings = RULES[name](lr=0.05, weight_decay=0.0, nap=True)
    run = Run(settings, weights)
    plain = Run(RULES[name](lr=0.05, weight_decay=0.0), weights)
    for number, grads in enumerate(gradients(SHAPES, 5)):
        after, free = run.step(grads), plain.step(grads)
        for k, w in weights.items():
            assert abs(after[k].norm() / w.norm() - 1) < 1e-12
            if number == 0:
                assert torch.allclose(after[k], free[k] * (w.norm() / free[k].norm()), rtol=1e-12)


def test_the_norm_is_state() -> None:
    """Oracle: an optimizer over other weights that has loaded the state projects to its norms."""
    settings = MuonSettings(weight_decay=0.0, nap=True)
    run, other = Run(settings, {"w": draw(6, 4)}), Run(settings, {"w": 3 * draw(6, 4)})
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    after = other.step({"w": draw(6, 4, seed=1)})["w"]
    assert abs(after.norm() / draw(6, 4).norm() - 1) < 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_effective_rate_of_a_scale_invariant_weight_is_constant(kind: str) -> None:
    """Oracle: the run without projection whose rate is lr |W|^2 / rho^2 (SGD), with Adam's state
    replaced by its definition: lr |W| / rho on gradients that scale with 1 / |W|."""
    target, rate = draw(6, 4, seed=3), 0.05

    def loss(weight):
        return ((weight / weight.norm() - target / target.norm()) ** 2).sum()

    projected = nn.Parameter(draw(6, 4))
    free = nn.Parameter(draw(6, 4))
    rho = float(free.detach().norm())

    def make(parameter):
        group = {"params": [parameter], "lr": rate, "weight_decay": 0.0}
        adam = AdamW([group], betas=(0.0, 0.0), eps=1e-30)
        return adam if kind == "adam" else torch.optim.SGD([parameter], lr=rate)

    one, other = make(projected), make(free)
    nap.attach(one, {"w": projected})
    for _ in range(30):
        for parameter, optimizer in ((projected, one), (free, other)):
            optimizer.zero_grad()
            loss(parameter).backward()
        size = float(free.detach().norm()) / rho
        other.param_groups[0]["lr"] = rate * (size**2 if kind == "sgd" else size)
        one.step()
        other.step()
        here, there = projected.detach() / rho, free.detach() / free.detach().norm()
        assert (here - there).abs().max() < 1e-9


def test_decay_beside_nap_is_refused() -> None:
    """Oracle: the message."""
    with pytest.raises(ValidationError, match="set optimizer.weight_decay=0"):
        MuonSettings(nap=True)
