"""A run beside weights in NF4: what is read, merged and exported is what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmnorm.config.file import load
from llmnorm.exchange.loading import load_model, open_source
from llmnorm.models import nf4
from llmnorm.models.adapters import is_adapter, loaded_name
from llmnorm.models.convert import named_weights
from llmnorm.models.modeling import LlmNormForCausalLM, empty_model
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
    """A run with an adapter, of which the MLP's layers have none under LoRA."""
    path = tmp_path_factory.mktemp("tuned") / request.param
    places = [f"run_dir={path}", f"data.dir={smoke_data}", f"model.pretrained={base}"]
    words = [f"adapter={request.param}"]
    words += ["adapter.targets=[q_proj, o_proj, down_proj]"] if request.param == "lora" else []
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


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 512, (3, 41), generator=torch.Generator().manual_seed(1))
    return model.eval()(ids).logits.double()


def divergence(model: Any, expected: Tensor) -> float:
    """The mean over tokens of KL(expected, model), in nats."""
    p, q = expected.log_softmax(-1), logits(model).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_try(tuned, base):
    expected = logits(as_trained(tuned, base))
    print(tuned.name, divergence(load_model(tuned)[0], expected), (logits(load_model(tuned)[0])-expected).abs().max())
    llmnorm("export", tuned, tuned.parent / "m", "--merge")
    print("merged bf16", divergence(AutoModelForCausalLM.from_pretrained(tuned.parent / "m", dtype=torch.float32), expected))
    llmnorm("export", tuned, tuned.parent / "a")
    m = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tuned.parent / "a")
    print("unquantised", divergence(m.merge_and_unload(), expected))
    print(metrics_of(tuned)[-1])
    assert 0
