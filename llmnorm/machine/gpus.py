"""Which GPUs this machine has and whether torch can use them; setup and train ask first.

    check_gpu("auto")             raises where nvidia-smi shows a GPU that torch cannot use
    launch_hint(["CONFIG.yaml"])  the command that would use all free GPUs, where several are
    python -m llmnorm.machine.gpus auto   check_gpu as a command, for tools/bootstrap.sh

What would surprise: nvidia-smi is asked what is in the machine, not torch, because a torch that
cannot see the GPU is the fault to be found. torch is imported only inside functions.
"""

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmnorm.part import InputError

# The CUDA builds of torch that the message may name: the newest that a driver runs, newest first.
TORCH_INDEXES = (((13, 0), "cu130"), ((12, 6), "cu126"))
FREE_GPU_MIB = 1024  # a GPU on which no more than this is in use counts as free


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
    """What nvidia-smi prints. Without nvidia-smi, or where it fails: no GPUs, and the `problem`."""
    if shutil.which("nvidia-smi") is None:
        return Nvidia((), None, "nvidia-smi is not installed")
    query = "--query-gpu=index,uuid,name,driver_version,memory.total,memory.used"
    listing, problem = output_of(["nvidia-smi", query, "--format=csv,noheader,nounits"])
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
    header, _ = output_of(["nvidia-smi"])
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


def own_serial() -> str:
    """The serial number of this process's GPU, its UUID where it has none; "" without nvidia-smi.

    A launcher gives each process of a computer one GPU, the one of its LOCAL_RANK.
    """
    gpus, index = visible_gpus(), int(os.environ.get("LOCAL_RANK", "0"))
    if index >= len(gpus):
        return ""
    uuid = gpus[index].uuid
    query = ["nvidia-smi", "--query-gpu=serial", "--format=csv,noheader", f"--id={uuid}"]
    serial = output_of(query)[0].strip()
    return serial if serial.isdigit() and int(serial) else uuid


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

    build = f"torch {torch.__version__} ({cuda_build()})"
    found = nvidia()
    if not gpus:
        why = found.problem or "CUDA_VISIBLE_DEVICES hides every GPU"
        raise InputError(
            f"training.device: cuda needs a GPU, but {why}; {build} says: {reason}; "
            "set training.device=cpu to train on the CPU"
        )
    raise InputError(
        f"nvidia-smi shows a GPU ({len(gpus)} x {gpus[0].name}, {driver_line(found)}) that {build} "
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


@cache
def fla_problem() -> str | None:
    """Why fla's kernels do not compute the recurrences of mixers here; None where they do."""
    for module in ("fla", "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return cuda_problem()


@cache
def one_decay_problem() -> str | None:
    """Why fla cannot compute mixers with one decay a head, or with none; None where it can.

    triton 3.4.0 to 3.7.0 compiles these kernels wrongly for Hopper GPUs (fla-org issue 640). With a
    decay fla refuses by itself. Without one it does not, and its gradient of q in bf16 was off by
    half on an H200.
    """
    import torch

    if importlib.util.find_spec("triton") is None or cuda_problem() is not None:
        return None
    triton = importlib.metadata.version("triton")
    number = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    hopper = torch.cuda.get_device_capability()[0] == 9
    if not hopper or not (3, 4, 0) <= number < (3, 7, 1):
        return None
    return f"triton {triton} computes them wrongly on Hopper GPUs, 3.7.1 does not"


def _cure(cuda: str | None) -> str:
    version = tuple(int(part) for part in (cuda or "0.0").split("."))
    for needed, name in TORCH_INDEXES:
        if version >= needed:
            index = f"https://download.pytorch.org/whl/{name}"
            return f"run LLMNORM_TORCH_INDEX={index} bash tools/bootstrap.sh"
    oldest = ".".join(map(str, TORCH_INDEXES[-1][0]))
    return f"update the driver to one that runs CUDA {oldest} or newer"


def driver_line(found: Nvidia) -> str:
    """The driver's version and the newest CUDA that it runs, for messages."""
    return f"driver {found.gpus[0].driver}, which runs CUDA up to {found.cuda or 'unknown'}"


def launch_file(name: str) -> str:
    """The path of the launch file `NAME.yaml`: in the installed package, or in the checkout."""
    installed = Path(__file__).parents[1] / "launch_files"
    return f"{installed if installed.is_dir() else 'launch/accelerate'}/{name}.yaml"


def launch_hint(arguments: Sequence[str], command: str = "train") -> str | None:
    """A sentence with the command that would use all free GPUs, where one process was started.

    None where several processes were started or fewer than two GPUs are free.

    Args:
        arguments: what follows the command on the command line.
        command: `train` or `finetune`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    gpus = visible_gpus()
    free = [gpu for gpu in gpus if gpu.used_mib <= FREE_GPU_MIB]
    if len(free) < 2:
        return None
    chosen = f"CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in free)} "
    return (
        f"one process was started, but {len(free)} GPUs are free; to use them all, run: "
        f"{'' if free == gpus else chosen}accelerate launch "
        f"--config_file {launch_file('ddp')} --num_processes {len(free)} "
        f"-m llmnorm {command} {shlex.join(arguments)}".rstrip()
    )


def cuda_build() -> str:
    """For example "built for CUDA 12.8", from torch's version file: importing torch is slow."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "not installed"
    cuda = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return f"built for CUDA {cuda}" if cuda else "built without CUDA"


def output_of(command: list[str]) -> tuple[str, str | None]:
    """A command's standard output, and the last line of its errors (None if it succeeded)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode == 0:
        return done.stdout, None
    complaint = (done.stderr or done.stdout).strip().splitlines()
    return done.stdout, complaint[-1] if complaint else f"{command[0]}: exit code {done.returncode}"


def main() -> int:
    """`python -m llmnorm.machine.gpus [auto|cpu|cuda]`: `check_gpu`, one line and exit code 2."""
    try:
        check_gpu(sys.argv[1] if len(sys.argv) > 1 else "auto")
    except InputError as error:
        print(f"llmnorm: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
