"""The mixer contract, one body for every mixer and every kind of context."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from llmnorm.nn.cache import KeyValues, RaggedCache
from llmnorm.nn.masks import document_lengths, document_mask, padding_mask
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.gated_delta import delta_recurrence
from llmnorm.nn.mixers.gla import channel_recurrence
from llmnorm.nn.mixers.linear_recurrence import linear_recurrence
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.mixers.settings import HydraSettings
from llmnorm.nn.mixers.settings import Mixer as MixerPart
from llmnorm.nn.recurrent_cache import RecurrentCache
from llmnorm.nn.settings import ModelSettings
from llmnorm.nn.visibility import Cached, Masked, Packed
from llmnorm.nn.visibility import packed as packed_rows
from llmnorm.part import InputError
from tests.nn.recurrences import mixed_token_by_token

BATCH, LENGTH = 3, 11
BLOCK = {"gate": True, "conv_kernel": 3, "norm": "layer"}
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax"},
    "softmax qk_norm": {"name": "softmax", "qk_norm": True},
    "softmax qkv bias": {"name": "softmax", "attention_bias": "qkv"},
    "softmax bias": {"name": "softmax", "attention_bias": True},
    "softmax both": {"name": "softmax", "bidirectional": True, "qk_norm": True},
    "softmax window": {"name": "softmax", "sliding_window": 4},
    "linear": {"name": "linear"},
    "linear block": {"name": "linear", "bias": True, "rotary": False, **BLOCK},
    "linear both": {"name": "linear", "bidirectional": True, **BLOCK},
    "nala": {"name": "nala"},
    "nala cosine": {"name": "nala", "direction": "cosine", "norm_scale": 2.0, "conv_kernel": 0},
    "ssd": {"name": "ssd", "head_dim": 8, "state_size": 5, "time_step_limit": [0.01, 5.0]},
    "ssd groups": {"name": "ssd", "head_dim": 10, "n_groups": 2, "state_size": 3, "conv_kernel": 2},
    "gla": {"name": "gla", "num_heads": 2},
    "gated_delta": {"name": "gated_delta", "num_key_heads": 2, "key_head_dim": 3},
    "gated_delta groups": {
        **{"name": "gated_delta", "num_key_heads": 2, "num_value_heads": 4},
        **{"key_head_dim": 4, "value_head_dim": 3, "conv_kernel": 3},
    },
    "hydra": {"name": "hydra", "head_dim": 8, "state_size": 3, "conv_kernel": 5},
    "hydra groups": {"name": "hydra", "head_dim": 5, "n_groups": 2, "state_size": 4},
    **{
        f"matrix {family}{'' if own else ' learned'}": {
            **{"name": "matrix", "head_dim": 8, "conv_kernel": 5},
            "family": {"name": family, "data_dependent": own, **({"qk_dim": 3} if qk else {})},
        }
        for family, qk in {
            **{"toeplitz": False, "vandermonde": True, "cauchy": True},
            **{"low_rank": True, "attention": True, "quasiseparable": True},
        }.items()
        for own in (True, False)
    },
    "matrix dense": {"name": "matrix", "head_dim": 10, "family": "dense"},
    "matrix bias": {"name": "matrix", "head_dim": 10, "family": "dense", "use_bias": True},
    "hydra biases": {
        **{"name": "hydra", "head_dim": 8, "state_size": 3},
        **{"use_bias": True, "use_conv_bias": False},
    },
    "matrix dft": {"name": "matrix", "head_dim": 5, "family": "dft"},
    "hydra add": {"name": "hydra", "head_dim": 8, "state_size": 3, "combination": "add"},
    "hydra concat": {"name": "hydra", "head_dim": 8, "state_size": 3, "combination": "concat"},
    "nala both": {"name": "nala", "bidirectional": True, "conv_kernel": 5, "rotary": False},
}
CAUSAL = {
    k: v
    for k, v in MIXERS.items()
    if not v.get("bidirectional") and v["name"] not in ("hydra", "matrix")
}
PACKED = torch.tensor(
    [
        [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5],
        list(range(11)),
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0],
    ]
)


def settings(kv_heads: int = 2) -> ModelSettings:
    return ModelSettings(
        hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=6,
        max_position_embeddings=131,
    )


def build(mixer: dict[str, Any], kv_heads: int = 2, std: float = 0.5) -> Mixer:
    part = TypeAdapter(MixerPart).validate_python(mixer)
    torch.manual_seed(0)
    built = part.build(settings(kv_heads), 0).double()
    for parameter in built.parameters():
        parameter.data.normal_(std=std)
    return built


def is_recurrence(mixer: dict[str, Any]) -> bool:
    """Whether tests/nn/recurrences.py knows it as one."""
    family = mixer["family"] if mixer["name"] == "matrix" else mixer
    name = family if isinstance(family, str) else family["name"]
    return name not in {"softmax", "dense", "toeplitz", "vandermonde", "dft", "cauchy", "attention"}


def every(mixers: dict[str, dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("mixer", mixers.values(), ids=mixers)


def tables(positions: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    model = settings()
    return Rotary(model.rope_parameters, model.head_dim, 2048)(positions, dtype)


def plain(length: int = LENGTH) -> Context:
    return Context(*tables(torch.arange(length).unsqueeze(0)))


def packed(positions: Tensor = PACKED, *, by_mask: bool = False, causal: bool = True) -> Context:
    documents = document_lengths(positions)
    assert documents is not None
    rows = packed_rows(documents, len(positions), positions.device)
    if by_mask:
        mask = document_mask(rows.segments, causal=causal)
        rows = replace(rows, mask=mask, longest=positions.shape[1], fixed_shapes=True)
    return Context(*tables(positions), rows)


def padded(length: int = LENGTH, *, causal: bool = True) -> Context:
    """Padding on the left of row 1 and on the right of row 2."""
    real = torch.ones(BATCH, length, dtype=torch.bool)
    real[1, : length // 3] = False
    real[2, length - length // 4 :] = False
    rows = Masked(real, padding_mask(real, causal=causal))
    return Context(*tables((real.cumsum(1) - 1).clamp(min=0)), rows)


def contexts(causal: bool = True) -> Iterator[Context]:
    yield from (plain(), packed(), packed(by_mask=True, causal=causal), padded(causal=causal))


def inputs(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, length, 20, dtype=torch.float64, generator=generator)


def rounding(mixer: dict[str, Any], expected: Tensor) -> float:
    """Softmax is a mean; sums over the row are larger and round accordingly."""
    return 1e-13 if mixer["name"] == "softmax" else 1e-12 * max(1.0, float(expected.abs().max()))


def mixed_by_matrix(mixer: Mixer, p: Any, context: Context) -> Tensor:
    matrix = mixer.materialize(p, context)
    values = p.v.repeat_interleave(matrix.shape[1] // p.v.shape[2], dim=2)
    return torch.einsum("bhij,bjhv->bihv", matrix, values)


@every(MIXERS)
def test_mix_is_the_matrix_times_the_values(mixer: dict[str, Any]) -> None:
    """Oracle: the materialised matrix, for plain, packed (loop and mask) and padded rows."""
    built, x = build(mixer), inputs()
    for context in contexts(built.causal):
        p = built.prepare(x, context)
        y, expected = built.mix(p, context), mixed_by_matrix(built, p, context)
        assert y.shape == expected.shape and y.shape[:2] == (BATCH, LENGTH)
        torch.testing.assert_close(y, expected, rtol=0, atol=rounding(mixer, expected))
        torch.testing.assert_close(built(x, context), built.finish(y, x, p), rtol=0, atol=1e-12)


@every({k: v for k, v in MIXERS.items() if is_recurrence(v)})
def test_mix_is_the_recurrence_one_token_at_a_time(mixer: dict[str, Any]) -> None:
    """Oracle: plain loops in both directions, over chunks and documents; 1e-11 of the largest."""
    built, x = build(mixer), inputs(67)
    positions = torch.arange(67).repeat(BATCH, 1)
    positions[0, 10:], positions[1, 64:] = torch.arange(57), torch.arange(3)
    for context in (plain(67), packed(positions), padded(67, causal=built.causal)):
        p = built.prepare(x, context)
        y, expected = built.mix(p, context), mixed_token_by_token(built, p, context)
        assert expected is not None, (
            "tests/nn/recurrences.py: mixed_token_by_token: add this mixer's loop over tokens; or "
            "name it in is_recurrence of tests/nn/test_mixers.py if it is none"
        )
        if context.real is not None:
            y, expected = y[context.real], expected[context.real]
        assert (y - expected).abs().max() <= 1e-11 * expected.abs().max()


@every(MIXERS)
@pytest.mark.parametrize("length", [1, 2, 131])
def test_any_length(mixer: dict[str, Any], length: int) -> None:
    """Oracle: the matrix, for one token, and for a prime number of them over several chunks."""
    built, x = build(mixer), inputs(length)
    positions = torch.arange(length).repeat(BATCH, 1)
    positions[1, length // 2 :] -= length // 2
    some = [plain(length)]
    if length > 3:
        some += [packed(positions), padded(length, causal=built.causal)]
    for context in some:
        p = built.prepare(x, context)
        expected = mixed_by_matrix(built, p, context)
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(built.mix(p, context), expected, rtol=0, atol=1e-11 * largest)


@every(CAUSAL)
def test_later_tokens_and_other_documents_weigh_nothing(mixer: dict[str, Any]) -> None:
    """Oracle: entries of the matrix that must be exactly zero, counted by hand per pair."""
    built, x = build(mixer), inputs()
    number = (PACKED == 0).cumsum(1)
    for context in contexts():
        matrix = built.materialize(built.prepare(x, context), context)
        for i in range(LENGTH):
            assert not matrix[:, :, i, i + 1 :].any()
        for row, i, j in [(0, 4, 3), (0, 5, 4), (0, 10, 2), (2, 10, 9)]:
            assert number[row, i] != number[row, j]
            if context.segments is not None:
                assert not matrix[row, :, i, j].any()


@every(MIXERS)
def test_causality(mixer: dict[str, Any]) -> None:
    """Oracle: exact zeros in the gradient of a token with respect to later ones, or none at all."""
    built, x = build(mixer), inputs(9).requires_grad_()
    (grad,) = torch.autograd.grad(built(x, plain(9))[:, 4].square().sum(), x)
    first = 5 - mixer.get("sliding_window", 5)
    assert grad[:, first:5].abs().amin(-1).min() > 0 and not grad[:, :first].any()
    assert bool(grad[:, 5:].any()) is not built.causal
    assert built.causal == (mixer in CAUSAL.values())


@every(MIXERS)
@pytest.mark.parametrize("by_mask", [False, True])
def test_documents_never_see_each_other(mixer: dict[str, Any], by_mask: bool) -> None:
    """Oracle: exact zeros in the gradient, and outputs equal to the bit when the other changes."""
    built, x = build(mixer), inputs().requires_grad_()
    context = packed(by_mask=by_mask, causal=built.causal)
    out = built(x, context)
    (grad,) = torch.autograd.grad(out[0, 5:].square().sum(), x)
    assert grad[0, 5:].abs().min() > 0
    assert not grad[0, :5].any() and not grad[1:].any()
    changed = x.detach().clone()
    changed[0, :5] = 7.0
    assert torch.equal(built(changed, context)[0, 5:], out[0, 5:])
    assert not torch.equal(built(changed, context)[0, :5], out[0, :5])


@every(MIXERS)
def test_packed_documents_are_the_documents_alone(mixer: dict[str, Any]) -> None:
    """Oracle: each document in a call of its own, positions from 0."""
    built, x = build(mixer), inputs()
    context = packed()
    assert isinstance(context.visibility, Packed)
    lengths = context.visibility.lengths
    out = built(x, context).flatten(0, 1)
    parts = x.flatten(0, 1).split(lengths), out.split(lengths)
    for part, whole in zip(*parts, strict=True):
        alone = built(part.unsqueeze(0), plain(len(part))).squeeze(0)
        torch.testing.assert_close(whole, alone, rtol=0, atol=rounding(mixer, alone))


@every(MIXERS)
def test_padding_changes_nothing(mixer: dict[str, Any]) -> None:
    """Oracle: each row's real tokens in a call of their own; what padding holds has no effect."""
    built, x = build(mixer), inputs()
    context = padded(causal=built.causal)
    assert context.real is not None
    out = built(x, context)
    assert out.isfinite().all()
    for row, real in zip(range(BATCH), context.real, strict=True):
        alone = built(x[row, real].unsqueeze(0), plain(int(real.sum()))).squeeze(0)
        torch.testing.assert_close(out[row, real], alone, rtol=0, atol=1e-12)
    changed = torch.where(context.real[..., None], x, 5.0)
    torch.testing.assert_close(
        built(changed, context)[context.real], out[context.real], rtol=0, atol=0
    )


def through_the_cache(built: Mixer, cache: RaggedCache, x: Tensor, counts: Any = None) -> Tensor:
    places = cache.places(len(x), x.shape[1], x.device, counts)
    context = Context(*tables(places.index, x.dtype), Cached(places))
    with torch.no_grad():
        return built(x, context, cache.layers[0])


@every(CAUSAL)
@pytest.mark.parametrize("cuts", [[LENGTH], [1] * LENGTH, [4, 1, 1, 5], [3, 8], [1, 10]])
def test_any_cut_through_the_cache_is_one_pass(mixer: dict[str, Any], cuts: list[int]) -> None:
    """Oracle: the pass without a cache, in float64."""
    built, x = build(mixer), inputs()
    cache = RaggedCache([built.new_cache()])
    outs = [through_the_cache(built, cache, part) for part in x.split(cuts, 1)]
    whole = built(x, plain())
    atol = 10 * rounding(mixer, whole)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=atol)


@every(CAUSAL)
@pytest.mark.parametrize("cuts", [[150, 31], [1, 180], [90, 1, 90]])
def test_a_long_prefill_into_a_filled_cache_goes_on(mixer: dict[str, Any], cuts: list[int]) -> None:
    """Oracle: the explicit matrix of the whole row, float64; pieces of several chunks, of which a
    window drops what it does not see."""
    built, x = build(mixer, std=0.3), inputs(181)
    cache = RaggedCache([built.new_cache()])
    got = torch.cat([through_the_cache(built, cache, part) for part in x.split(cuts, 1)], 1)
    p = built.prepare(x, plain(181))
    expected = built.finish(mixed_by_matrix(built, p, plain(181)), x, p)
    largest = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * largest)


@every(CAUSAL)
def test_places_of_an_empty_cache_are_refused_by_a_filled_one(mixer: dict[str, Any]) -> None:
    """Oracle: the message; the tokens would overwrite, or not see, those that are there."""
    built, x = build(mixer), inputs(7)
    cache, empty = RaggedCache([built.new_cache()]), RaggedCache([built.new_cache()])
    through_the_cache(built, cache, x[:, :4])
    places = empty.places(BATCH, 3, x.device)
    context = Context(*tables(places.index), Cached(places))
    with torch.no_grad(), pytest.raises(ValueError, match=r"rows of \[4, 4, 4\] tokens"):
        built(x[:, 4:], context, cache.layers[0])
    whole = built(x, plain(7))[:, 4:]
    got = through_the_cache(built, cache, x[:, 4:])
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-11)


@every({k: v for k, v in MIXERS.items() if k not in CAUSAL})
def test_a_mixer_that_looks_both_ways_has_no_cache(mixer: dict[str, Any]) -> None:
    """Oracle: the message."""
    built = build(mixer)
    with pytest.raises(InputError, match="looks at later tokens and has no cache"):
        built.new_cache()


@every(CAUSAL)
def test_the_cache_goes_back_and_takes_in(mixer: dict[str, Any]) -> None:
    """Oracle: rows as Python lists, each in a pass of its own, after every verb of the cache."""
    built, x = build(mixer), inputs(40)
    cache, other = RaggedCache([built.new_cache()]), RaggedCache([built.new_cache()])
    rows: list[Tensor] = [x[row, :0] for row in range(BATCH)]
    fresh = iter(range(40))

    def append(counts: list[int]) -> None:
        width = max(counts)
        new = torch.stack([x[:, next(fresh)] for _ in range(width)], 1)
        out = through_the_cache(built, cache, new, counts)
        for row, count in enumerate(counts):
            rows[row] = torch.cat((rows[row], new[row, :count]))
            if count:
                whole = built(rows[row].unsqueeze(0), plain(len(rows[row])))[0, -count:]
                torch.testing.assert_close(out[row, :count], whole, rtol=0, atol=1e-10)
        assert cache.lengths == [len(row) for row in rows]

    def rollback(counts: list[int]) -> None:
        cache.rollback(counts)
        rows[:] = [r[: len(r) - n] for r, n in zip(rows, counts, strict=True)]

    append([4, 1, 3])
    rollback([4, 0, 1])
    append([2, 2, 2])
    append([1, 1, 1])
    append([1, 1, 1])
    rollback([3, 2, 0])
    append([3, 0, 2])
    through_the_cache(built, other, x[:1, :5])
    cache.release(1)
    assert cache.admit(other, 0) == 1
    rows[1] = x[0, :5]
    append([1, 3, 2])
    rollback([0, 3, 1])
    cache.select([2, 0, 1, 0][:3])
    rows[:] = [rows[2], rows[0], rows[1]]
    append([2, 1, 2])


@every({k: v for k, v in CAUSAL.items() if k in (v["name"], "softmax window") and k != "softmax"})
def test_the_state_is_of_constant_size_and_goes_back_at_least_64_tokens(
    mixer: dict[str, Any],
) -> None:
    """Oracle: bytes of all tensors held, each 300 tokens; a pass without a cache."""
    built, x = build(mixer), inputs(900)
    cache, sizes = RaggedCache([built.new_cache()]), []
    for end in (300, 600, 900):
        through_the_cache(built, cache, x[:, end - 300 : end - 70])
        for token in range(end - 70, end):
            through_the_cache(built, cache, x[:, token : token + 1])
        sizes.append(held(cache.layers[0]))
    assert sizes[0] <= sizes[1] == sizes[2]
    cache.rollback([64, 0, 1])
    out = through_the_cache(built, cache, x[:, :1])
    for row, length in enumerate((836, 900, 899)):
        alone = torch.cat((x[row, :length], x[row, :1]))
        expected = built(alone.unsqueeze(0), plain(length + 1))[0, -1]
        torch.testing.assert_close(out[row, 0], expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="of recurrent layers the last|of layers with a window"):
        cache.rollback([400, 0, 0])


def held(value: Any) -> int:
    """Bytes of all tensors that an object holds, each storage counted once and whole."""
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)
        }.values()
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in a layer's attributes, in whatever tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (KeyValues, RecurrentCache, RaggedCache)):
        yield from tensors(list(vars(value).values()))


@every(MIXERS)
def test_gradients(mixer: dict[str, Any]) -> None:
    """Oracle: finite differences, of the input and of every parameter, on packed rows."""
    built = build(mixer)
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    x = inputs(5)[:1].requires_grad_()
    names, parameters = zip(*built.named_parameters(), strict=True)
    leaves = tuple(p.detach().clone().requires_grad_() for p in parameters)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(
            built, dict(zip(names, values, strict=True)), (x, packed(positions))
        )

    assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)
    out = built(0 * x, packed(positions)).square().sum()
    for grad in torch.autograd.grad(out, [x, *built.parameters()]):
        assert grad.isfinite().all()


@every(MIXERS)
def test_bf16(mixer: dict[str, Any]) -> None:
    """Oracle: the float64 output of the same rounded weights and inputs."""
    built, x = build(mixer, std=0.2).bfloat16(), inputs().bfloat16()
    cos, sin = (t.float() for t in tables(torch.arange(LENGTH).unsqueeze(0)))
    out = built(x, Context(cos, sin))
    assert out.dtype == torch.bfloat16
    expected = built.double()(x.double(), plain())
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < 3e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = built.float()(x.float(), Context(cos, sin))
    assert (out.double() - expected).abs().max() / expected.abs().max() < 3e-2


@every(MIXERS)
def test_built_on_the_meta_device_and_initialised(mixer: dict[str, Any]) -> None:
    """Oracle: no memory is taken; every parameter is set by its module's reset_parameters."""
    with torch.device("meta"):
        built = TypeAdapter(MixerPart).validate_python(mixer).build(settings(), 0)
    assert all(parameter.is_meta for parameter in built.parameters())
    assert not list(built.buffers())
    built.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(torch.nan)
        for module in built.modules():
            if list(module.parameters(recurse=False)):
                module.reset_parameters()  # type: ignore[operator]
    assert all(parameter.isfinite().all() for parameter in built.parameters())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["softmax", "linear", "nala"])
def test_grouped_heads_share_keys(name: str, kv_heads: int) -> None:
    """Oracle: full heads whose key and value weights are the shared ones, repeated."""
    mixer = {"name": name} if name == "softmax" else {"name": name, "conv_kernel": 0}
    grouped, full = build(mixer, kv_heads), build(mixer, 4)
    state = grouped.state_dict()
    for weight in ("k_proj.weight", "v_proj.weight"):
        heads = state[weight].view(kv_heads, 6, 20)
        state[weight] = heads.repeat_interleave(4 // kv_heads, 0).reshape(24, 20)
    full.load_state_dict(state)
    x = inputs()
    torch.testing.assert_close(grouped(x, plain()), full(x, plain()), rtol=0, atol=1e-12)


def test_hydra_has_the_papers_parameters() -> None:
    """Oracle: 3,825,224 a layer of Hydra-BERT (width 768, state 64, kernel 7)."""
    with torch.device("meta"):
        mixer = HydraSettings().build(ModelSettings(hidden_size=768), 0)
    assert sum(p.numel() for p in mixer.parameters()) == 3_825_224


def test_hydras_concat_is_normed_gated_and_projected_side_by_side() -> None:
    """Oracle: heads [forward, backward] of one head beside each other, the gate for both."""
    built: Any = build(MIXERS["hydra concat"])
    p = built.prepare(inputs(), plain())
    heads = built.norm(built.mix(p, plain()).flatten(2)).unflatten(-1, (5, 2, 8))
    gated = heads * torch.nn.functional.silu(p.z).unflatten(-1, (5, 1, 8))
    out = built.out_proj(gated.flatten(2))
    torch.testing.assert_close(built(inputs(), plain()), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hydra", "ssd"])
def test_blocks_beside_the_diagonal_are_of_the_states_rank(name: str) -> None:
    """Oracle: the rank of every block below (and above) the diagonal is the state's size, 3."""
    built, x = build({"name": name, "head_dim": 8, "state_size": 3}), inputs(12)
    matrix = built.materialize(built.prepare(x, plain(12)), plain(12))
    ranks = set()
    for cut in (4, 6, 8):
        ranks |= set(
            torch.linalg.matrix_rank(matrix[..., cut:, :cut], rtol=1e-9).flatten().tolist()
        )
        upper = torch.linalg.matrix_rank(matrix[..., :cut, cut:], rtol=1e-9).flatten().tolist()
        assert set(upper) == ({3} if name == "hydra" else {0})
    assert ranks == {3}


@pytest.mark.parametrize("rotary", [False, True])
def test_rows_of_nala_sum_to_one_without_rotation_only(rotary: bool) -> None:
    """Oracle: weights are non-negative and sum to den / (den + eps t); rotated ones do neither."""
    built: Any = build({"name": "nala", "rotary": rotary})
    p = built.prepare(inputs(), plain())
    matrix = built.materialize(p, plain())
    count = torch.arange(1, LENGTH + 1)
    q, k = built.features(p.q, p.k)
    den = torch.einsum("bihf,bjhf->bhij", q, k.repeat_interleave(2, 2)).tril().sum(-1)
    right = (matrix.sum(-1) - den / (den + 1e-6 * count.double())).abs().max() < 1e-12
    assert bool(right) is bool((matrix >= 0).all()) is not rotary


def test_nalas_cosine_tends_to_the_sign() -> None:
    """Oracle: the sign split; their difference for alpha of 20 and of a million."""
    x, outs = inputs(), {}
    for alpha in (None, 20.0, 1e6):
        direction = {"direction": "cosine", "alpha": alpha} if alpha else {}
        built = build({"name": "nala", "query_eps": 0.0, **direction})
        outs[alpha] = built(x, plain()) if not outs else built(x, plain()) - outs[None]
    assert 1e-6 < outs[20.0].abs().max() < 0.1 * outs[None].abs().max()
    assert outs[1e6].abs().max() < 1e-10


def test_nalas_cosine_is_that_of_the_papers_angles() -> None:
    """Oracle: |q|^p |k|^lam cos(th_q - th_k) by dimension, th = (pi/4) tanh(alpha x / |x|)."""
    built = build({"name": "nala", "direction": "cosine", "query_eps": 0.0})
    q, k = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    length = q.norm(dim=-1, keepdim=True)
    size = (q / length).abs() ** (3 * (0.5 + length.tanh())) * k.abs() ** 3
    q_angle, k_angle = (
        torch.pi / 4 * (20 * x / x.norm(dim=-1, keepdim=True)).tanh() for x in (q, k)
    )
    expected = (size * (q_angle - k_angle).cos()).sum(-1)
    phi_q, phi_k = built.features(q, k)
    assert (phi_q >= 0).all() and (phi_k >= 0).all()
    torch.testing.assert_close((phi_q * phi_k).sum(-1), expected, rtol=0, atol=1e-13)


def test_the_delta_rule_recalls_orthogonal_keys() -> None:
    """Oracle: a query equal to a stored key reads its value; a share of 0 stores nothing."""
    torch.manual_seed(0)
    k = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0].view(1, 6, 1, 6)
    v, one = torch.randn(1, 6, 1, 3, dtype=torch.float64), torch.ones(1, 6, 1, dtype=torch.float64)
    _, state = delta_recurrence(k, k, v, one, chunk=4)
    torch.testing.assert_close(k[0, :, 0] @ state[0, 0], v[0, :, 0], rtol=0, atol=1e-14)
    assert not delta_recurrence(k, k, v, 0 * one)[0].any()


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_every_recurrence_in_any_chunks(chunk: int) -> None:
    """Oracle: the default chunk, which recorded vectors hold; equal gates make GLA the engine."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 37, 2, 4, dtype=torch.float64, generator=generator) for _ in "qkv")
    g, b = -q.square().mean(-1), k.square().mean(-1).clamp(max=1)
    state = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=generator)
    segments = (torch.arange(37) > 20).long().expand(2, 37)
    keys: Any = {"segments": segments, "state": state, "chunk": chunk}
    simple = linear_recurrence(q, k, v, g, segments=segments, state=state)
    for got, expected in (
        (channel_recurrence(q, k, v, g[..., None].expand_as(k), **keys), simple),
        (
            delta_recurrence(q, k, v, b, g, **keys),
            delta_recurrence(q, k, v, b, g, segments=segments, state=state),
        ),
    ):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
