"""The step of a model that is being trained."""

import pytest
import torch

from llmnorm.models.eager_step import EagerStep
from tests.models.cache_rounds import VOCABULARY, build


@pytest.mark.parametrize("name", ["softmax", "softmax before nala"])
def test_a_step_is_a_pass_without_a_cache(name: str) -> None:
    """Oracle: the model's own logits of whole rows, of uneven lengths, in float64."""
    model = build(name)
    step = EagerStep(model)
    assert (step.vocabulary, step.dtype, step.device.type) == (VOCABULARY, torch.float64, "cpu")
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = step.new_cache()
    for _ in ids:
        cache.admit()
    first = step.step(ids[:, :5], cache, [5, 3])
    last = step.step(ids[:, 5:7], cache, [2, 1], last=True)
    rows = [ids[0, :7], torch.cat([ids[1, :3], ids[1, 5:6]])]
    for row, whole in enumerate(rows):
        expected = model(whole[None]).logits[0]
        count = (5, 3)[row]
        torch.testing.assert_close(first[row, :count], expected[:count], rtol=0, atol=1e-12)
        torch.testing.assert_close(last[row, 0], expected[-1], rtol=0, atol=1e-12)


def test_a_step_leaves_the_model_as_it_is() -> None:
    """Oracle: modules, parameters and the memory they lie in, before and after; a Decoder joins
    weights."""
    from llmnorm.models.decoding import Decoder

    model = build("softmax")
    before = [(n, p.data_ptr(), p.clone()) for n, p in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    step = EagerStep(model)
    cache = step.new_cache()
    cache.admit()
    step.step(torch.tensor([[1, 2, 3]]), cache)
    after = list(model.named_parameters())
    assert modules == [name for name, _ in model.named_modules()]
    for (name, place, value), (other, parameter) in zip(before, after, strict=True):
        assert (name, place) == (other, parameter.data_ptr()) and value.equal(parameter)
        assert parameter.requires_grad and parameter.grad is None
    Decoder(model, captured=False, layout="plain")
    places = [p.data_ptr() for _, p in model.named_parameters()]
    assert places != [place for _, place, _ in before]


def test_under_autocast_the_cache_has_its_numbers() -> None:
    """Oracle: the dtype of keys that a pass under autocast makes."""
    model = build("softmax").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = EagerStep(model)
        cache = step.new_cache()
        cache.admit()
        step.step(torch.tensor([[1, 2]]), cache)
    assert step.dtype == torch.bfloat16
    assert cache.layers[0].keys.dtype == torch.bfloat16  # type: ignore[attr-defined]
