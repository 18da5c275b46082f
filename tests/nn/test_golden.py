"""Our parts against recorded runs of official implementations, by tools/golden/."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools import golden

D = torch.float64
VECTORS = Path("tests/data/golden")


def test_every_recorded_vector_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the recorded outputs, gradients and caches, each within the file's own tolerance."""
    assert golden.main([str(VECTORS)]) == 0
    printed = capsys.readouterr().out
    for path in VECTORS.glob("*.safetensors"):
        assert path.stem in printed
    assert "ABOVE TOLERANCE" not in printed


@pytest.mark.parametrize(
    ("file", "key", "change"),
    [
        ("norm_layernorm_rmsnorm", "rmsnorm_4x7_std_eps1e-06/grad_x", 1e-9),
        ("norm_layernorm_rmsnorm", "layernorm_4x7_tiny_eps1e-06/grad_bias", 1e-9),
        ("norm_layernorm_rmsnorm", "rmsnorm_2x3x1_std_eps1e-06/grad_x", 1e-9),
        ("norm_rmsnorm_bf16_castmodes", "0/out_llama", 0.01),
        ("powernorm_g1_nomask", "grad_x_006", 1e-10),
        ("powernorm_g4_mask", "ema_gz_007", 1e-10),
        ("unified_norm_kappa", "grad_weight_010", 1e-9),
        ("unified_norm_filter", "buffer_x2_012", 1e-9),
        ("unified_norm_window1", "grad_x_004", 1e-9),
        ("dyt", "grad_alpha", 1e-11),
        ("crmsnorm_equivalence", "crms_norm_1/grad_x", 1e-11),
        ("crmsnorm_equivalence", "vit/compressed_att_out_linear_bias", 1e-10),
        ("llama_placements_lns_mixln", "lns/hidden_3", 1e-7),
        ("llama_placements_lns_mixln", "post_pre/grad_weight/0.mlp.down_proj.weight", 1e-7),
        ("llama_placements_lns_mixln", "sandwich/grad_x", 1e-7),
        ("rope_yarn", "grad_in/k", 1e-8),
        ("attn_gqa_4_2", "packed/out", 1e-8),
        ("attn_mqa_bias_offset", "step/v_cache", 1e-8),
        ("attn_gqa_4_2", "M", float("nan")),
        ("mm_toeplitz_di", "derived/M_definition", 1e-8),
        ("mm_cauchy_dd", "grad/matrix_mixer.bias", 1e-7),
        ("mm_quasiseparable_dd", "mid/dt_bwd_flipped", 1e-8),
        ("adamw_wd_f64", "param_after_003/2", 1e-11),
        ("farms_alpha", "alpha_1", 3e-4),
        ("colm_facility_location", "1/gains", 1e-2),
        ("colm_facility_location", "4/order", 1),
        ("colm_facility_location", "2/weights", 1),
        ("colm_facility_location", "1/similarity", 1e-2),
        ("colm_sparsify", "1/kept_dimensions", 1),
        ("colm_budgets", "1/budgets", 1),
        ("colm_adam_normalisation", "3/v", 1e-2),
        ("colm_pipeline", "2/adam_features", 1e-3),
        ("colm_pipeline", "3/selected", -1),
    ],
)
def test_a_changed_vector_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, key: str, change: float
) -> None:
    """Oracle: one element of one tensor moved by more than its tolerance must fail."""
    with safe_open(VECTORS / f"{file}.safetensors", framework="pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        header = saved.metadata()
    flat = tensors[key].flatten()
    flat[flat.abs().argmax()] += change
    save_file(tensors, tmp_path / f"{file}.safetensors", header)
    assert golden.main([str(tmp_path)]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


def write(directory: Path, kind: str, hyperparameters: Any, tensors: dict[str, Any]) -> None:
    """A file as a recording script writes them."""
    key = "f64_max_abs" if kind.startswith("norm") else "float64"
    header = {
        "kind": kind,
        "hyperparameters": json.dumps(hyperparameters),
        "tolerance": json.dumps({key: 1e-10}),
        "dtype": "float64",
    }
    whole = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    save_file(whole, directory / "made.safetensors", header)


def changed(directory: Path, file: str, **settings: Any) -> None:
    """A committed file with other settings in its header."""
    with safe_open(VECTORS / f"{file}.safetensors", framework="pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        header = saved.metadata()
    hyperparameters = json.loads(header["hyperparameters"]) | settings
    header["hyperparameters"] = json.dumps(hyperparameters)
    save_file(tensors, directory / f"{file}.safetensors", header)


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("dyt", {"channels_last": False}, "not served: channels_last=False"),
        ("dyt", {"alpha_init": -1.0}, "not served: alpha_init=-1.0"),
        ("powernorm_g4_mask", {"centred": True}, "not served: centred=True"),
        ("powernorm_g4_mask", {"group_num": 3}, "not served: group_num=3"),
        ("unified_norm", {"window_size": [4, 2]}, "not served: window_size=[4, 2]"),
        ("farms_alpha", {"filter_zeros": True}, "not served: filter_zeros=True"),
        (
            "hydra_short_L2",
            {"learnable_init_states": True},
            "not served: learnable_init_states=True",
        ),
        ("hydra_short_L2", {"d_conv": 4}, "not served: d_conv=4"),
        ("mamba2_module_g1", {"norm_before_gate": True}, "not served: norm_before_gate=True"),
        ("gated_deltanet_module", {"l2_eps": 1e-3}, "not served: l2_eps=0.001"),
        ("mm_dense_di", {"conv_bias": False}, "not served: conv_bias=False"),
        ("mm_attention_dd", {"activation": "gelu"}, "not served: activation=gelu"),
        ("nala_core_norope", {"tau": 0.1}, "not served: lam=3"),
        ("fla_gla", {"use_qk_l2norm_in_kernel": True}, "not served: use_qk_l2norm_in_kernel=True"),
        ("attn_gqa_4_2", {"sinks": True}, "not served: sinks=True"),
        ("llama_placements_lns_mixln", {"final_norm": "none"}, "not served: final_norm=none"),
        ("llama_placements_lns_mixln", {"hidden_act": "gelu"}, "not served: hidden_act=gelu"),
        ("llama_placements_lns_mixln", {"rms_norm_eps": 1e-2}, "ABOVE TOLERANCE"),
        ("dyt", {"alpha_init": None}, "not served: alpha_init=None"),
    ],
)
def test_a_setting_that_a_part_lacks_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, settings: Any, words: str
) -> None:
    """Oracle: the words and exit code 1; a figure of the header that is another one is used."""
    changed(tmp_path, file, **settings)
    assert golden.main([str(tmp_path)]) == 1
    assert words in capsys.readouterr().out


def test_a_window_of_another_start_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the other configurations of the file are compared all the same."""
    config = {"Q_ratio": 1.0, "num_row_samples": 32, "sampling_ops_per_dim": 5}
    configs = [config | {"fix_fingers": start} for start in ("xmin_mid", "xmin_peak")]
    changed(tmp_path, "farms_alpha", configs=configs)
    assert golden.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "not served: fix_fingers=xmin_peak" in printed and printed.count("  ok") == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lightning/module", "MiniMax"),
        ("norm/evonorm_s0", "EvoNorm"),
        ("placement/ngpt", "nGPT"),
        ("loss/rank_mixup", "RankMixup"),
        ("room/nosuch", "knows the kind room/nosuch"),
    ],
)
def test_a_kind_without_a_part_is_named_and_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, words: str
) -> None:
    """Oracle: the words, and exit code 0; beside a served kind of the same header too."""
    write(tmp_path, kind, {"anything": 1}, {"x": torch.zeros(1)})
    assert golden.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no part: " in printed and words in printed
    write(tmp_path, f"norm/dyt; {kind}", {"anything": 1}, {"x": torch.zeros(1)})
    assert golden.main([str(tmp_path), "--kind", kind]) == 0
    assert golden.main([str(tmp_path), "--kind", "no/such"]) == 2


def test_a_file_that_does_not_fit_fails_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 1, the tensor that is missing, and the next file's verdict."""
    write(tmp_path, "norm/dyt", {"alpha_init": 0.5}, {"x": torch.zeros(2, 3)})
    shutil.copy(VECTORS / "rope_yarn.safetensors", tmp_path)
    assert golden.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError" in printed and printed.count("  ok") == 2


def dyt(width: int) -> tuple[str, Any, dict[str, Tensor]]:
    """Another width, no offset."""
    x, g, weight = (torch.randn(2, width, dtype=D) for _ in range(3))
    leaves = [t.requires_grad_() for t in (x, weight[0].clone(), torch.tensor([0.7], dtype=D))]
    out = leaves[1] * torch.tanh(leaves[2] * x)
    out.backward(g)
    names = ("x", "weight", "alpha")
    tensors = {"grad_out": g, "out": out} | dict(zip(names, leaves, strict=True))
    tensors |= {f"grad_{name}": t.grad for name, t in zip(names, leaves, strict=True)}
    return "norm/dyt", {"alpha_init": 0.5}, tensors


def linear_norm(heads: int, length: int) -> tuple[str, Any, dict[str, Tensor]]:
    """No initial state, another scale, no single steps."""
    inputs = {n: torch.rand(1, length, heads, 3, dtype=D, requires_grad=True) for n in "qkv"}
    weights = torch.einsum("bihk,bjhk->bhij", inputs["q"] * 0.3, inputs["k"]).tril()
    total = weights.sum(-1, keepdim=True) + 1e-10
    out = torch.einsum("bhij,bjhv->bihv", weights / total, inputs["v"])
    g = torch.randn_like(out)
    out.backward(g)
    tensors = {"out": out, "grad_out": g} | {f"in/{n}": t for n, t in inputs.items()}
    tensors |= {f"grad_in/{n}": t.grad for n, t in inputs.items()}
    return "linear_recurrence/linear_norm", {"scale": 0.3, "initial_state": False}, tensors


def dense(width: int, heads: int, length: int) -> tuple[str, Any, dict[str, Tensor]]:
    """A width that eight heads do not divide, offsets on the projections, another kernel."""
    state = {
        "in_proj.weight": torch.randn(2 * width, width, dtype=D),
        "in_proj.bias": torch.randn(2 * width, dtype=D),
        "conv1d.weight": torch.randn(width, 1, 3, dtype=D),
        "conv1d.bias": torch.randn(width, dtype=D),
        "matrix_mixer.M": torch.randn(heads, length, length, dtype=D),
        "norm.weight": torch.randn(width, dtype=D),
        "out_proj.weight": torch.randn(width, width, dtype=D),
        "out_proj.bias": torch.randn(width, dtype=D),
    }
    p = {name: tensor.requires_grad_() for name, tensor in state.items()}
    x = torch.randn(2, length, width, dtype=D, requires_grad=True)
    z, v = F.linear(x, p["in_proj.weight"], p["in_proj.bias"]).chunk(2, -1)
    v = F.conv1d(v.mT, p["conv1d.weight"], p["conv1d.bias"], padding=1, groups=width).mT
    v = F.silu(v).unflatten(-1, (heads, -1))
    matrix = p["matrix_mixer.M"] / length**0.5 + torch.eye(length, dtype=D)
    y = torch.einsum("hij,bjhv->bihv", matrix, v).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] * F.silu(z)
    out = F.linear(y, p["out_proj.weight"], p["out_proj.bias"])
    g = torch.randn_like(out)
    out.backward(g)
    tensors = {"x": x, "out": out, "grad_out": g, "grad_x": x.grad, "M": matrix}
    tensors |= {f"state/{n}": t for n, t in p.items()} | {f"grad/{n}": t.grad for n, t in p.items()}
    sizes = {"d_model": width, "expand": 1, "headdim": width // heads, "max_seq_len": length}
    settings = {"is_data_dependent": False, "d_conv": 3, "bias": True}
    return "matrix_mixer/dense_di", sizes | settings, tensors


OTHERS = {"dyt": dyt(23), "linear_norm": linear_norm(3, 7), "dense": dense(15, 5, 6)}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_and_settings_are_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Oracle: the definitions, written out in float64; one number moved fails."""
    kind, hyperparameters, tensors = OTHERS[name]
    write(tmp_path, kind, hyperparameters, tensors)
    assert golden.main([str(tmp_path)]) == 0
    assert "  ok" in capsys.readouterr().out
    moved = tensors["out"].detach().contiguous().clone()
    moved.view(-1)[0] += 1e-6
    write(tmp_path, kind, hyperparameters, tensors | {"out": moved})
    assert golden.main([str(tmp_path)]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


def test_one_kind_is_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the lines printed; an empty folder is an error of its own."""
    shutil.copy(VECTORS / "rope_yarn.safetensors", tmp_path)
    shutil.copy(VECTORS / "rope_linear.safetensors", tmp_path)
    assert golden.main([str(tmp_path), "--kind", "rope/yarn"]) == 0
    printed = capsys.readouterr().out
    assert "rope_yarn" in printed and "rope_linear" not in printed
    assert golden.main([str(tmp_path / "none")]) == 2
