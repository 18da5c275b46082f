"""Which parameter gets which rule, fused projections, the table, rates and schedules of groups."""

import pytest
import torch
from torch import nn

from llmnorm.models import LlmNormConfig
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.optim.build import describe
from llmnorm.optim.groups import Groups, assign, check, matrices, split
from llmnorm.optim.schedule import ConstantSettings
from llmnorm.optim.settings import (
    AdamWSettings,
    CondaSettings,
    MuonSettings,
    NorMuonSettings,
    SOAPSettings,
)
from llmnorm.part import InputError
from tests.optim.rules import RULES, Run, draw

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}


class Odd(nn.Module):
    """Two axes are no matrix: a gain of (heads, head_dim), a table, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(2, 4))
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.hidden = nn.Linear(4, 6)


def test_only_weights_of_linear_layers_are_matrices() -> None:
    """Oracle: the list written by hand."""
    groups = split(Odd())
    assert set(groups.matrices) == {"hidden.weight"}
    others = {"gain", "table.weight", "conv.weight", "conv.bias", "hidden.bias"}
    assert set(groups.auxiliary) == others


def test_a_model_is_split_into_projections_and_the_rest() -> None:
    """Oracle: Llama's names."""
    with torch.device("meta"):
        groups = split(LlmNormForCausalLM(LlmNormConfig(**SMALL)))
    kinds = {name.split(".")[-2] for name in groups.matrices}
    assert kinds == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < set(
        groups.auxiliary
    )


def test_a_parameter_claimed_twice_or_never_is_named() -> None:
    """Oracle: groups with one mistake each."""
    model = Odd()
    matrices_, auxiliary, _ = split(model)
    weight = matrices_["hidden.weight"]
    with pytest.raises(ValueError, match="hidden.weight: trainable, but in 2"):
        check(Groups(matrices_, {**auxiliary, "again": weight}), model)
    with pytest.raises(ValueError, match="hidden.weight: trainable, but in 0"):
        check(Groups({}, auxiliary), model)
    model.gain.requires_grad_(False)
    with pytest.raises(ValueError, match="gain: frozen, but in 1"):
        check(Groups(matrices_, auxiliary), model)
    del auxiliary["gain"]
    check(Groups(matrices_, auxiliary), model)
    stranger = {"x": nn.Parameter(torch.zeros(1))}
    with pytest.raises(ValueError, match="the model does not"):
        check(Groups(matrices_, {**auxiliary, **stranger}), model)


@pytest.mark.parametrize("name", [n for n in RULES if n != "adamw"])
def test_fused_projections_are_matrices_of_their_own(name: str) -> None:
    """Oracle: the same pieces as parameters of their own, to the bit."""
    sizes = [6, 4, 6]
    fused = draw(16, 8)
    grads = [draw(16, 8, seed=s) for s in range(1, 5)]
    settings = RULES[name](split_sizes={"*qkv*": sizes})
    one = Run(settings, {"a.qkv.weight": fused})
    pieces = dict(enumerate(fused.split(sizes)))
    other = Run(RULES[name](), {f"{i}": piece for i, piece in pieces.items()})
    for grad in grads:
        whole = one.step({"a.qkv.weight": grad})["a.qkv.weight"]
        parts = other.step({f"{i}": g for i, g in enumerate(grad.split(sizes))})
    assert torch.equal(whole, torch.cat([parts[f"{i}"] for i in range(3)]))
    (state,) = one.optimizer.state.values()
    assert {field.rpartition(".")[2] for field in state} == {"0", "1", "2"}


def test_wrong_split_sizes_are_refused() -> None:
    """Oracle: the messages."""
    groups = Groups({"a.qkv.weight": nn.Parameter(torch.zeros(6, 2))}, {})
    with pytest.raises(InputError, match=r"\[2, 2\] are 4 rows, a.qkv.weight has 6"):
        matrices(groups, {"*qkv*": [2, 2]})
    with pytest.raises(InputError, match=r"\*qvk\* matches no hidden matrix"):
        matrices(groups, {"*qvk*": [3, 3]})
    with pytest.raises(InputError, match=r"\*qkv\* and a\.\* both match a.qkv.weight"):
        matrices(groups, {"*qkv*": [3, 3], "a.*": [3, 3]})


def test_the_table_says_who_gets_what() -> None:
    """Oracle: lines written by hand."""
    with torch.device("meta"):
        groups = split(LlmNormForCausalLM(LlmNormConfig(**SMALL)))
    text = describe(CondaSettings(lr=0.02, weight_decay=0.5, auxiliary={"lr": 0.003}), groups)
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["model.layers.0.self_attn.q_proj.weight"][1:] == (
        ["16", "x", "16", "conda", "0.02", "0.5"]
    )
    assert rows["model.embed_tokens.weight"][1:] == ["32", "x", "16", "adamw", "0.003", "0"]
    assert rows["model.norm.weight"][1:] == ["16", "adamw", "0.003", "0"]
    assert "in 14 hidden matrices" in text
    halves = describe(MuonSettings(split_sizes={"*.0.*q_proj.weight": [8, 8]}), groups)
    pieces = [line.split()[:4] for line in halves.splitlines() if "0.self_attn.q_proj" in line]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert pieces == [[f"{name}.{i}", "8", "x", "16"] for i in (0, 1)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (AdamWSettings(lr=0.1), 0.1),
        (CondaSettings(lr=0.1, scale=0.25), 0.025),
        (MuonSettings(lr=0.1), 0.1),
        (MuonSettings(lr=0.1, update_rms="original"), 0.1 / (0.2 * 64**0.5)),
        (NorMuonSettings(lr=0.1), 0.1 / (0.2 * 64**0.5)),
        (NorMuonSettings(lr=0.1, preset="paper"), 0.1),
        (CondaSettings(lr=0.1, auxiliary={"lr": 0.7}), 0.7),
        (SOAPSettings(lr=0.1, normalize_grads=True), 0.1 / 0.2),
    ],
)
def test_the_rest_has_adamws_rate_at_equal_steps_unless_given(settings, expected) -> None:
    """Oracle: the conversions written out, at a width of 64."""
    members = {"w": nn.Parameter(torch.zeros(8, 64))}
    optimizer = settings.build(Groups(members, {"b": nn.Parameter(torch.zeros(3))}))
    hidden, rest = optimizer.param_groups
    assert (hidden["kind"], rest["kind"]) == ("matrices", "auxiliary")
    assert rest["peak_lr"] == pytest.approx(expected) and hidden["peak_lr"] == 0.1


@pytest.mark.parametrize("name", RULES)
def test_the_rest_is_adamw_with_its_own_rate_decay_and_schedule(name: str) -> None:
    """Oracle: our AdamW over the same vector; rates that the loop would set."""
    own = {"lr": 0.03, "weight_decay": 0.2, "schedule": {"name": "constant", "warmup": 2}}
    settings = RULES[name](lr=0.1, auxiliary=own)
    run = Run(settings, {"w": draw(4, 6)}, {"b": draw(5)})
    alone = Run(AdamWSettings(lr=0.03, weight_decay=0.2), {"b": draw(5)})
    of_the_run = ConstantSettings(warmup=5).build(10)
    hyperparameters = settings.hyperparameters(of_the_run, 10)
    for step in range(4):
        hyperparameters.set(run.optimizer.param_groups, step)
        alone.optimizer.param_groups[0]["lr"] = 0.03 * min(1, (step + 1) / 2)
        grads = {"w": draw(4, 6, seed=step), "b": draw(5, seed=step)}
        run.step(grads)
        alone.step(grads)
    assert torch.equal(run.auxiliary["b"], alone.weights["b"])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 4 / 5)
    assert RULES[name]().hyperparameters(of_the_run, 10).lr["auxiliary"] is of_the_run


def table(settings: object) -> dict[str, list[str]]:
    """By parameter: shape, rule, rate and decay, as `--print-groups` prints them."""
    with torch.device("meta"):
        groups = split(LlmNormForCausalLM(LlmNormConfig(**SMALL)))
    lines = describe(settings, groups).splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines[1:-1]}


def test_the_last_pattern_that_matches_a_name_counts_alone() -> None:
    """Oracle: lines written by hand; patterns of whole names and of their ends."""
    settings = MuonSettings(
        lr=0.1,
        weight_decay=0.2,
        auxiliary={"lr": 0.01, "weight_decay": 0.3},
        groups=[
            {"match": "*.mlp.*", "lr": 0.5, "weight_decay": 0},
            {"match": "layers.0.*", "rule": "adamw"},
            {"match": "model.layers.0.mlp.up_proj.weight", "lr": 2},
            {"match": "embed_tokens.weight", "rule": "muon", "lr": 0.1},
            {"match": "norm.weight", "weight_decay": 0.7},
        ],
    )
    rows = table(settings)
    assert rows["model.layers.1.mlp.up_proj.weight"][3:] == ["muon", "0.05", "0"]
    assert rows["model.layers.0.mlp.gate_proj.weight"][3:] == ["adamw", "0.01", "0.3"]
    assert rows["model.layers.0.mlp.up_proj.weight"][3:] == ["muon", "0.2", "0.2"]
    assert rows["model.layers.1.self_attn.q_proj.weight"][3:] == ["muon", "0.1", "0.2"]
    assert rows["model.embed_tokens.weight"] == ["32", "x", "16", "muon", "0.01", "0.2"]
    assert rows["lm_head.weight"][3:] == ["adamw", "0.01", "0.3"]
    assert rows["model.norm.weight"] == ["16", "adamw", "0.01", "0.7"]
    # The pattern begins behind a dot: `input_layernorm.weight` has none before `norm`.
    assert rows["model.layers.1.input_layernorm.weight"][1:] == ["adamw", "0.01", "0.3"]


def test_groups_that_do_not_fit_are_refused() -> None:
    """Oracle: the messages."""
    with torch.device("meta"):
        groups = split(LlmNormForCausalLM(LlmNormConfig(**SMALL)))

    def refused(match: str, *, nap: bool = False, **keys: object) -> str:
        decay = {"nap": True, "weight_decay": 0} if nap else {}
        settings = MuonSettings(groups=[{"match": match, **keys}], **decay)
        with pytest.raises(InputError) as error:
            assign(groups, settings)
        return str(error.value)

    assert "did you mean 'layers.*.mlp.up_proj.weight'?" in refused(
        "layers.*.mpl.up_proj.weight", lr=1
    )
    assert "names are such as model.layers.0." in refused("*.17.*", lr=1)
    assert "norm.weight has the shape (16,)" in refused("model.*norm.weight", rule="muon")
    said = refused("*.mlp.*", nap=True, weight_decay=0.1)
    assert (
        "optimizer.nap takes the place of decay on hidden matrices such as model.layers.0" in said
    )
    model = Odd()
    model.hidden.weight.requires_grad_(False)
    with pytest.raises(InputError, match="'hidden.weight' matches no parameter that is trained"):
        assign(split(model), AdamWSettings(groups=[{"match": "hidden.weight", "lr": 2}]))


@pytest.mark.parametrize("name", RULES)
def test_a_group_has_its_own_rate_and_decay(name: str) -> None:
    """Oracle: runs in which all parameters have the rate and decay of the one, to the bit."""
    weights = {"a": draw(6, 10), "b": draw(6, 10, seed=1), "c": draw(8, 8)}
    vectors = {"bias": draw(7), "gain": draw(7, seed=2)}
    auxiliary = {"lr": 0.02, "weight_decay": 0.1}
    own = {"match": "[bg]*", "lr": 0.5, "weight_decay": 0.7}

    def trained(**keys: object) -> dict[str, torch.Tensor]:
        run = Run(RULES[name](**{"weight_decay": 0.1} | keys), weights, vectors)
        for step in range(4):
            shapes = {k: w.shape for k, w in (weights | vectors).items()}
            run.step({k: draw(*shape, seed=9 * step + len(k)) for k, shape in shapes.items()})
        return {k: p.detach() for k, p in (run.weights | run.auxiliary).items()}

    found = trained(lr=0.1, auxiliary=auxiliary, groups=[own, {"match": "bias", "lr": 1}])
    plain = trained(lr=0.1, auxiliary=auxiliary)
    other = {"lr": 0.01, "weight_decay": 0.7}
    theirs = trained(lr=0.05, weight_decay=0.7, auxiliary=other)
    for key in weights | vectors:
        assert torch.equal(found[key], theirs[key] if key in ("b", "gain") else plain[key]), key


@pytest.mark.parametrize("name", [n for n in RULES if n != "adamw"])
def test_a_group_has_its_own_rule(name: str) -> None:
    """Oracle: AdamW and the rule by themselves, to the bit; the state's names."""
    matrix, table_, vector = draw(6, 10), draw(8, 8), draw(7)
    auxiliary = {"lr": 0.02, "weight_decay": 0.1}
    settings = RULES[name]()
    groups = [
        {"match": "w", "rule": "adamw", "lr": 0.5},
        {"match": "table", "rule": settings.label, "lr": 2},
    ]
    run = Run(
        RULES[name](lr=0.1, auxiliary=auxiliary, groups=groups),
        {"w": matrix},
        {"table": table_, "b": vector},
    )
    alone = Run(AdamWSettings(lr=0.01, weight_decay=0.1), {"w": matrix})
    rule = Run(RULES[name](lr=0.2), {"table": table_})
    for step in range(4):
        grads = {"w": draw(6, 10, seed=step), "table": draw(8, 8, seed=step + 9), "b": draw(7)}
        run.step(grads)
        alone.step({"w": grads["w"]})
        rule.step({"table": grads["table"]})
    assert torch.equal(run.weights["w"], alone.weights["w"])
    assert torch.equal(run.auxiliary["table"], rule.weights["table"])
    assert set(run.optimizer.state[run.weights["w"]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "exp_avg" not in run.optimizer.state[run.auxiliary["table"]]


def test_a_schedule_moves_the_rates_of_groups_too() -> None:
    """Oracle: the products written out, at a step whose factor is 1/2."""
    groups = [{"match": "*", "lr": 0.5}, {"match": "v", "weight_decay": 0.3}]
    settings = AdamWSettings(lr=0.1, groups=groups)
    run = Run(settings, {"w": draw(4, 6), "v": draw(4, 6)}, {"b": draw(5)})
    hyperparameters = settings.hyperparameters(ConstantSettings(warmup=4).build(10), 10)
    hyperparameters.set(run.optimizer.param_groups, 1)
    of = {id(p): g for g in run.optimizer.param_groups for p in g["params"]}
    found = {k: of[id(p)] for k, p in (run.weights | run.auxiliary).items()}
    assert {k: g["lr"] for k, g in found.items()} == {"w": 0.025, "v": 0.05, "b": 0.025}
    assert {k: g["weight_decay"] for k, g in found.items()} == {"w": 0.1, "v": 0.3, "b": 0.0}
    first = run.optimizer.param_groups[0]
    assert first["lr"] == 0.05  # what the metrics name: the rate without groups


def test_nap_holds_a_hidden_matrix_that_adamw_updates() -> None:
    """Oracle: the norm from before the first step."""
    groups = [{"match": "w", "rule": "adamw"}]
    settings = MuonSettings(lr=0.1, weight_decay=0, nap=True, groups=groups)
    run = Run(settings, {"w": draw(6, 10), "v": draw(6, 10, seed=1)})
    norms = {k: p.detach().norm() for k, p in run.weights.items()}
    for step in range(3):
        run.step({"w": draw(6, 10, seed=step), "v": draw(6, 10, seed=step + 5)})
    for key, parameter in run.weights.items():
        torch.testing.assert_close(parameter.detach().norm(), norms[key])
