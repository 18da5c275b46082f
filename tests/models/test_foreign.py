"""A class of transformers in the training loop computes what the class itself computes."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedModel

from llmnorm.models import foreign as foreign_file
from llmnorm.models import looks as looks_file
from llmnorm.models.flops import flops_per_token
from llmnorm.models.foreign import Foreign, Ways, empty_foreign
from llmnorm.models.looks import Looks, look
from llmnorm.objectives.apart import as_asked, padding
from llmnorm.part import InputError
from tests.families import (
    FAMILIES,
    LENGTHS,
    class_of,
    configuration,
    packed_rows,
    tiny,
    with_weights,
)

# How each is found to be run; a new version of transformers may know better ways.
WAYS = {
    **dict.fromkeys(("llama", "gemma3_text", "phi3", "gpt2", "olmo2"), ("positions", "linear")),
    **dict.fromkeys(("smollm3", "qwen3_moe"), ("positions", "linear")),
    **dict.fromkeys(("gemma2", "granite", "cohere2"), ("positions", "own")),
    "gpt_oss": ("mask", "linear"),
    **dict.fromkeys(("qwen3_next", "mamba2", "lfm2", "bamba"), ("apart", "linear")),
    "falcon_h1": ("apart", "own"),
}
ALONE: Any = SimpleNamespace(world=1)  # a Parallel of one process


def seen(model: Foreign, **options: Any) -> Looks:
    return look(model, **({"autocast": nullcontext} | options))


def looked(model: Foreign, **options: Any) -> Foreign:
    seen(model, **options)
    return model


def train_step(model: Foreign) -> float:
    """Gradients of a step of two rows in two micro-batches; the loss."""
    batches = as_asked(model, [packed_rows(1, 0), packed_rows(1, 1)], ALONE)
    items = float(sum(batch.labels for batch in batches))
    total = 0.0
    for batch in batches:
        loss = cast(Any, model)(**batch.inputs, num_items_in_batch=items).loss
        loss.backward()
        total += float(loss.detach())
    return total


def own_step(model: PreTrainedModel) -> float:
    """The same by the class alone: its own loss, a document a pass."""
    batches = [packed_rows(1, 0), packed_rows(1, 1)]
    items = sum(batch.labels for batch in batches)
    total = 0.0
    for batch in batches:
        for ids in cast(Tensor, batch.inputs["input_ids"]).split(LENGTHS, 1):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss = loss * ((ids.shape[1] - 1) / items)
            loss.backward()
            total += float(loss.detach())
    return total


def distance(found: nn.Module, wanted: nn.Module) -> float:
    """The largest difference of a gradient, over the largest gradient of its tensor."""
    there = {name: parameter.grad for name, parameter in found.named_parameters()}
    worst = 0.0
    for name, parameter in wanted.named_parameters():
        gradient, other = parameter.grad, there[name]
        assert gradient is not None and other is not None, name
        scale = float(gradient.abs().max().clamp(min=1e-3))
        worst = max(worst, float((gradient - other).abs().max()) / scale)
    return worst


def beside_its_class(family: str) -> tuple[Foreign, float, PreTrainedModel, float]:
    """A tiny model after a step of packed rows, its loss, and the same of the class alone."""
    own = tiny(family).train()
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = looked(with_weights(own))
    return model, train_step(model), own, own_step(own)


def own_distance(family: str) -> float:
    """The largest relative difference of loss and gradients to the class's own."""
    model, found, own, wanted = beside_its_class(family)
    return max(abs(found - wanted) / wanted, distance(model, own))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_classs_own(family: str) -> None:
    """Oracle: the class's `labels=` loss, a document a pass; packed rows, two micro-batches."""
    model, found, own, wanted = beside_its_class(family)
    assert model.ways == WAYS[family]
    assert abs(found - wanted) <= 1e-5 * wanted
    assert distance(model, own) <= 1e-5


class Past(LlamaForCausalLM):
    """Its base's forward pass is called past the module, as OPT calls a part of its base."""

    def forward(self, *args: Any, labels: Any = None, **given: Any) -> Any:
        logits = self.lm_head(type(self.model).forward(self.model, *args, **given)[0])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return SimpleNamespace(loss=loss, logits=logits)


class Capped(LlamaForCausalLM):
    """A head with a cap that no configuration names."""

    def forward(self, *args: Any, labels: Any = None, **given: Any) -> Any:
        output = super().forward(*args, **given)
        output.logits = 30 * torch.tanh(output.logits / 30)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


class Biased(LlamaForCausalLM):
    """A head with a bias, which is no argument of Llama's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()


class Shifted(LlamaForCausalLM):
    """Every hidden state has a thousandth of the token's before: packing leaks by one position."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.norm.register_forward_hook(self._leak)

    @staticmethod
    def _leak(_: Any, __: Any, hidden: Tensor) -> Tensor:
        return hidden + 1e-3 * F.pad(hidden, (0, 0, 1, -1))


class Buffered(LlamaForCausalLM):
    """A scale that is no parameter and in no file."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(0.25), persistent=False)
        self.model.embed_tokens.register_forward_hook(lambda _, __, out: out * self.scale)


class Noisy(LlamaForCausalLM):
    """Dropout that no key of the configuration names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(
            lambda _, __, out: F.dropout(out, 0.1, self.training)
        )


class OverRows(LlamaForCausalLM):
    """Tokens see the mean of the rows of a batch, and of the row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda _, __, h: h + 0.01 * h.mean((0, 1)))


class WithMore(LlamaForCausalLM):
    """Its own loss is more than the cross-entropy."""

    def forward(self, *args: Any, **given: Any) -> Any:
        output = super().forward(*args, **given)
        if output.loss is not None:
            output.loss = output.loss + 0.5
        return output


def broken(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A tiny model of a class that is a little else than Llama; a head's bias is not 0."""
    torch.manual_seed(0)
    own = kind(configuration("llama")).train()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if parameter.ndim == 2 or name.endswith("lm_head.bias"):
                parameter.normal_(std=0.5)
    return own


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        (Capped, ("positions", "own")),
        (Biased, ("positions", "linear")),
        (Shifted, ("apart", "linear")),
        (Buffered, ("positions", "linear")),
    ],
)
def test_what_no_configuration_says_is_seen(kind: type[PreTrainedModel], ways: Ways) -> None:
    """Oracle: the class's own loss and gradients; the plain way would be wrong by far more."""
    own = broken(kind)
    model = looked(with_weights(own))
    assert model.ways == ways
    found, wanted = train_step(model), own_step(own)
    assert abs(found - wanted) <= 1e-5 * wanted
    assert distance(model, own) <= 1e-5
    model.zero_grad()
    if ways != ("positions", "linear"):
        model.ways = Ways("positions", "linear")
        train_step(model)
        assert distance(model, own) > 1e-4


def test_a_class_whose_base_is_not_called_gives_all_its_logits() -> None:
    """Oracle: the class's own loss and gradients."""
    own = broken(Past)
    model = looked(with_weights(own))
    assert model.ways == ("positions", "logits")
    found, wanted = train_step(model), own_step(own)
    assert abs(found - wanted) <= 1e-5 * wanted
    assert distance(model, own) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (Noisy, "two passes over the same tokens differ .* model.dropout=config"),
        (OverRows, "documents of a batch reach each other whatever is done"),
    ],
)
def test_what_cannot_be_trained_right_is_refused(
    kind: type[PreTrainedModel], complaint: str
) -> None:
    """Oracle: classes made so."""
    with pytest.raises(InputError, match=complaint):
        looked(with_weights(broken(kind)))


def test_a_loss_of_more_than_cross_entropy_is_named() -> None:
    """Oracle: a class that adds .5."""
    found = seen(with_weights(broken(WithMore)))
    assert "the class adds +0.5, which is not trained" in found.table()


def test_recomputation_that_changes_gradients_is_refused() -> None:
    """Oracle: a block that computes something else the second time, and one that does not."""

    def recomputed(model: Foreign) -> Foreign:
        for block in model.units().values():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return model

    plain = recomputed(with_weights(tiny("llama")))
    assert "gradients as without it" in seen(plain, recomputes=True).table()
    model = with_weights(tiny("llama"))
    calls = [0]

    def changing(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * (1 + calls[0] % 7)

    model.model.layers[0].mlp.register_forward_hook(changing)
    model.ways = Ways("positions", "linear")
    looks = looks_file._Looks(recomputed(model), looks_file._by_autograd, True, False)
    with pytest.raises(InputError, match="activation_checkpointing: recomputed blocks"):
        looks._recomputation("positions")


def test_windows_beyond_the_documents_are_named() -> None:
    """Oracle: a window of 4,096 in the configuration."""
    found = seen(with_weights(tiny("gemma2", sliding_window=100)))
    assert "sliding_window 100: documents of 17 tokens" in found.table()


def test_the_looks_are_exact_under_bf16() -> None:
    """Oracle: the ways found in float32."""
    for family in ("gemma2", "gpt_oss", "mamba2", "lfm2"):
        model = with_weights(tiny(family))
        seen(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        assert model.ways == WAYS[family]


def test_documents_stand_apart_by_length() -> None:
    """Oracle: the documents of the packed rows, counted by hand: 4 of 9, 4 of 11 and 4 of 20 in
    micro-batches of at most 80 tokens."""
    model = with_weights(tiny("mamba2"))
    model.ways = Ways("apart", "linear")
    batches = [packed_rows(2, 0), packed_rows(2, 2)]
    found = as_asked(model, batches, ALONE)
    shapes = [tuple(cast(Tensor, batch.inputs["input_ids"]).shape) for batch in found]
    assert shapes == [(4, 20), (7, 11), (1, 9)]
    assert sum(batch.labels for batch in found) == sum(batch.labels for batch in batches)
    assert sum(batch.tokens for batch in found) == sum(batch.tokens for batch in batches)
    assert torch.cat([b.rows for b in found]).tolist() == [0, 1, 2, 3]
    assert padding(found) == (3 * 2, 80 + 77 + 9)


def test_a_step_without_labels_has_a_pass_all_the_same() -> None:
    """Oracle: a loss of 0, and gradients that are 0 and there."""
    model = looked(with_weights(tiny("falcon_h1")))
    batch = packed_rows(1)
    empty = batch._replace(
        inputs={**batch.inputs, "shift_labels": torch.full((1, 40), -100)}, labels=0
    )
    (only,) = as_asked(model, [empty], ALONE)
    loss = cast(Any, model)(**only.inputs, num_items_in_batch=1.0).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_dropout_is_off_unless_asked_for() -> None:
    """Oracle: GPT-2's three rates of .1 and Mixtral's router jitter; the directory's stay saved."""
    config = configuration("gpt2")
    model = empty_foreign(type(tiny("gpt2")), config)
    assert model.config.resid_pdrop == model.config.attn_pdrop == 0
    assert model.saved_config.resid_pdrop == config.resid_pdrop == 0.1
    with_noise = empty_foreign(model.kind, config, dropout=True)
    assert with_noise.config.resid_pdrop == 0.1
    jitter = configuration("mixtral", router_jitter_noise=0.1, num_local_experts=2)
    assert empty_foreign(class_of(jitter), jitter).config.router_jitter_noise == 0


def test_a_class_without_blocks_is_refused() -> None:
    """Oracle: a class that names none and has no list of modules."""
    own = nn.Linear(2, 2)
    own._no_split_modules = None  # type: ignore[assignment]
    with pytest.raises(InputError, match="has no blocks that can be sharded"):
        foreign_file.unit_names(cast(Any, own))


def test_flops_are_counted_from_the_modules() -> None:
    """Oracle: 6 operations for each number of a matrix, by hand; 2 of 4 experts for a token."""
    gpt2 = with_weights(tiny("gpt2"))
    blocks = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 48) + 96 * 32
    assert flops_per_token(gpt2, 10) == 6 * blocks + 3 * 2 * 4 * 10 * 32
    model = with_weights(tiny("qwen3_moe"))
    attention = 32 * 32 * 2 + 2 * 32 * 16
    experts = 2 * 3 * 32 * 24
    blocks = 2 * (attention + experts) + 96 * 32
    router = 2 * 32 * 4  # its own parameter, no linear layer
    assert flops_per_token(model, 10) == 6 * blocks + 3 * 2 * 4 * 10 * 32
    assert router > 0
