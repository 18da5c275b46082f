"""AdamW against torch's recorded float64 trajectory and against the algorithm written out."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from llmnorm.optim.groups import Groups, split
from llmnorm.optim.settings import AdamWSettings
from llmnorm.optim.state import named_state

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "adamw_wd_f64.safetensors"


def make(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*s, generator=generator, dtype=dtype)) for s in shapes]


def test_the_recorded_trajectory() -> None:
    # Oracle: torch 2.13's single-tensor path, recorded in float64.
    with safe_open(GOLDEN, "pt") as golden:
        header = golden.metadata()
        hyper = json.loads(header["hyperparameters"])
        keys = list(golden.keys())
        count = sum(key.startswith("param_") and key[6:].isdigit() for key in keys)
        parameters = {f"p{i}": nn.Parameter(golden.get_tensor(f"param_{i}")) for i in range(count)}
        settings = AdamWSettings(
            lr=hyper["lr"],
            betas=hyper["betas"],
            eps=hyper["eps"],
            weight_decay=hyper["weight_decay"],
        )
        optimizer = settings.build(Groups(parameters, {}))
        for step in range(int(header["steps"])):
            for i, parameter in enumerate(parameters.values()):
                parameter.grad = golden.get_tensor(f"grad_{step:03d}/{i}").to(parameter.dtype)
            optimizer.step()
            for i, parameter in enumerate(parameters.values()):
                expected = golden.get_tensor(f"param_after_{step:03d}/{i}")
                assert (parameter - expected).abs().max() <= 1e-13


def test_the_algorithm_written_out() -> None:
    # Oracle: Algorithm 2 of arXiv 1711.05101 in plain tensors; decay on the matrix only.
    matrix, vector = make([(5, 3), (3,)])
    expected = [matrix.detach().clone(), vector.detach().clone()]
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in expected]
    settings = AdamWSettings(lr=0.01, weight_decay=0.3, auxiliary={"lr": 0.002})
    optimizer = settings.build(Groups({"m": matrix}, {"v": vector}))
    generator = torch.Generator().manual_seed(1)
    (b1, b2), eps = settings.betas, settings.eps
    for t in range(1, 6):
        for i, (parameter, lr, decay) in enumerate([(matrix, 0.01, 0.3), (vector, 0.002, 0.0)]):
            g = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = g
            m, v = moments[i]
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            denominator = (v / (1 - b2**t)).sqrt() + eps
            expected[i] = expected[i] * (1 - lr * decay) - lr * (m / (1 - b1**t)) / denominator
        optimizer.step()
        assert (matrix - expected[0]).abs().max() < 1e-14
        assert (vector - expected[1]).abs().max() < 1e-14


class Tiny(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_groups_are_a_partition_of_the_trainable_parameters() -> None:
    # Oracle: the list written by hand.
    for tied in (False, True):
        groups = split(Tiny(tied))
        assert set(groups.matrices) == {"hidden.weight"}
        outside = {"embed.weight", "hidden.bias", "norm.weight", "norm.bias"}
        assert set(groups.auxiliary) == outside | (set() if tied else {"head.weight"})


def test_the_state_is_there_before_the_first_step_and_named() -> None:
    # Oracle: a step after loading the initial state equals a step without it.
    model = Tiny(False)
    optimizer = AdamWSettings().build(split(model))
    state = named_state(optimizer, model)
    assert {name.rpartition(".")[0] for name in state} == set(split(model).matrices) | set(
        split(model).auxiliary
    )
    assert {n.rpartition(".")[2] for n in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(t.dtype == torch.float32 and not t.any() for t in state.values())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = named_state(optimizer, model)
    assert all(after[name] is state[name] for name in state), "steps replace no tensor"
    assert after["hidden.weight.step"] == 1


def test_groups_without_members_are_left_out() -> None:
    # Oracle: torch refuses an empty list of groups; one group alone must work.
    (matrix,) = make([(2, 2)])
    assert len(AdamWSettings().build(Groups({"m": matrix}, {})).param_groups) == 1
