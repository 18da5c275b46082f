"""`llmnorm convert` on directories, and depth scaling in and out of a stock Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmnorm.exchange.convert import convert_directory
from llmnorm.exchange.export import export
from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from tests.running import SMOKE, llmnorm

IDS = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lns(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A depth-scaled run of 20 steps."""
    run = tmp_path_factory.mktemp("lns") / "run"
    words = ["model.depth_scaling=lns", "model.num_hidden_layers=3", "training.steps=20"]
    llmnorm("train", SMOKE, *words, f"run_dir={run}", f"data.dir={smoke_data}")
    return run


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def test_a_trained_depth_scaled_model_is_a_stock_llama(lns: Path, tmp_path: Path) -> None:
    """Oracle: LlamaForCausalLM: logits 1e-5, the same 64 greedy tokens; the way back to 1e-6."""
    llmnorm("export", lns, tmp_path / "llama", "--stock")
    ours = load_model(lns)[0]
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(llama) is transformers.LlamaForCausalLM
    torch.testing.assert_close(logits(llama), logits(ours), rtol=0, atol=1e-5)
    unscaled = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    for layer, block in enumerate(unscaled.model.layers):
        block.input_layernorm.weight.data.mul_((layer + 1) ** 0.5)
    assert (logits(unscaled) - logits(ours)).abs().max() > 1e-3  # the test can fail
    texts = []
    for model in (ours, llama):
        keys = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        texts.append(model.generate(IDS[:, :5], **keys))
    assert texts[0].shape == (2, 69) and torch.equal(*texts)
    convert_directory(tmp_path / "llama", tmp_path / "back", target="lns")
    back = load_model(tmp_path / "back")[0]
    assert back.config.depth_scaling == "lns"
    for (name, one), other in zip(back.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, msg=name)
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_a_run_goes_through_every_norm(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the run's own logits, 1e-5 in float32, whatever directory they come from."""
    run = tmp_path / "run"
    words = ["model.norm={name: layer, bias: false}", "training.steps=4"]
    words.append("model.tie_word_embeddings=false")
    llmnorm("train", SMOKE, *words, f"run_dir={run}", f"data.dir={smoke_data}")
    expected = logits(load_model(run)[0])
    there = run
    for number, target in enumerate(("rms", "crms", "layer", "crms", "rms")):
        llmnorm("convert", there, tmp_path / str(number), "--to", target)
        there = tmp_path / str(number)
        model = load_model(there)[0]
        assert model.config.norm["name"] == target
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    card = (there / "README.md").read_text()
    assert "`llmnorm convert --to rms`" in card
    llmnorm("export", there, tmp_path / "llama", "--stock")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    torch.testing.assert_close(logits(llama), expected, rtol=0, atol=1e-5)


def test_a_unified_run_folds(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the run's logits; the statistics come from its checkpoint."""
    run = tmp_path / "run"
    words = ["model.norm={name: unified, allow_leak: true, warmup: 3}", "training.steps=8"]
    llmnorm("train", SMOKE, *words, f"run_dir={run}", f"data.dir={smoke_data}")
    llmnorm("convert", run, tmp_path / "folded", "--to", "identity", "--untie")
    model, folded = load_model(run)[0], load_model(tmp_path / "folded")[0]
    assert model.model.norm.steps == 8
    torch.testing.assert_close(logits(folded), logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_stays_gpt2(tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: GPT2LMHeadModel before and after; other targets and a tied head are refused."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="--to rms: .* learned positions no llmnorm model has"):
        convert_directory(tmp_path / "gpt2", tmp_path / "out", target="rms", untie=True)
    with pytest.raises(InputError, match="--to centred: the tied head .*--untie"):
        convert_directory(tmp_path / "gpt2", tmp_path / "out", target="centred")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]
    llmnorm("convert", tmp_path / "gpt2", tmp_path / "out", "--to", "centred", "--untie")
    centred = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(centred) is GPT2LMHeadModel and centred.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits(centred), logits(model), rtol=0, atol=tolerance)
    means = [
        centred.transformer.wte.weight.float().mean(-1),
        *(block.mlp.c_proj.weight.float().mean(-1) for block in centred.transformer.h),
    ]
    assert max(m.abs().max() for m in means) < (1e-7 if dtype == torch.float32 else 1e-3)


def test_what_cannot_be_converted_leaves_nothing(lns: Path, tmp_path: Path) -> None:
    """Oracle: the reason, the exit code's error class, an empty directory."""
    with pytest.raises(InputError, match="--to crms: .* gives the residual stream a mean"):
        convert_directory(lns, tmp_path / "out", target="crms")
    with pytest.raises(InputError, match="neither config.yaml"):
        convert_directory(tmp_path, tmp_path / "out", target="rms")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="is not empty"):
        convert_directory(lns, tmp_path / "full", target="unscaled")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_model_without_gains_has_no_llama(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the key that no stock architecture has."""
    run = tmp_path / "run"
    words = ["model.placement=peri", "training.steps=2"]
    llmnorm("train", SMOKE, *words, f"run_dir={run}", f"data.dir={smoke_data}")
    with pytest.raises(InputError, match="--stock: model.placement: no stock architecture has"):
        export(run, tmp_path / "out", stock=True)
    export(run, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["placement"] == {"name": "peri"}
