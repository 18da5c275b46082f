"""Adapters in a model: PEFT's own arithmetic and files, the base at step 0, frozen weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmnorm.config.adapter import LoraSettings, LowRankSettings
from llmnorm.models import adapters
from llmnorm.models.adapters import (
    Factors,
    PeftFiles,
    factor_names,
    inject,
    is_adapter,
    loaded_name,
    merged,
    peft_name,
    set_first_values,
    write_config,
)
from llmnorm.models.building import build_model, class_of, empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import named_weights
from llmnorm.models.flops import flops_per_token
from llmnorm.models.frozen import freeze, narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.mixers.contract import Mixer
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.part import InputError
from tests.models.adapter_kinds import ADAPTERS
from tests.models.test_generation import MIXERS

peft = pytest.importorskip("peft", reason="needs the extra finetune")

every_adapter = pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
BOTH = [ADAPTERS["lora"], ADAPTERS["dora"]]
ENCODERS: dict[str, Any] = {
    "hydra": {"name": "hydra", "head_dim": 8, "state_size": 3},
    "matrix": {"name": "matrix", "head_dim": 8, "family": {"name": "attention", "qk_dim": 3}},
}


def config(**keys: Any) -> LlmNormConfig:
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return LlmNormConfig(**(sizes | heads | keys))


def injected(
    settings: LowRankSettings, base: LlmNormForCausalLM, seed: int = 1
) -> LlmNormForCausalLM:
    """A model with an adapter that has its first values, beside the weights of `base`."""
    model = empty_model(base.config, device="meta", dtype=base.dtype)
    inject(model, settings)
    freeze(model, norms=False, new_head=False)
    allocate(model, base)
    set_first_values(dict(model.named_modules()), seed=seed)
    return model


def allocate(model: LlmNormForCausalLM, base: LlmNormForCausalLM) -> None:
    model.to_empty(device="cpu")
    model.tie_weights()
    weights = named_weights(base)
    with torch.no_grad():
        for name, tensor in named_weights(model).items():
            if not is_adapter(name):
                tensor.copy_(weights[loaded_name(name)])


@torch.no_grad()
def moved(model: LlmNormForCausalLM) -> LlmNormForCausalLM:
    """The model as if it had been trained: B is no longer 0, and m no longer the norms."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).mul_(0.1))
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mixer", [*MIXERS.values(), *ENCODERS.values()], ids=[*MIXERS, *ENCODERS])
@pytest.mark.parametrize("settings", BOTH, ids=["lora", "dora"])
def test_every_mixer_begins_as_the_base_and_trains_every_projection(
    settings: LowRankSettings, mixer: Any
) -> None:
    """Oracle: the logits of the base, to the bit; all linear layers of the blocks."""
    keys: dict[str, Any] = {"mixer": mixer}
    if mixer in ENCODERS.values():
        keys["architectures"] = ["LlmNormForMaskedLM"]
    elif isinstance(mixer, list):
        keys["num_hidden_layers"] = len(mixer)
    base = build_model(config(**keys), seed=0)
    model = injected(settings, base)
    assert model(ids()).logits.equal(base(ids()).logits)
    blocks = [n for n, m in base.model.layers.named_modules() if isinstance(m, nn.Linear)]
    found = {n.partition(".lora_B")[0] for n in trained(model) if ".lora_B." in n}
    assert found == {f"model.layers.{name}" for name in blocks}
    assert any(isinstance(m, Mixer) for m in model.modules())
    model(ids(), labels=ids()).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        elif not is_adapter(name):
            assert parameter.grad is None, name


def test_first_values_depend_on_seed_and_name_alone() -> None:
    """Oracle: the bound 1 / sqrt(in) of PEFT's A; another seed; blocks filled one by one."""
    base = build_model(config(), seed=0)
    one, same, other = (injected(ADAPTERS["dora"], base, seed) for seed in (1, 1, 2))
    by_block = empty_model(base.config, device="meta")
    inject(by_block, ADAPTERS["dora"])
    allocate(by_block, base)
    for number in (1, 0):
        name = f"model.layers.{number}"
        set_first_values({n: m for n, m in by_block.named_modules() if n.startswith(name)}, seed=1)
    values = [dict(m.named_parameters()) for m in (one, same, by_block, other)]
    drawn: set[float] = set()
    for name in trained(one):
        first, again, block, another = (v[name] for v in values)
        assert first.equal(again) and first.equal(block)
        if ".lora_A." in name:
            bound = first.shape[1] ** -0.5
            assert bound * 0.8 < first.abs().max() <= bound and not first.equal(another)
            drawn.add(float(first.detach()[0, 0]))
        elif ".lora_B." in name:
            assert not first.any()
    assert len(drawn) == sum(".lora_A." in name for name in trained(one))


@every_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_merged_weights_are_pefts(settings: LowRankSettings, dtype: torch.dtype) -> None:
    """Oracle: `merge` of PEFT's layers, to the bit; the logits of the layers unmerged."""
    base = build_model(config(), seed=0).to(dtype)
    model = moved(injected(settings, base))
    logits = model(ids()).logits
    weights = named_weights(model)
    ours = {
        name: merged(tensor, Factors(*(weights.get(n) for n in names)), settings.scale)
        for name, tensor in named_weights(base).items()
        if (names := factor_names(name))[0] in weights
    }
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert ours.keys() == {f"{name}.weight" for name in layers}
    plain = empty_model(base.config, device="cpu", dtype=dtype)
    for name, tensor in named_weights(plain).items():
        tensor.copy_(ours.get(name, named_weights(base)[name]))
    assert (logits - plain(ids()).logits).abs().max() < (1e-12 if dtype.itemsize == 8 else 1e-5)
    for name, layer in layers.items():
        layer.merge()
        assert layer.base_layer.weight.equal(ours[f"{name}.weight"]), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_trained_is_wide_whatever_the_base(stored: torch.dtype) -> None:
    """Oracle: PEFT's layers take the base's dtype; float32 is what optimizers change."""
    model = empty_model(config(), device="meta", dtype=stored)
    inject(model, ADAPTERS["dora"])
    wide = torch.float64 if stored == torch.float64 else torch.float32
    assert {p.dtype for n, p in model.named_parameters() if is_adapter(n)} == {wide}


# Targets


@pytest.mark.parametrize(
    ("targets", "keys", "message"),
    [
        (["q_prj"], {}, "no linear layer 'q_prj'; did you mean 'q_proj'"),
        (["norm"], {}, "no linear layer 'norm'"),
        (["lm_head"], {"tie_word_embeddings": True}, "'lm_head' is the embedding"),
    ],
)
def test_a_target_that_cannot_be_is_named(targets: list[str], keys: Any, message: str) -> None:
    """Oracle: the names of the model's layers."""
    model = empty_model(config(**keys), device="meta")
    with pytest.raises(InputError, match=message):
        inject(model, LoraSettings(targets=targets))


def test_targets_are_last_names_or_more() -> None:
    """Oracle: the names by hand; a head that is not tied may be one."""
    model = empty_model(config(), device="meta")
    names = adapters.target_modules(model, ["layers.1.mlp.up_proj", "k_proj", "lm_head"])
    attention = [f"model.layers.{n}.self_attn.k_proj" for n in (0, 1)]
    assert names == ["model.layers.1.mlp.up_proj", *attention, "lm_head"]


# PEFT's files


def written(model: LlmNormForCausalLM, settings: LowRankSettings, directory: Path) -> Path:
    """PEFT's directory of a model with an adapter, as `llmnorm export` makes it."""
    directory.mkdir()
    plain = empty_model(model.config, device="meta")
    tensors = trained(model)
    write_config(directory, settings, model=plain, trained=tensors, base="somewhere")
    save_file({peft_name(n): t for n, t in tensors.items()}, directory / adapters.WEIGHTS)
    return directory


@every_adapter
def test_pefts_files_are_read_by_plain_peft(settings: LowRankSettings, tmp_path: Path) -> None:
    """Oracle: PeftModel on the base gives the logits; the file that PEFT itself writes."""
    base = build_model(config(), seed=0).eval()
    model = moved(injected(settings, base)).eval()
    directory = written(model, settings, tmp_path / "ours")
    expected = model(ids()).logits
    assert (expected - base(ids()).logits).abs().max() > 1e-3
    loaded = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    assert loaded(ids()).logits.equal(expected)
    loaded.save_pretrained(str(tmp_path / "theirs"))
    theirs = PeftFiles(tmp_path / "theirs")
    theirs.check(model, settings)
    back = {name: torch.zeros_like(tensor) for name, tensor in trained(model).items()}
    theirs.read_into(back)
    assert all(back[name].equal(tensor) for name, tensor in trained(model).items())


def test_what_trains_beside_an_adapter_is_in_pefts_files_too(tmp_path: Path) -> None:
    """Oracle: PeftModel on the base gives the logits of a model whose norms and head moved."""
    keys = {"architectures": ["LlmNormForSequenceClassification"], "num_labels": 3}
    base = build_model(config(**keys, pad_token_id=0), seed=0).eval()
    model = empty_model(base.config, device="meta")
    inject(model, ADAPTERS["lora"])
    freeze(model, norms=True, new_head=True)
    allocate(model, base)
    set_first_values(dict(model.named_modules()), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter).mul_(0.1))
    directory = written(model, ADAPTERS["lora"], tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    assert loaded(ids()).logits.equal(model.eval()(ids()).logits)


def _changed(key: str, value: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / adapters.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("change", "settings", "keys", "message"),
    [
        (None, {"rank": 8}, {}, r"other settings; add adapter.rank=4"),
        (None, {"alpha": 16, "rslora": True}, {}, r"adapter.alpha=8 adapter.rslora=false"),
        (_changed("use_dora", True), {}, {}, r"other settings; add adapter.name=dora"),
        (_changed("peft_type", "IA3"), {}, {}, "PEFT's type IA3"),
        (_changed("rank_pattern", {"q_proj": 2}), {}, {}, "rank_pattern"),
        (_changed("bias", "all"), {}, {}, "bias is 'all'"),
        (None, {}, {"hidden_size": 32}, r"another base: '.*' has shape \(4, 24\) there"),
        (None, {}, {"num_hidden_layers": 3}, "another base or other targets"),
        (None, {"targets": ["q_proj"]}, {}, "which this run does not train; its layers are down"),
        (lambda d: (d / adapters.WEIGHTS).unlink(), {}, {}, "adapter_model.safetensors"),
        (lambda d: (d / adapters.WEIGHTS).write_bytes(b"no"), {}, {}, "cannot be read"),
        (lambda d: (d / adapters.CONFIG).unlink(), {}, {}, "adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, change: Any, settings: dict[str, Any], keys: Any, message: str
) -> None:
    """Oracle: one thing changed in the directory, the settings or the base."""
    base = build_model(config(), seed=0)
    directory = written(injected(ADAPTERS["lora"], base), ADAPTERS["lora"], tmp_path / "d")
    if change is not None:
        change(directory)
    other = LoraSettings(**({"rank": 4, "alpha": 8} | settings))
    model = empty_model(config(**keys), device="meta")
    inject(model, other)
    with pytest.raises(InputError, match=message):
        PeftFiles(directory).check(model, other)


# Frozen weights


def steps(model: LlmNormForCausalLM, count: int = 10) -> dict[str, Tensor]:
    """What is trained after steps of AdamW under autocast."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(count):
        rows = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(rows, labels=rows, loss_only=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


@pytest.mark.parametrize("settings", BOTH, ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_frozen_weights_in_bf16_change_no_bit(settings: LowRankSettings, tied: bool) -> None:
    """Oracle: 10 steps with the same weights in float32; a stream in bf16, which is another run."""
    qkv = {"name": "softmax", "attention_bias": True, "qk_norm": True}
    base = build_model(config(tie_word_embeddings=tied, mixer=qkv), seed=0)
    with torch.no_grad():
        for name, parameter in base.named_parameters():  # as a file in bf16 has them
            draws = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
            parameter.add_(draws.mul_(0.05 if name.endswith(("bias", "norm.weight")) else 0))
            parameter.copy_(parameter.bfloat16())
    wide = injected(settings, base)
    stored = empty_model(base.config, device="meta")
    inject(stored, settings)
    freeze(stored, norms=False, new_head=False)
    narrow(stored)
    allocate(stored, base)
    set_first_values(dict(stored.named_modules()), seed=1)
    kinds = {n.rpartition(".")[2]: p.dtype for n, p in stored.named_parameters() if "layers.0" in n}
    assert kinds["bias"] == torch.float32
    matrices = {n for n, p in stored.named_parameters() if p.dtype == torch.bfloat16}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.base_layer.weight"} < matrices
    assert not any("norm" in name for name in matrices)
    assert (stored.lm_head.weight is stored.model.embed_tokens.weight) == tied
    expected, found = steps(wide), steps(stored)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    cast = injected(settings, base).bfloat16()
    for name, parameter in cast.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    assert not all(steps(cast)[name].equal(tensor) for name, tensor in expected.items())


def test_a_frozen_product_costs_four_operations_a_weight() -> None:
    """Oracle: the weights of the linear layers, counted by hand."""
    base = build_model(config(), seed=0)
    model = injected(ADAPTERS["lora"], base)
    layers = [m for m in base.modules() if isinstance(m, nn.Linear)]
    frozen = sum(m.weight.numel() for m in layers)
    own = sum(t.numel() for t in trained(model).values())
    before = flops_per_token(base, 16)
    assert flops_per_token(model, 16) == before - 2 * frozen + 6 * own


@pytest.mark.parametrize("norm", ["power", {"name": "unified", "allow_leak": True}])
def test_running_statistics_stand_still_beside_frozen_weights(norm: Any) -> None:
    """Oracle: the buffers before; a model that is trained as a whole moves them."""
    base = build_model(config(norm=norm), seed=0).train()
    model = injected(ADAPTERS["lora"], base).train()
    norms = [m for m in model.modules() if isinstance(m, RunningNorm)]
    assert norms
    before = {n: b.clone() for n, b in model.named_buffers()}
    for tuned in (model, base):
        tuned(ids(), labels=ids()).loss.backward()
        for module in tuned.modules():
            if isinstance(module, RunningNorm):
                module.commit()
    assert all(b.equal(before[n]) for n, b in model.named_buffers())
    assert not all(b.equal(before[n]) for n, b in base.named_buffers())


def test_norms_alone_can_be_trained() -> None:
    """Oracle: the names by hand; those of queries and keys are norms too."""
    mixer = {"name": "softmax", "qk_norm": True}
    model = empty_model(config(mixer=mixer, num_hidden_layers=1), device="meta")
    freeze(model, norms=True, new_head=False)
    block = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    names = {f"model.layers.0.{name}.weight" for name in block} | {"model.norm.weight"}
    assert set(trained(model)) == names
    assert class_of(model.config) is LlmNormForCausalLM
