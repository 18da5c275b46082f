"""Rows of new tokens beside a frozen embedding: gradient, memory and first values."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmnorm.config.adapter import LoraSettings
from llmnorm.models.adapters import inject, is_adapter, loaded_name, set_first_values
from llmnorm.models.building import build_model, empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import named_weights
from llmnorm.models.frozen import freeze, narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.models.new_rows import EMBEDDING, HEAD, add_new_rows, rows_name, set_new_rows
from llmnorm.optim.groups import split

pytest.importorskip("peft", reason="needs the extra finetune")

NEW = range(57, 60)  # of 61 rows: one that no token has stands behind them
both = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def config(tied: bool, **keys: Any) -> LlmNormConfig:
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return LlmNormConfig(**(sizes | heads | {"tie_word_embeddings": tied} | keys))


def beside(
    base: LlmNormForCausalLM, *, new: range = NEW, stored: torch.dtype | None = None
) -> LlmNormForCausalLM:
    """The base with an adapter and new rows, its own rows of new tokens being nonsense."""
    model = empty_model(base.config, device="meta", dtype=base.dtype)
    inject(model, LoraSettings(rank=4, alpha=8))
    if new:
        add_new_rows(model, new)
    freeze(model, norms=False, new_head=False)
    if stored is not None:
        narrow(model, stored)
    model.to_empty(device="cpu")
    model.tie_weights()
    weights = named_weights(base)
    with torch.no_grad():
        for name, tensor in named_weights(model).items():
            if not is_adapter(name):
                tensor.copy_(weights[loaded_name(name)])
        for name in (EMBEDDING, HEAD):
            rows = named_weights(model).get(rows_name(name))
            if rows is not None:
                rows.copy_(weights[name][new.start : new.stop])
                named_weights(model)[name][new.start : new.stop] = 7.0
    set_first_values(dict(model.named_modules()), seed=1)
    return model


def text(rows: int = 3, length: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens, new ones among them, and which of them are labels."""
    ids = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(3))
    ids[0, 2:5] = torch.tensor([*NEW])
    labels = ids.clone()
    labels[:, 6:9] = -100
    return ids, labels


def rows_of(model: LlmNormForCausalLM) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.endswith("new_rows")}


@both
@pytest.mark.parametrize("loss_only", [True, False], ids=["chunks", "logits"])
def test_their_gradient_is_that_of_these_rows_of_a_whole_embedding(
    tied: bool, loss_only: bool
) -> None:
    """Oracle: autograd on the base as a whole, in float64: loss, logits, gradients."""
    base = build_model(config(tied), seed=0).double()
    model = beside(base)
    ids, labels = text()
    expected, found = (m(ids, labels=labels, loss_only=loss_only) for m in (base, model))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    if not loss_only:
        torch.testing.assert_close(found.logits, expected.logits)
        expected.loss = torch.nn.functional.cross_entropy(
            expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        found.loss = torch.nn.functional.cross_entropy(
            found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
    expected.loss.backward()
    found.loss.backward()
    whole = dict(base.named_parameters())
    rows = rows_of(model)
    assert rows.keys() == {rows_name(n) for n in ([EMBEDDING] if tied else [EMBEDDING, HEAD])}
    for name, parameter in rows.items():
        gradient = whole[name.replace("new_rows", "weight")].grad
        assert gradient is not None and parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient[NEW.start : NEW.stop])
        assert parameter.grad.abs().min() > 0
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if is_adapter(n)}
    groups = split(model)
    assert rows.keys() <= groups.auxiliary.keys() and not rows.keys() & groups.matrices.keys()


@both
def test_bf16_weights_beside_float32_rows(tied: bool) -> None:
    """Oracle: the float32 model under the same autocast; float32 rows keep small steps."""
    base = build_model(config(tied), seed=0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.bfloat16())
    wide, narrowed = beside(base), beside(base, stored=torch.bfloat16)
    assert narrowed.lm_head.weight.dtype == torch.bfloat16
    ids, labels = text()
    for model in (wide, narrowed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=labels, loss_only=True).loss
        loss.backward()
    for name, parameter in rows_of(narrowed).items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.equal(rows_of(wide)[name].grad)
    assert narrowed.get_input_embeddings()(ids).dtype == torch.float32


@both
def test_steps_move_these_rows_alone(tied: bool) -> None:
    """Oracle: the base's rows, to the bit, where a token is not new."""
    base = build_model(config(tied), seed=0)
    model = beside(base)
    before = {n: p.detach().clone() for n, p in rows_of(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, labels = text()
    for _ in range(3):
        model(ids, labels=labels, loss_only=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    others = torch.tensor([n for n in range(61) if n not in NEW])
    weights = named_weights(base)
    assert model.get_input_embeddings()(others).equal(weights[EMBEDDING][others])
    assert model.lm_head.weight[others].equal(base.lm_head.weight[others])
    for name, parameter in rows_of(model).items():
        assert bool((parameter != before[name]).any(1).all())


def test_new_rows_begin_at_the_mean_of_the_rows_before_them() -> None:
    """Oracle: the mean in float64, of a weight in bfloat16 too."""
    weight = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.empty(2, 3)
    kept = weight.clone()
    set_new_rows({EMBEDDING: weight, rows_name(EMBEDDING): rows}, range(4990, 4992))
    mean = kept[:4990].double().mean(0)
    torch.testing.assert_close(rows, mean.float().expand(2, 3), rtol=0, atol=1e-7)
    assert weight[4990:4992].equal(mean.bfloat16().expand(2, 3))
    assert weight[:4990].equal(kept[:4990]) and weight[4992:].equal(kept[4992:])


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self.alive:
            return

        def gone(_: object) -> None:
            self.bytes -= self.alive.pop(key)[1]

        self.alive[key] = weakref.ref(storage, gone), storage.nbytes()
        self.bytes += storage.nbytes()


@both
def test_memory_of_a_step(tied: bool) -> None:
    """Oracle: live bytes, counted, with new rows and without; the whole embedding trained
    would be far above."""
    base = build_model(config(tied, vocab_size=8000, hidden_size=64, intermediate_size=160), seed=0)
    ids = torch.randint(0, 8000, (4, 64), generator=torch.Generator().manual_seed(0))
    new = range(7990, 7992)

    def peak(model: LlmNormForCausalLM) -> int:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        held = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
        with Live() as live:
            for _ in range(2):  # moments are there from the second on
                model(ids, labels=ids, loss_only=True).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return held + live.peak

    without, rows = peak(beside(base, new=range(0))), peak(beside(base, new=new))
    assert without < rows <= 1.05 * without
    trained = beside(base, new=range(0))
    for parameter in (*trained.get_input_embeddings().parameters(), trained.lm_head.weight):
        parameter.requires_grad_()
    assert peak(trained) > 1.3 * without
