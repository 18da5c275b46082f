"""What transformers and its tools ask of every class: options, keywords, caches, vocabularies."""

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from llmnorm.models import (
    LlmNormConfig,
    LlmNormForCausalLM,
    LlmNormForMaskedLM,
    LlmNormForSequenceClassification,
    LlmNormModel,
)
from llmnorm.models.building import build_model
from llmnorm.part import InputError

CLASSES = [LlmNormForCausalLM, LlmNormForMaskedLM, LlmNormForSequenceClassification]
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(7))
each_class = pytest.mark.parametrize("cls", CLASSES)
MIXERS: dict[str, Any] = {
    "softmax": "softmax",
    "window": {"name": "softmax", "sliding_window": 5},
    "nala": "nala",
    "ssd": {"name": "ssd", "head_dim": 8, "state_size": 6},
    "hybrid": ["gated_delta", "softmax"],
}


def build(cls: Any = LlmNormForCausalLM, **keys: Any) -> Any:
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    mixer = {"name": "softmax", "bidirectional": cls is not LlmNormForCausalLM}
    names = {"mixer": mixer, "architectures": [cls.__name__]}
    return build_model(LlmNormConfig(**shape | heads | names | keys), seed=0).double().eval()


@each_class
def test_the_configurations_options_are_those_of_the_call(cls: Any) -> None:
    """Oracle: the same options as keywords, which win over the configuration's."""
    model = build(cls)
    expected = model(IDS, output_hidden_states=True, output_attentions=True, return_dict=False)
    model.config.output_hidden_states = model.config.output_attentions = True
    model.config.return_dict = False
    got = model(IDS)
    assert isinstance(got, tuple) and len(got) == len(expected) == 3
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1] + got[2], expected[1] + expected[2], strict=True):
        assert torch.equal(one, other)
    plain = model(IDS, output_hidden_states=False, output_attentions=False, return_dict=True)
    assert plain.hidden_states is plain.attentions is None
    torch.testing.assert_close(plain.logits, got[0], rtol=0, atol=1e-12)
    assert isinstance(model.model(IDS), tuple)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_attentions_are_the_mixers_matrices(mixer: Any) -> None:
    """Oracle: `materialize` of the parameters of every mixer, seen by a hook; padded rows."""
    model, mask, found = build(mixer=mixer), torch.ones_like(IDS), []
    mask[0, :3] = 0
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(
            lambda m, given: found.append(m.materialize(m.prepare(*given[:2]), given[1]))
        )
    output = model(IDS, attention_mask=mask, output_attentions=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape[2:] == (9, 9)
    for one, other in zip(output.attentions, found, strict=True):
        assert torch.equal(one, other)
    real, expected = mask.bool(), model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(output.logits[real], expected[real], rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(output.logits[real].sum(), output.attentions[0])
    assert gradient.any()


def test_a_configuration_that_asks_for_matrices_is_saved_and_loaded(tmp_path: Any) -> None:
    """Oracle: the option after loading; transformers refuses it with its own default, `sdpa`."""
    model = build()
    model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    for loaded in (model, LlmNormForCausalLM.from_pretrained(tmp_path)):
        assert loaded.config.output_attentions and len(loaded(IDS).attentions) == 2


@each_class
def test_unknown_keywords_are_named(cls: Any) -> None:
    """Oracle: the name and the nearest one; None says nothing."""
    model = build(cls)
    with pytest.raises(InputError, match=r"max_length_qq: .*did you mean 'max_length_q'"):
        model(IDS, max_length_qq=3)
    with pytest.raises(InputError, match="head_mask"):
        model(IDS, head_mask=torch.ones(4))
    assert torch.equal(model(IDS, head_mask=None).logits, model(IDS).logits)


@each_class
def test_keywords_that_say_what_is_known_change_nothing(cls: Any) -> None:
    """Oracle: the logits without them; what says otherwise is refused by name."""
    model = build(cls)
    expected, causal = model(IDS).logits, model.model.causal
    known = {
        "cache_position": torch.arange(9),
        "is_causal": causal,
        "token_type_ids": torch.zeros_like(IDS),
        "cu_seq_lens_q": torch.tensor([0, 9, 18], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 9, 18], dtype=torch.int32),
        **{"max_length_q": 9, "max_length_k": 9},
    }
    assert torch.equal(model(IDS, **known).logits, expected)
    numbers = torch.zeros_like(IDS)
    places = torch.arange(9).expand_as(IDS)
    assert torch.equal(model(IDS, position_ids=places, seq_idx=numbers).logits, expected)
    wrong: dict[str, dict[str, Any]] = {
        "cache_position": {"cache_position": torch.arange(1, 10)},
        "is_causal": {"is_causal": not causal},
        "token_type_ids": {"token_type_ids": torch.ones_like(IDS)},
        "cu_seq_lens_k, max_length_q, max_length_k: missing": {"cu_seq_lens_q": torch.arange(3)},
        "seq_idx: needs": {"seq_idx": numbers},
        "seq_idx: documents": {"seq_idx": numbers + (places > 4), "position_ids": places},
    }
    for words, keys in wrong.items():
        with pytest.raises(InputError, match=words):
            model(IDS, **keys)


def test_columns_of_new_tokens_behind_a_cache() -> None:
    """Oracle: the logits without cache_position, which transformers 4 passes in every step."""
    for mask in (None, torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])):
        model, found = build(), []
        for given in (False, True):
            cache, logits = model.model.new_cache(), []
            for start in (0, 5):
                part = slice(start, 5 if start == 0 else 6)
                keys = {} if mask is None else {"attention_mask": mask[:, : part.stop]}
                if given:
                    keys["cache_position"] = torch.arange(part.start, part.stop)
                logits.append(model(IDS[:, part], past_key_values=cache, **keys).logits)
            found.append(torch.cat(logits, 1))
        assert torch.equal(*found)
    with pytest.raises(InputError, match="cache_position"):
        model(IDS[:, :1], past_key_values=cache, cache_position=torch.tensor([3]))


class Other(Cache):
    """A cache of somebody's own."""

    def __init__(self) -> None:
        super().__init__(layers=[])


@pytest.mark.parametrize("kind", ["dynamic", "static", "other"])
def test_foreign_caches_are_refused_by_name(kind: str) -> None:
    """Oracle: the class's name and ours, in a pass and in `generate`."""
    model = build()
    cache = {
        "dynamic": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
        "other": Other,
    }[kind]()
    words = f"LlmNormCache, got {type(cache).__name__}"
    with pytest.raises(InputError, match=words):
        model(IDS, past_key_values=cache)
    with pytest.raises(InputError, match=words):
        model.generate(IDS, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("name", ["static", "offloaded", "quantized", "paged"])
def test_cache_implementations_of_others_are_refused(name: str) -> None:
    """Oracle: the key, or what transformers makes of it."""
    with pytest.raises(InputError, match="cache_implementation|continuous batching"):
        build().generate(IDS, cache_implementation=name, max_new_tokens=2)


@pytest.mark.parametrize(
    "name", ["paged|sdpa", "paged|eager", "flash_attention_2", "flex_attention", "someones/kernel"]
)
def test_attention_that_no_layer_follows_is_refused(name: str, tmp_path: Any) -> None:
    """Oracle: the key, when a model is made, loaded, or told so later."""
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="attn_implementation"):
        model.set_attn_implementation(name)
    with pytest.raises(InputError, match="attn_implementation"):
        LlmNormForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    config = LlmNormConfig.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(InputError, match="attn_implementation"):
        LlmNormModel(config)
    for known in ("eager", "sdpa"):
        loaded = LlmNormForCausalLM.from_pretrained(tmp_path, attn_implementation=known)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_attention_hook_is_still_there() -> None:
    """Oracle: transformers' own sources, which call the private method."""
    for caller in (PreTrainedModel.__init__, PreTrainedModel.set_attn_implementation):
        assert "self._check_and_adjust_attn_implementation(" in inspect.getsource(caller)


def test_continuous_batching_is_refused() -> None:
    """Oracle: the way out; its pages of keys and values are nothing that our layers know."""
    with pytest.raises(InputError, match="continuous batching: .*generate"):
        build().generate_batch([[1, 2, 3]], max_new_tokens=2)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_keys_of_a_cache_are_as_long_as_the_row(mixer: Any) -> None:
    """Oracle: the number of tokens; a recurrent layer has no keys."""
    model = build(mixer=mixer)
    cache = model(IDS, use_cache=True).past_key_values
    for tokens in (9, 10):
        assert cache.get_seq_length() == tokens
        for layer, block in zip(cache.layers, model.model.layers, strict=True):
            assert layer.get_seq_length() == tokens
            if hasattr(block.self_attn, "qk_norm"):
                assert layer.keys.shape == layer.values.shape == (2, 2, tokens, 6)
            else:
                assert layer.keys is layer.values is None
        model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("cls", CLASSES[:2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_head_is_kept_by_post_init(cls: Any, tied: bool) -> None:
    """Oracle: the weights before; a head that lost its mark would be drawn anew."""
    model = build(cls, tie_word_embeddings=tied)
    model.resize_token_embeddings(64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.post_init()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
