"""Which processor this is, and how wide the instructions are that torch may use on it.

    processor()     Processor(vendor="AMD", family=25, instructions="AVX512")

What would surprise: the environment counts as much as the hardware. ATEN_CPU_CAPABILITY limits
torch's own kernels and ONEDNN_MAX_CPU_ISA those of oneDNN. Where one of them is AVX2, the answer is
that of a processor without AVX-512. Both libraries read their variable once in a process, and so
does this file.
"""

import os
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

Instructions = Literal["AVX512", "AVX2", "none"]

# The values of ONEDNN_MAX_CPU_ISA that stay below AVX2 (oneDNN's page "CPU dispatcher control").
BELOW_AVX2 = ("SSE41", "AVX")


class Processor(NamedTuple):
    """What decides which library multiplies fastest.

    `vendor` is "AMD", "Intel" or what /proc/cpuinfo says; "" and family 0 where there is no such
    file. `instructions` are the widest ones that the processor has and the environment allows:
    "none" stands for less than AVX2, and for a processor that is no x86.
    """

    vendor: str
    family: int
    instructions: Instructions


@cache
def processor() -> Processor:
    """This machine's processor as the environment of this process lets torch use it."""
    import torch

    facts = _facts()
    vendor = facts.get("vendor_id", "")
    family = facts.get("cpu family", "0")
    return Processor(
        {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(vendor, vendor),
        int(family) if family.isdigit() else 0,
        allowed(torch.backends.cpu.get_cpu_capability(), onednn_limit()),
    )


def allowed(capability: str, limit: str) -> Instructions:
    """The narrower of torch's capability (which heeds ATEN_CPU_CAPABILITY) and oneDNN's limit.

    A limit that oneDNN does not know is none, for oneDNN ignores it too.
    """
    if capability not in ("AVX512", "AVX2") or limit in BELOW_AVX2:
        return "none"
    return "AVX2" if capability == "AVX2" or limit.startswith("AVX2") else "AVX512"


def onednn_limit() -> str:
    """ONEDNN_MAX_CPU_ISA or its old name DNNL_MAX_CPU_ISA, in capitals; "" if neither is set."""
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    return next((os.environ[name].upper() for name in names if os.environ.get(name)), "")


def _facts() -> dict[str, str]:
    """The lines of /proc/cpuinfo, of whichever core comes last; {} where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
