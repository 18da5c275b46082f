"""`llmnorm plan`: what a run needs before machines are rented for it."""

import argparse
import math

from llmnorm.commands.arguments import add_config, count, local
from llmnorm.commands.configured import load_config, resolve_auto
from llmnorm.part import InputError

HELP = "tell what a run needs on so many GPUs, without running it"
TAKES_SETTINGS = True
LAST = -1  # the last process


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, the GPUs, and how the model is laid out over them."""
    add_config(parser)
    parser.add_argument("--gpus", type=count, default=1, metavar="N", help="how many (1)")
    help = "a100, h100, h200, b200, l4, a10, rtx4090, or cpu for this machine"
    parser.add_argument("--gpu", metavar="NAME", help=help)
    help = "of a GPU that has no name here: its memory in GiB"
    parser.add_argument("--memory", type=_positive, metavar="GB", help=help)
    help = "of such a GPU: 1e12 products of bf16 a second"
    parser.add_argument("--tflops", type=_positive, metavar="X", help=help)
    help = "of such a GPU: GB a second that it sends to another"
    parser.add_argument("--link", type=_positive, metavar="GB/s", help=help)
    help = "in the place of parallel.sharding: none, ddp, fsdp2, hsdp, zero1, zero2 or zero3"
    parser.add_argument("--sharding", metavar="NAME", help=help)
    help = "the price of a GPU for an hour, for what the run costs"
    parser.add_argument("--price", type=_positive, metavar="PER_GPU_HOUR", help=help)
    help = "take the machine's speed from this run of the same parts, in any size"
    parser.add_argument("--calibrate", type=local, metavar="RUN", help=help)
    help = "list the layouts that fit, the fastest first, in the place of a plan"
    parser.add_argument("--fit", action="store_true", help=help)
    help = "try out a step of process RANK (the last) on shapes alone, among as many as --gpus"
    parser.add_argument("--trace", type=_rank, nargs="?", const=LAST, metavar="RANK", help=help)
    help = "write plan.json and a picture there"
    parser.add_argument("--out", type=local, metavar="DIR", help=help)


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print the plan."""
    from llmnorm.analysis.plan.gpus import Gpu, gpu_named, gpu_of

    given = (parsed.memory, parsed.tflops, parsed.link)
    gpu: Gpu
    if parsed.gpu is not None:
        if any(value is not None for value in given):
            raise InputError(
                "--gpu: names a GPU, and --memory, --tflops and --link describe one; give one or "
                "the other"
            )
        gpu = gpu_named(parsed.gpu)
    elif all(value is not None for value in given):
        gpu = gpu_of(*given)
    else:
        raise InputError(
            "--gpu: is missing: a100, h100, h200, b200, l4, a10, rtx4090 or cpu; another is "
            "described by --memory GB --tflops X --link GB/s, all three"
        )
    if parsed.fit:
        _refuse_beside_fit(parsed)
    config, _ = resolve_auto(load_config(parsed.config, overrides))
    from llmnorm.analysis.plan.command import fit, plan

    if parsed.fit:
        fit(config, gpu, parsed.gpus, parsed.calibrate)
        return
    plan(
        config,
        gpu,
        parsed.gpus,
        sharding=parsed.sharding,
        output=parsed.out,
        calibrated_by=parsed.calibrate,
        price=parsed.price,
        traced=parsed.trace,
    )


def _refuse_beside_fit(parsed: argparse.Namespace) -> None:
    """Refuse what is of a single layout.

    Raises:
        InputError: it was given.
    """
    for option in ("sharding", "price", "trace", "out"):
        if getattr(parsed, option) is not None:
            raise InputError(
                f"--{option}: is of one layout, and --fit lists several; leave one of them out"
            )


def _rank(text: str) -> int:
    """The number of a process."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected the number of a process, got '{text[:40]}'")
    return int(text)


def _positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got '{text[:40]}'")
    return number
