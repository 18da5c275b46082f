"""The decode step: captured and eager equal each other and passes without a cache, every mixer."""

import copy
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models import decoding as module
from llmnorm.models.building import build_model
from llmnorm.models.decoding import Decoder
from llmnorm.models.nf4 import NF4Linear
from llmnorm.nn import projections
from llmnorm.nn.cache import KeyValues
from llmnorm.nn.layer_cache import VERIFIED
from llmnorm.part import InputError
from tests.models.cache_rounds import MODELS, VOCABULARY, build

# Rows, new tokens, real ones of each row: one row, several, fewer than the cache has, padding, a
# row that has nothing new, more tokens than two windows hold.
PASSES: list[tuple[int, int, list[int] | None]] = [
    (3, 9, [9, 4, 2]),
    (3, 1, None),
    (1, 1, None),
    (2, 1, None),
    (3, 3, [3, 1, 0]),
    (1, 3, None),
    (2, 3, [2, 2]),
    (3, 1, [1, 0, 1]),
    *[(3, 17, None)] * 8,
    (2, 1, None),
]


class Passes(NamedTuple):
    """Logits of the real tokens of each row, by decoder, after PASSES; and the rows' tokens."""

    logits: dict[str, list[list[Tensor]]]
    tokens: list[list[int]]
    lengths: dict[str, list[int]]


def run(decoders: dict[str, Decoder], model: LlmNormForCausalLM) -> Passes:
    """Every decoder over PASSES, behind a cache of its own, with a rollback after each third."""
    generator = torch.Generator().manual_seed(0)
    caches = {name: model.model.new_cache().slots for name in decoders}
    logits: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in decoders}
    tokens: list[list[int]] = [[], [], []]
    for number, (rows, new, counts) in enumerate(PASSES):
        ids = torch.randint(VOCABULARY, (rows, new), generator=generator)
        kept = [new] * rows if counts is None else counts
        back = [int(number % 3 == 2 and count > 0) for count in kept]
        for row, (count, less) in enumerate(zip(kept, back, strict=True)):
            tokens[row] += ids[row, : count - less].tolist()
        for name, decoder in decoders.items():
            found = decoder.step(ids, caches[name], counts)
            caches[name].rollback(back)
            for row, (count, less) in enumerate(zip(kept, back, strict=True)):
                logits[name][row].append(found[row, : count - less])
    return Passes(logits, tokens, {name: cache.lengths for name, cache in caches.items()})


@pytest.mark.parametrize("name", [*MODELS, "qk norm, groups"])
@torch.no_grad()
def test_captured_and_eager_steps_are_passes_without_a_cache(name: str) -> None:
    """Oracle: the model's own forward over each row's tokens, in float64, 1e-12 of keys and values
    and 1e-10 of states; captured against eager 1e-12."""
    model = build(name) if name in MODELS else grouped().double()
    decoders = {"eager": Decoder(model, captured=False), "captured": Decoder(model)}
    if name not in MODELS:
        decoders["transposed"] = Decoder(model, layout="transposed")
    found = run(decoders, model)
    keys = all(isinstance(layer, KeyValues) for layer in model.model.new_cache().slots.layers)
    for way, rows in found.logits.items():
        assert found.lengths[way] == [len(row) for row in found.tokens]
        for row, tokens in enumerate(found.tokens):
            whole = model(torch.tensor([tokens])).logits[0]
            got = torch.cat(rows[row])
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-12 if keys else 1e-10)
            eager = torch.cat(found.logits["eager"][row])
            torch.testing.assert_close(got, eager, rtol=0, atol=1e-12)
    # By new tokens, and one row or several: all of PASSES but the first, which fills the cache.
    assert set(decoders["captured"]._graphs) == {
        *((1, one) for one in (True, False)),
        *((3, one) for one in (True, False)),
        (17, False),
    }
    assert not decoders["eager"]._graphs


@pytest.mark.parametrize("name", ["softmax", "nala"])
@pytest.mark.parametrize("padding", [None, VERIFIED, 0])
@torch.no_grad()
def test_passes_of_other_numbers_of_tokens_are_padded_to_a_graph(
    name: str, padding: int | None
) -> None:
    """Oracle: eager passes. Near the end of what is reserved nothing is padded."""
    model = build(name)
    decoders = Decoder(model, captured=False), Decoder(model)
    caches = [decoder.new_cache() for decoder in decoders]
    if padding is not None:
        for cache in caches:
            cache.reserve(2, 30, padding, dtype=torch.float64, device=torch.device("cpu"))
    ids = torch.arange(2 * 30).reshape(2, 30) % VOCABULARY
    start = 0
    for new, counts in ((4, None), (6, None), (7, [7, 3]), (8, None), (5, [0, 5])):
        found = [
            decoder.step(ids[:, start : start + new], cache, counts)
            for decoder, cache in zip(decoders, caches, strict=True)
        ]
        assert found[1].shape == (2, new, VOCABULARY)
        for row, count in enumerate(counts or [new] * 2):
            torch.testing.assert_close(
                found[1][row, :count], found[0][row, :count], rtol=0, atol=1e-12
            )
        start += new
    assert caches[0].lengths == caches[1].lengths == [25, 26]
    widths = {new for new, _ in decoders[1]._graphs}
    assert widths == ({5, 9} if padding != 0 else {5, 8, 9})


class Foreign(torch.nn.Module):
    """A norm from another package."""


def grouped(**more: Any) -> LlmNormForCausalLM:
    """A model with grouped heads, norms of queries and keys, biases and depth scaling."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "initializer_range": 0.1,
        "depth_scaling": "lns",
        "mixer": {"name": "softmax", "qk_norm": True, "attention_bias": True},
    }
    return build_model(LlmNormConfig(**shape | more), seed=1).eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_layers_that_an_adapter_reads_are_decoded(dora: bool, layout: Any) -> None:
    """Oracle: the adapted model's own pass. DoRA, and rows of new tokens, read the weight of the
    layer that they stand around."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], use_dora=dora, trainable_token_indices=[1, 3]
    )
    adapted = peft.get_peft_model(grouped(tie_word_embeddings=True), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "token_adapter" in name:
                parameter.normal_(std=0.1, generator=generator)
    model = adapted.get_base_model().double().eval()
    decoder = Decoder(model, layout=layout)
    cache, ids = decoder.new_cache(), torch.arange(9)[None] % 5
    found = [decoder.step(part, cache) for part in ids.split([4, 1, 4], 1)]
    with torch.no_grad():
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_captured_step_has_the_eager_ones_bits(dtype: torch.dtype) -> None:
    """Oracle: the eager step with the same layout, in the dtypes that are served."""
    model = grouped().to(dtype)
    decoders = {"eager": Decoder(model, captured=False), "captured": Decoder(model)}
    found = run(decoders, model)
    for row in range(3):
        assert torch.equal(*(torch.cat(logits[row]) for logits in found.logits.values()))


@pytest.mark.skipif(not projections.has_packing(), reason="no oneDNN operator to pack weights")
@torch.no_grad()
def test_packed_weights_give_the_same_logits() -> None:
    """Oracle: weights as they are, float32."""
    model = grouped()
    decoders = {
        "plain": Decoder(model, captured=False, layout="plain"),
        "captured": Decoder(model, layout="packed"),
        "eager": Decoder(model, captured=False, layout="packed"),
    }
    found = run(decoders, model)
    for row in range(3):
        plain, *others = (torch.cat(logits[row]) for logits in found.logits.values())
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(*others)


@torch.no_grad()
def test_the_last_real_tokens_logits_are_those_of_all() -> None:
    """Oracle: the logits of all tokens, with padding, of a prompt and of a captured pass."""
    model = grouped().double()
    decoder, generator = Decoder(model), torch.Generator().manual_seed(0)
    caches = [model.model.new_cache().slots for _ in range(2)]
    for counts in ([5, 2], [1, 3]):
        ids = torch.randint(VOCABULARY, (2, 5), generator=generator)
        every, last = (
            decoder.step(ids, cache, counts, last=way)
            for cache, way in zip(caches, (False, True), strict=True)
        )
        expected = torch.stack([every[row, count - 1] for row, count in enumerate(counts)])
        torch.testing.assert_close(last[:, 0], expected, rtol=0, atol=1e-14)


@torch.no_grad()
def test_reserved_buffers_do_not_move_and_hold_what_was_written() -> None:
    """Oracle: a cache that grows; the buffers' addresses."""
    model = grouped().double()
    decoder = Decoder(model)
    grows, reserved = (model.model.new_cache().slots for _ in range(2))
    reserved.reserve(2, 70, 4, dtype=torch.float64, device=torch.device("cpu"))
    addresses = [layer.keys.data_ptr() for layer in reserved.layers]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    for new in (3, 1, 17, 17, 17, 1):
        ids = torch.randint(VOCABULARY, (2, new), generator=generator)
        assert torch.equal(decoder.step(ids, grows), decoder.step(ids, reserved))
    layers: list[Any] = reserved.layers
    assert [layer.keys.data_ptr() for layer in layers] == addresses


def test_a_model_is_as_it_was() -> None:
    """Oracle: a copy made before; training and generate go by the model's own modules."""
    model = grouped()
    before = copy.deepcopy(model)
    decoder = Decoder(model, layout="plain")  # which joins weights
    decoder.step(torch.ones(1, 3, dtype=torch.long), model.model.new_cache().slots)
    assert all(p.requires_grad for p in model.parameters())
    assert str(model) == str(before)
    ids = torch.arange(12).view(2, 6)
    losses = [m.train()(ids, labels=ids).loss for m in (model, before)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_what_a_decoder_does_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: float64, as asked, a norm with statistics, no CPU, no tracer, training."""
    model = grouped().double()
    captured = "decoding: steps are captured (float64 on cpu)"
    assert Decoder(model).says == f"{captured}; weights stay as they are (float64 on cpu)"
    asked = Decoder(model, captured=False, layout="transposed").says
    assert asked == "decoding: steps run eagerly, as asked for; weights: transposed, as asked for"
    running = grouped(norm="power")
    assert "steps run eagerly (a norm keeps running statistics)" in Decoder(running).says
    assert module.captures(grouped().to("meta"))[1] == "steps run eagerly (float32 on meta)"
    foreign = grouped()
    foreign.model.norm = Foreign()
    assert "eagerly (Foreign is no module of this package)" in Decoder(foreign).says
    foreign.model.norm = NF4Linear(torch.nn.Linear(16, 16).requires_grad_(False))
    assert "eagerly (a tracer cannot follow weights in four bits)" in Decoder(foreign).says
    monkeypatch.delattr(torch.jit, "trace")
    assert module.captures(model) == (False, "steps run eagerly (this torch has no tracer)")
    with pytest.raises(InputError, match="training mode"):
        Decoder(model.train())


@torch.no_grad()
def test_norms_with_statistics_are_decoded_eagerly() -> None:
    """Oracle: a pass without a cache."""
    model = grouped(norm="power").double()
    decoder, cache = Decoder(model), model.model.new_cache().slots
    ids = torch.arange(9)[None]
    found = [decoder.step(part, cache) for part in ids.split([4, 1, 4], 1)]
    whole = model(ids).logits
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_do_not_depend_on_the_longest_one_where_positions_follow_it(kind: str) -> None:
    """Oracle: passes without a cache over each row; `dynamic` and `longrope` turn all rows of a
    call as its longest position says, so rows and their padding stay within what does not."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
        rope |= {"original_max_position_embeddings": 12}
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        max_position_embeddings=24,
        rope_parameters=rope,
    )
    model = build_model(config, seed=1).double().eval()
    decoder = Decoder(model, captured=False)
    cache, short = decoder.new_cache(), [9, 4, 7, 1, 8]
    assert decoder.context == (12 if kind == "longrope" else 24)
    long = list(range(decoder.context))
    decoder.step(torch.tensor([long[:-1], [*short[:2], *long[3:]]]), cache, [len(long) - 1, 2])
    found = decoder.step(torch.tensor([long[-1:] * 3, short[2:]]), cache, [1, 3])
    for row, ids in ((found[0, :1], long), (found[1], short)):
        with torch.no_grad():
            whole = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(row, whole[-len(row) :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "nala", "gated_delta, ssd, window"])
@torch.no_grad()
def test_what_a_captured_pass_leaves_serves_every_verb(name: str) -> None:
    """Oracle: a cache that eager passes fill (held to passes without a cache by
    test_cache_promises.py), under the same verbs: deep rollbacks, copies, releases, selections."""
    model, chance = build(name), random.Random(3)
    decoders = Decoder(model, captured=False), Decoder(model)
    caches = [decoder.new_cache() for decoder in decoders]
    generator = torch.Generator().manual_seed(0)
    for decoder, cache in zip(decoders, caches, strict=True):
        decoder.step(torch.ones(3, 5, dtype=torch.long), cache)
    passed = [5] * 3  # tokens since the row began, of which 64 can be taken back
    for number in range(60):
        verb = chance.choice(["back", "deep", "copy", "select", "none", "none"])
        if verb == "back":
            counts = [chance.randint(0, min(2, n)) for n in passed]
        elif verb == "deep":
            counts = [chance.randint(0, min(40, n)) for n in passed]
        else:
            counts = [0, 0, 0]
        rows = [chance.randrange(3) for _ in range(3)] if verb == "select" else [0, 1, 2]
        source, target = chance.sample(range(3), 2)
        for cache in caches:
            cache.rollback(counts)
            cache.select(rows)
            if verb == "copy":
                cache.release(target)
                assert cache.admit(cache, source) == target
        passed = [passed[row] - counts[row] for row in rows]
        if verb == "copy":
            passed[target] = passed[source]
        new, taking = chance.choice([1, 1, 3]), chance.choice([1, 3, 3])
        real = [chance.randint(0, new) for _ in range(taking)]
        ids = torch.randint(VOCABULARY, (taking, new), generator=generator)
        if not any(caches[0].lengths[:taking]):
            real = [new] * taking  # so that the next pass is captured
        found = [
            decoder.step(ids, cache, real) for decoder, cache in zip(decoders, caches, strict=True)
        ]
        passed = [min(64, n + more) for n, more in zip(passed, [*real, 0, 0], strict=False)]
        for row, count in enumerate(real):
            eager, captured = (logits[row, :count] for logits in found)
            torch.testing.assert_close(captured, eager, rtol=0, atol=1e-12, msg=f"{number} {verb}")
        assert caches[0].lengths == caches[1].lengths
    assert len(decoders[1]._graphs) == 4


@torch.no_grad()
def test_captured_passes_of_one_row_leave_its_copies_inputs() -> None:
    """Oracle: eager passes. Copies of a row share its inputs until one of them goes on alone and
    would overwrite those that the others may still replay."""
    model = build("nala")
    ids = torch.randint(VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(0))
    found = []
    for captured in (False, True):
        decoder = Decoder(model, captured=captured)
        cache = decoder.new_cache()
        decoder.step(ids, cache)
        cache.select([0, 0])
        for _ in range(9):
            decoder.step(ids[:, :17], cache)  # of the first row
        cache.rollback([0, 60])
        found.append(decoder.step(ids[:, :1].expand(2, 1), cache))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
