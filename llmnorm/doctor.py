"""What this machine can run: the report of `llmnorm doctor`, and checks that setup and train share.

    check_gpu("auto")             stops where nvidia-smi shows a GPU that torch cannot use
    launch_hint(["CONFIG.yaml"])  the launch line for all free GPUs, where one process was started
    missing_extra("peft")         the error that names the line which installs it
    report()                      the text to paste into a bug report

What would surprise: this file stands beside cli.py but imports only part.py, and torch only inside
functions, because setup calls it before anything else works. It asks nvidia-smi, not torch, what is
in the machine: a torch that cannot see the GPU is just what has to be found.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmnorm.part import InputError

# Each extra of pyproject.toml -> the modules by which it is recognised.
EXTRAS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("deepspeed",),
    "flash": ("flash_attn",),
    "fla": ("fla",),
    "finetune": ("peft",),
    "quant": ("bitsandbytes",),
    "eval": ("lm_eval",),
    "serve": ("fastapi", "uvicorn"),
    "track": ("tensorboard", "wandb"),
    "dev": ("pytest", "hypothesis", "jsonschema", "mypy", "ruff"),
}
# Extras with compiled parts, which break at import, not at installation: the report imports them.
COMPILED = ("deepspeed", "flash", "fla", "quant")
PACKAGES = ["torch", "accelerate", "transformers", "datasets", "tokenizers", "safetensors", "numpy"]
# The CUDA builds of torch that the message may name: the newest that a driver runs, newest first.
TORCH_INDEXES = (((13, 0), "cu130"), ((12, 6), "cu126"))
FREE_GPU_MIB = 1024  # a GPU on which no more than this is in use counts as free
COLLECTIVE_SECONDS = 60


@dataclass(frozen=True)
class GPU:
    """One line of nvidia-smi."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_mib: int
    used_mib: int


@dataclass(frozen=True)
class Nvidia:
    """What nvidia-smi shows: GPUs and the newest CUDA the driver runs, or why it shows none."""

    gpus: tuple[GPU, ...]
    cuda: str | None
    problem: str | None


def nvidia() -> Nvidia:
    """Ask nvidia-smi; a machine without it, or with one that fails, has no GPUs and a problem."""
    if shutil.which("nvidia-smi") is None:
        return Nvidia((), None, "nvidia-smi is not installed")
    query = "--query-gpu=index,uuid,name,driver_version,memory.total,memory.used"
    listing, problem = _output(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    if problem:
        return Nvidia((), None, problem)
    gpus = []
    for line in listing.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 6 and cells[0].isdigit():
            memory, used = (int(c) if c.isdigit() else 0 for c in cells[4:])  # may be "[N/A]"
            gpus.append(GPU(int(cells[0]), cells[1], cells[2], cells[3], memory, used))
    if not gpus:
        return Nvidia(
            (), None, f"nvidia-smi shows no GPU: {(listing.splitlines() or ['no output'])[0]}"
        )
    header, _ = _output(["nvidia-smi"])
    cuda = re.search(r"CUDA(?: UMD)? Version:\s*(\d+\.\d+)", header)
    return Nvidia(tuple(gpus), cuda.group(1) if cuda else None, None)


def visible_gpus() -> list[GPU]:
    """The GPUs of nvidia-smi that CUDA_VISIBLE_DEVICES leaves to this process."""
    gpus, chosen = list(nvidia().gpus), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    found = []
    for word in (w.strip() for w in chosen.split(",")):
        match = [g for g in gpus if word == str(g.index) or (word and g.uuid.startswith(word))]
        if not match:
            break  # as CUDA does: everything from the first invalid entry on is hidden
        found += match
    return found


def check_gpu(device: str) -> None:
    """Refuse to train on the CPU by accident, or on a GPU that is not there.

    Args:
        device: `training.device`: "auto", "cpu" or "cuda".

    Raises:
        InputError: nvidia-smi shows a GPU that torch cannot use, or `device` is "cuda" and there is
            none. The message names driver, torch's CUDA version and what to set.
    """
    if device == "cpu":
        return
    gpus = visible_gpus()
    if not gpus and device == "auto":
        return
    reason = cuda_problem()
    if reason is None:
        return
    import torch

    build = f"torch {torch.__version__} ({_cuda_build()})"
    found = nvidia()
    if not gpus:
        why = found.problem or "CUDA_VISIBLE_DEVICES hides every GPU"
        raise InputError(
            f"training.device: cuda needs a GPU, but {why}; {build} says: {reason}; "
            "set training.device=cpu to train on the CPU"
        )
    raise InputError(
        f"nvidia-smi shows a GPU ({len(gpus)} x {gpus[0].name}, {_driver(found)}) that {build} "
        f"cannot use: {reason}; {_cure(found.cuda)}, "
        "or train on the CPU with training.device=cpu (setup: LLMNORM_DEVICE=cpu)"
    )


def cuda_problem() -> str | None:
    """Why this torch cannot use CUDA, in one line; None where it can. Makes no CUDA context."""
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # no CUDA build; old driver, no device
        return str(error).strip().splitlines()[0]
    built = [
        int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")
    ]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if built and 10 * major + minor < min(built):
            return (
                f"it was built for sm_{min(built)} and newer, and GPU {index} is sm_{major}{minor}"
            )
    return None if torch.cuda.device_count() else "CUDA starts but finds no device"


def _cure(cuda: str | None) -> str:
    version = tuple(int(part) for part in (cuda or "0.0").split("."))
    for needed, name in TORCH_INDEXES:
        if version >= needed:
            index = f"https://download.pytorch.org/whl/{name}"
            return f"run LLMNORM_TORCH_INDEX={index} bash tools/bootstrap.sh"
    oldest = ".".join(map(str, TORCH_INDEXES[-1][0]))
    return f"update the driver to one that runs CUDA {oldest} or newer"


def _driver(found: Nvidia) -> str:
    return f"driver {found.gpus[0].driver}, which runs CUDA up to {found.cuda or 'unknown'}"


def launch_hint(arguments: Sequence[str]) -> str | None:
    """The line that uses all free GPUs, where only one process was started; else None.

    Args:
        arguments: what follows `llmnorm train` on the command line.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    gpus = visible_gpus()
    free = [gpu for gpu in gpus if gpu.used_mib <= FREE_GPU_MIB]
    if len(free) < 2:
        return None
    chosen = f"CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in free)} "
    return (
        f"one process was started and {len(free)} GPUs are free; for all of them: "
        f"{'' if free == gpus else chosen}accelerate launch "
        f"--config_file launch/accelerate/ddp.yaml --num_processes {len(free)} "
        f"-m llmnorm train {' '.join(arguments)}".rstrip()
    )


def missing_extra(module: str) -> InputError:
    """The error for a module that an extra brings, to be raised where its import failed.

    Args:
        module: the module's name as imported, for example "peft" or "peft.tuners".
    """
    root = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if root in modules:
            return InputError(f"{root} is not installed; run: bash tools/bootstrap.sh {extra}")
    return InputError(f"{root} is not installed; run: bash tools/bootstrap.sh")


def report() -> str:
    """Everything a bug report should say about this machine, a few lines a subject."""
    sections = [
        ("software", _software()),
        ("machine", _machine()),
        ("GPUs", _gpus()),
        ("extras", [_extra(name) for name in EXTRAS]),
        ("collectives", [_collective(backend) for backend in _backends()]),
    ]
    return "\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections
    )


def _software() -> list[str]:
    lines = [f"llmnorm {_version('llmnorm')}{_commit()}", f"python {platform.python_version()}"]
    lines += [f"{name} {_version(name)}" for name in PACKAGES]
    if importlib.util.find_spec("torch"):
        lines[lines.index(f"torch {_version('torch')}")] += f" ({_cuda_build()})"
    return lines


def _machine() -> list[str]:
    import torch

    disk = shutil.disk_usage(".")
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return [
        f"{platform.platform()}",
        f"CPU: {usable} of {cores} cores usable, {torch.backends.cpu.get_cpu_capability()}",
        f"OMP_NUM_THREADS: {os.environ.get('OMP_NUM_THREADS', 'not set')} "
        f"(torch uses {torch.get_num_threads()} threads)",
        f"memory: {_memory()}",
        f"disk: {disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB",
    ]


def _gpus() -> list[str]:
    found = nvidia()
    if not found.gpus:
        return [f"none ({found.problem})"]
    lines = [_driver(found)]
    for gpu in found.gpus:
        lines.append(f"{gpu.index}: {gpu.name}, {gpu.used_mib} of {gpu.memory_mib} MiB in use")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        lines.append(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
    problem = cuda_problem()
    return [*lines, f"torch cannot use them: {problem}" if problem else "torch can use them"]


def _extra(name: str) -> str:
    for module in EXTRAS[name]:
        if importlib.util.find_spec(module) is None:
            return f"{name}: not installed ({module} is missing); bash tools/bootstrap.sh {name}"
    if name not in COMPILED:
        return f"{name}: present"
    code = "; ".join(f"import {module}" for module in EXTRAS[name])
    _, problem = _output([sys.executable, "-c", code])
    return f"{name}: {f'installed, but {problem}' if problem else 'present'}"


def _backends() -> list[str]:
    import torch

    return (
        ["gloo", "nccl"]
        if torch.cuda.is_available() and torch.cuda.device_count() > 1
        else ["gloo"]
    )


def _collective(backend: str) -> str:
    """Two real processes sum a tensor; a hang (firewall, wrong interface) is cut off, reported."""
    from torch import multiprocessing

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory, "store"))
        workers = multiprocessing.spawn(_all_reduce, (backend, store), nprocs=2, join=False)
        assert workers is not None  # spawn returns None only where it joins
        try:
            while not workers.join(timeout=1):
                if time.monotonic() - start > COLLECTIVE_SECONDS:
                    return f"{backend}: 2 processes did not finish within {COLLECTIVE_SECONDS} s"
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
            return f"{backend}: failed: {str(error).strip().splitlines()[-1]}"
        finally:
            for process in workers.processes:
                if process.is_alive():
                    process.kill()
    seconds = time.monotonic() - start
    return f"{backend}: all_reduce over 2 processes is right, {seconds:.1f} s with their start"


def _all_reduce(rank: int, backend: str, store: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    tensor = torch.full((1000,), rank + 1.0)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    if not bool((tensor == 3).all()):
        raise RuntimeError(f"1 + 2 gave {tensor[0].item()}")


def _cuda_build() -> str:
    import torch

    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the source tree that this file runs from; nothing for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    commit, problem = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if problem:
        return ""
    changed, _ = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f" (commit {commit.strip()}{', with changes' if changed.strip() else ''})"


def _memory() -> str:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return "unknown"
    free, total = (int(lines[key].split()[0]) / 2**20 for key in ("MemAvailable", "MemTotal"))
    return f"{free:.1f} GiB available of {total:.1f} GiB"


def _output(command: list[str]) -> tuple[str, str | None]:
    """A command's standard output, and its last line of complaint (None where it went well)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode == 0:
        return done.stdout, None
    complaint = (done.stderr or done.stdout).strip().splitlines()
    return done.stdout, complaint[-1] if complaint else f"{command[0]}: exit code {done.returncode}"


def main() -> int:
    """`python -m llmnorm.doctor check-gpu [auto|cpu|cuda]` (setup's own check), else the report."""
    if sys.argv[1:2] != ["check-gpu"]:
        print(report())
        return 0
    try:
        check_gpu(sys.argv[2] if len(sys.argv) > 2 else "auto")
    except InputError as error:
        print(f"llmnorm: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
