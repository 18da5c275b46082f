"""Recorded files of other sizes and settings than the committed ones, through `tools.golden`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmnorm.optim.settings import (
    AdamPSettings,
    CondaSettings,
    MuonSettings,
    NorMuonSettings,
    SOAPSettings,
)
from tests.optim import test_official as official
from tests.optim.rules import draw
from tools import golden
from tools.golden import record_muon

SHAPES = [(3, 11), (9, 4), (5, 5)]
STEPS = 7


def write(
    path: Path, kind: str, loop: Any, settings: Any, header: dict[str, Any], vector: Any = None
) -> None:
    """A file as a recorder of the official code would write it, by a loop of test_official.py.

    Args:
        vector: settings with which the loop treats a vector of 6, as a matrix of one column.
    """
    starts = [draw(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    chosen = [settings] * len(starts)
    if vector is not None:
        starts.append(draw(6, 1, seed=40))
        chosen.append(vector)
    tensors: dict[str, Tensor] = {}
    for i, (start, own) in enumerate(zip(starts, chosen, strict=True)):
        grads = [draw(*start.shape, seed=50 + 10 * step + i) for step in range(STEPS)]
        squeezed = (lambda t: t[:, 0]) if start.shape[1] == 1 else (lambda t: t)
        tensors[f"param_{i}"] = squeezed(start).clone()
        for step, after in enumerate(loop(start, grads, own)):
            tensors[f"grad_{step:03d}/{i}"] = squeezed(grads[step]).clone()
            tensors[f"param_after_{step:03d}/{i}"] = squeezed(after).clone()
    metadata = {
        "kind": f"optimizer/{kind}",
        "hyperparameters": json.dumps(header),
        "dtype": "float64",
        "tolerance": json.dumps({"f64_max_abs": 1e-11}),
    }
    save_file(tensors, path, metadata=metadata)


ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
CONDA = ADAM | {"scale": 0.5, "correct_bias": False}
ADAMP = ADAM | {"delta": 0.7, "wd_ratio": 0.3, "nesterov": True}
SOAP = ADAM | {
    "shampoo_beta": 0.7,
    "precondition_frequency": 2,
    "max_precond_dim": 5,
    "correct_bias": False,
    "normalize_grads": True,
}
WARMUP = {"lr": 0.03, "weight_decay": 0.2, "momentum": official.WARMUP}
FILES: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "conda": (
        official.conda,
        CondaSettings(refresh_every=3, **CONDA),
        CONDA | {"update_proj_gap": 3, "proj_type": "std", "aux_lr": 0.05},
        CondaSettings(refresh_every=3, **(CONDA | {"scale": 1.0, "lr": 0.05})),
    ),
    "adamp": (
        official.adamp,
        AdamPSettings(**ADAMP),
        ADAMP,
        AdamPSettings(**(ADAMP | {"delta": 0.0})),
    ),
    "soap": (
        official.soap,
        SOAPSettings(**SOAP),
        SOAP | {"merge_dims": False, "precondition_1d": False},
        SOAPSettings(**(SOAP | {"max_precond_dim": 0})),
    ),
    "normuon": (
        official.normuon,
        NorMuonSettings(beta2=0.7, **WARMUP),
        WARMUP | {"beta2": 0.7, "ns_steps": 5},
        None,
    ),
    "muon_torch": (
        official.muon,
        MuonSettings(variant="torch", nesterov=False, **WARMUP),
        WARMUP | {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "eps": 1e-7},
        None,
    ),
    "muon_moonlight": (
        official.muon,
        MuonSettings(variant="moonlight", **WARMUP),
        {"lr": 0.03, "wd": 0.2, "momentum": official.WARMUP},
        None,
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_sizes_and_settings_are_reproduced(kind: str, tmp_path: Path) -> None:
    """Oracle: the official arithmetic in float64, to 1e-11, vectors included."""
    loop, settings, header, vector = FILES[kind]
    write(tmp_path / "file.safetensors", kind, loop, settings, header, vector)
    assert golden.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("kind", "changed", "verdict"),
    [
        ("conda", {"proj_type": "reverse_std"}, "proj_type=reverse_std"),
        ("conda", {"rank": 8}, "rank=8"),
        ("adamp", {"amsgrad": True}, "amsgrad=True"),
        ("soap", {"precondition_1d": True}, "precondition_1d=True"),
        ("soap", {"merge_dims": True}, "merge_dims=True"),
        ("soap", {"eps": 0.0}, "eps=0.0"),
        ("normuon", {"ns_steps": 6}, "ns_steps=6"),
        ("normuon", {"per_head": True}, "per_head=True"),
        ("muon_torch", {"eps": 1e-5}, "eps=1e-05"),
        ("muon_torch", {"ns_coefficients": [2, -1.5, 0.5]}, "ns_coefficients=[2, -1.5, 0.5]"),
        ("muon_torch", {"adjust_lr_fn": "spectral"}, "adjust_lr_fn=spectral"),
        ("muon_moonlight", {"scale": "0.2*sqrt(rows)"}, "scale=0.2*sqrt(rows)"),
    ],
)
def test_a_setting_that_we_lack_is_named(
    kind: str, changed: dict[str, Any], verdict: str, tmp_path: Path, capsys
) -> None:
    """Oracle: the verdict, exit code 1, and no number beside it."""
    loop, settings, header, vector = FILES[kind]
    write(tmp_path / "file.safetensors", kind, loop, settings, header | changed, vector)
    assert golden.main([str(tmp_path)]) == 1
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"not served: {verdict}" in lines[0]


def test_a_vector_that_the_official_class_refuses_is_not_served(tmp_path: Path, capsys) -> None:
    """Oracle: torch.optim.Muon takes matrices alone; the verdict names the parameter's shape."""
    loop, settings, header, _ = FILES["muon_torch"]
    write(tmp_path / "file.safetensors", "muon_torch", loop, settings, header, settings)
    assert golden.main([str(tmp_path)]) == 1
    assert "not served: param_3=[6]" in capsys.readouterr().out


def test_the_committed_float64_steps_are_torchs() -> None:
    """Oracle: torch.optim.Muon of the installed version, recorded again."""
    again = record_muon.record()
    saved = golden.Vectors(record_muon.FILE)
    assert saved.tensors.keys() == again.keys()
    for key, tensor in again.items():
        assert tensor.dtype == torch.float64
        assert (saved[key] - tensor).abs().max() <= 1e-14, key
