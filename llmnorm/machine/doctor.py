"""The report of `llmnorm doctor`: this machine and this installation, for a bug report.

    report()                      software, machine, GPUs, extras, and a sum over two real processes
    versions()                    the line of `llmnorm --version`
    version()                     the package and its commit, as saved with every run
    missing_extra("peft")         the error that names the line which installs it

What would surprise: every room may import this file, to raise `missing_extra`. So it imports only
the ground floor, and torch only inside functions.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from llmnorm.machine.gpus import (
    cuda_build,
    cuda_problem,
    driver_line,
    fla_problem,
    nvidia,
    one_decay_problem,
    output_of,
)
from llmnorm.machine.processor import processor
from llmnorm.part import InputError

# Each extra of pyproject.toml -> the modules by which it is recognised.
EXTRAS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("deepspeed",),
    "flash": ("flash_attn",),
    "fla": ("fla",),
    "finetune": ("peft",),
    "quant": ("bitsandbytes",),
    "gguf": ("gguf",),
    "eval": ("lm_eval",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "structured": ("llguidance",),
    "track": ("tensorboard", "wandb", "trackio"),
    "remote": ("s3fs",),
    "docs": ("mkdocs", "material"),
    "dev": ("pytest", "hypothesis", "jsonschema", "mypy", "openai", "ruff", "hatchling"),
}
_ABOVE = Path(__file__).resolve().parents[2]  # of the package: the checkout, or site-packages
# Extras with compiled parts, which break at import, not at installation: the report imports them.
COMPILED = ("deepspeed", "flash", "fla", "quant")
PACKAGES = ["accelerate", "transformers", "datasets", "tokenizers", "safetensors", "numpy"]
COLLECTIVE_SECONDS = 300


def missing_extra(module: str) -> InputError:
    """The error for a module that an extra brings, to be raised where its import failed.

    Args:
        module: the module's name as imported, for example "peft" or "peft.tuners".
    """
    root = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if root in modules:
            return InputError(f"{root} is not installed; run: {_installs(extra)}")
    return InputError(f"{root} is not installed; run: {_installs()}")


def _installs(extra: str = "") -> str:
    """The line that installs an extra, or without one the package: a checkout has a script."""
    if (_ABOVE / "tools" / "bootstrap.sh").is_file():
        return f"bash tools/bootstrap.sh {extra}".rstrip()
    return f"pip install 'llmnorm[{extra}]'" if extra else "pip install llmnorm"


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


def versions() -> str:
    """The line of `llmnorm --version`: package, torch and the CUDA that torch was built for."""
    return f"llmnorm {version()}, torch {_version('torch')} ({cuda_build()})"


@cache
def version() -> str:
    """The version of the package, and the commit where it runs from a checkout."""
    return _version("llmnorm") + _commit()


def _software() -> list[str]:
    others = [f"{name} {_version(name)}" for name in PACKAGES]
    return [versions(), f"python {platform.python_version()}", *others]


def _machine() -> list[str]:
    import torch

    disk = shutil.disk_usage(".")
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return [
        f"{platform.platform()}",
        f"CPU: {usable} of {cores} cores usable, {_processor()}",
        f"OMP_NUM_THREADS: {os.environ.get('OMP_NUM_THREADS', 'not set')} "
        f"(torch uses {torch.get_num_threads()} threads)",
        f"memory: {_memory()}",
        f"disk: {disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB",
    ]


def _processor() -> str:
    found = processor()
    widest = "no AVX2" if found.instructions == "none" else f"{found.instructions} at most"
    return f"{found.vendor or 'unknown vendor'} family {found.family}, {widest}"


def _gpus() -> list[str]:
    found = nvidia()
    if not found.gpus:
        return [f"none ({found.problem})"]
    lines = [driver_line(found)]
    for gpu in found.gpus:
        lines.append(f"{gpu.index}: {gpu.name}, {gpu.used_mib} of {gpu.memory_mib} MiB in use")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        lines.append(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
    problem = cuda_problem()
    return [*lines, f"torch cannot use them: {problem}" if problem else "torch can use them"]


def _extra(name: str) -> str:
    for module in EXTRAS[name]:
        if importlib.util.find_spec(module) is None:
            return f"{name}: not installed ({module} is missing); {_installs(name)}"
    if name not in COMPILED:
        return f"{name}: present"
    code = "; ".join(f"import {module}" for module in EXTRAS[name])
    _, problem = output_of([sys.executable, "-c", code])
    if problem:
        return f"{name}: installed, but {problem}"
    return f"{name}: present{_served() if name == 'fla' else ''}"


def _served() -> str:
    """Which mixers fla's kernels compute on this machine (llmnorm/nn/mixers/fla.py)."""
    problem = fla_problem()
    if problem:
        return f"; recurrent mixers do not use it: {problem}"
    problem = one_decay_problem()
    but = f", except with a single decay a head or none: {problem}" if problem else ""
    return f"; recurrent mixers use its kernels in bf16{but}"


def _backends() -> list[str]:
    import torch

    return (
        ["gloo", "nccl"]
        if torch.cuda.is_available() and torch.cuda.device_count() > 1
        else ["gloo"]
    )


def _collective(backend: str) -> str:
    """Whether two real processes can sum a tensor.

    A firewall or a wrong network interface makes them wait for ever: they are killed after
    COLLECTIVE_SECONDS, and the report says so. A busy machine needs a minute for the two imports.
    """
    from torch import multiprocessing

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory, "store"))
        workers = multiprocessing.spawn(_all_reduce, (backend, store), nprocs=2, join=False)
        assert workers is not None  # spawn returns None only where it joins
        try:
            while not workers.join(timeout=1):
                if time.monotonic() - start > COLLECTIVE_SECONDS:
                    return (
                        f"{backend}: 2 processes could not sum a tensor in {COLLECTIVE_SECONDS} s; "
                        "look at the firewall, or name the network interface in GLOO_SOCKET_IFNAME "
                        "(nccl: NCCL_SOCKET_IFNAME)"
                    )
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the source tree that this file runs from; nothing for an installed package."""
    if not (_ABOVE / ".git").exists():
        return ""
    commit, problem = output_of(["git", "-C", str(_ABOVE), "rev-parse", "--short=12", "HEAD"])
    if problem:
        return ""
    status = ["git", "-C", str(_ABOVE), "status", "--porcelain", "--untracked-files=no"]
    changed, _ = output_of(status)
    return f" (commit {commit.strip()}{', with changes' if changed.strip() else ''})"


def _memory() -> str:
    try:
        lines = dict(
            line.split(":", 1)
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
    except OSError:
        return "unknown"
    free, total = (int(lines[key].split()[0]) / 2**20 for key in ("MemAvailable", "MemTotal"))
    return f"{free:.1f} GiB available of {total:.1f} GiB"
