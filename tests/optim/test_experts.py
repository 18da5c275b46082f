"""Stacks of experts, transposed and fused matrices, under every rule; stacks and routers told."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmnorm.models.foreign import empty_foreign
from llmnorm.models.fused import fused_rows
from llmnorm.optim.build import describe, describe_matrices
from llmnorm.optim.groups import Groups, matrices, split
from llmnorm.optim.matrix import Layout
from llmnorm.optim.settings import AdamWSettings, MuonSettings
from llmnorm.optim.state import named_state
from tests.families import class_of, configuration
from tests.optim.rules import RULES, Run, draw

MATRIX_RULES = [name for name in RULES if name != "adamw"]
EXPERTS = 5
# Layout -> shape as it is stored.
LAYOUTS = {
    "experts": (Layout(), (EXPERTS, 10, 6)),
    "transposed experts": (Layout(True), (EXPERTS, 10, 6)),
    "experts with gate and up": (Layout(pieces=(6, 6)), (EXPERTS, 12, 8)),
    "transposed experts with gate and up": (Layout(True, (6, 6)), (EXPERTS, 8, 12)),
    "transposed": (Layout(True), (10, 6)),
    "transposed and fused": (Layout(True, (6, 4, 6)), (8, 16)),
}


def alone(stored: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Every matrix as a parameter of its own, in the order in which they are numbered."""
    whole = stored if stored.ndim == 3 else stored.unsqueeze(0)
    whole = whole.mT if layout.transposed else whole
    pieces = whole.split(list(layout.pieces) or whole.shape[1], 1)
    return {
        f"{piece}.{expert}": matrix.contiguous()
        for piece, experts in enumerate(pieces)
        for expert, matrix in enumerate(experts)
    }


def together(apart: dict[str, Tensor], stored: Tensor, layout: Layout) -> Tensor:
    """The opposite of `alone`."""
    experts = len(stored) if stored.ndim == 3 else 1
    pieces = [
        torch.stack([apart[f"{p}.{e}"] for e in range(experts)])
        for p in range(max(1, len(layout.pieces)))
    ]
    whole = torch.cat(pieces, 1)
    return (whole.mT if layout.transposed else whole).reshape(stored.shape)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", MATRIX_RULES)
def test_every_matrix_of_a_parameter_is_updated_as_if_it_were_alone(name: str, kind: str) -> None:
    """Oracle: the same matrices as parameters of their own, to the bit; chunks of three matrices,
    so that some begin in one expert's neighbour and end in another's."""
    layout, shape = LAYOUTS[kind]
    first, grads = draw(*shape), [draw(*shape, seed=seed) for seed in range(1, 5)]
    stacked = Run(RULES[name](), {"w": first}, layouts={"w": layout})
    single = Run(RULES[name](), alone(first, layout))
    for run in (stacked, single):
        run.optimizer.stacks = [
            replace(s, chunk_bytes=3 * 4 * s.matrices[0].rows * s.matrices[0].columns)
            for s in run.optimizer.stacks
        ]
    for grad in grads:
        found = stacked.step({"w": grad})["w"]
        expected = together(single.step(alone(grad, layout)), first, layout)
    assert torch.equal(found, expected)
    assert not torch.equal(found, first)


@pytest.mark.parametrize("name", ["muon", "conda", "soap"])
def test_the_state_of_a_stack_is_one_tensor_a_field(name: str) -> None:
    """Oracle: the rule's own shapes with the experts in front; a saved state goes on to the bit."""
    layout, shape = LAYOUTS["experts with gate and up"]
    run = Run(RULES[name](), {"w": draw(*shape)}, layouts={"w": layout})
    model = nn.ParameterDict(run.weights)
    state = named_state(run.optimizer, model)
    rule = RULES[name]().rule()
    for piece in (0, 1):
        for field, of_one in rule.fields(6, 8).items():
            assert state[f"w.{field}.{piece}"].shape == (EXPERTS, *of_one)
        if "phase" in rule.scalars:
            numbers = torch.arange(EXPERTS) + piece * EXPERTS
            assert torch.equal(state[f"w.phase.{piece}"], (numbers / (2 * EXPERTS)).float())
    run.step({"w": draw(*shape, seed=1)})
    resumed = Run(RULES[name](), {"w": run.weights["w"].detach()}, layouts={"w": layout})
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    grad = {"w": draw(*shape, seed=2)}
    assert torch.equal(resumed.step(grad)["w"], run.step(grad)["w"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_projection_keeps_the_norm_of_every_expert(name: str) -> None:
    """Oracle: the norms before the first step."""
    first = draw(EXPERTS, 6, 4) * torch.arange(1, EXPERTS + 1).view(-1, 1, 1)
    run = Run(RULES[name](nap=True, weight_decay=0.0), {"w": first, "plain": draw(6, 4)})
    for seed in range(1, 4):
        found = run.step({"w": draw(EXPERTS, 6, 4, seed=seed), "plain": draw(6, 4, seed=seed)})
    assert torch.allclose(found["w"].norm(dim=(1, 2)), first.norm(dim=(1, 2)), rtol=1e-12, atol=0)
    assert torch.allclose(found["plain"].norm(), draw(6, 4).norm(), rtol=1e-12, atol=0)
    assert not torch.equal(found["w"], first)


def test_nap_finds_the_experts_of_a_part() -> None:
    """Oracle: the experts of all elements, one by one; parts of any beginning and end."""
    from llmnorm.optim.fragments import Fragment
    from llmnorm.optim.nap import _by_expert

    class One:
        spread = True

        def local(self, part: Tensor) -> Tensor:
            return part

        def own(self, parameter: Fragment) -> tuple[int, int]:
            return parameter.cuts[0], parameter.cuts[1]

    whole = torch.Size((4, 2, 5))
    numbers = torch.arange(40.0)
    for first in range(0, 40, 3):
        for last in range(first, 41):
            fragment = Fragment.of(numbers[first:last], whole, (first, last), 0)
            found = {}
            for experts, part in _by_expert(fragment, One()):  # type: ignore[arg-type]
                for expert, own in zip(range(experts.start, experts.stop), part, strict=True):
                    found.setdefault(expert, []).extend(own.tolist())
            expected: dict[int, list[float]] = {}
            for number in range(first, last):
                expected.setdefault(number // 10, []).append(float(number))
            assert found == expected


# Who gets what.


class Experts(nn.Module):
    """As transformers' modules of experts are, with their biases."""

    def __init__(self, transposed: bool, concatenated: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 4, transposed
        self.is_concatenated, self.has_gate = concatenated, True
        up, down = (8, 12), (6, 8)
        self.gate_up_proj = nn.Parameter(torch.zeros(4, *(up if transposed else up[::-1])))
        self.down_proj = nn.Parameter(torch.zeros(4, *(down if transposed else down[::-1])))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 12))


class Mixture(nn.Module):
    """Experts beside a router, and what could be taken for one or the other."""

    def __init__(self, transposed: bool = False, concatenated: bool = True) -> None:
        super().__init__()
        self.k_proj = nn.Linear(8, 4, bias=False)  # as many outputs as there are experts
        self.short_conv = nn.Conv1d(4, 4, 3, groups=4, bias=False)  # (4, 1, 3)
        self.mlp = nn.Module()
        self.mlp.experts = Experts(transposed, concatenated)
        self.mlp.gate = nn.Linear(8, 4, bias=False)
        self.mlp.shared = nn.Linear(8, 12, bias=False)


def test_stacks_are_matrices_and_routers_are_not() -> None:
    """Oracle: the lists written by hand."""
    groups = split(Mixture())
    stacks = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert set(groups.matrices) == stacks | {"k_proj.weight", "mlp.shared.weight"}
    assert set(groups.auxiliary) == {
        "short_conv.weight",
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj_bias",
    }
    assert groups.layouts == {"mlp.experts.gate_up_proj": Layout(pieces=(6, 6))}
    found = {m.name + m.suffix: (m.count, m.rows, m.columns) for m in matrices(groups, {})}
    assert found["mlp.experts.gate_up_proj.1"] == (4, 6, 8)
    assert found["mlp.experts.down_proj"] == (4, 8, 6)


def test_a_transposed_stack_is_cut_only_where_gate_and_up_do_not_alternate() -> None:
    """Oracle: layouts written by hand, and the shape of the matrices."""
    name = "mlp.experts.gate_up_proj"
    assert split(Mixture(True, True)).layouts[name] == Layout(True, (6, 6))
    groups = split(Mixture(True, False))
    assert groups.layouts[name].pieces == () and "alternate" in groups.layouts[name].note
    (whole,) = (m for m in matrices(groups, {}) if m.name == name)
    assert (whole.count, whole.rows, whole.columns) == (4, 12, 8)
    assert whole.weight().shape == (4, 12, 8)


def test_settings_cut_in_the_place_of_what_was_found() -> None:
    """Oracle: sizes given by hand; one number leaves a matrix whole, under its own name."""
    groups = split(Mixture())
    whole = [m for m in matrices(groups, {"*gate_up_proj": [12]}) if "gate_up" in m.name]
    assert [(m.suffix, m.rows) for m in whole] == [("", 12)]
    thirds = [m for m in matrices(groups, {"*gate_up_proj": [4, 4, 4]}) if "gate_up" in m.name]
    assert [(m.suffix, m.rows, m.number) for m in thirds] == [
        (".0", 4, 1),
        (".1", 4, 5),
        (".2", 4, 9),
    ]


def test_a_conv1d_is_the_transpose_of_a_matrix() -> None:
    """Oracle: transformers' own class, whose inputs are the first axis; the width of the model."""
    model = nn.ModuleDict({"wide": Conv1D(24, 6), "narrow": Conv1D(6, 6)})
    groups = split(model)
    found = {m.name: (m.rows, m.columns) for m in matrices(groups, {})}
    assert found == {"wide.weight": (24, 6), "narrow.weight": (6, 6)}
    optimizer = MuonSettings(lr=0.1, update_rms="original").build(groups)
    assert optimizer.param_groups[1]["peak_lr"] == pytest.approx(0.1 / (0.2 * 6**0.5))


def groups_of(family: str) -> Groups:
    """Of a tiny model on the meta device, as a run with a rule has it."""
    config = configuration(family)
    model = empty_foreign(class_of(config), config)
    model.fused = fused_rows(model)
    return split(model)


FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "gpt2", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_embeddings_norms_biases_and_routers_of_a_family_are_adamws(family: str) -> None:
    """Oracle: the words in the names."""
    groups = groups_of(family)
    words = ("norm", "bias", "embed", "wte", "wpe", "ln_", "router", "gate.weight", "lm_head")
    others = [name for name in groups.auxiliary if not any(word in name for word in words)]
    assert all("sinks" in name for name in others), others
    assert not any(word in name for name in groups.matrices for word in words)


def test_the_table_shows_experts_transposes_and_what_cannot_be_told() -> None:
    """Oracle: lines written by hand, of four families."""
    expected = {
        "qwen3_moe": [
            ("model.layers.0.mlp.experts.gate_up_proj.0", "4 of 24 x 32", "muon", ""),
            ("model.layers.0.mlp.experts.down_proj", "4 of 32 x 24", "muon", ""),
            ("model.layers.0.mlp.gate.weight", "4 x 32", "adamw", ""),
        ],
        "gpt_oss": [
            (
                "model.layers.0.mlp.experts.gate_up_proj",
                "4 of 96 x 32",
                "muon",
                "transposed; one matrix: rows of gate and up alternate",
            ),
            ("model.layers.0.mlp.experts.down_proj", "4 of 32 x 48", "muon", "transposed"),
            ("model.layers.0.mlp.router.weight", "4 x 32", "adamw", ""),
        ],
        "gpt2": [("transformer.h.0.attn.c_attn.weight.2", "32 x 32", "muon", "transposed")],
        "phi3": [
            ("model.layers.0.self_attn.qkv_proj.weight.1", "16 x 32", "muon", ""),
            ("model.layers.0.mlp.gate_up_proj.weight.0", "48 x 32", "muon", ""),
        ],
    }
    for family, lines in expected.items():
        text = describe(MuonSettings(), groups_of(family))
        cells = [[*line.split("  ")] for line in text.splitlines()]
        rows = {row[0]: [cell.strip() for cell in row if cell.strip()] for row in cells}
        for name, shape, rule, note in lines:
            row = rows[name]
            assert row[1:3] == [shape, rule], row
            assert row[5:] == ([note] if note else []), row
    plain = describe(AdamWSettings(lr=1e-3), groups_of("gpt_oss"))
    assert "4 of 32 x 96" in plain and "transposed" not in plain


def test_the_line_of_a_run_counts_stacks_and_cuts() -> None:
    """Oracle: numbers counted by hand from the configuration of tests/families.py."""
    stacks = 2 * 4 * (2 * 24 * 32 + 32 * 24)
    attention = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    line = describe_matrices(groups_of("qwen3_moe"))
    assert f"{(stacks + attention) / 1e6:.2f}M numbers in hidden matrices" in line
    assert f"{stacks / 1e6:.2f}M of them in 4 stacks of experts" in line
    assert "2 parameters are cut into projections" in line
    assert "4 are one matrix each: rows of gate and up alternate" in describe_matrices(
        groups_of("gpt_oss")
    )
