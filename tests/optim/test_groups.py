"""Which parameter gets which rule, fused projections, the table, rates and schedules of groups."""

import pytest
import torch
from torch import nn

from llmnorm.models import LlmNormConfig
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.optim.build import describe
from llmnorm.optim.groups import Groups, check, matrices, split
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
