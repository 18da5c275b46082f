"""generate() through the ragged cache against full passes without one."""

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaForCausalLM

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.cache import LlmNormCache
from llmnorm.part import InputError

PAD = 2
# Every causal mixer alone and in one model with softmax, whose cache it shares.
MIXERS: dict[str, Any] = {
    "softmax": "softmax",
    "window": {"name": "softmax", "sliding_window": 5},
    "linear": "linear",
    "nala": "nala",
    "ssd": {"name": "ssd", "head_dim": 8, "state_size": 6},
    "gla": "gla",
    "gated_delta": "gated_delta",
    "hybrid": ["nala", {"name": "nala", "direction": "cosine"}, {"sliding_window": 6}],
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)


def build(seed: int = 0, **keys: Any) -> LlmNormForCausalLM:
    # 0.1: at 0.02 all logits of so small a model are alike and any token would do.
    config = LlmNormConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=len(keys["mixer"]) if isinstance(keys.get("mixer"), list) else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=PAD,
        **keys,
    )
    return build_model(config, seed=seed).double().eval()


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of these lengths, and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 61, (length,), generator=generator)
    return ids, (ids != PAD).long()


@torch.no_grad()
def greedy(model: LlmNormForCausalLM, prompt: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Logits of every step of greedy decoding, each by a full pass over the row alone."""
    logits = []
    for _ in range(steps):
        logits.append(model(prompt.unsqueeze(0)).logits[0, -1])
        prompt = torch.cat((prompt, logits[-1].argmax(-1, keepdim=True)))
    return logits


@every_mixer
@pytest.mark.parametrize("lengths", [[1], [7], [6, 6, 6], [1, 9, 4, 4, 13]])
def test_greedy_is_the_argmax_of_full_passes(mixer: Any, lengths: list[int]) -> None:
    """Oracle: one full pass a token and row, without cache or padding; logits to 1e-10."""
    model = build(mixer=mixer)
    ids, mask = prompts(lengths)
    steps, seen = 12, []
    # generate rounds the logits it returns to float32
    hook = model.register_forward_hook(lambda _, args, out: seen.append(out.logits[:, -1]))
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
    )
    hook.remove()
    assert isinstance(out.past_key_values, LlmNormCache)
    assert out.past_key_values.slots.lengths == [n + steps - 1 for n in lengths]
    got = torch.stack(seen, 1)
    tokens = set()
    for row, length in enumerate(lengths):
        expected = torch.stack(greedy(model, ids[row, -length:], steps))
        atol = 1e-12 if mixer == "softmax" else 1e-10
        torch.testing.assert_close(got[row], expected, rtol=0, atol=atol)
        assert out.sequences[row, -steps:].tolist() == expected.argmax(-1).tolist()
        tokens |= set(out.sequences[row, -steps:].tolist())
    assert len(tokens) > 2


@every_mixer
def test_without_a_cache_the_tokens_are_the_same(mixer: Any) -> None:
    """Oracle: generate(use_cache=False) on left-padded rows."""
    model = build(mixer=mixer)
    ids, mask = prompts([3, 8])
    keys = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **keys), model.generate(ids, use_cache=False, **keys))


@pytest.mark.parametrize("lengths", [[5], [2, 7]])
def test_beam_search_is_that_of_the_stock_cache(lengths: list[int]) -> None:
    """Oracle: the same weights in transformers' Llama with its own cache, float32."""
    model = build().float()
    config = model.config
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    stock = LlamaForCausalLM(
        LlamaConfig(**{key: getattr(config, key) for key in keys + heads}, pad_token_id=PAD)
    ).eval()
    stock.load_state_dict(model.state_dict())
    ids, mask = prompts(lengths)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "num_beams": 4,
        "num_return_sequences": 3,
        "do_sample": False,
        "eos_token_id": 5,
        "pad_token_id": PAD,
    }
    got, expected = model.generate(ids, **options), stock.generate(ids, **options)
    assert torch.equal(got, expected)
    assert len({tuple(row) for row in got.tolist()}) > len(lengths)


@every_mixer
@pytest.mark.parametrize("how", ["assistant", "lookup", "chunked"])
def test_other_ways_of_decoding_give_greedy(mixer: Any, how: str) -> None:
    """Oracle: plain greedy; assistants crop the cache, chunked prefill fills it in parts."""
    model = build(mixer=mixer)
    ids, _ = prompts([17])
    keys: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False}
    expected = model.generate(ids, **keys)
    if how == "assistant":
        keys["assistant_model"] = build(seed=1, mixer=mixer)
    elif how == "lookup":
        keys["prompt_lookup_num_tokens"] = 3
    else:
        keys["prefill_chunk_size"] = 5
    assert torch.equal(model.generate(ids, **keys), expected)


@every_mixer
def test_verbs_between_passes_leave_each_row_as_if_alone(mixer: Any) -> None:
    """Oracle: full passes; a row rolled back, released and re-admitted, rows of three lengths."""
    model = build(mixer=mixer)
    rows = [torch.randint(3, 61, (n,)) for n in (4, 9, 6)]
    cache = model.model.new_cache()

    def run(tokens: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, attention_mask=real, past_key_values=cache).logits

    ids = torch.full((3, 9), PAD)
    for row, tokens in enumerate(rows):
        ids[row, -len(tokens) :] = tokens
    run(ids, (ids != PAD).long())
    draft = torch.randint(3, 61, (3, 5))
    run(draft)
    cache.slots.rollback([5, 2, 0])
    rows = [torch.cat((r, d[: 5 - n])) for r, d, n in zip(rows, draft, [5, 2, 0], strict=True)]
    cache.slots.release(0)
    other = model.model.new_cache()
    rows[0] = torch.randint(3, 61, (7,))
    with torch.no_grad():
        model(rows[0].unsqueeze(0), past_key_values=other)
    assert cache.slots.admit(other.slots) == 0
    cache.slots.select([2, 0, 1, 0])
    rows = [rows[r] for r in (2, 0, 1, 0)]
    last = torch.randint(3, 61, (4, 1))
    got = run(last)
    for row, tokens in enumerate(rows):
        with torch.no_grad():
            expected = model(torch.cat((tokens, last[row])).unsqueeze(0)).logits[0, -1]
        atol = 1e-12 if mixer == "softmax" else 1e-10
        torch.testing.assert_close(got[row, -1], expected, rtol=0, atol=atol)


@every_mixer
@pytest.mark.parametrize("real", [[[1, 0, 1, 1], [0, 0, 1, 1]], [[1, 1, 1, 0], [0, 0, 0, 0]]])
def test_padding_between_the_new_tokens_of_a_filled_cache(mixer: Any, real: Any) -> None:
    """Oracle: full passes over each row's real tokens; padding stands anywhere."""
    model, cache = build(mixer=mixer), build(mixer=mixer).model.new_cache()
    tokens, mask = torch.randint(3, 61, (2, 9)), torch.tensor(real)
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache)
        whole = torch.cat((torch.ones(2, 5), mask), 1)
        got = model(tokens[:, 5:], attention_mask=whole, past_key_values=cache).logits
        for row in range(2):
            alone = tokens[row, whole[row].bool()].unsqueeze(0)
            expected = model(alone).logits[0, 5:]
            torch.testing.assert_close(got[row, mask[row].bool()], expected, rtol=0, atol=1e-10)


def test_a_stock_model_can_use_the_cache_for_equal_rows_and_is_refused_for_others() -> None:
    """Oracle: transformers' DynamicCache; its own masks would be silently wrong for ragged rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    stock = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 61, (2, 9))
    ours, theirs = LlmNormCache(2), DynamicCache(config=config)
    with torch.no_grad():
        for part in ids.split([4, 1, 4], 1):
            got = stock(part, past_key_values=ours).logits
            expected = stock(part, past_key_values=theirs).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    ours.slots.rollback([3, 0])
    assert ours.get_seq_length() == 9
    with pytest.raises(ValueError, match="unequal lengths"):
        stock(ids[:, :1], past_key_values=ours)


@every_mixer
@pytest.mark.parametrize("given", ["whole", "new", "embeddings"])
def test_a_left_padded_batch_goes_on_from_its_cache(mixer: Any, given: str) -> None:
    """Oracle: one `generate` of all tokens; a cache holds fewer tokens than there are columns."""
    model = build(mixer=mixer).float()
    ids, mask = prompts([3, 8, 6])
    keys: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, **keys)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, **keys)
    whole = first.sequences
    keys["attention_mask"] = torch.cat((mask, torch.ones(3, 4, dtype=mask.dtype)), 1)
    keys |= {"past_key_values": first.past_key_values, "max_new_tokens": 2}
    if given == "embeddings":
        inputs: dict[str, Any] = {"inputs_embeds": model.get_input_embeddings()(whole)}
    else:
        inputs = {"input_ids": whole if given == "whole" else whole[:, -1:]}
    more = model.generate(**inputs, **keys)
    assert torch.equal(more.sequences[:, -2:], expected.sequences[:, -2:])
    assert more.past_key_values.slots.lengths == [8, 13, 11]


@pytest.mark.parametrize("keys", [{}, {"prefill_chunk_size": 2}])
def test_tokens_that_the_cache_does_not_hold_are_refused(keys: dict[str, Any]) -> None:
    """Oracle: the argument that says so; a cached token would be read once more, without a word."""
    model = build()
    ids, mask = prompts([3, 8])
    cache = model.model.new_cache()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    if not keys:
        with pytest.raises(InputError, match="input_ids: have .3, 8. tokens"):
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
        mask[0, 0] = 1
    ids = torch.cat((ids, ids[:, -2:]), 1)
    mask = torch.cat((mask, torch.ones(2, 2, dtype=mask.dtype)), 1)
    cache.slots.rollback([2, 1])
    with pytest.raises(InputError, match="attention_mask: has"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, **keys)


@every_mixer
def test_what_stands_around_a_block_leaves_it_its_cache(mixer: Any) -> None:
    """Oracle: the model without it."""

    class Around(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *given: Any) -> torch.Tensor:
            return self.block(*given)

    model = build(mixer=mixer)
    ids, mask = prompts([3, 8])
    keys = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **keys)
    model.model.layers[1] = Around(model.model.layers[1])
    assert torch.equal(model.generate(ids, **keys), expected)


def test_the_private_hook_is_still_there() -> None:
    """Oracle: transformers' own signature of the method that `generate` calls."""
    names = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert names[:3] == ["self", "generation_config", "model_kwargs"]
    source = inspect.getsource(GenerationMixin.generate)
    assert "self._prepare_cache_for_generation(" in source


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"past_key_values": DynamicCache()}, "LlmNormCache"),
        ({"position_ids": torch.tensor([[0, 1, 0]]), "use_cache": True}, "restart"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask"),
        ({"output_attentions": True, "use_cache": True}, "no whole matrix"),
        ({"inputs_embeds": torch.zeros(1, 3, 24)}, "exactly one"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(keys: dict[str, Any], words: str) -> None:
    """Oracle: the word that tells the way out."""
    with pytest.raises(InputError, match=words):
        build()(torch.tensor([[3, 4, 5]]), **keys)


def test_training_through_a_cache_is_refused() -> None:
    """Oracle: gradients would be lost without a word."""
    with pytest.raises(InputError, match="gradients"):
        build().train()(torch.tensor([[3, 4, 5]]), use_cache=True)


def test_foreign_cache_implementations_are_refused() -> None:
    """Oracle: generate(cache_implementation="static") would hold rows of one length."""
    with pytest.raises(InputError, match="static"):
        build().generate(torch.tensor([[3, 4]]), max_new_tokens=2, cache_implementation="static")


def test_cache_as_hugging_face_sees_it() -> None:
    """Oracle: the facts generate relies on."""
    cache = LlmNormCache(2)
    assert not cache.is_compileable and cache.is_croppable and cache.get_seq_length() == 0
    with torch.no_grad():
        build()(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    assert cache.get_seq_length() == 3 and len(cache) == 2
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.slots.lengths == [3, 3]
    cache.crop(-2)
    assert cache.slots.lengths == [1, 1]
    with pytest.raises(ValueError, match="negative"):
        cache.crop(2)
    cache.reset()
    assert cache.get_seq_length() == 0
