"""Models of every kind behind the server, each with speculation."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm.exchange.served import load_target
from llmnorm.generation.engine import Counters
from llmnorm.models import LlmNormConfig
from llmnorm.models.building import build_model
from tests.models.cache_rounds import MODELS
from tests.serving.served import Served, save_model, serving
from tests.test_data.chats import save_tokenizer

SAID = {"role": "user", "content": "It is 4. 2+2? 3+3? " * 6}


def save_mixer(directory: Path, name: str) -> Path:
    """A model of this package with these mixers, whose texts repeat themselves now and then."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(directory))
    mixer = MODELS[name]
    config = LlmNormConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        mixer=mixer,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    build_model(config, seed=1).double().eval().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["softmax", "nala", "ssd", "softmax before nala"])
def test_a_chat_of_two_turns_with_drafts(name: str, tmp_path: Path) -> None:
    """Oracle: the offline engine without a draft; the second turn's beginning was not run again,
    or it is counted that a recurrent state could not be taken back."""
    with serving(save_mixer(tmp_path / "model", name), draft_tokens=3, slots=2) as served:
        talk: list[Any] = [SAID]
        for turn in range(2):
            asked = {"messages": talk, "temperature": 0, "max_tokens": 24}
            told = httpx.post(f"{served.url}/chat/completions", json=asked, timeout=60).json()
            answer = told["choices"][0]["message"]["content"]
            ids = served.model.chat.tokens(talk, {})
            text, _, _ = served.offline(
                ids, temperature=0, max_tokens=24, stop_tokens=served.model.chat.stops
            )
            assert answer == text
            cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
            talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "ok"}]
            if turn:
                assert cached > 40 or served.engine.prefix_lost
        assert sum(served.engine.counters.drafted) > 0


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    """Oracle: PEFT's own layers beside the weights."""
    peft = pytest.importorskip("peft", reason="the extra finetune is not installed")
    from llmnorm.config.generation import GenerationSettings

    directory = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(str(tmp_path / "lora"))
    ids = torch.tensor([[1, 20, 30, 40]])
    found = []
    for merge in (False, True):
        target = load_target(
            directory, GenerationSettings(), adapter=tmp_path / "lora", merge=merge
        )
        names = [name for name, _ in target.model.named_modules() if "lora" in name]
        assert bool(names) != merge
        with torch.no_grad():
            found.append(target.model(ids).logits)
    assert torch.allclose(found[0], found[1], atol=1e-10)
    plain = load_target(directory, GenerationSettings())
    with torch.no_grad():
        assert not torch.allclose(plain.model(ids).logits, found[1], atol=1e-2)


def test_steps_are_captured_before_the_first_request(tmp_path: Path) -> None:
    """Oracle: the graphs for one row and for several; nothing of it is counted."""
    served = Served(save_model(tmp_path / "model"))
    assert {alone for _, alone in served.engine._step._graphs} == {True, False}  # type: ignore[attr-defined]
    assert served.engine.counters == Counters() and served.engine.idle
    served.bound.close()
