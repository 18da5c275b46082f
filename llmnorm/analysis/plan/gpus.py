"""GPUs that `llmnorm plan` knows: their memory, arithmetic and links.

    gpu_named("h100")        a row of the table; "cpu" is this machine
    gpu_of(80, 989, 450)     one that the table lacks, from `--memory`, `--tflops` and `--link`

Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, L4 and A10, and the
Ada GPU architecture paper (RTX 4090). Memory is what the driver shows as total. FLOP/s are dense,
without sparsity, products of bf16 summed in float32; of float32 they are those outside of the
tensor cores, since torch's default for float32 products is not TF32. Links are bytes a second that
one GPU sends while it receives as many: half of what data sheets of NVLink name.

What would surprise:
- Links across nodes are the network of the usual machine with eight of them, divided by eight:
  DGX A100 (8 x 200 Gb/s), DGX H100, H200 and B200 (8 x 400 Gb/s); 100 Gb/s a node for the others.
- The `cpu` row is an estimate (16 operations a cycle, 2.5 GHz, a core for each processor that the
  system shows); a calibration replaces it.
"""

import os
from dataclasses import dataclass

from llmnorm.machine.memory import limit
from llmnorm.part import InputError, nearest

MIB, GIB = 2**20, 2**30
PER_NODE = 8
CORE_FLOPS = 16 * 2.5e9  # a core with AVX2: 8 lanes of float32, multiplied and added
# Of a GPU that is not in the table only the products are given; these are H100's proportions.
FLOPS_A_BYTE = 295.0  # products in bf16 for a byte of memory traffic
BF16_OVER_FLOAT32 = 14.8


@dataclass(frozen=True)
class Gpu:
    """What a plan must know of a GPU.

    Attributes:
        name: as `--gpu` takes it.
        memory_bytes: all of it, in bytes.
        flops: dense products of bf16, operations a second.
        flops_float32: products of float32, operations a second.
        bandwidth: of its memory, bytes a second.
        link: to the other GPUs of its node, bytes a second in one direction.
        link_across: to GPUs of other nodes, its share of the node's network.
        per_node: GPUs of a node.
    """

    name: str
    memory_bytes: int
    flops: float
    flops_float32: float
    bandwidth: float
    link: float
    link_across: float
    per_node: int = PER_NODE

    @property
    def device(self) -> str:
        """The kind of device that torch computes on: "cpu" or "cuda"."""
        return "cpu" if self.name == "cpu" else "cuda"


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 81_920 * MIB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
        Gpu("h100", 81_559 * MIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
        Gpu("h200", 143_771 * MIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
        Gpu("b200", 183_359 * MIB, 2250e12, 75e12, 8e12, 900e9, 50e9),
        Gpu("l4", 23_034 * MIB, 121e12, 30.3e12, 0.3e12, 32e9, 1.56e9),
        Gpu("a10", 23_028 * MIB, 125e12, 31.2e12, 0.6e12, 32e9, 1.56e9),
        Gpu("rtx4090", 24_564 * MIB, 165.2e12, 82.6e12, 1.008e12, 32e9, 1.56e9),
    )
}
NAMES = [*GPUS, "cpu"]


def gpu_named(name: str) -> Gpu:
    """A GPU of the table, or for "cpu" this machine.

    Raises:
        InputError: there is none of that name; the nearest is named.
    """
    if name == "cpu":
        return _this_cpu()
    if name.lower() not in GPUS:
        raise InputError(
            f"--gpu: '{name}' is not known; {nearest(name.lower(), NAMES)}; another is described "
            "by --memory GB --tflops X --link GB/s"
        )
    return GPUS[name.lower()]


def gpu_of(memory: float, tflops: float, link: float) -> Gpu:
    """A GPU that is not in the table; what was not given is in H100's proportions.

    Args:
        memory: GiB.
        tflops: 1e12 dense products of bf16 a second.
        link: GB a second to any other GPU, of its node or of others.
    """
    flops = tflops * 1e12
    return Gpu(
        name="given",
        memory_bytes=int(memory * GIB),
        flops=flops,
        flops_float32=flops / BF16_OVER_FLOAT32,
        bandwidth=flops / FLOPS_A_BYTE,
        link=link * 1e9,
        link_across=link * 1e9,
    )


def _this_cpu() -> Gpu:
    """This machine, whose processes share its memory and its cores: the numbers are those of all.

    Raises:
        InputError: the system does not say how much memory it has.
    """
    memory = limit()
    if memory is None:
        raise InputError(
            "--gpu: cpu: this system does not say how much memory it has; give "
            "--memory GB --tflops X --link GB/s"
        )
    flops = CORE_FLOPS * (os.cpu_count() or 1)
    # Two channels of memory, over which processes also exchange what they send.
    return Gpu("cpu", memory, flops, flops, 20e9, 5e9, 1e9, per_node=1)
