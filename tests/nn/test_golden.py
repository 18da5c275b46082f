"""Our parts against recorded runs of official implementations, by tools/golden/."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tools import golden

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


def test_a_kind_without_a_part_is_named_and_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a made-up kind beside a served one of the same header."""
    header = {"kind": "norm/layernorm,nosuch", "tolerance": "plain text", "hyperparameters": "{}"}
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", header)
    assert golden.main([str(tmp_path), "--kind", "norm/nosuch"]) == 0
    assert "norm/nosuch" in capsys.readouterr().out


def test_one_kind_is_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the lines printed; an empty folder is an error of its own."""
    shutil.copy(VECTORS / "rope_yarn.safetensors", tmp_path)
    shutil.copy(VECTORS / "rope_linear.safetensors", tmp_path)
    assert golden.main([str(tmp_path), "--kind", "rope/yarn"]) == 0
    printed = capsys.readouterr().out
    assert "rope_yarn" in printed and "rope_linear" not in printed
    assert golden.main([str(tmp_path / "none")]) == 2
