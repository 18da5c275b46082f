"""What a process computes: counted without numbers, against counts of steps with numbers."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.work import (
    Operation,
    Rates,
    Work,
    passes,
    rule_work,
    seconds_of,
    times,
)
from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.models.building import empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.initialization import initialize
from tests.running import SMOKE

LENGTH, ROWS = 64, 2


def config_of(*words: str) -> RunConfig:
    common = ["training.global_batch=2", f"data.context_length={LENGTH}", "training.device=cpu"]
    return load(SMOKE, [*common, *words]).config


def products(work: Work) -> float:
    return sum(each.flops * count for each, count in work.items())


def kinds_of(config: RunConfig) -> tuple[int, ...]:
    return record(config, 1, "cpu").kinds


@pytest.mark.parametrize("mixer", ["nala", "ssd"])
def test_products_are_those_of_a_step(mixer: str) -> None:
    """Oracle: torch's count of the products of a real forward and backward pass."""
    config = config_of(f"model.mixer={mixer}", "model.num_hidden_layers=3")
    found = passes(config, ROWS, "cpu", kinds_of(config))
    vocabulary = config.tokenizer.vocab_size
    settings = LlmNormConfig.from_settings(config.model, vocab_size=vocabulary)
    model = empty_model(settings, device="meta").to_empty(device="cpu").train()
    initialize(model, seed=0, modules=dict(model.named_modules()))
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    # torch's table lacks products that are added in place.
    known = {
        torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
        torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2],
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counted:
        model(input_ids=ids, shift_labels=ids, loss_only=True).loss.backward()
    assert products(found.whole(recompute=False)) == pytest.approx(counted.get_total_flops())
    more = products(found.whole(recompute=True)) - products(found.whole(recompute=False))
    assert more == pytest.approx(products(found.forward))


def test_attention_is_counted_as_a_fused_kernel() -> None:
    """Oracle: by hand; a causal kernel computes half of 2 and, backward, of 5 products."""
    config = config_of("model.num_hidden_layers=2", "model.num_key_value_heads=4")
    found = passes(config, ROWS, "cuda", kinds_of(config))
    hidden, inner = config.model.hidden_size, config.model.intermediate_size
    tokens = ROWS * LENGTH
    scores = 2 * tokens * LENGTH * hidden
    linear = 2 * tokens * (4 * hidden**2 + 3 * hidden * inner)
    assert products(found.forward) == 2 * (linear + 0.5 * 2 * scores)
    assert products(found.backward) == 2 * (2 * linear + 0.5 * 5 * scores)


def test_bf16_products_are_told_apart() -> None:
    """Oracle: all products of the same run are bf16, and as many."""
    plain, narrow = config_of(), config_of("training.precision=bf16")
    kinds = kinds_of(plain)
    wide, half = (passes(c, ROWS, "cuda", kinds).whole(recompute=False) for c in (plain, narrow))
    assert products(wide) == products(half)
    assert not any(each.bf16 for each in wide)
    assert all(each.bf16 for each in half if each.flops)


def test_bytes_of_an_operation() -> None:
    """Oracle: by hand; two tensors of 64 bytes are read and one is written, views are free."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llmnorm.analysis.plan.work import Counting

    with FakeTensorMode(), Counting() as counting:
        a, b = torch.empty(4, 4), torch.empty(4, 4)
        a + b.t()
        assert counting.work == Counter({Operation(0.0, False, 3 * 64): 1})
        counting.work.clear()
        a.add_(b)
        assert counting.work == Counter({Operation(0.0, False, 3 * 64): 1})
        counting.work.clear()
        a.copy_(b)
        assert counting.work == Counter({Operation(0.0, False, 2 * 64): 1})
        counting.work.clear()
        torch.nn.functional.embedding(torch.empty(2, dtype=torch.long), a)
        assert counting.work == Counter({Operation(0.0, False, 2 * 32): 1})
        counting.work.clear()
        a @ b
        assert counting.work == Counter({Operation(2 * 64.0, False, 3 * 64): 1})


def test_a_roofline() -> None:
    """Oracle: by hand; the longer of products and bytes, and what each operation's start takes."""
    rates = Rates(bf16=100.0, float32=10.0, moved=5.0, started=2.0)
    work = Work({Operation(100.0, True, 1.0): 1, Operation(100.0, False, 1.0): 2})
    work[Operation(1.0, True, 10.0)] += 1
    assert seconds_of(work, rates) == 1.0 + 2 * 10.0 + 2.0 + 4 * 0.5
    assert seconds_of(times(work, 0.5), rates) == 0.5 * seconds_of(work, rates)


def test_newton_schulz() -> None:
    """Oracle: Muon's 5 (4 k^2 L + 2 k^3) operations, in bf16 on a GPU."""
    config = config_of("optimizer=muon")
    found = rule_work(config, 96, 40, "cuda")
    assert products(found) == 5 * (4 * 40**2 * 96 + 2 * 40**3)
    assert all(each.bf16 for each in found if each.flops)


@pytest.mark.parametrize(
    ("name", "interval"), [("conda", "refresh_every"), ("soap", "precondition_frequency")]
)
def test_what_is_done_at_intervals_is_spread(name: str, interval: str) -> None:
    """Oracle: twice the interval, half of what is beyond a usual step."""
    words = [f"optimizer={name}", "optimizer.basis=eigh"][: 2 if name == "conda" else 1]

    def at(steps: int) -> float:
        config = config_of(*words, f"optimizer.{interval}={steps}")
        return products(rule_work(config, 96, 40, "cuda"))

    usual = 2 * at(200) - at(100)
    assert at(100) - usual == pytest.approx(2 * (at(200) - usual))
    assert at(100) > usual > 0
    if name == "conda":  # a gradient is rotated, a delta back
        assert usual == pytest.approx(2 * 2 * 96 * 40**2)


def test_every_rule_is_counted() -> None:
    """Oracle: none does nothing; muon's precision is not changed where it was chosen."""
    for name in ("muon", "normuon", "conda", "adamp", "soap"):
        assert rule_work(config_of(f"optimizer={name}"), 32, 32, "cpu")
    chosen = rule_work(config_of("optimizer=muon", "optimizer.precision=fp32"), 96, 40, "cuda")
    assert not any(each.bf16 for each in chosen)
