"""A run beside weights in NF4: what is read, merged and exported is what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmnorm.config.file import load
from llmnorm.exchange.loading import load_model, open_source
from llmnorm.models import nf4
from llmnorm.models.adapters import is_adapter, loaded_name
from llmnorm.models.building import empty_model
from llmnorm.models.convert import named_weights
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.training.model import choose_trained
from tests.running import SMOKE, llmnorm, metrics_of, state_of

peft = pytest.importorskip("peft", reason="needs the extra finetune")
pytest.importorskip("bitsandbytes", reason="needs the extra quant")
STEPS = 6
WORDS = ["training.device=cpu", f"training.steps={STEPS}", "schedule=constant"]
WORDS += ["optimizer.lr=1e-2", "evaluation.every=3", "evaluation.samples=0", "model.quantize=nf4"]


@pytest.fixture(scope="module")
def base(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run's model in bfloat16, as most models are published."""
    base = tmp_path_factory.mktemp("narrow") / "base"
    shutil.copytree(exported, base)
    weights = {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return base


@pytest.fixture(scope="module", params=["lora", "dora"])
def tuned(
    request: pytest.FixtureRequest,
    base: Path,
    smoke_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run with an adapter, which LoRA has on two layers a block."""
    path = tmp_path_factory.mktemp("tuned") / request.param
    places = [f"run_dir={path}", f"data.dir={smoke_data}", f"model.pretrained={base}"]
    words = [f"adapter={request.param}"]
    words += ["adapter.targets=[q_proj, down_proj]"] if request.param == "lora" else []
    llmnorm("train", SMOKE, *places, *WORDS, *words)
    return path


def as_trained(path: Path, base: Path) -> LlmNormForCausalLM:
    """The model that the loop has trained: PEFT's layers around layers in NF4."""
    source = open_source(base)
    model = empty_model(source.config, device="meta")
    choose_trained(load(path).config, model, new_head=False)
    model.to_empty(device="cpu")
    model.tie_weights()
    named = named_weights(model)
    source.read_into({loaded_name(n): t for n, t in named.items() if not is_adapter(n)})
    nf4.fill(
        dict(model.named_modules()),
        lambda into: source.read_into({loaded_name(n): t for n, t in into.items()}),
    )
    state = state_of(path, STEPS)
    with torch.no_grad():
        for name, tensor in named.items():
            if is_adapter(name):
                tensor.copy_(state[f"model.{name}"])
    return model.eval()


def ids() -> Tensor:
    return torch.randint(0, 512, (3, 41), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(ids()).logits.double()


def divergence(model: Any, expected: Tensor) -> float:
    """The mean over tokens of KL(expected, model), in nats."""
    p, q = expected.log_softmax(-1), logits(model).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_reader_has_the_trained_function(tuned: Path, base: Path) -> None:
    """Oracle: PEFT's layers around layers in NF4, as the loop has them; its last validation."""
    expected = logits(as_trained(tuned, base))
    torch.testing.assert_close(logits(load_model(tuned)[0]), expected, rtol=0, atol=1e-5)
    llmnorm("eval", tuned)
    (file,) = (tuned / "eval").glob("*.json")
    found = json.loads(file.read_text())["validation"]["loss"]
    last = [line["validation"] for line in metrics_of(tuned) if "validation" in line][-1]
    assert found == pytest.approx(last["loss"], rel=1e-5)


def test_a_merge_is_into_the_weights_that_were_trained_beside(
    tuned: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: PEFT's merge into the base's own weights, in float32, diverges 10 times as much."""
    expected = logits(as_trained(tuned, base))
    llmnorm("export", tuned, tmp_path / "merged", "--merge")
    capsys.readouterr()
    llmnorm("export", tuned, tmp_path / "adapter")
    assert "trained beside weights in NF4" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16  # the base's
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload()
    gap = divergence(other, expected)
    assert gap > 1e-3
    assert 0 <= divergence(merged.float(), expected) < gap / 10
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    untouched = "model.layers.1.mlp.up_proj.weight"  # by LoRA here: rounded to NF4, and to bf16
    if tuned.name == "lora":
        before = load_file(base / "model.safetensors")[untouched]
        assert weights[untouched].equal(nf4.rounded(before.float()).bfloat16())
        assert not weights[untouched].equal(before)
    said = "were stored in NF4 (4 bits, double quantisation)"
    cards = [(tmp_path / name / "README.md").read_text() for name in ("merged", "adapter")]
    assert all(said in card for card in cards)
    assert "They are what was merged here." in cards[0]
    assert "quantization_config=config" in cards[1] and "quantization_config" not in cards[0]


def test_the_adapter_has_the_trained_function_on_a_base_in_nf4(
    smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the code of the card, run with PEFT and transformers on a stock Qwen3."""
    stock, path, out = (tmp_path / name for name in ("stock", "run", "adapter"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    positions = {"max_position_embeddings": 256}
    config = Qwen3Config(
        num_hidden_layers=2, tie_word_embeddings=True, **sizes, **heads, **positions
    )
    Qwen3ForCausalLM(config).save_pretrained(stock)
    places = [f"run_dir={path}", f"data.dir={smoke_data}", f"model.pretrained={stock}"]
    llmnorm("train", SMOKE, *places, *WORDS, "adapter=lora", "model.intermediate_size=192")
    llmnorm("export", path, out)
    code = (out / "README.md").read_text().partition("```python")[2].partition("```")[0]
    code = code.replace("(BASE", f"({str(stock)!r}, dtype='float32'").replace("DIRECTORY", "OUT")
    names: dict[str, Any] = {"OUT": str(out)}
    exec(code, names)
    # In evaluation mode bitsandbytes multiplies in bf16 on some CPUs.
    found = names["model"].train()(ids()).logits.detach().double()
    torch.testing.assert_close(found, logits(load_model(path)[0]), rtol=0, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    other = logits(peft.PeftModel.from_pretrained(plain, out))
    assert (found - other).abs().max() > 1e-2
