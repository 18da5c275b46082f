"""What must hold for every rule: symmetries, scale, decay, memory, precision, state."""

import pytest
import torch
from torch import nn

from llmnorm.optim import conda, stacks
from llmnorm.optim.groups import Groups
from llmnorm.optim.orthogonalize import ITERATIONS
from llmnorm.optim.settings import (
    AdamPSettings,
    CondaSettings,
    MuonSettings,
    NorMuonSettings,
    SOAPSettings,
)
from tests.optim.rules import RULES, SHAPES, SPECTRAL, Run, draw, gradients, zeros

GRADS = gradients(SHAPES, 7)
WEIGHTS = {name: draw(*shape, seed=9) for name, shape in SHAPES.items()}
WITH_WEIGHTS = ("adamp",)  # directions depend on the weights too


def close(one, other, tolerance) -> None:
    for got, expected in zip(one, other, strict=True):
        for name in got:
            size = expected[name].abs().max()
            assert (got[name] - expected[name]).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("name", RULES)
def test_a_negative_gradient_makes_the_opposite_step(name: str) -> None:
    """Oracle: the steps of the same rule, with their signs changed, to the bit."""
    plain = Run(RULES[name](weight_decay=0.0), zeros()).deltas(GRADS)
    negated = [{k: -g for k, g in one.items()} for one in GRADS]
    opposite = Run(RULES[name](weight_decay=0.0), zeros()).deltas(negated)
    for one, other in zip(plain, opposite, strict=True):
        assert all(torch.equal(one[k], -other[k]) for k in one)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_rules_do_not_see_the_gradients_size(name: str) -> None:
    """Oracle: the same steps, up to what the guard on the norm does to the smallest singular values
    (a polynomial's slope at 0 to the fifth, at most some tens)."""
    settings = RULES[name](weight_decay=0.0)
    plain = Run(settings, zeros()).deltas(GRADS)
    first = min(0.05 * g.norm() for g in GRADS[0].values())
    guard = ITERATIONS[settings.coefficients].guard
    for scale in (1e-3, 2.0**10):
        scaled = [{k: scale * g for k, g in one.items()} for one in GRADS]
        tolerance = 30 * guard / (first * min(scale, 1))
        close(Run(settings, zeros()).deltas(scaled), plain, tolerance)


@pytest.mark.parametrize("name", ["adamw", "conda", "conda eigh staggered", "soap", "adamp"])
def test_adams_kin_do_not_see_the_gradients_size_without_eps(name: str) -> None:
    """Oracle: the same steps in float32 with eps 1e-30."""
    weights = {k: w.float() for k, w in WEIGHTS.items()}
    start = weights if name in WITH_WEIGHTS else zeros(torch.float32)
    settings = RULES[name](weight_decay=0.0, eps=1e-30)
    grads = [{k: g.float() for k, g in one.items()} for one in GRADS]
    plain = Run(settings, start).deltas(grads)
    for scale in (2.0**-10, 2.0**10):
        scaled = [{k: scale * g for k, g in one.items()} for one in grads]
        close(Run(settings, start).deltas(scaled), plain, 1e-6)


@pytest.mark.parametrize("name", RULES)
def test_rows_and_columns_may_change_places(name: str) -> None:
    """Oracle: the steps of the plain run, permuted alike."""
    orders = {k: [draw(n, seed=n).argsort() for n in shape] for k, shape in SHAPES.items()}

    def permuted(tensors):
        return {k: t[orders[k][0]][:, orders[k][1]] for k, t in tensors.items()}

    settings = RULES[name](weight_decay=0.0)
    plain = Run(settings, WEIGHTS).deltas(GRADS)
    moved = Run(settings, permuted(WEIGHTS)).deltas([permuted(one) for one in GRADS])
    close(moved, [permuted(one) for one in plain], 1e-11)


def test_muon_turns_with_the_gradient() -> None:
    """Oracle: U delta V^T for orthogonal U and V; delta^T for the transposed gradient."""
    turns = {
        k: [torch.linalg.qr(draw(n, n, seed=n)).Q for n in shape] for k, shape in SHAPES.items()
    }

    def turned(tensors):
        return {k: turns[k][0] @ t @ turns[k][1].T for k, t in tensors.items()}

    settings = MuonSettings(weight_decay=0.0)
    plain = Run(settings, zeros()).deltas(GRADS)
    close(
        Run(settings, zeros()).deltas([turned(g) for g in GRADS]), [turned(d) for d in plain], 1e-12
    )
    transposed = [{k: g.T for k, g in one.items()} for one in GRADS]
    flipped = Run(settings, {k: z.T for k, z in zeros().items()}).deltas(transposed)
    close(flipped, [{k: d.T for k, d in one.items()} for one in plain], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_stack_is_its_matrices_one_by_one(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same rule with one matrix at a time, to the bit; a size with oneDNN too."""
    shapes = {f"{side}{i}": shape for side, shape in SHAPES.items() for i in range(3)}
    if dtype == torch.float32:
        shapes |= {"large0": (160, 130), "large1": (160, 130)}
    weights = {k: draw(*shape, seed=3, dtype=dtype) for k, shape in shapes.items()}
    grads = gradients(shapes, 4, dtype)
    stacked = Run(RULES[name](), weights)
    for one in grads:
        together = stacked.step(one)
    monkeypatch.setattr(stacks, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    single = Run(RULES[name](), weights)
    for one in grads:
        alone = single.step(one)
    assert all(torch.equal(together[k], alone[k]) for k in shapes)


@pytest.mark.parametrize("name", RULES)
def test_gradients_stay_as_they_are(name: str) -> None:
    """Oracle: copies made before."""
    run = Run(RULES[name](), WEIGHTS)
    for one in GRADS:
        given = {k: g.clone() for k, g in one.items()}
        run.step(one)
        assert all(torch.equal(given[k], one[k]) for k in one)


@pytest.mark.parametrize("name", RULES)
def test_decay_without_gradients(name: str) -> None:
    """Oracle: (1 - lr wd)^t; AdamP finds zero gradients orthogonal and takes a tenth, SOAP's first
    gradient changes nothing."""
    run = Run(RULES[name](lr=0.1, weight_decay=0.5), {k: w.float() for k, w in WEIGHTS.items()})
    nothing = {k: torch.zeros_like(w).float() for k, w in WEIGHTS.items()}
    for _ in range(5):
        after = run.step(nothing)
    factor = {"adamp": (1 - 0.1 * 0.5 * 0.1) ** 5, "soap": 0.95**4}.get(name, 0.95**5)
    for k, w in WEIGHTS.items():
        assert torch.allclose(after[k], factor * w.float(), rtol=1e-6), k


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_do_nothing_and_leave_no_nan(name: str) -> None:
    """Oracle: unchanged weights; the steps after them are finite, tiny gradients too."""
    run = Run(RULES[name](weight_decay=0.0), WEIGHTS)
    after = run.step({k: torch.zeros_like(w) for k, w in WEIGHTS.items()})
    assert all(torch.equal(after[k], w) for k, w in WEIGHTS.items())
    for one in ({k: 1e-30 * g for k, g in GRADS[0].items()}, *GRADS[:3]):
        after = run.step(one)
        assert all(a.isfinite().all() for a in after.values())


@pytest.mark.parametrize("name", RULES)
def test_a_matrix_without_a_gradient_is_named_and_nothing_changes(name: str) -> None:
    """Oracle: weights, state and counters before."""
    run = Run(RULES[name](), WEIGHTS)
    run.step(GRADS[0])
    kept = {
        k: {f: v.clone() for f, v in run.optimizer.state[p].items()} for k, p in run.weights.items()
    }
    before = {k: p.detach().clone() for k, p in run.weights.items()}
    run.weights["tall"].grad = None
    with pytest.raises(ValueError, match="tall: trainable, but without a gradient"):
        run.optimizer.step()
    for k, p in run.weights.items():
        assert torch.equal(p, before[k])
        assert all(torch.equal(v, kept[k][f]) for f, v in run.optimizer.state[p].items())


@pytest.mark.parametrize("name", [name for name in RULES if name != "adamw"])
def test_bf16_weights_follow_the_float32_run(name: str) -> None:
    """Oracle: the float32 run on the same gradients. State is float32 in both, equal to the bit
    where the rule does not read weights; the weights differ by their own rounding at every step, at
    most half of bf16's spacing, 2^-8 of a number that is at most the largest of its course."""
    start = {k: w.bfloat16() for k, w in WEIGHTS.items()}
    grads = [{k: g.bfloat16() for k, g in one.items()} for one in gradients(SHAPES, 12)]
    settings = RULES[name](lr=0.02, weight_decay=0.0)
    narrow, wide = Run(settings, start), Run(settings, {k: w.float() for k, w in start.items()})
    largest = {k: w.abs().float() for k, w in start.items()}
    for one in grads:
        low = narrow.step(one)
        high = wide.step({k: g.float() for k, g in one.items()})
        largest = {k: largest[k].maximum(low[k].float().abs()) for k in largest}
    for k, p in narrow.weights.items():
        reference = wide.optimizer.state[wide.weights[k]]
        for field, value in narrow.optimizer.state[p].items():
            assert value.dtype == torch.float32, field
            assert torch.equal(value, reference[field]), field
        if name != "adamp":
            assert ((low[k].float() - high[k]).abs() <= len(grads) * 2**-8 * largest[k]).all(), k


def test_the_second_moment_of_bf16_weights_decays() -> None:
    """Oracle: the exponential average in float64 of gradients that become ten times smaller
    (a bf16 average with beta2 .999 stays at 1.29 where .126 is right)."""
    run = Run(CondaSettings(betas=(0.9, 0.999), refresh_every=10**6), {"w": draw(4, 4).bfloat16()})
    expected = 0.0
    for step in range(600):
        size = 1.0 if step < 300 else 0.1
        run.step({"w": size * draw(4, 4, seed=step).bfloat16()})
        expected = 0.999 * expected + 0.001 * size**2
    (state,) = run.optimizer.state.values()
    assert abs(state["second_moment"].mean() / expected - 1) < 0.2
    basis = state["basis"]
    assert (basis.T @ basis - torch.eye(4)).abs().max() < 1e-5


# The size of the first step.


def rms(delta) -> float:
    return float(delta.square().mean().sqrt())


def test_the_first_steps_have_the_sizes_that_the_units_promise() -> None:
    """Oracle: the definitions: Adam's first step is sign-like, so lr (times Conda's scale) exactly;
    orthogonalised ones .16 to .20 lr; NorMuon's rows are all equally long, the paper's .2 lr."""
    large = {"wide": (48, 80), "tall": (80, 48), "square": (64, 64)}
    grads = gradients(large, 1)[0]
    start = {k: torch.zeros_like(g) for k, g in grads.items()}

    def first(settings):
        return Run(settings, start).deltas([grads])[0]

    for k, delta in first(CondaSettings(lr=0.1, scale=0.25, weight_decay=0)).items():
        assert abs(rms(delta) / (0.25 * 0.1) - 1) < 1e-5, k
    for delta in first(RULES["adamw"](lr=0.1)).values():
        assert abs(rms(delta) / 0.1 - 1) < 1e-6
    for delta in first(MuonSettings(lr=0.1)).values():
        assert 0.16 < rms(delta) / 0.1 < 0.20
    for delta in first(NorMuonSettings(lr=0.1, weight_decay=0)).values():
        rows = delta.norm(dim=1)
        assert rows.std() / rows.mean() < 1e-6
    for delta in first(NorMuonSettings(preset="paper", lr=0.1)).values():
        assert abs(rms(delta) / (0.2 * 0.1) - 1) < 1e-8
    # The conversion of the settings' documentation, at equal steps.
    original = MuonSettings(update_rms="original", lr=0.1 * 0.2 * 80**0.5)
    one, other = first(MuonSettings(lr=0.1)), first(original)
    assert torch.allclose(one["wide"], other["wide"], rtol=1e-12)
    assert original.adamw_lr(original.lr, 80) == pytest.approx(0.1)


# Conda.


def test_conda_with_the_basis_1_is_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Hugging Face's Adam (the official class's other path), to the bit."""
    monkeypatch.setattr(conda, "_basis", lambda momentum, how: None)
    run = Run(CondaSettings(lr=0.01, scale=1.0, weight_decay=0.0), WEIGHTS)
    weights = {k: w.clone() for k, w in WEIGHTS.items()}
    m, v = ({k: torch.zeros_like(w) for k, w in WEIGHTS.items()} for _ in range(2))
    for t, one in enumerate(GRADS, 1):
        after = run.step(one)
        for k, g in one.items():
            m[k].lerp_(g, 1 - 0.9)
            v[k].mul_(0.99).addcmul_(g, g, value=1 - 0.99)
            rate = 0.01 * (1 - 0.99**t) ** 0.5 / (1 - 0.9**t)
            weights[k] -= m[k] / (v[k].sqrt() + 1e-8) * rate
            assert torch.equal(after[k], weights[k])


def test_the_signs_of_condas_basis_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same weights to the bit when columns change their sign at every refresh."""
    settings = RULES["conda"]()
    plain = Run(settings, WEIGHTS)
    for one in GRADS:
        expected = plain.step(one)
    original, seeds = conda._basis, iter(range(100))

    def flipped(momentum, how):
        basis = original(momentum, how)
        return basis * draw(basis.shape[-1], seed=next(seeds)).sign()

    monkeypatch.setattr(conda, "_basis", flipped)
    run = Run(settings, WEIGHTS)
    for one in GRADS:
        after = run.step(one)
    assert all(torch.equal(after[k], expected[k]) for k in after)


def test_rotated_momentum_is_the_momentum() -> None:
    """Oracle: the plain exponential average, rotated back from the state, over five refreshes."""
    shapes = {"tall": (60, 24), "wide": (24, 60)}
    run = Run(CondaSettings(refresh_every=5), {k: draw(*s, seed=1) for k, s in shapes.items()})
    average = {k: torch.zeros(*s, dtype=torch.float64) for k, s in shapes.items()}
    for one in gradients(shapes, 25):
        run.step(one)
        for k, g in one.items():
            average[k].mul_(0.9).add_(0.1 * g)
    for k, p in run.weights.items():
        state = run.optimizer.state[p]
        m, q = state["momentum"], state["basis"]
        assert ((m @ q.T if k == "tall" else q @ m) - average[k]).abs().max() < 1e-13


def test_staggered_refreshes_are_spread_over_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count: all at first, then each matrix once an interval, never all together."""
    made: list[int] = []
    original = conda._basis
    monkeypatch.setattr(conda, "_basis", lambda m, how: made.append(1) or original(m, how))
    shapes = {f"{side}{i}": shape for side, shape in SHAPES.items() for i in range(4)}
    run = Run(
        CondaSettings(refresh_every=6, refresh="staggered"),
        {k: draw(*shape) for k, shape in shapes.items()},
    )
    counts = []
    for one in gradients(shapes, 19):
        made.clear()
        run.step(one)
        counts.append(len(made))
    assert counts[0] == 12
    assert counts[1:7] == counts[7:13] == counts[13:19] == [2] * 6


def test_what_becomes_of_the_second_moment_at_a_refresh() -> None:
    """Oracle: `reset` leaves one gradient's squares, `rotate` keeps the sum, `keep` is neither."""
    found = {}
    for what in ("keep", "rotate", "reset"):
        run = Run(CondaSettings(refresh_every=3, on_refresh=what), {"w": draw(8, 8)})
        for one in gradients({"w": (8, 8)}, 4):
            run.step(one)
        (state,) = run.optimizer.state.values()
        found[what] = state["second_moment"]
        rotated = one["w"] @ state["basis"]
    assert torch.allclose(found["reset"], 0.01 * rotated.square())
    assert torch.allclose(found["rotate"].sum(1), found["keep"].sum(1))
    assert not torch.allclose(found["rotate"], found["keep"], rtol=0.1)


# SOAP.


def test_soaps_first_bases_are_as_good_as_its_gradient() -> None:
    """Oracle: singular vectors in float64 of a float32 gradient of condition 1e4, whose Gram matrix
    in float32 (condition 1e8) leaves the last ones wrong by 1 %."""
    left, right = (torch.linalg.qr(draw(8, 8, seed=seed)).Q for seed in (1, 2))
    grad = (left * torch.logspace(0, -4, 8, dtype=torch.float64) @ right.T).float()
    run = Run(SOAPSettings(), {"w": draw(8, 8).float()})
    run.step({"w": grad})
    (state,) = run.optimizer.state.values()
    u, _, vh = torch.linalg.svd(grad.double())
    for basis, expected in ((state["basis_left"], u), (state["basis_right"], vh.T)):
        signs = (basis * expected).sum(0).sign()
        assert (basis * signs - expected).abs().max() < 1e-6


# AdamP.


def test_adamp_that_never_projects_is_adamw() -> None:
    """Oracle: our AdamW (torch's kernel)."""
    one, other = Run(AdamPSettings(delta=0), WEIGHTS), Run(RULES["adamw"](), WEIGHTS)
    for grads in GRADS:
        got, expected = one.step(grads), other.step(grads)
    assert all(torch.allclose(got[k], expected[k], rtol=1e-14, atol=1e-15) for k in got)


def test_adamp_keeps_steps_of_scale_invariant_weights_tangential() -> None:
    """Oracle: gradients orthogonal to the weight: <W, step> = 0. With random ones the layer's test
    fires by chance in 8 % of the steps."""
    weight = draw(16, 12, seed=1)
    run = Run(AdamPSettings(lr=0.01, weight_decay=0), {"w": weight})
    for seed in range(5):
        before = run.weights["w"].detach().clone()
        g = draw(16, 12, seed=seed + 10)
        g -= (g * before).sum() / before.square().sum() * before
        step = before - run.step({"w": g})["w"]
        assert abs((step * before).sum()) < 1e-8 * step.norm() * before.norm()
    rule = AdamPSettings().rule()
    stack = draw(2000, 16, 12, seed=3)
    share = rule._scale_invariant(stack.flatten(1), draw(2000, 16, 12, seed=4).flatten(1))
    assert abs(float(share.double().mean()) - 0.08) < 0.02


# NorMuon's variants.


def test_a_cautious_decay_shrinks_only_what_the_step_shrinks() -> None:
    """Oracle: the run without decay, and the mask written out."""
    plain = Run(NorMuonSettings(preset="speedrun", lr=0.1, weight_decay=0), WEIGHTS)
    cautious = Run(NorMuonSettings(preset="speedrun", lr=0.1, weight_decay=0.5), WEIGHTS)
    step = plain.deltas(GRADS[:1])[0]
    after = cautious.step(GRADS[0])
    for k, w in WEIGHTS.items():
        expected = w - step[k] - 0.1 * 0.5 * w * (step[k] * w >= 0)
        assert torch.allclose(after[k], expected, rtol=1e-13)


def test_the_presets_are_what_their_sources_say() -> None:
    """Oracle: the table of differences; a given key wins over the preset."""
    axes = {}
    for preset in ("official", "paper", "speedrun"):
        run = Run(NorMuonSettings(preset=preset), {"wide": draw(6, 10), "tall": draw(10, 6)})
        axes[preset] = [s["second_moment"].shape for s in run.optimizer.state.values()]
    assert axes["official"] == axes["paper"] == [(6, 1), (10, 1)]
    assert axes["speedrun"] == [(1, 10), (10, 1)]
    paper = NorMuonSettings(preset="paper")
    assert (paper.nesterov, paper.update_rms, paper.lr, paper.weight_decay) == (
        *(False, "match_adamw"),
        *(2e-3, 0.1),
    )
    assert NorMuonSettings(preset="paper", nesterov=True).nesterov
    speedrun = NorMuonSettings(preset="speedrun").rule()
    assert (speedrun.decay, speedrun.beta2, speedrun.muon.coefficients) == (
        *("inside", 0.9),
        "polar_express",
    )


def test_clipping_changes_no_spectral_step_but_what_is_mixed() -> None:
    """Oracle: gradients clipped to a tiny norm from the first step on give the same steps (the
    guard is 1e-7 beside norms of 1e-3); the update itself is never scaled."""
    norm = torch.stack([torch.stack([g.norm() for g in one.values()]).norm() for one in GRADS])
    plain = Run(MuonSettings(weight_decay=0), zeros()).deltas(GRADS[:1])
    clipped = [{k: g * (1e-2 / norm[0]) for k, g in GRADS[0].items()}]
    close(Run(MuonSettings(weight_decay=0), zeros()).deltas(clipped), plain, 1e-3)


def test_a_rule_without_a_matrix_is_refused() -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match="conda has no hidden matrix to train here; use adamw"):
        CondaSettings().build(Groups({}, {"b": nn.Parameter(torch.zeros(3))}))
