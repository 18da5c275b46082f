"""Adapters beside transformers' classes: where PEFT puts them, and what it computes with them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmnorm.config.adapter import DoraSettings, LoraSettings, LowRankSettings
from llmnorm.models.adapters import (
    WEIGHTS,
    Factors,
    factor_names,
    is_adapter,
    loaded_name,
    merged,
    peft_name,
    set_first_values,
    write_config,
)
from llmnorm.models.foreign import empty_foreign, skeleton
from llmnorm.models.foreign_adapters import foreign_targets, inject_in_blocks
from llmnorm.part import InputError
from tests.families import FAMILIES, VOCABULARY, class_of, configuration, tiny

peft = pytest.importorskip("peft", reason="needs the extra finetune")

# Of linear layers in blocks: those that PEFT takes for experts, or refuses in a class with a state.
LEFT_OUT = {
    "qwen3_next": {"gate_proj", "up_proj", "down_proj"},
    "falcon_h1": {"out_proj"},
    "mamba2": {"out_proj"},
}


def ids() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 20), generator=draw)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids(), use_cache=False).logits
    return found


def adapted(plain: PreTrainedModel, settings: LowRankSettings) -> tuple[PreTrainedModel, list[str]]:
    """A copy of a model with adapters that change what it computes, and the layers with one."""
    config, kind = plain.config, type(plain)
    blocks = [*empty_foreign(kind, config).units()]
    targets = foreign_targets(skeleton(kind, config), settings, blocks)
    model = skeleton(kind, config)
    inject_in_blocks(model, settings, targets.names, blocks)
    state, draw = plain.state_dict(), torch.Generator().manual_seed(2)
    for name, parameter in [*model.named_parameters()]:
        owner, _, last = name.rpartition(".")
        value = torch.empty(parameter.shape)
        if is_adapter(name):
            value.normal_(std=0.2, generator=draw)
        else:
            value.copy_(state[loaded_name(name)])
        weight = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), last, weight)
    model.tie_weights()
    return model, targets.names


def written(model: PreTrainedModel, settings: LowRankSettings, directory: Path) -> Path:
    """The adapter of a model in PEFT's files."""
    directory.mkdir()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    plain = skeleton(type(model), model.config)
    write_config(directory, settings, model=plain, trained=trained, base="BASE")
    save_file({peft_name(n): t for n, t in trained.items()}, directory / WEIGHTS)
    return directory


LORA, DORA = LoraSettings(rank=3), DoraSettings(rank=3)
CASES = [(family, LORA) for family in FAMILIES]
CASES += [(family, DORA) for family in ("gpt2", "phi3", "qwen3_next")]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_an_adapter_computes_the_same_in_plain_peft(
    family: str, settings: LowRankSettings, tmp_path: Path
) -> None:
    """Oracles: the model's own logits, and PEFT's merged weights; to 1e-5 of the largest."""
    base = tiny(family)
    model, names = adapted(base, settings)
    linear = {n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    left = {n.rpartition(".")[2] for n in linear - set(names) - {"lm_head"}}
    assert left == LEFT_OUT.get(family, set())
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    directory = written(model, settings, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as for keys that are not found
        loaded = peft.PeftModel.from_pretrained(tiny(family), directory)
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=bound)
    theirs = loaded.merge_and_unload().state_dict()
    parameters = dict(model.named_parameters())
    for name in names:
        weight = parameters[f"{name}.base_layer.weight"]
        factors = Factors(*(parameters.get(n) for n in factor_names(f"{name}.weight")))  # type: ignore[arg-type]
        turned = isinstance(base.get_submodule(name), Conv1D)
        own = merged(weight, factors, settings.scale, turned=turned)
        torch.testing.assert_close(own, theirs[f"{name}.weight"], rtol=1e-5, atol=1e-6)


def test_first_values_change_nothing_in_transposed_layers() -> None:
    """Oracle: GPT-2's own logits; DoRA's m is the norm over the inputs, which come first there."""
    base = tiny("gpt2")
    model, _ = adapted(base, DoraSettings(rank=2))
    set_first_values(dict(model.named_modules()), seed=3)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-5 * 20)


def test_a_linear_layer_that_computes_something_else_gets_none() -> None:
    """Oracle: a class whose forward pass is no product, and one that writes the product out."""

    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).tanh()

    class Written(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T

    config = configuration("llama")
    kind = class_of(config)
    model = skeleton(kind, config)
    model.get_submodule("model.layers.1.mlp.down_proj").__class__ = Grouped
    model.get_submodule("model.layers.0.mlp.up_proj").__class__ = Written
    blocks = [*empty_foreign(kind, config).units()]
    found = foreign_targets(model, LORA, blocks)
    assert found.left_out == ["model.layers.1.mlp.down_proj"] and len(found.names) == 13
    alone = LoraSettings(targets=["down_proj"])
    assert foreign_targets(model, alone, blocks).names == ["model.layers.0.mlp.down_proj"]


def test_what_is_left_out_is_counted_and_named() -> None:
    """Oracle: the shared expert's three layers in each of the four blocks."""
    config = configuration("qwen3_next")
    kind = class_of(config)
    blocks = [*empty_foreign(kind, config).units()]
    found = foreign_targets(skeleton(kind, config), LoraSettings(), blocks).describe()
    assert "12 of 30 linear layers get none" in found
    assert found.endswith("4 gate_proj, 4 up_proj, 4 down_proj")


@pytest.mark.parametrize(
    ("family", "targets", "why"),
    [
        ("llama", ["q_proj", "qproj"], "'qproj' is no linear layer of LlamaForCausalLM; did you"),
        ("llama", ["lm_head"], "'lm_head' is outside of the blocks of LlamaForCausalLM"),
        (
            "mamba2",
            ["out_proj"],
            "no adapter around backbone.layers.0.mixer.out_proj.*incompatible",
        ),
        ("qwen3_next", ["up_proj"], "PEFT puts no adapter around model.layers.0.mlp.shared_expert"),
    ],
)
def test_targets_that_cannot_have_one_are_refused(
    family: str, targets: list[str], why: str
) -> None:
    """Oracle: one line that begins with the setting."""
    config = configuration(family)
    kind = class_of(config)
    blocks = [*empty_foreign(kind, config).units()]
    with pytest.raises(InputError, match=why) as told:
        foreign_targets(skeleton(kind, config), LoraSettings(targets=targets), blocks)
    assert str(told.value).startswith("adapter.targets: ") and "\n" not in str(told.value)
