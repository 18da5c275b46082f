"""The report in a real process, beside a stand-in nvidia-smi, and the messages of extras."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from llmnorm.machine import doctor
from llmnorm.machine.doctor import EXTRAS, missing_extra
from llmnorm.part import InputError
from tests.machine.test_gpus import NAME, ROOT, nvidia_smi, run


def test_extras_are_those_of_the_package() -> None:
    """Oracle: pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(EXTRAS) == list(project["optional-dependencies"])


def test_missing_extra_names_the_line_that_installs_it() -> None:
    """Oracle: the line of the README, written out."""
    error = missing_extra("flash_attn.layers")
    assert isinstance(error, InputError)
    assert str(error) == "flash_attn is not installed; run: bash tools/bootstrap.sh flash"
    assert str(missing_extra("safetensors")).endswith("run: bash tools/bootstrap.sh")


def test_an_installed_package_names_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: pip's own words; an installed package has no tools/bootstrap.sh beside it."""
    monkeypatch.setattr(doctor, "_ABOVE", tmp_path)
    assert str(missing_extra("peft")) == (
        "peft is not installed; run: pip install 'llmnorm[finetune]'"
    )
    assert str(missing_extra("safetensors")).endswith("run: pip install llmnorm")
    assert doctor._commit() == ""


def test_the_version_names_the_commit_of_a_checkout() -> None:
    """Oracle: git."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    head = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    assert f"(commit {commit}" in doctor._commit()


def test_versions_are_told_without_torch(tmp_path: Path) -> None:
    """Oracle: what torch says of itself, and sys.modules of a fresh interpreter."""
    code = "import sys; from llmnorm.machine.doctor import versions as v; "
    code += "print(v(), 'torch' in sys.modules)"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    said = run(tmp_path, "-c", code).stdout.strip()
    assert said.endswith(f", torch {torch.__version__} ({cuda}) False")


def test_report_of_this_machine(tmp_path: Path) -> None:
    """Oracle: torch's own version, the stand-in GPUs, and two real processes that sum a tensor."""
    nvidia_smi(tmp_path, used=[3, 30000])
    done = run(tmp_path, "-m", "llmnorm", "doctor")
    assert done.returncode == 0, done.stderr
    for line in (
        f", torch {torch.__version__} (built ",
        "  driver 570.12, which runs CUDA up to 12.8",
        f"  1: {NAME}, 30000 of 40960 MiB in use",
        "  dev: present",
        "  gloo: all_reduce over 2 processes is right",
        f"python {sys.version.split()[0]}",
        "GB free of",
    ):
        assert line in done.stdout
    for extra in EXTRAS:
        assert f"  {extra}: " in done.stdout
