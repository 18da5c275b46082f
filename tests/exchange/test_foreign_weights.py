"""Weights of transformers' classes, read and written by the names that they have on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmnorm.exchange.foreign_source import skeleton_of
from llmnorm.exchange.foreign_weights import ForeignWeights, on_disk
from llmnorm.exchange.loading import open_source
from llmnorm.models.foreign import skeleton
from llmnorm.part import InputError
from tests.families import FAMILIES, class_of, configuration, tiny

# Beside the others: experts and layers that have other names in the model.
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {"num_experts": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_expand": 1},
    "gpt_neox": {},
}


def saved(model: PreTrainedModel, directory: Path, **given: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes of a model, and its tensors."""
    model.save_pretrained(directory, **given)
    return stored(directory)


def stored(directory: Path) -> dict[str, Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def opened(directory: Path, **keys: Any) -> ForeignWeights:
    config = AutoModelForCausalLM.from_pretrained(directory).config
    return ForeignWeights(directory, skeleton_of(class_of(config), config, where="it"), **keys)


def read(weights: ForeignWeights) -> dict[str, Tensor]:
    """All tensors; those of floating point are NaN before they are read."""
    into = {}
    for name, (dtype, shape) in weights.tensors.items():
        empty = torch.zeros(shape, dtype=dtype)
        into[name] = empty.fill_(torch.nan) if dtype.is_floating_point else empty
    weights.read_into(into)
    return into


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_weights_go_in_and_out_as_transformers_has_them(family: str, tmp_path: Path) -> None:
    """Oracles: a model's own state, and the names and tensors of `save_pretrained`; to the bit."""
    model = tiny(family, **MORE.get(family, {}))
    files = saved(model, tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    plain = skeleton_of(type(model), model.config, where="it")
    weights = ForeignWeights(tmp_path, plain)
    found, state = read(weights), model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(state) - set(found) == tied - set(found)
    for name, tensor in found.items():
        assert tensor.equal(state[name]), name
    names, fill = on_disk(plain, weights.tensors, weights.read_into)
    assert names.keys() == files.keys()
    for name in names:  # one by one: whatever is asked for, its whole group is converted
        tensor = torch.empty(names[name].shape, dtype=names[name].dtype)
        fill({name: tensor})
        assert tensor.equal(files[name]), name


def test_a_part_is_read_without_the_rest(tmp_path: Path) -> None:
    """Oracle: the model's tensors; sources of other groups lie in a file that is not there."""
    model = tiny("qwen3_moe")
    files = saved(model, tmp_path)
    first = {n: t for n, t in files.items() if ".layers.0." in n}
    (tmp_path / "model.safetensors").unlink()
    names = {"model-1.safetensors": first, "model-2.safetensors": files}
    save_file({n: t for n, t in files.items() if n not in first}, tmp_path / "model-2.safetensors")
    save_file(first, tmp_path / "model-1.safetensors")
    index = {n: "model-1.safetensors" if n in first else "model-2.safetensors" for n in files}
    assert set(index.values()) == set(names)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index, "metadata": {}})
    )
    weights = opened(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    state = model.state_dict()
    some = {n: torch.empty_like(state[n]) for n in state if ".layers.0." in n}
    weights.read_into(some)
    assert all(tensor.equal(state[name]) for name, tensor in some.items())
    with pytest.raises(InputError, match=r"model-2.safetensors: cannot be read"):
        weights.read_into({"model.norm.weight": torch.empty_like(state["model.norm.weight"])})


def lacking(files: dict[str, Tensor]) -> None:
    del files["model.layers.1.mlp.experts.2.up_proj.weight"]


def narrower(files: dict[str, Tensor]) -> None:
    files["model.norm.weight"] = files["model.norm.weight"][1:].clone()


def more(files: dict[str, Tensor]) -> None:
    files["model.layers.1.mlp.experts.9.up_proj.bias"] = torch.zeros(3)


def without(files: dict[str, Tensor]) -> None:
    del files["model.embed_tokens.weight"]


def uneven(files: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    files[name] = files[name][1:].clone()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lacking, "cannot be made into 'model.layers.1.mlp.experts.gate_up_proj'"),
        (uneven, "cannot be made into 'model.layers.1.mlp.experts.gate_up_proj'"),
        (narrower, r"'model.norm.weight' has shape \(31,\), and config.json asks for \(32,\)"),
        (more, "'model.layers.1.mlp.experts.9.up_proj.bias' has no place in Qwen3MoeForCausalLM"),
        (without, "holds no tensor for 'model.embed_tokens.weight'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(
    change: Any, why: str, tmp_path: Path
) -> None:
    """Oracle: one line that begins with the directory."""
    files = saved(tiny("qwen3_moe"), tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    change(files)
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=why) as told:
        ForeignWeights(tmp_path, skeleton_of(class_of(config), config, where="it"))
    assert str(told.value).startswith(f"{tmp_path}: ") and "\n" not in str(told.value)


def test_a_tied_head_in_the_file_is_compared(tmp_path: Path) -> None:
    """Oracle: the embedding; a head beside it is left out where equal, and refused where not."""
    model = tiny("gemma2")
    files = saved(model, tmp_path)
    both = files | {"lm_head.weight": files["model.embed_tokens.weight"].clone()}
    save_file(both, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in read(opened(tmp_path))
    alone = {n: t for n, t in both.items() if n != "model.embed_tokens.weight"}
    save_file(alone, tmp_path / "model.safetensors")
    state = model.state_dict()
    found = read(opened(tmp_path))["model.embed_tokens.weight"]
    assert found.equal(state["model.embed_tokens.weight"])
    both["lm_head.weight"][3, 5] += 1
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="'lm_head.weight' differ, and config.json ties them"):
        ForeignWeights(tmp_path, skeleton_of(type(model), model.config, where="it"))


def quantised(directory: Path, files: dict[str, Tensor], **settings: Any) -> None:
    """Write other tensors and a `quantization_config` into a saved directory."""
    save_file(files, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))


def packed_fp4(files: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random bytes in the layout of gpt-oss in the place of its experts' matrices."""
    made, draw = {}, torch.Generator().manual_seed(0)
    for name, tensor in files.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
            scales = torch.randint(120, 130, shape, generator=draw, dtype=torch.uint8)
            made |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            made[name] = tensor
    return made


def packed_fp8(files: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the blocks in 8 bits, with a scale for each 8 by 8."""
    made = {}
    for name, tensor in files.items():
        if ".layers." in name and tensor.ndim == 2 and ".gate." not in name:
            tiles = tensor.unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
            scale = tiles.abs().amax((1, 3)) / 448
            made[name] = (tiles / scale[:, None, :, None]).view_as(tensor).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale
        else:
            made[name] = tensor
    return made


FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize(
    ("family", "pack", "settings", "other"),
    [
        ("gpt_oss", packed_fp4, {"quant_method": "mxfp4"}, {"intermediate_size": 32}),
        ("llama", packed_fp8, FP8, {}),
        ("qwen3_moe", packed_fp8, FP8, {}),
    ],
)
def test_quantised_weights_are_read_as_plain_ones(
    family: str, pack: Any, settings: Any, other: Any, tmp_path: Path
) -> None:
    """Oracle: transformers' own loading of the directory in float32, to the bit."""
    files = saved(tiny(family, **other), tmp_path)
    packed = pack(files)
    assert len(packed) > len(files)
    quantised(tmp_path, packed, **settings)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    source = open_source(tmp_path, classes="transformers")
    assert not hasattr(source.config, "quantization_config")
    into = {name: torch.full(stored.shape, torch.nan) for name, stored in source.tensors.items()}
    source.read_into(into)
    for name, tensor in into.items():
        assert tensor.equal(expected[name].float()), name
    matrix = next(name for name in into if "down_proj" in name and "bias" not in name)
    assert source.tensors[matrix].dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["awq", "nobodys"])
def test_quantised_weights_that_cannot_be_read_are_refused(method: str, tmp_path: Path) -> None:
    """Oracle: one line that begins with the file and says what to do."""
    files = saved(tiny("llama"), tmp_path)
    quantised(tmp_path, files, quant_method=method)
    with pytest.raises(InputError, match="cannot be read as plain weights.*; give the model") as it:
        open_source(tmp_path, classes="transformers")
    assert str(it.value).startswith(f"{tmp_path / 'config.json'}: quantization_config: '{method}'")
    assert "\n" not in str(it.value)


def test_what_a_class_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """Oracle: the dtypes of transformers' own model in bfloat16."""
    keys = {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
    }
    config = configuration("ernie4_5_moe", **keys, moe_layer_start_index=0, moe_layer_interval=1)
    kind = class_of(config)
    kind(config).save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = skeleton_of(kind, config, where="it", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in found.named_parameters()}
    assert {torch.float32, torch.bfloat16} == set(dtypes.values())
    assert dtypes == {n: p.dtype for n, p in plain.named_parameters()}


def test_buffers_have_the_values_that_the_class_computes() -> None:
    """Oracle: the buffers of a plain model; a file holds none of them."""
    for family in ("gemma3_text", "falcon_h1", "llama", "lfm2"):
        config = configuration(family)
        plain = dict(class_of(config)(config).named_buffers())
        for name, buffer in skeleton(class_of(config), config).named_buffers():
            assert buffer.equal(plain[name]), (family, name)


def test_a_directory_is_written_as_it_was_saved(tmp_path: Path, capsys: Any) -> None:
    """Oracle: `save_pretrained` of the same model; `llmnorm export` of a stock directory."""
    from tests.running import llmnorm

    files = saved(tiny("qwen3_moe"), tmp_path / "saved")
    llmnorm("export", tmp_path / "saved", tmp_path / "written")
    assert "Qwen3MoeForCausalLM" in capsys.readouterr().out
    found = stored(tmp_path / "written")
    assert found.keys() == files.keys() and all(found[n].equal(t) for n, t in files.items())
    before, after = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("saved", "written")
    )
    assert after == before
    shutil.rmtree(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert model.state_dict().keys() == tiny("qwen3_moe").state_dict().keys()
