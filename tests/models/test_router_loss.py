"""The balancing loss of mixtures, whatever rows stand together, and the precision of experts."""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmnorm.models.foreign import Foreign, Ways, empty_foreign
from llmnorm.models.frozen import narrow
from llmnorm.models.looks import look
from llmnorm.models.router_loss import coefficient, own_coefficient
from llmnorm.nn.experts import (
    can_be_narrow,
    expert_count,
    routers,
    stack_names,
    stacked_modules,
)
from llmnorm.objectives.apart import as_asked, with_row_sizes
from llmnorm.objectives.contract import MicroBatch
from llmnorm.part import InputError
from llmnorm.training.expert_load import expert_load
from tests.families import class_of, configuration, packed_rows, tiny, with_weights
from tests.training.test_step import reads

SOME = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
SOME_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "gpt_oss": {},
    "mixtral": SOME_LOCAL,
    "olmoe": SOME,
    "granitemoe": SOME_LOCAL,
}
FACTOR = 0.3
ALONE: Any = SimpleNamespace(world=1, autocast=nullcontext, reduce=lambda values: values)


def mixture(family: str, **other: Any) -> Foreign:
    """A tiny model of a family, looked at, whose balancing loss is trained."""
    model = with_weights(tiny(family, **(MIXTURES[family] | other)))
    model.router_loss = FACTOR
    look(model, autocast=nullcontext)
    return model


def uneven(count: int, first: int = 0) -> MicroBatch:
    """Rows of which each has other labels, in its first tokens; with what each row is of."""
    batch = packed_rows(count, first)
    labels = cast(Tensor, batch.inputs["shift_labels"]).clone()
    for row in range(count):
        labels[row, 5 + 7 * (first + row) :] = -100
    counted = int((labels != -100).sum())
    batch = batch._replace(inputs={**batch.inputs, "shift_labels": labels}, labels=counted)
    return with_row_sizes(batch)


def step(model: Foreign, batches: list[MicroBatch]) -> tuple[float, float]:
    """Gradients of a step; its cross-entropy and its balancing loss."""
    model.zero_grad()
    items = float(sum(batch.labels for batch in batches))
    loss = balance = 0.0
    for batch in batches:
        output = cast(Any, model)(**batch.inputs, num_items_in_batch=items)
        output.loss.backward()
        loss, balance = loss + float(output.cross_entropy), balance + float(output.balance)
    return loss, balance


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, over the largest gradient of its tensor."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[n] - w).abs().max() / w.abs().max().clamp(min=1e-3)) for n, w in wanted.items()
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_a_row_has_the_classs_own_loss_and_gradients(family: str) -> None:
    """Oracle: the class's `labels=` loss of the same row with `output_router_logits`."""
    named = {"output_router_logits": True, "router_aux_loss_coef": FACTOR}
    own = tiny(family, **(MIXTURES[family] | named)).train()
    model = with_weights(own)
    model.router_loss = coefficient("auto", model)
    assert model.router_loss == FACTOR
    assert "0.3 times the class's own" in look(model, autocast=nullcontext).table()
    ids = cast(Tensor, packed_rows(1).inputs["input_ids"])
    wanted = own(input_ids=ids, labels=ids, use_cache=False)
    wanted.loss.backward()
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    sizes = {"row_tokens": (ids.shape[1],), "row_labels": (ids.shape[1] - 1,)}
    found = cast(Any, model)(input_ids=ids, shift_labels=labels, **sizes)
    found.loss.backward()
    assert float(found.balance) == pytest.approx(float(wanted.aux_loss.detach()), rel=1e-7)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.loss.detach()), rel=1e-6)
    assert float(found.cross_entropy) < float(found.loss.detach()) - 0.3
    assert furthest(gradients(model), gradients(own)) <= 1e-5


def test_a_step_is_the_same_in_any_micro_batches() -> None:
    """Oracle: the class's own function a row, weighted by labels; 1 x 4, 2 x 2 and 4 x 1 rows.

    The four rows together have another loss, and another gradient.
    """
    model = mixture("qwen3_moe")
    loss, balance = step(model, [uneven(1, n) for n in range(4)])
    wanted = gradients(model)
    for rows in (2, 4):
        found = step(model, [uneven(rows, n) for n in range(0, 4, rows)])
        assert found == pytest.approx((loss, balance), rel=1e-6)
        assert furthest(gradients(model), wanted) <= 1e-6
    batch = uneven(4)
    ids = cast(Tensor, batch.inputs["input_ids"])
    positions = cast(Tensor, batch.inputs["position_ids"])
    labels = cast(tuple[int, ...], batch.inputs["row_labels"])

    def own(rows: slice) -> float:
        asked: Any = {"use_cache": False, "output_router_logits": True}
        found = model(input_ids=ids[rows], position_ids=positions[rows], **asked)
        return float(found.aux_loss.detach())

    alone = sum(n * own(slice(row, row + 1)) for row, n in enumerate(labels)) / sum(labels)
    assert balance == pytest.approx(alone, rel=1e-6)
    assert abs(own(slice(4)) - balance) > 1e-2


def test_padding_and_rows_without_labels_do_not_count() -> None:
    """Oracle: the same row without anything behind it; other tokens there change nothing."""
    model = mixture("qwen3_moe")
    batch = uneven(1)
    short = step(model, [batch])
    wanted = gradients(model)
    inputs = {n: cast(Tensor, batch.inputs[n]) for n in ("input_ids", "position_ids")}
    ids = torch.cat([F.pad(inputs["input_ids"], (0, 9), value=7), torch.full((1, 49), 5)])
    positions = torch.cat([inputs["position_ids"], torch.arange(9)[None]], 1)
    labels = F.pad(cast(Tensor, batch.inputs["shift_labels"]), (0, 9, 0, 1), value=-100)
    padded = MicroBatch(
        {
            "input_ids": ids,
            "position_ids": torch.cat([positions, torch.arange(49)[None]]),
            "shift_labels": labels,
        },
        batch.labels,
        batch.tokens,
        torch.arange(2),
        [(0, 11), (11, 40), (49, 60)],
    )
    padded = with_row_sizes(padded)
    assert padded.inputs["row_tokens"] == (40, 0)
    assert step(model, [padded]) == pytest.approx(short, rel=1e-6)
    assert furthest(gradients(model), wanted) <= 1e-6


def test_documents_apart_count_by_themselves() -> None:
    """Oracle: a document a row, in other micro-batches: the same sum over documents."""
    model = mixture("qwen3_moe")
    assert model.ways is not None
    model.ways = Ways("apart", model.ways.head)
    found = as_asked(model, [packed_rows(2, 0)], ALONE)
    wanted = as_asked(model, [packed_rows(1, n) for n in range(2)], ALONE)
    assert len(found) < len(wanted)
    assert sorted(n for b in found for n in b.inputs["row_tokens"]) == [9, 9, 11, 11, 20, 20]
    loss = step(model, wanted)
    gradient = gradients(model)
    assert step(model, found) == pytest.approx(loss, rel=1e-6)
    assert furthest(gradients(model), gradient) <= 1e-6


def test_recomputed_blocks_give_the_same_gradients() -> None:
    """Oracle: the step without recomputation; routers are called twice, their logits count once."""
    model = mixture("gpt_oss")
    loss = step(model, [uneven(2)])
    wanted = gradients(model)
    for block in model.units().values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert step(model, [uneven(2)]) == loss
    assert furthest(gradients(model), wanted) <= 1e-6


def test_the_device_is_not_waited_for() -> None:
    """Oracle: what a step without the balancing loss reads; rows are cut by numbers of the host."""
    model = mixture("qwen3_moe")
    batch = uneven(2)
    with reads() as found:
        step(model, [batch])
    model.router_loss = 0.0
    with reads() as without:
        cast(Any, model)(**batch.inputs, num_items_in_batch=1.0).loss.backward()
    inside = [where for _, where in found if where]
    assert Counter(inside) == Counter(where for _, where in without if where)


def test_evaluation_has_no_balancing_loss() -> None:
    """Oracle: the loss of the model without one."""
    model = mixture("qwen3_moe").eval()
    batch = uneven(2)
    found = cast(Any, model)(**batch.inputs)
    model.router_loss = 0.0
    assert "balance" not in found
    assert torch.equal(found.loss, cast(Any, model)(**batch.inputs).loss)


def test_what_a_run_asks_for() -> None:
    """Oracle: the coefficients of the configurations; JetMoE calls its own by another name."""
    for family, key in (("qwen3_moe", "router_aux_loss_coef"), ("jetmoe", "aux_loss_coef")):
        for says in (False, True):
            config = configuration(family, output_router_logits=says, **{key: 0.037})
            model = empty_foreign(class_of(config), config)
            assert own_coefficient(model) == 0.037
            assert coefficient("auto", model) == (0.037 if says else 0.0)
            assert coefficient("off", model) == 0.0
            assert coefficient(0.5, model) == 0.5
            assert not model.config.output_router_logits
            assert model.saved_config.output_router_logits is says
    for family, more in (("llama", {}), ("glm4_moe", {"n_routed_experts": 4})):
        config = configuration(family, **more)
        model = empty_foreign(class_of(config), config)
        assert model.is_mixture is (family != "llama")
        assert coefficient("auto", model) == 0.0
        with pytest.raises(InputError, match=r"router_loss: 0\.01; .* has no balancing loss"):
            coefficient(0.01, model)


def test_a_balancing_loss_that_is_not_the_classs_own_is_refused() -> None:
    """Oracle: a base model that returns twice its router logits, but not to its own class."""
    model = mixture("qwen3_moe")
    assert "0.3 times the class's own" in look(model, autocast=nullcontext).table()
    own = model._of_base

    def other(given: Any) -> Any:
        output = own(given)
        output.router_logits = tuple(2 * layer for layer in output.router_logits or ())
        return output

    model._of_base = other  # type: ignore[method-assign]
    with pytest.raises(InputError, match="model.router_loss: the balancing loss of Qwen3Moe"):
        look(model, autocast=nullcontext)


def test_what_is_a_router_and_what_a_stack() -> None:
    """Oracle: the classes' files."""
    for family, router, layers, stacks in (
        ("qwen3_moe", "mlp.gate", 2, ("gate_up_proj", "down_proj")),
        ("gpt_oss", "mlp.router", 4, ("gate_up_proj", "down_proj")),
        ("jamba", "feed_forward.router", 1, ("gate_up_proj", "down_proj")),
    ):
        more = {"num_experts": 4, "use_mamba_kernels": False} if family == "jamba" else {}
        config = configuration(family, **more)
        model = empty_foreign(class_of(config), config)
        found = routers(model)
        assert len(found) == len(stacked_modules(model)) == layers
        assert all(name.endswith(router) for name in found)
        assert {stack_names(module) for module in stacked_modules(model)} == {stacks}
        assert expert_count(model) == 4
    assert not routers(tiny("llama")) and not can_be_narrow(torch.empty(4, 8, 12))


def test_a_router_that_is_a_linear_layer_stays_float32() -> None:
    """Oracle: Phi-MoE's, derived from one, among frozen weights that are stored in bf16."""
    config = configuration("phimoe", num_local_experts=4)
    model = empty_foreign(class_of(config), config).requires_grad_(False)
    narrow(cast(Any, model))
    found = [cast(nn.Linear, layer) for layer in routers(model).values()]
    assert len(found) == 2 and all(isinstance(layer, nn.Linear) for layer in found)
    assert all(layer.weight.dtype == torch.float32 for layer in found)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def halves() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_routers_are_float32_and_experts_bf16_under_autocast(family: str) -> None:
    """Oracle: products of the same numbers, rounded before and not at all; the class without us."""
    model = with_weights(tiny(family, **MIXTURES[family]))
    router, experts = next(iter(routers(model).values())), stacked_modules(model)[0]
    x = torch.randn(10, 32)
    with halves():
        logits, scores, chosen = router(x)
        found = experts(x, chosen, scores)
        assert torch.equal(router(x.bfloat16())[0], router(x.bfloat16().float())[0])
    with torch.no_grad():
        wanted, *_ = router(x)
        assert torch.equal(logits, wanted) and logits.dtype == torch.float32
        exact = experts(x, chosen, scores)
        for name in stack_names(experts):
            experts.get_parameter(name).copy_(experts.get_parameter(name).bfloat16())
        rounded = experts(x, chosen, scores)
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - exact).abs().max() / exact.abs().max()) < 3e-2
    assert not torch.equal(found, rounded)  # the inputs of the products are rounded too
    found.square().sum().backward()
    for name in stack_names(experts):
        gradient = experts.get_parameter(name).grad
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.any()


def test_frozen_experts_in_bf16_give_the_same_bits() -> None:
    """Oracle: float32 experts, which are rounded at every use; routers stay float32."""
    own = tiny("qwen3_moe")
    wide, narrowed = with_weights(own), empty_foreign(type(own), own.config)
    narrowed.requires_grad_(False)
    narrow(narrowed)
    kept = {n: p.dtype for n, p in narrowed.named_parameters() if p.ndim > 1}
    assert {n for n, dtype in kept.items() if dtype == torch.float32} == set(
        n for n in kept if n.endswith("mlp.gate.weight")
    )
    narrowed.to_empty(device="cpu")
    wide.requires_grad_(False)
    values = dict(own.named_parameters())
    with torch.no_grad():
        for name, parameter in narrowed.named_parameters():
            parameter.copy_(values[name])
        wide.model.embed_tokens.weight.copy_(wide.model.embed_tokens.weight.bfloat16())
    narrowed.model.rotary_emb = wide.model.rotary_emb  # a buffer, which is in no file
    narrowed.train()
    ids = cast(Tensor, packed_rows(1).inputs["input_ids"])
    with halves():
        logits = [m(input_ids=ids, use_cache=False).logits for m in (wide, narrowed)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_load_counts_what_the_experts_are_called_with(family: str) -> None:
    """Oracle: the largest router logits of each real token, counted by hand; padding is not."""
    model = mixture(family)
    batch = uneven(2)
    sizes = {"row_tokens": (40, 13)}
    inputs = {**batch.inputs, **sizes}
    found = expert_load(model, inputs, ALONE)
    assert model.training and [*found] == [str(n) for n in range(len(model.units()))]
    with torch.no_grad():
        given = {n: batch.inputs[n] for n in ("input_ids", "position_ids")}
        if family == "gpt_oss":
            given = model._inputs(given["input_ids"], given["position_ids"], None, "mask")
        asked: Any = {"use_cache": False, "output_router_logits": True}
        layers = model.base_model(**(given | asked)).router_logits
    for figures, logits in zip(found.values(), layers, strict=True):
        counts = logits[:53].topk(2).indices.flatten().bincount(minlength=4)
        assert figures["expert_load"] == pytest.approx((counts / (2 * 53)).tolist())
