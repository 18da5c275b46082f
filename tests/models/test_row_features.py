"""What is measured of rows for a selection: exact in float64, and nothing else is touched."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.data.best_fit import lay_out
from llmnorm.data.loader import document_bounds
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.models.row_features import (
    Gradient,
    Hidden,
    Losses,
    ZerothOrder,
    directions,
    projection,
)
from llmnorm.part import InputError
from tests.models.adapter_kinds import ADAPTERS
from tests.models.test_adapters import injected
from tests.models.test_generation import MIXERS, build
from tests.objectives.examples import PAD, example

LENGTHS = [[(3, 4), (2, 6)], [(5, 2)], [(1, 1), (4, 3), (2, 2)]]
ROOM = 16
ALIKE = {name: mixer for name, mixer in MIXERS.items() if name != "hybrid"}
every_mixer = pytest.mark.parametrize("mixer", ALIKE.values(), ids=ALIKE)


def packed() -> tuple[dict[str, Any], list[tuple[int, int]], list[tuple[Any, Any]]]:
    """Examples in rows of a batch: the model's keywords, the spans, and the examples."""
    rows = [
        [example(*n, seed=10 * r + i) for i, n in enumerate(row)] for r, row in enumerate(LENGTHS)
    ]
    batch = lay_out(rows, ROOM, PAD)
    spans = []
    for number, row in enumerate(rows):
        start = number * ROOM
        for ids, _ in row:
            spans.append((start, start + len(ids) - 1))
            start += len(ids) - 1
    inputs = {**batch, **document_bounds(batch["position_ids"]), "loss_only": True}
    return inputs, spans, [one for row in rows for one in row]


def alone(model: nn.Module, one: tuple[Any, Any]) -> Tensor:
    """The mean loss of an example by itself, from all logits."""
    ids, trained = torch.from_numpy(one[0]), torch.from_numpy(one[1])
    losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return losses[trained[1:]].mean()


def last(model: LlmNormForCausalLM) -> nn.Module:
    return projection(model.model.layers[-1])[1]


def gradients(model: LlmNormForCausalLM, at: nn.Module, examples: list[Any]) -> Tensor:
    """Each example's whole gradient of a weight, by autograd, (examples, out, in)."""
    return torch.stack([torch.autograd.grad(alone(model, e), at.weight)[0] for e in examples])


@every_mixer
def test_features_are_the_gradients_of_single_rows(mixer: Any) -> None:
    """Oracle: autograd and full logits of each example alone, float64; a difference along a
    direction is off by the third derivative times eps^2."""
    model = build(mixer=mixer)
    at = last(model)
    inputs, spans, examples = packed()
    z = directions(at, 3, seed=5).double()
    slopes = gradients(model, at, examples).flatten(1) @ z.flatten(1).t()
    losses = torch.stack([alone(model, one) for one in examples]).detach()

    exact = Gradient(at, z).measure(model, inputs, spans)
    torch.testing.assert_close(exact.features, slopes, atol=1e-10, rtol=1e-8)
    near = ZerothOrder(at, z, eps=1e-4).measure(model, inputs, spans)
    torch.testing.assert_close(near.features, slopes, atol=2e-6, rtol=1e-4)
    for found in (exact, near, Losses().measure(model, inputs, spans)):
        assert found.losses is not None
        torch.testing.assert_close(found.losses, losses, atol=1e-6, rtol=0)


def test_a_perturbed_output_is_a_perturbed_weight() -> None:
    """Oracle: the same differences with the weight itself changed, float64."""
    model = build()
    at = last(model)
    inputs, spans, examples = packed()
    z = directions(at, 1, seed=1).double()
    found = ZerothOrder(at, z, eps=1e-3).measure(model, inputs, spans).features[:, 0]
    sides = []
    for sign in (1, -1):
        other = copy.deepcopy(model)
        last(other).weight.data.add_(z[0], alpha=sign * 1e-3)
        with torch.no_grad():
            sides.append(torch.stack([alone(other, one) for one in examples]))
    torch.testing.assert_close(found, (sides[0] - sides[1]) / 2e-3, atol=1e-11, rtol=0)


def test_the_mean_of_the_last_hidden_states() -> None:
    """Oracle: each example alone."""
    model = build()
    inputs, spans, examples = packed()
    found = Hidden(24).measure(model, inputs, spans)
    assert found.losses is None
    for got, (ids, _) in zip(found.features, examples, strict=True):
        with torch.no_grad():
            states = model.model(torch.from_numpy(ids[:-1])[None]).last_hidden_state[0]
        torch.testing.assert_close(got, states.mean(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_of_an_adapter_it_is_b_at_the_values(kind: str) -> None:
    """Oracle: autograd of B, which is not 0, each example alone; float64."""
    model = injected(ADAPTERS[kind], build()).double().eval()
    name, at = projection(model.model.layers[-1])
    assert name == "self_attn.v_proj.lora_B" and at.weight.shape == (12, 4)
    at.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    inputs, spans, examples = packed()
    z = directions(at, 2, seed=5)
    assert z.dtype == torch.float64
    slopes = gradients(model, at, examples).flatten(1) @ z.flatten(1).t()
    found = Gradient(at, z).measure(model, inputs, spans).features
    torch.testing.assert_close(found, slopes, atol=1e-9, rtol=1e-7)
    near = ZerothOrder(at, z, eps=1e-5).measure(model, inputs, spans).features
    torch.testing.assert_close(near, slopes, atol=1e-5, rtol=1e-4)


def test_where_values_have_no_projection_the_output_is_measured() -> None:
    """Oracle: the names; an adapter elsewhere leaves the layer itself, without `lora_B`."""
    names = {
        kind: projection(build(mixer=mixer).model.layers[-1])[0] for kind, mixer in MIXERS.items()
    }
    assert names["softmax"] == names["gla"] == "self_attn.v_proj"
    assert names["ssd"] == names["gated_delta"] == "self_attn.out_proj"
    model = injected(ADAPTERS["rslora"], build())  # queries and down_proj alone
    assert projection(model.model.layers[-1])[0] == "self_attn.v_proj"


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes that autograd keeps inside."""
    found: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def test_nothing_is_left_behind() -> None:
    """Oracle: no gradient, no hook, no saved bytes of differences; weights, the block's own forward
    (of a compiler, or recomputation) and the loss are as before."""
    model = build()
    at, block = last(model), model.model.layers[-1]
    inputs, spans, _ = packed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model(**inputs).loss
    called = []
    plain = block.forward

    def wrapped(*args: Any) -> Any:
        called.append(1)
        return plain(*args)

    block.forward = wrapped  # type: ignore[method-assign]
    z = directions(at, 2, seed=3).double()
    with saved_bytes() as saved:
        ZerothOrder(at, z, 1e-3).measure(model, inputs, spans)
        Hidden(24).measure(model, inputs, spans)
        Losses().measure(model, inputs, spans)
    assert not saved
    Gradient(at, z).measure(model, inputs, spans)
    assert not called and vars(block)["forward"] is wrapped
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert model(**inputs).loss.equal(loss) and called
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_frozen_weights_in_bf16_are_measured_in_float32() -> None:
    """Oracle: the same weights, rounded to bfloat16, in a model of float32; bit by bit, though the
    pass below is autocast's."""
    from llmnorm.models.frozen import narrow

    base = build().float()
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    wide = injected(ADAPTERS["lora"], base).eval()
    thin = injected(ADAPTERS["lora"], base).eval()
    narrow(thin)
    inputs, spans, _ = packed()
    found = []
    for model in (wide, thin):
        at = last(model)
        z = directions(at, 1, seed=5)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(ZerothOrder(at, z, 1e-3).measure(model, inputs, spans))
        assert "forward" not in vars(model.model.layers[-1].self_attn.q_proj.base_layer)
    assert found[0].features.dtype == torch.float64
    assert found[0].features.equal(found[1].features)


def test_many_directions_tell_what_one_does_not() -> None:
    """Oracle: rank correlation of distances with those of whole gradients, which are their
    projections on all axes: over .8 with 64 directions, and far less with one."""
    model = build()
    at = last(model)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 61, (24, 8), generator=generator)
    inputs = {"input_ids": ids, "shift_labels": ids.roll(-1, 1), "loss_only": True}
    spans = [(8 * row, 8 * row + 8) for row in range(24)]
    size = at.weight.shape
    axes = torch.eye(size.numel(), dtype=torch.float64).view(-1, *size)

    def ranks(z: Tensor) -> Tensor:
        features = Gradient(at, z).measure(model, inputs, spans).features
        return F.pdist(features).argsort().argsort().double()

    exact = ranks(axes)
    found = [
        float(torch.corrcoef(torch.stack([exact, ranks(directions(at, count, 7).double())]))[0, 1])
        for count in (1, 64)
    ]
    assert found[0] < 0.6 and found[1] > 0.8


def test_directions_are_the_same_for_a_seed() -> None:
    """Oracle: another seed, and the first of more directions."""
    at = nn.Linear(3, 5)
    assert directions(at, 2, 1).shape == (2, 5, 3)
    assert directions(at, 2, 1).equal(directions(at, 2, 1))
    assert not directions(at, 2, 1).equal(directions(at, 2, 2))


def test_rows_are_measured_by_labels() -> None:
    """Oracle: the message."""
    model = build()
    with pytest.raises(InputError, match="feature: rows are measured by their labels"):
        model(torch.tensor([[3, 4]]), feature=Losses())
