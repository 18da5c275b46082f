"""The figures that mixers give of themselves, against their explicit matrices."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.nn.mixers import health
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.mixers.settings import NaLaSettings
from llmnorm.nn.settings import ModelSettings
from llmnorm.nn.visibility import visible_pairs, visible_tokens
from tests.nn.recurrences import token_by_token
from tests.nn.test_mixers import MIXERS, build, contexts, every, inputs

NORMALISED = {k: v for k, v in MIXERS.items() if v["name"] in ("softmax", "linear", "nala")}
LINEAR = {k: v for k, v in NORMALISED.items() if v["name"] != "softmax"}


def looked(mixer: dict[str, Any], context: Context, change: Any = None) -> tuple[Any, Any, Any]:
    """The mixer, its parameters for some inputs, and its figures."""
    built: Any = build(mixer)
    if change is not None:
        change(built)
    with torch.no_grad():
        p = built.prepare(inputs(), context)
        return built, p, built.health(p, context)


def over_tokens(values: Tensor, context: Context) -> Tensor:
    """The entries of values (batch, heads, length) that belong to real tokens."""
    values = values.transpose(1, 2)
    return values.flatten() if context.real is None else values[context.real].flatten()


@every(NORMALISED)
@torch.no_grad()
def test_entropies_are_those_of_the_matrix(
    mixer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the matrix, in float64 (its unrotated twin's, whose rows are made to sum to 1)."""
    monkeypatch.setattr(health, "QUERIES", 4)
    causal = build(mixer).causal
    for context in contexts(causal):
        built, p, found = looked(mixer, context)
        twin = copy.copy(built)
        twin.rotary = False
        matrix = twin.materialize(p, context)
        matrix = matrix / matrix.sum(-1, keepdim=True)
        visible = visible_pairs(p.v, context.visibility, causal=causal)
        if mixer.get("sliding_window"):
            visible = visible.triu(1 - mixer["sliding_window"])
        count = visible.sum(-1).expand(matrix.shape[:3])
        entropy = -(matrix.clamp(min=1e-300).log() * matrix).sum(-1)
        several = over_tokens(count, context) > 1
        expected = (over_tokens(entropy / count.double().log(), context))[several].mean()
        torch.testing.assert_close(found["entropy"], expected, rtol=0, atol=1e-12)


@every({k: v for k, v in NORMALISED.items() if v["name"] == "softmax"})
@torch.no_grad()
def test_the_largest_logit(mixer: dict[str, Any]) -> None:
    """Oracle: all products, pair by pair, of those that see each other."""
    for context in contexts(build(mixer).causal):
        _, p, found = looked(mixer, context)
        largest = -torch.inf
        visible = visible_pairs(p.v, context.visibility, causal=not mixer.get("bidirectional"))
        visible = visible.triu(1 - mixer.get("sliding_window", 99)).expand(len(p.q), 1, -1, -1)
        for row, _, i, j in visible.nonzero().tolist():
            if context.real is None or context.real[row, i]:
                products = (p.q[row, i] * p.k[row, j].repeat_interleave(2, 0)).sum(-1)
                largest = max(largest, float(products.max()) / 6**0.5)
        assert float(found["max_logit"]) == pytest.approx(largest, rel=1e-12)


@every(LINEAR)
@torch.no_grad()
def test_denominators_and_sums_of_rows(mixer: dict[str, Any]) -> None:
    """Oracle: a loop over the tokens from both ends; the matrix."""
    for context in contexts(build(mixer).causal):
        built, p, found = looked(mixer, context)
        q, k, _, _ = built.both_features(p.q, p.k, context.cos, context.sin, context.real)
        one = p.v.new_ones(*p.v.shape[:3], 1)
        total, _ = token_by_token(q, k, one, segments=context.segments)
        if not built.causal:
            flipped = [None if t is None else t.flip(1) for t in (q, k, one, context.segments)]
            behind, _ = token_by_token(*flipped[:3], segments=flipped[3])
            itself = (q * k.repeat_interleave(2, 2)).sum(-1, keepdim=True)
            total = total + behind.flip(1) - itself
        mean = (
            total.squeeze(-1)
            / visible_tokens(p.v, context.visibility, causal=built.causal)[..., None]
        )
        smallest = over_tokens(mean.transpose(1, 2), context).min()
        torch.testing.assert_close(found["min_denominator"], smallest, rtol=1e-9, atol=0)
        sums = over_tokens(built.materialize(p, context).sum(-1), context)
        torch.testing.assert_close(found["row_sum"], sums.abs().mean(), rtol=1e-9, atol=0)


def test_tiny_keys_show_in_the_smallest_denominator() -> None:
    """Oracle: the cube of what the keys are scaled by; then eps is what outputs are divided by."""

    def collapse(built: Any) -> None:
        built.k_proj.weight.data.mul_(1e-3)

    for context in contexts():
        built, _, well = looked(MIXERS["nala"], context)
        _, _, ill = looked(MIXERS["nala"], context, collapse)
        torch.testing.assert_close(ill["min_denominator"], 1e-9 * well["min_denominator"])
        assert ill["min_denominator"] < 1e-3 * built.eps
        assert ill["row_sum"] < 0.01 * well["row_sum"]


@pytest.mark.parametrize(("scale", "share"), [(1e-3, 0.0), (1e3, 1.0)])
def test_long_queries_saturate(scale: float, share: float) -> None:
    """Oracle: the limits; at a length between, tanh by hand."""

    def change(built: Any) -> None:
        built.q_proj.weight.data.mul_(scale)

    for name in ("nala", "nala cosine"):
        for context in contexts():
            assert looked(MIXERS[name], context, change)[2]["saturation"] == share
    built, p, found = looked(MIXERS["nala"], next(contexts()))
    lengths = (p.q.square().sum(-1) + 1e-6).sqrt()
    expected = (4.5 - 3 * (0.5 + lengths.tanh()) < 1e-3).double().mean()
    assert 0 < expected < 1 and found["saturation"] == expected


@every({k: v for k, v in MIXERS.items() if k not in NORMALISED})
def test_decays_and_diagonals(mixer: dict[str, Any]) -> None:
    """Oracle: real tokens one by one; other families have no figures."""
    family = mixer.get("family", {})
    name = mixer["name"] if not family else family if isinstance(family, str) else family["name"]
    for context in contexts(build(mixer).causal):
        _, p, found = looked(mixer, context)
        real = torch.ones(3, 11).bool() if context.real is None else context.real
        rows = real.nonzero().tolist()

        def mean(*tensors: Tensor, rows: Any = rows) -> float:
            return float(torch.stack([t[b, i].mean() for t in tensors for b, i in rows]).mean())

        expected = {}
        if name in ("ssd", "gated_delta"):
            expected["decay"] = mean(p.log_decay.exp())
        elif name == "gla":
            expected["decay"] = mean(p.log_gate.exp())
        elif name == "hydra":
            expected["decay"] = mean(p.forward.log_decay.exp(), p.backward.log_decay.exp())
            if p.delta is not None:
                expected["delta"] = mean(p.delta)
        elif name == "quasiseparable":
            expected["delta"] = mean(p.made.delta)
        assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hidden_size", [192, 1024])
@torch.no_grad()
def test_nala_starts_clear_of_eps_and_wider_queries_would_saturate(hidden_size: int) -> None:
    """Oracle: ten times eps; weights of 1 / sqrt(hidden_size), whose queries are of length 8."""
    model = ModelSettings(hidden_size=hidden_size, num_attention_heads=hidden_size // 64)
    built: Any = NaLaSettings().build(model, 0)
    torch.manual_seed(0)
    positions, x = torch.arange(256).unsqueeze(0), torch.randn(1, 256, hidden_size)
    context = Context(*Rotary(model.rope_parameters, 64, 256)(positions, torch.float32))
    found = {}
    for std in (model.initializer_range, hidden_size**-0.5):
        for projection in (built.q_proj, built.k_proj):
            projection.weight.normal_(std=std)
        found[std] = built.health(built.prepare(x, context), context)
    first, wide = found.values()
    assert first["min_denominator"] > 10 * built.eps
    assert (first["saturation"] > 0.5) == (hidden_size == 1024)
    assert wide["min_denominator"] > first["min_denominator"] and wide["saturation"] == 1
