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
from llmnorm.models.convert import named_weights
from llmnorm.models.expert_adapters import merged_stack, stack_layers
from llmnorm.models.flops import flops_per_token
from llmnorm.models.foreign import empty_foreign, skeleton
from llmnorm.models.foreign_adapters import Targets, foreign_targets, inject_in_blocks
from llmnorm.models.frozen import freeze, narrow
from llmnorm.parallel.shards import fill_and_shard
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


def adapted(plain: PreTrainedModel, settings: LowRankSettings) -> tuple[PreTrainedModel, Targets]:
    """A copy of a model with adapters that change what it computes, and what has one."""
    config, kind = plain.config, type(plain)
    blocks = [*empty_foreign(kind, config).units()]
    targets = foreign_targets(skeleton(kind, config), settings, blocks)
    model = skeleton(kind, config)
    inject_in_blocks(model, settings, targets.names, blocks, targets.stacks)
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
    return model, targets


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
    model, (names, _, _) = adapted(base, settings)
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


# The stacks of gpt-oss are transposed; in the last case an outer layer alone is there.
EXPERTS: dict[str, tuple[str, LowRankSettings]] = {
    "qwen3_moe": ("qwen3_moe", LoraSettings(rank=3, parameters=["gate_up_proj", "down_proj"])),
    "mixtral": ("mixtral", LoraSettings(rank=3, rslora=True, parameters=["experts.gate_up_proj"])),
    "gpt_oss": ("gpt_oss", LoraSettings(rank=3, parameters=["down_proj", "gate_up_proj"])),
    "stacks alone": (
        "gpt_oss",
        LoraSettings(rank=3, targets="none", parameters=["layers.1.mlp.experts.down_proj"]),
    ),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_adapters_of_experts_compute_the_same_in_plain_peft(case: str, tmp_path: Path) -> None:
    """Oracles: PEFT's logits, gradients and merged weights, to 1e-5; the number of the stacks."""
    family, settings = EXPERTS[case]
    base = tiny(family)
    model, targets = adapted(base, settings)
    layers = base.config.num_hidden_layers
    counts = {"mixtral": layers, "stacks alone": 1}
    assert len(targets.stacks) == counts.get(case, 2 * layers)
    assert bool(targets.names) == (case != "stacks alone")
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    directory = written(model, settings, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(tiny(family), directory, is_trainable=True)
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=bound)
    gradients = []
    for each in (model, loaded):
        loss = each(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        found = {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        gradients.append({n.removeprefix("base_model.model."): g for n, g in found.items()})
    own, theirs = gradients
    assert own.keys() == theirs.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)
    state = loaded.merge_and_unload().state_dict()
    parameters = dict(model.named_parameters())
    for name, layer, turned in targets.stacks:
        weight = base.get_parameter(name)
        a, b = (parameters[f"{layer}.lora_{kind}.default.weight"] for kind in "AB")
        merged = merged_stack(weight.detach(), a, b, settings.scale, turned=turned)
        torch.testing.assert_close(merged, state[name], rtol=1e-5, atol=1e-6)
        assert (merged - weight).abs().amax((1, 2)).min() > 0.1  # of every expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_around_a_stack_is_that_of_peft(dtype: torch.dtype) -> None:
    """Oracle: PEFT's own pass, to the bit; stacks in bfloat16 under autocast as a run has them."""
    config, kind = configuration("qwen3_moe"), class_of(configuration("qwen3_moe"))
    model, settings = empty_foreign(kind, config), EXPERTS["qwen3_moe"][1]
    blocks = [*model.units()]
    targets = foreign_targets(skeleton(kind, config), settings, blocks)
    inject_in_blocks(model, settings, targets.names, blocks, targets.stacks)
    freeze(model, norms=False, new_head=False)
    if dtype == torch.bfloat16:
        narrow(model)
    draw = torch.Generator().manual_seed(2)

    def fill(modules: Any) -> None:
        for tensor in named_weights(modules).values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)

    fill_and_shard(model, fill, torch.device("cpu"), None)
    layers = stack_layers(model)
    assert len(layers) == 4 and {layer.get_param().dtype for layer in layers} == {dtype}
    found = []
    for own in (True, False):
        if not own:
            for layer in layers:
                del layer.forward
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() and g.any() for g in grads)
        found.append([loss.detach(), *grads])
    assert all(ours.equal(theirs) for ours, theirs in zip(*found, strict=True))
    assert not any("down_proj" in vars(layer.get_base_layer()) for layer in layers)


def test_a_stack_with_an_adapter_counts_as_if_it_were_trained() -> None:
    """Oracle: by hand, two of four experts a token; the adapter is not multiplied with tokens."""
    config = configuration("qwen3_moe")
    found = []
    for parameters in (None, ["down_proj"]):
        model = empty_foreign(class_of(config), config)
        settings, blocks = LoraSettings(rank=3, parameters=parameters), [*model.units()]
        targets = foreign_targets(skeleton(model.kind, config), settings, blocks)
        inject_in_blocks(model, settings, targets.names, blocks, targets.stacks)
        found.append(flops_per_token(model, 16))
    assert found[1] - found[0] == (6 - 4) * 2 * (2 * 24 * 32)


def test_first_values_change_nothing_beside_experts() -> None:
    """Oracle: the base's own logits, to the bit: B is 0."""
    base = tiny("qwen3_moe")
    model, _ = adapted(base, EXPERTS["qwen3_moe"][1])
    set_first_values(dict(model.named_modules()), seed=3)
    a = model.get_parameter("model.layers.0.mlp.experts.base_layer.lora_A.default.weight")
    assert a.shape == (4 * 3, 32) and a.abs().amax(1).min() > 0.5 * 32**-0.5
    assert logits(model).equal(logits(base))


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


@pytest.mark.parametrize(
    ("family", "parameters", "why"),
    [
        ("llama", ["gate_up_proj"], "LlamaForCausalLM has no stacks of experts; leave it out"),
        (
            "qwen3_moe",
            ["down_proj", "gate_up"],
            "'gate_up' is no stack of experts of Qwen3MoeForCausalLM; did you mean 'gate_up_proj'",
        ),
        ("gpt_oss", ["gate_up_proj_bias"], "'gate_up_proj_bias' is no stack of experts"),
        ("qwen3_moe", ["expert.down_proj"], "did you mean 'experts.down_proj'"),
    ],
)
def test_parameters_that_are_no_stacks_are_refused(
    family: str, parameters: list[str], why: str
) -> None:
    """Oracle: one line that begins with the setting and has the near name."""
    config = configuration(family)
    kind = class_of(config)
    blocks = [*empty_foreign(kind, config).units()]
    with pytest.raises(InputError, match=why) as told:
        foreign_targets(skeleton(kind, config), LoraSettings(parameters=parameters), blocks)
    assert str(told.value).startswith("adapter.parameters: ") and "\n" not in str(told.value)
