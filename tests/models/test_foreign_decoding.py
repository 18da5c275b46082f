"""Stock decoders of transformers behind ragged caches; the oracle is the class without a cache."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmnorm.models import foreign_decoding
from llmnorm.models.foreign_decoding import ForeignStep
from llmnorm.nn.cache import KEPT
from llmnorm.part import InputError

VOCABULARY, CONTEXT = 31, 48
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "pad_token_id": 2}
# One of each kind of position (learned, learned with an offset, rotary over a part, rotary), with
# biases, parallel blocks, experts, groups of heads.
CLASSES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "OPT": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    | {"word_embed_proj_dim": 16, "init_std": 0.1},
    "GPTNeoX": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 24, "rotary_pct": 0.5},
    "Llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "intermediate_size": 24},
    "Mixtral": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "intermediate_size": 16, "num_local_experts": 3},
    "GPTJ": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": CONTEXT},
}


def stock(name: str, **changed: Any) -> transformers.PreTrainedModel:
    """A tiny model of a class of CLASSES, float64, random."""
    keys = COMMON | CLASSES[name] | changed
    if "n_positions" not in keys:
        keys = {"max_position_embeddings": CONTEXT} | keys
    config = getattr(transformers, f"{name}Config")(**keys)
    torch.manual_seed(0)
    # The grouped products of experts take no float64.
    experts = {"experts_implementation": "eager"} if name == "Mixtral" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **experts)
    return model.double().eval()


def full(model: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits (tokens, vocabulary) of one pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_ragged_rows_have_the_logits_of_full_passes(name: str) -> None:
    """Oracle: passes without a cache, 1e-12 (1e-6 where the class rounds to float32 by itself).

    Uneven rows, rows of no new tokens, the first rows of the cache, rollbacks, rows admitted from a
    side cache and from the cache itself, a full context with padding behind it.
    """
    model = stock(name)
    step = ForeignStep(model)
    assert (step.context, step.vocabulary) == (CONTEXT, VOCABULARY)
    bound = 1e-12 if model.config._attn_implementation == "sdpa" else 1e-6
    generator = torch.Generator().manual_seed(1)
    cache = step.new_cache()
    cache.reserve(3, CONTEXT, 17, dtype=torch.float64, device=torch.device("cpu"))
    tokens: list[list[int]] = [[], [], []]

    def feed(counts: list[int]) -> None:
        ids = torch.randint(VOCABULARY, (len(counts), max(counts)), generator=generator)
        last = sum(counts) % 2 == 0
        logits = step.step(ids, cache, counts, last=last)
        for row, count in enumerate(counts):
            tokens[row] += ids[row, :count].tolist()
            if count:
                found = logits[row, :1] if last else logits[row, :count]
                wanted = full(model, tokens[row])[-1 if last else -count :]
                assert float((found - wanted).abs().max()) <= bound
        assert cache.lengths == [len(row) for row in tokens]

    side = step.new_cache()
    prompt = torch.randint(VOCABULARY, (1, 9), generator=generator)
    step.step(prompt[:, :5], side, last=True)
    step.step(prompt[:, 5:], side, last=True)
    for row in range(2):
        cache.admit(side)
        tokens[row] = prompt[0].tolist()
    cache.admit()
    feed([2, 1])
    feed([1, 4, 3])
    cache.rollback([1, 4])
    tokens[0], tokens[1] = tokens[0][:-1], tokens[1][:-4]
    feed([1, 0, 4])
    cache.rollback([len(tokens[0]) - 1])  # any number of tokens, of keys and values
    tokens[0] = tokens[0][:1]
    feed([1])
    cache.release(1)
    cache.admit(cache, 2)
    cache.release(2)
    tokens[1], tokens[2] = tokens[2], []
    feed([1, 1])
    feed([5, CONTEXT - len(tokens[1])])
    feed([5, 0])
    assert KEPT > CONTEXT or cache.lengths[1] == CONTEXT


def test_rows_of_longrope_stay_within_the_context_that_was_extended() -> None:
    """Oracle: passes without a cache; beyond it the class turns all rows by other frequencies."""
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope |= {"original_max_position_embeddings": CONTEXT // 2}
    keys = {"rope_parameters": rope, "num_attention_heads": 2}
    model = stock("Llama", **keys)
    step = ForeignStep(model)
    assert step.context == CONTEXT // 2
    cache, long, short = step.new_cache(), list(range(step.context)), [9, 4, 7, 1, 8, 2]
    first = torch.tensor([long[:-1], [*short[:2], *long[3:]]])
    step.step(first, cache, [len(long) - 1, 2])
    found = step.step(torch.tensor([long[-1:] * 4, short[2:]]), cache, [1, 4])
    for row, ids in ((found[0, :1], long), (found[1], short)):
        assert float((row - full(model, ids)[-len(row) :]).abs().max()) <= 1e-12
    assert float((full(model, [*long, 3])[-2] - found[0, 0]).abs().max()) > 1e-3


@pytest.mark.parametrize("error", ["position", "mask", "padding"])
def test_a_planted_error_fails_the_proof(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: none needed: a hole in the positions, later slots in sight, padding that stays."""
    model = stock("Llama", initializer_range=0.02)
    masked, forward = foreign_decoding._mask, model.forward

    def with_a_hole(position_ids: Tensor | None = None, **given: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids + (position_ids > 1)
        return forward(position_ids=position_ids, **given)

    if error == "position":
        monkeypatch.setattr(model, "forward", with_a_hole)
    elif error == "mask":
        monkeypatch.setattr(foreign_decoding, "_mask", lambda *a: masked(*a).clamp(min=-1))
    else:
        monkeypatch.setattr(foreign_decoding.RaggedCache, "rollback", lambda *a: None)
    with pytest.raises(InputError, match="rows of unequal lengths get other logits"):
        ForeignStep(model)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | COMMON
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma2": ({"num_key_value_heads": 2, "head_dim": 8}, "have a window"),
    "Mistral": ({"num_key_value_heads": 2}, "as a model of llmnorm"),
    "GPTNeo": ({"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},)
    + ("attention_layers: local",),
    "Mamba": ({"state_size": 4}, "recurrent"),
    "Jamba": ({"num_key_value_heads": 2}, "recurrent"),
    "DeepseekV3": ({"num_key_value_heads": 2}, "kv_lora_rank"),
    "Bloom": ({"n_layer": 1, "n_head": 2}, "position_ids"),
    "Falcon": ({"alibi": True}, "position_ids"),
    "Bart": ({"d_model": 16}, "an encoder beside its decoder"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_classes_that_rows_cannot_be_run_with_are_refused_by_name(name: str) -> None:
    """Oracle: what each class keeps, by its documentation; no weights are made for the answer."""
    keys, why = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**TINY | keys)
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    with pytest.raises(InputError, match=why) as told:
        foreign_decoding.refuse_foreign(config, kind, "models/it")
    assert str(told.value).startswith("models/it: ") and "\n" not in str(told.value)


def test_an_encoder_fails_the_proof() -> None:
    """Oracle: attention in both directions, under the name of a causal language model."""
    config = transformers.BertConfig(**TINY, intermediate_size=24)
    model = transformers.BertLMHeadModel(config).eval()
    with pytest.raises(InputError, match="BertLMHeadModel: it is an encoder"):
        ForeignStep(model)
    masked = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(InputError, match="BertForMaskedLM is no causal language model"):
        ForeignStep(masked)


def test_other_attention_and_training_are_refused() -> None:
    """Oracle: the messages, with the cure."""
    model = stock("Llama")
    with pytest.raises(InputError, match="call model.eval"):
        ForeignStep(model.train())
    model.eval().set_attn_implementation("flex_attention")
    with pytest.raises(InputError, match="attn_implementation='sdpa'"):
        ForeignStep(model)
