"""Who may look at whom, from the arguments of a model's forward pass."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmnorm.models import LlmNormConfig
from llmnorm.models.building import build_model, class_of
from llmnorm.models.context import Documents, Rules, given_documents, with_cache, without_cache
from llmnorm.nn.masks import document_boundaries, document_lengths
from llmnorm.nn.mixers import varlen
from llmnorm.nn.visibility import Masked, Packed, Plain
from llmnorm.part import InputError

CAUSAL: dict[str, Any] = {
    "softmax": "softmax",
    "window": {"name": "softmax", "sliding_window": 3},
    "linear": "linear",
    "nala": "nala",
    "ssd": {"name": "ssd", "head_dim": 8, "state_size": 6},
    "gla": "gla",
    "gated_delta": "gated_delta",
    "hybrid": ["nala", "softmax"],
}
BOTH_WAYS: dict[str, Any] = {
    "both": {"name": "softmax", "bidirectional": True},
    "nala both": {"name": "nala", "bidirectional": True, "conv_kernel": 3},
    "hydra": {"name": "hydra", "head_dim": 8, "state_size": 3, "conv_kernel": 5},
    **{
        family: {"name": "matrix", "head_dim": 8, "conv_kernel": 5, "family": family}
        for family in ("toeplitz", "attention", "low_rank", "dense", "dft", "quasiseparable")
    },
}
EVERY = CAUSAL | BOTH_WAYS
every_mixer = pytest.mark.parametrize("name", EVERY)
# Rows of 12 tokens; documents of 5, 3 and 4, then one.
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 3, 4), (12,))])
LENGTHS = (5, 3, 4, 12)
HIDDEN = torch.zeros(2, 12, 1)
RULES = Rules(causal=True, kernel=False, fixed_shapes=False)


def build(name: str, **keys: Any) -> Any:
    return build_model(configuration(name, **keys), seed=0)


def configuration(name: str, **keys: Any) -> LlmNormConfig:
    return LlmNormConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.1,
        mixer=EVERY[name],
        architectures=keys.pop("architectures", None)
        or [f"LlmNormFor{'CausalLM' if name in CAUSAL else 'MaskedLM'}"],
        **keys,
    )


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def documents(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    boundaries = document_boundaries(lengths, torch.device("cpu"))
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@every_mixer
@pytest.mark.parametrize("rows", ["packed", "whole"])
def test_documents_that_are_handed_over_change_no_bit(name: str, rows: str) -> None:
    """Oracle: the model that finds them in position_ids; loss and gradients, equal to the bit."""
    model, ids = build(name).train(), tokens()
    positions = POSITIONS if rows == "packed" else torch.arange(12).expand(2, -1)
    labels = "shift_labels" if name in CAUSAL else "labels"
    handed = documents(LENGTHS if rows == "packed" else (12, 12))
    found = []
    for keys in (
        {"position_ids": positions},
        {"position_ids": positions, **handed},
        handed,
    ):
        model.zero_grad()
        loss = model(ids, **{labels: ids}, **keys).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_classifier_takes_documents_too() -> None:
    """Oracle: position_ids alone."""
    model = build("both", architectures=["LlmNormForSequenceClassification"]).eval()
    expected = model(tokens(), position_ids=POSITIONS).logits
    assert torch.equal(model(tokens(), **documents()).logits, expected)
    assert not torch.equal(model(tokens()).logits, expected)


@every_mixer
@pytest.mark.parametrize("fixed", [False, True])
def test_packed_rows_with_a_mask_are_isolated(name: str, fixed: bool) -> None:
    """Oracle: each document in a row of its own, float64; padding stands left, between and right,
    and what it holds has no effect."""
    model = build(name).double().eval()
    model.model.fixed_shapes = fixed
    ids = tokens(2, 14)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, [0, 6, 13]] = 0
    mask[1, 9:] = 0
    # Row 0: padding, documents of 3 and 2, padding, documents of 2 and 4, padding.
    positions = torch.tensor([[1, 0, 1, 2, 0, 1, 1, 0, 1, 0, 1, 2, 3, 1], [*range(14)]])
    pieces = [(0, 1, 4), (0, 4, 6), (0, 7, 9), (0, 9, 13), (1, 0, 9)]
    with torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, first, last in pieces:
            alone = model(ids[row : row + 1, first:last]).logits[0]
            torch.testing.assert_close(got[row, first:last], alone, rtol=0, atol=1e-10)
        other = torch.where(mask.bool(), ids, 0)
        changed = model(other, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(changed[mask.bool()], got[mask.bool()])
        ones = torch.ones(2, 12, dtype=torch.long)
        with_ones = model(tokens(), attention_mask=ones, position_ids=POSITIONS).logits
        assert torch.equal(with_ones, model(tokens(), position_ids=POSITIONS).logits)


def test_the_kind_of_rows() -> None:
    """Oracle: by hand, for each set of arguments."""
    right = torch.ones(2, 12, dtype=torch.long)
    right[1, 8:] = 0
    left, none = right.flip(1), None
    whole = torch.arange(12).expand(2, -1)
    after_padding = torch.stack([whole[0], (left[1].cumsum(0) - 1).clamp(min=0)])

    def kind(*given: Any) -> Any:
        return without_cache(*given, HIDDEN, RULES)[0]

    assert isinstance(kind(none, none, none), Plain)
    assert isinstance(kind(none, whole + 3, none), Plain)
    assert isinstance(kind(torch.ones(2, 12), none, none), Plain)
    assert isinstance(kind(none, none, Documents(document_boundaries((12, 12), "cpu"), 12)), Plain)  # type: ignore[arg-type]
    for mask, positions in ((right, none), (right, whole), (left, after_padding)):
        found = kind(mask, positions, none)
        assert isinstance(found, Masked) and torch.equal(found.real, mask.bool())
        assert (found.mask is None) == (mask is right)
    found = kind(none, POSITIONS, none)
    assert isinstance(found, Packed) and found.lengths == LENGTHS and found.longest == 12
    assert kind(right, POSITIONS, none).lengths == (5, 3, 4, 8, 4)
    both_ways = RULES._replace(causal=False)
    found = without_cache(right, none, none, HIDDEN, both_ways)[0]
    assert isinstance(found, Masked) and found.mask is not None


def test_positions_of_documents_that_are_handed_over() -> None:
    """Oracle: position_ids that restart where they do."""
    given = given_documents(*documents().values(), HIDDEN)
    packed, positions = without_cache(None, None, given, HIDDEN, RULES)
    assert isinstance(packed, Packed) and document_lengths(positions) == packed.lengths
    assert torch.equal(positions, POSITIONS)
    assert packed.segments.tolist() == [[0] * 5 + [1] * 3 + [2] * 4, [3] * 12]


BAD = torch.tensor([0, 5, 8, 12, 24], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seq_lens_k": None}, "cu_seq_lens_k: missing; give all of"),
        ({"max_length_q": None, "max_length_k": None}, "max_length_q, max_length_k: missing"),
        ({"cu_seq_lens_q": BAD.long()}, "cu_seq_lens_q: must be int32"),
        ({"cu_seq_lens_k": BAD[None]}, "cu_seq_lens_k: must be int32"),
        ({"cu_seq_lens_q": BAD[:2]}, "at least one document for each of 2 rows"),
        ({"cu_seq_lens_k": BAD[[0, 1, 3, 4]]}, "queries and keys are the same tokens"),
        ({"max_length_k": 11}, "queries and keys are the same tokens"),
        ({"cu_seq_lens_k": BAD + 0 * BAD + (BAD == 5).int()}, "differs from cu_seq_lens_q"),
        ({"max_length_q": 13, "max_length_k": 13}, "from 1 to the rows' length 12, got 13"),
        ({"max_length_q": 5, "max_length_k": 5}, "has a document of 12 tokens"),
        ({"cu_seq_lens_q": BAD - 1, "cu_seq_lens_k": BAD - 1}, "must rise from 0 to 24"),
        ({"position_ids": torch.arange(12).expand(2, -1)}, "elsewhere than position_ids are 0"),
        ({"attention_mask": torch.ones(2, 12)}, "cannot be given with cu_seq_lens_q"),
        ({"use_cache": True}, "packed rows have no cache"),
    ],
)
def test_documents_that_are_not_what_they_say_are_refused(
    change: dict[str, Any], words: str
) -> None:
    """Oracle: the message."""
    with pytest.raises(InputError, match=words):
        build("softmax").eval()(tokens(), **(documents() | change))


def test_a_document_over_the_end_of_a_row_is_refused() -> None:
    """Oracle: the message."""
    crossing = torch.tensor([0, 5, 14, 24], dtype=torch.int32)
    with pytest.raises(InputError, match="start of every row, 0, 12"):
        given_documents(crossing, crossing, 12, 12, HIDDEN)


class Synchronisations(TorchDispatchMode):
    """Counts the operators whose result, or its shape, the host must wait for on a GPU."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), keys: Any = None
    ) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in self.NAMES or name.startswith("_unique"):
            self.found[name] += 1
        return function(*given, **(keys or {}))


@pytest.mark.parametrize("name", [*CAUSAL, "both", "hydra", "quasiseparable"])
@pytest.mark.parametrize("fixed", [False, True])
def test_nothing_is_read_back_where_documents_are_handed_over(
    name: str, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch's own operators of a forward and backward pass in bf16, with a stand-in for the
    kernel; without the documents they are read back once."""
    monkeypatch.setattr(varlen, "serves", lambda hidden: True)
    monkeypatch.setattr(varlen, "has_kernel", lambda head_dim: True)
    monkeypatch.setattr(varlen, "attention", lambda q, k, v, *rest, causal: 1 * q)
    model = build(name).bfloat16().train()
    model.model.fixed_shapes = fixed
    counts = []
    for handed in (documents(), {}):
        with Synchronisations() as counter:
            hidden = model.model(tokens(), position_ids=POSITIONS, **handed).last_hidden_state
            hidden.float().square().sum().backward()
        counts.append(dict(counter.found))
    assert counts == [{}, {"nonzero": 1}]


@pytest.mark.parametrize("name", [*CAUSAL, "both", "hydra", "quasiseparable"])
@pytest.mark.parametrize("kernel", [False, True])
def test_nothing_is_read_back_from_another_device(
    name: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: tensors on the meta device have no values, so that reading one is an error, as it is
    without the documents; forward and backward, by a kernel or by a mask."""
    monkeypatch.setattr(varlen, "serves", lambda hidden: kernel)
    monkeypatch.setattr(varlen, "has_kernel", lambda head_dim: True)
    monkeypatch.setattr(varlen, "attention", lambda q, k, v, *rest, causal: 1 * q)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has none for meta
    with torch.device("meta"):
        config = configuration(name)
        made = class_of(config)(config)
        ids, positions = torch.zeros(2, 2, 12, dtype=torch.long).unbind()
        starts = torch.zeros(5, dtype=torch.int32)
        made.model.fixed_shapes = not kernel
        handed = dict(zip(documents(), (starts, starts, 12, 12), strict=True))
        out = made.model(ids, position_ids=positions, **handed).last_hidden_state
        out.sum().backward()
        assert out.is_meta and made.model.embed_tokens.weight.grad.is_meta
        with pytest.raises(NotImplementedError, match="nonzero"):
            made.model(ids, position_ids=positions)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefill_into_a_filled_cache_goes_on(name: str) -> None:
    """Oracle: one pass over the whole row without a cache, float64; pieces longer than a chunk,
    with and without positions and a mask."""
    model, ids = build(name).double().eval(), tokens(2, 190)
    expected = model(ids).logits
    for keys in ((), ("position_ids",), ("attention_mask",), ("position_ids", "attention_mask")):
        cache, seen = model.model.new_cache(), 0
        for width in (100, 70, 1, 19):
            given = {
                "position_ids": torch.arange(seen, seen + width).expand(2, -1),
                "attention_mask": torch.ones(2, seen + width, dtype=torch.long),
            }
            with torch.no_grad():
                part = ids[:, seen : seen + width]
                kept = {key: given[key] for key in keys}
                got = model(part, past_key_values=cache, **kept).logits
            whole = expected[:, seen : seen + width]
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-10)
            seen += width


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"position_ids": torch.tensor([[3, 4, 0]])}, "restart inside a row"),
        ({"position_ids": torch.tensor([[0, 1, 2]])}, "restart at 0 in row 0.*holds 4 tokens"),
        (
            {
                "position_ids": torch.tensor([[4, 5, 0]]),
                "attention_mask": torch.ones(1, 7, dtype=torch.long),
            },
            "restart inside a row",
        ),
        ({"attention_mask": torch.ones(1, 2, dtype=torch.long)}, "column for each of the 3 new"),
    ],
)
def test_what_a_filled_cache_cannot_do_is_refused(keys: dict[str, Any], words: str) -> None:
    """Oracle: the message, and the cache as it was."""
    model, ids = build("softmax").eval(), tokens(1, 7)
    cache = model.model.new_cache()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(InputError, match=words):
            model(ids[:, 4:], past_key_values=cache, **keys)
        assert cache.slots.lengths == [4]
        expected = model(ids).logits[:, 4:]
        got = model(ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected)


def test_padding_in_front_may_have_any_position() -> None:
    """Oracle: generate's own positions of a left-padded prompt, 0 or 1 at padding."""
    cache, mask = build("softmax").model.new_cache(), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    cached, turned, order = with_cache(mask, positions, cache, HIDDEN[:, :4])
    assert order is not None and order.tolist()[0] == [2, 3, 0, 1]
    assert cached.places.counts == [2, 4] and turned[0, :2].tolist() == [0, 1]


def test_a_mask_of_another_width_is_refused() -> None:
    """Oracle: the message."""
    with pytest.raises(InputError, match=r"attention_mask: must be \(batch, length\) = \(2, 12\)"):
        build("softmax")(tokens(), attention_mask=torch.ones(2, 13))


def test_layers_that_are_out_of_step_are_refused() -> None:
    """Oracle: the message; a layer that was fed alone would be overwritten."""
    model, ids = build("hybrid").eval(), tokens(2, 4)
    cache = model.model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.slots.layers[1].rollback([1, 0])
        with pytest.raises(ValueError, match=r"rows of \[3, 4\] tokens.*rows of \[4, 4\]"):
            model(ids, past_key_values=cache)
