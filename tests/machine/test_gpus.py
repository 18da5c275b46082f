"""The GPU checks in real processes, with a stand-in nvidia-smi on PATH."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmnorm.machine import gpus

ROOT = Path(__file__).parents[2]
NAME = "NVIDIA A100-SXM4-40GB"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")


def nvidia_smi(directory: Path, used: list[int], cuda: str = "12.8") -> None:
    """Put an nvidia-smi into `directory` that shows a GPU for each number of MiB in use."""
    lines = [f"{i}, GPU-{i}abc, {NAME}, 570.12, 40960, {mib}" for i, mib in enumerate(used)]
    listing = "\n".join(lines)
    write_program(
        directory / "nvidia-smi",
        f"if [ $# = 0 ]; then echo '| Driver Version: 570.12  CUDA Version: {cuda} |'; exit; fi\n"
        f"cat <<'END'\n{listing}\nEND",
    )


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE")}
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**kept, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def check_gpu(directory: Path, device: str, **environment: str) -> tuple[int, str]:
    done = run(directory, "-m", "llmnorm.machine.gpus", device, **environment)
    return done.returncode, done.stderr


@no_gpu
@pytest.mark.parametrize(
    ("cuda", "cure"),
    [
        ("13.1", "LLMNORM_TORCH_INDEX=https://download.pytorch.org/whl/cu130 bash tools/bootstrap"),
        ("12.8", "LLMNORM_TORCH_INDEX=https://download.pytorch.org/whl/cu126 bash tools/bootstrap"),
        ("11.4", "update the driver to one that runs CUDA 12.6 or newer"),
    ],
)
def test_a_gpu_that_torch_cannot_use_stops_setup(tmp_path: Path, cuda: str, cure: str) -> None:
    """Oracle: one line with GPU, driver, both CUDA versions, cure and way out; exit code 2."""
    nvidia_smi(tmp_path, used=[3], cuda=cuda)
    code, message = check_gpu(tmp_path, "auto")
    assert code == 2
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    for part in (NAME, "driver 570.12", f"CUDA up to {cuda}", build, cure, "training.device=cpu"):
        assert part in message
    assert message.startswith("llmnorm: error: ") and message.count("\n") == 1


@no_gpu
def test_the_gpu_is_left_alone_where_the_user_said_so(tmp_path: Path) -> None:
    """Oracle: exit code 0 for the CPU by name, and for hidden GPUs."""
    nvidia_smi(tmp_path, used=[3])
    assert check_gpu(tmp_path, "cpu") == (0, "")
    assert check_gpu(tmp_path, "auto", CUDA_VISIBLE_DEVICES="") == (0, "")


@no_gpu
def test_cuda_without_a_gpu_is_an_error_that_quotes_nvidia_smi(tmp_path: Path) -> None:
    """Oracle: nvidia-smi's own complaint and exit code, passed on for cuda, ignored for auto."""
    complaint = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    write_program(tmp_path / "nvidia-smi", f'echo "{complaint}"; exit 9')
    assert check_gpu(tmp_path, "auto") == (0, "")
    code, message = check_gpu(tmp_path, "cuda")
    assert code == 2
    assert complaint in message and "training.device=cpu" in message


@pytest.mark.parametrize(
    ("used", "environment", "expected"),
    [
        (
            [3, 3],
            {},
            "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 2",
        ),
        ([3, 30000, 3], {}, "CUDA_VISIBLE_DEVICES=0,2 accelerate launch"),
        ([3, 30000], {}, None),
        ([3, 3], {"WORLD_SIZE": "2"}, None),
        ([3, 3], {"CUDA_VISIBLE_DEVICES": "1"}, None),
        ([3, 3], {"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-0a"}, "--num_processes 2 "),
        ([], {}, None),
    ],
)
def test_launch_hint_names_all_free_gpus(
    tmp_path: Path, used: list[int], environment: dict[str, str], expected: str | None
) -> None:
    """Oracle: the GPUs below 1 GiB in use that the process may see, counted by hand."""
    nvidia_smi(tmp_path, used)
    code = "import json; from llmnorm.machine.gpus import launch_hint as h; "
    code += "print(json.dumps(h(['c.yaml'])))"
    hint = json.loads(run(tmp_path, "-c", code, **environment).stdout)
    if expected is None:
        assert hint is None
    else:
        assert expected in hint and hint.endswith("-m llmnorm train c.yaml")


@pytest.mark.parametrize(
    ("triton", "capability", "wrong"),
    [
        ("3.3.1", 9, False),
        ("3.4.0", 9, True),
        ("3.6.0", 9, True),
        ("3.7.0+git", 9, True),
        ("3.7.1", 9, False),
        ("3.10.0", 9, False),
        ("3.6.0", 8, False),
        (None, 9, False),
    ],
)
def test_gradients_that_triton_gets_wrong(
    triton: str | None, capability: int, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the range that fla's kernels refuse, Hopper with 3.4.0 <= triton < 3.7.1."""
    monkeypatch.setattr(gpus, "cuda_problem", lambda: None)
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    problem = gpus.one_decay_problem.__wrapped__()
    assert (problem is not None) is wrong
    assert not wrong or problem.startswith(f"triton {triton} computes them wrongly on Hopper")


def test_what_keeps_fla_from_being_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what is missing first, by hand."""
    there: set[str] = set()
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(gpus, "cuda_problem", lambda: "no device")
    said = []
    for module in ("fla", "triton", ""):
        said.append(gpus.fla_problem.__wrapped__())
        there.add(module)
    assert said == ["fla is not installed", "triton is not installed", "no device"]


def test_the_own_gpu_has_a_serial_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: that of the stand-in for the process's LOCAL_RANK; the UUID where it has none."""
    nvidia_smi(tmp_path, used=[3, 3])
    listing = (tmp_path / "nvidia-smi").read_text().removeprefix("#!/bin/sh\n")
    for serial, expected in (("1654922006536", "1654922006536"), ("[N/A]", "GPU-1abc")):
        query = f'case "$*" in *query-gpu=serial*GPU-1abc*) echo "{serial}"; exit;; esac'
        write_program(tmp_path / "nvidia-smi", f"{query}\n{listing}")
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert gpus.own_serial() == expected
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert gpus.own_serial() == ""
