"""The model: losses, packed rows, padding, precision, saving, wrapping."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.flops import flops_per_token
from llmnorm.nn import loss as loss_module
from llmnorm.nn.mixers import varlen
from llmnorm.nn.mixers.settings import Mixer
from llmnorm.part import InputError, part_classes

VOCABULARY = 61
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], list(range(12))])


def build(**keys: Any) -> LlmNormForCausalLM:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    return build_model(LlmNormConfig(**shape | keys), seed=0)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_with_and_without_logits(tied: bool) -> None:
    """Oracle: full logits, shifted by hand, F.cross_entropy, in float64; every parameter."""
    model = build(tie_word_embeddings=tied).double().train()
    ids = tokens(3, 11)
    labels = ids.masked_fill(torch.arange(11) % 4 == 2, -100)
    output = model(ids, labels=labels, loss_only=True)
    assert output.logits is None
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-14)
    assert ("lm_head.weight" in grads) != tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_head_runs_where_labels_are_known_to_be(
    tied: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: full logits and F.cross_entropy in float64, every gradient; the rows of the logits
    that were made. Without labels the loss is 0, and every weight has a gradient of zeros."""
    model = build(tie_word_embeddings=tied).double().train()
    ids = tokens(3, 11)
    chosen = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < share
    labels = tokens(3, 11).masked_fill(~chosen, -100)
    positions = chosen.flatten().nonzero().squeeze(1)
    items = float(max(len(positions), 1))
    made, logits_of = [], loss_module._logits
    monkeypatch.setattr(
        loss_module, "_logits", lambda h, *more: made.append(len(h)) or logits_of(h, *more)
    )
    keys = {"shift_labels": labels, "label_positions": positions, "num_items_in_batch": items}
    loss = model(ids, **keys, loss_only=True).loss
    loss.backward()
    assert sum(made) == len(positions)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    flat = model(ids).logits.flatten(0, 1)
    expected = F.cross_entropy(flat, labels.flatten(), reduction="sum") / items
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-12, atol=1e-14)
    with_logits = model(ids, **keys)
    torch.testing.assert_close(with_logits.loss, loss, rtol=1e-12, atol=0)
    assert torch.equal(with_logits.logits.flatten(0, 1), flat)
    with pytest.raises(InputError, match="label_positions: are those of shift_labels"):
        model(ids, label_positions=positions)


def test_labels_shifted_or_not_and_items() -> None:
    """Oracle: shift by hand; the sum over labels divided by the items given."""
    model = build().double()
    ids = tokens(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    whole = model(ids, labels=ids).loss
    assert torch.equal(model(ids, shift_labels=shifted).loss, whole)
    for items in (32.0, torch.tensor(32)):
        got = model(ids, labels=ids, num_items_in_batch=items).loss
        torch.testing.assert_close(got, whole * 16 / 32, rtol=1e-14, atol=0)


def test_logits_are_made_when_and_where_asked() -> None:
    """Oracle: the full logits."""
    model = build().eval()
    ids = tokens(2, 9)
    full = model(ids).logits
    assert torch.equal(model(ids, labels=ids).logits, full)
    assert torch.equal(model(ids, shift_labels=ids).logits, full)
    assert torch.equal(model.train()(ids, labels=ids).logits, full)
    assert model(ids, shift_labels=ids, loss_only=True).logits is None
    with pytest.raises(InputError, match="loss_only"):
        model(ids, loss_only=True)
    model.eval()
    # A product of fewer rows may add in another order: equal to float32's rounding.
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    keep = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, full[:, keep])
    assert torch.equal(model(ids, return_dict=False)[0], full)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, full)


@pytest.mark.parametrize("fixed", [False, True])
def test_packed_documents_never_see_each_other(fixed: bool) -> None:
    """Oracle: exactly zero gradient, outputs equal to the bit under changes of the others."""
    model = build().double()
    model.model.fixed_shapes = fixed
    ids = tokens(2, 12)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = torch.full_like(ids, -100)
    labels[0, 5:8] = ids[0, 5:8]
    model(inputs_embeds=embeds, position_ids=PACKED, shift_labels=labels).loss.backward()
    assert embeds.grad is not None
    assert embeds.grad[0, 5:8].abs().min() > 0
    assert not embeds.grad[0, :5].any()
    assert not embeds.grad[0, 8:].any() and not embeds.grad[1].any()
    changed = ids.clone()
    changed[0, :5], changed[0, 8:] = 0, 0
    before = model(ids, position_ids=PACKED).logits
    after = model(changed, position_ids=PACKED).logits
    assert torch.equal(before[0, 5:8], after[0, 5:8])
    assert not torch.equal(before[0, 8:], after[0, 8:])


def test_packed_documents_are_the_documents_alone() -> None:
    """Oracle: each document in a row of its own, float64."""
    model = build().double().eval()
    ids = tokens(2, 12)
    packed = model(ids, position_ids=PACKED).logits
    for row, first, last in [(0, 0, 5), (0, 5, 8), (0, 8, 12), (1, 0, 12)]:
        alone = model(ids[row : row + 1, first:last]).logits[0]
        torch.testing.assert_close(packed[row, first:last], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
def test_boundaries_alone_keep_documents_apart(
    fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the model without a kernel; attention between the boundaries that it would be given,
    one by one, stands for it. Rows that hold one document each need none."""
    given: list[int] = []

    def kernel(q: torch.Tensor, *rest: Any, causal: bool) -> torch.Tensor:
        k, v, boundaries, longest, _ = rest
        lengths = boundaries.diff().tolist()
        given.append(len(lengths))
        assert max(lengths) <= longest and boundaries.dtype == torch.int32
        pieces = [t.transpose(0, 1).split(lengths, 1) for t in (q, k, v)]
        mixed = [
            F.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)
            for one in zip(*pieces, strict=True)
        ]
        return torch.cat(mixed, 1).transpose(0, 1)

    model = build().double().eval()
    model.model.fixed_shapes = fixed
    ids, whole = tokens(2, 12), torch.arange(12).expand(2, -1)
    expected = [model(ids, position_ids=places).logits for places in (PACKED, whole)]
    monkeypatch.setattr(varlen, "serves", lambda hidden: True)
    monkeypatch.setattr(varlen, "has_kernel", lambda q: True)
    monkeypatch.setattr(varlen, "attention", kernel)
    got = [model(ids, position_ids=places).logits for places in (PACKED, whole)]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert given == [4, 4]  # one a layer


@settings(max_examples=20)
@given(left=st.integers(0, 6), right=st.integers(0, 6), length=st.integers(1, 5))
def test_padding_changes_nothing(left: int, right: int, length: int) -> None:
    """Oracle: the row without padding, float64; the neighbour row is full."""
    model = build().double().eval()
    width = left + length + right
    ids, mask = tokens(2, width), torch.zeros(2, width, dtype=torch.long)
    mask[0, left : left + length] = 1
    mask[1] = 1
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        alone = model(ids[:1, left : left + length]).logits[0]
        whole = model(ids[1:]).logits[0]
    torch.testing.assert_close(got[0, left : left + length], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 1},
        {"hidden_size": 7, "head_dim": 2, "num_attention_heads": 3, "num_key_value_heads": 1},
        {"norm": "layer", "mlp": "gelu"},
        {"norm": {"name": "rms", "cast_mode": "llama"}, "mixer": {"qk_norm": True}},
        {"mixer": [{"qk_norm": True}, {"attention_bias": True}], "num_hidden_layers": 3},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4},
        {"vocab_size": 7, "intermediate_size": 1},
        {"dropout": 0.3},
    ],
)
@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "autocast"])
def test_odd_sizes_in_every_precision(keys: dict[str, Any], length: int, precision: str) -> None:
    """Oracle: the float64 loss of the same weights, within the precision's rounding."""
    model = build(**keys).train(keys.get("dropout") is not None)
    ids = tokens(3, length) % model.config.vocab_size
    with torch.no_grad():
        expected = build(**keys).double().eval()(ids, shift_labels=ids).loss
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    model = model.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        loss = model(ids, shift_labels=ids).loss
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for parameter in model.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
    if "dropout" not in keys:
        allowed = {"float64": 1e-13, "float32": 1e-5}.get(precision, 0.1)
        assert abs(loss.item() - expected.item()) < allowed


def test_autocast_keeps_float32_outside_of_products() -> None:
    """Oracle: dtypes seen by hooks: norms and residual stream float32, linear layers bf16."""
    model = build().train()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: out.dtype})
            )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(2, 9), labels=tokens(2, 9), loss_only=True).loss
    assert loss.dtype == torch.float32
    for name, dtype in seen.items():
        bf16 = name.endswith("_proj")
        assert dtype == (torch.bfloat16 if bf16 else torch.float32), name


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    """Oracle: bit-equal logits through AutoModelForCausalLM and AutoModel; float64 stays."""
    for tied in (False, True):
        model = build(tie_word_embeddings=tied).double().eval()
        path = tmp_path / str(tied)
        model.save_pretrained(path)
        loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
        assert isinstance(loaded, LlmNormForCausalLM) and loaded.dtype == torch.float64
        ids = tokens(2, 9)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        base = AutoModel.from_pretrained(path)
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
        narrow = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        assert narrow.dtype == torch.bfloat16


def test_a_missing_weight_is_initialised_and_the_others_are_kept(tmp_path: Path) -> None:
    """Oracle: the saved weights; the head's std is the configuration's, its values are new."""
    from safetensors.torch import load_file, save_file

    model = build(norm="layer")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"], state["model.norm.bias"]
    state["model.norm.weight"] += 3
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(loaded.model.norm.weight, torch.full((24,), 4.0))
    assert not loaded.model.norm.bias.any()
    assert 0.08 < loaded.lm_head.weight.std() < 0.12


def test_parameter_names_are_llamas() -> None:
    """Oracle: transformers' Llama of the same shape, names and shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = build()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    stock = LlamaForCausalLM(
        LlamaConfig(**{key: getattr(model.config, key) for key in keys + heads})
    )
    theirs = {name: p.shape for name, p in stock.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == theirs
    assert not list(model.named_buffers())


def test_blocks_may_be_checkpointed_and_compiled_in_place() -> None:
    """Oracle: the plain model, loss and gradients; packed rows; one graph without a break."""
    ids = tokens(2, 12)

    def run(model: LlmNormForCausalLM) -> list[torch.Tensor]:
        loss = model(ids, labels=ids, position_ids=PACKED).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = run(build().train())
    recomputed = build().train()
    for block in recomputed.model.layers:
        forward = block.forward
        block.forward = lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=False)
    compiled = build().train()
    compiled.model.fixed_shapes = True
    for block in compiled.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    for other, exact in ((recomputed, True), (compiled, False)):
        for got, expected in zip(run(other), plain, strict=True):
            torch.testing.assert_close(
                got, expected, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6
            )


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_keeps_the_old_tokens(tied: bool) -> None:
    """Oracle: the old logits; the loss of the longer ones by F.cross_entropy."""
    model = build(tie_word_embeddings=tied).train()
    ids = tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 4)
    ids[0, 3] = VOCABULARY + 3
    output = model(ids, labels=ids)
    logits = model(ids).logits
    assert torch.equal(output.logits, logits)
    assert torch.equal(logits[1, :, :VOCABULARY], before[1])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert flops_per_token(model.config, 8) == flops_per_token(model, 8)


def test_a_wrapped_head_is_asked_for_its_own_logits() -> None:
    """Oracle: F.cross_entropy of the wrapper's logits (a low-rank adapter adds to the head's)."""

    class Doubled(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = head

        def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            return 2 * self.base_layer(x, *rest)

    model = build().train()
    model.lm_head = Doubled(model.lm_head)
    ids = tokens(2, 9)
    logits = model(ids).logits
    for items, divisor in ((None, 16), (40.0, 40)):
        got = model(ids, labels=ids, num_items_in_batch=items).loss
        flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(got, flat / divisor)


def test_hidden_states() -> None:
    """Oracle: embeddings first, the normed last state last, as Hugging Face's Llama has them."""
    model = build().eval()
    ids = tokens(2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


def test_dropout_acts_in_training_only() -> None:
    """Oracle: two training passes differ, two evaluations do not; 0 leaves no trace."""
    ids = tokens(2, 9)
    model = build(dropout=0.5)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, build().train()(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_hand(tied: bool) -> None:
    """Oracle: six per weight of a product, twelve per layer, head width and position (PaLM)."""
    model = build(tie_word_embeddings=tied)
    block = 24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 64
    expected = 6 * (2 * block + 24 * VOCABULARY) + 12 * 2 * 24 * 128
    assert flops_per_token(model, 128) == flops_per_token(model.config, 128) == expected


@pytest.mark.parametrize(
    "mixer", [name for name, part in part_classes(get_args(Mixer)[0]).items() if part().causal]
)
def test_every_mixer_learns(mixer: str) -> None:
    """Oracle: the loss on one batch of packed rows, before and after 20 steps of Adam."""
    model = build(mixer=mixer, hidden_size=64, num_hidden_layers=1, initializer_range=0.02).train()
    ids, positions = tokens(4, 24), torch.arange(24).repeat(4, 1)
    positions[1, 7:] -= 7
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids, position_ids=positions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 0.9 * math.log(VOCABULARY)
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert flops_per_token(model, 24) > 6 * sum(p.numel() for p in model.lm_head.parameters())


def test_a_hybrid_is_saved_and_loaded(tmp_path: Path) -> None:
    """Oracle: logits of the model that was saved; the layers' types by hand."""
    mixer = ["nala", "ssd", {"name": "softmax", "sliding_window": 4}]
    model = build(mixer=mixer, num_hidden_layers=4, hidden_size=32)
    kinds = ["linear_attention", "linear_attention", "sliding_attention", "linear_attention"]
    assert model.config.layer_types == kinds
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.settings() == model.config.settings()
    assert loaded.config.layer_types == kinds
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
