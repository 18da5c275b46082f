"""Every norm against its oracle: largest error in float64, float32 and bfloat16, 1 and 2 processes.

usage: python tools/bench/norm_accuracy.py [--out docs/results/norm_accuracy.json]

The oracles are those of the tests, in float64: the norm's definition and autograd through it. For
norms with running statistics they are the paper's equations written out, over nine steps with masks
of different lengths. An error is max|got - oracle| / max|oracle| of a tensor; the table has the
largest over outputs and gradients. Of 2 processes (gloo) each has half of the rows; in a third of
the steps the second one has no real token.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from report import RESULTS, Table, publish
from torch import Tensor

from llmnorm.nn.norms.running import RunningNorm, RunningStatistics
from llmnorm.nn.norms.settings import (
    CRMSNormSettings,
    DyTSettings,
    LayerNormSettings,
    PowerNormSettings,
    RMSNormSettings,
    UnifiedNormSettings,
)
from tests.nn.test_norms import plain
from tests.nn.test_running_norms import WIDTH, by_hand

NORMS: dict[str, Any] = {
    "layer": LayerNormSettings(),
    "rms": RMSNormSettings(),
    "crms": CRMSNormSettings(),
    "dyt": DyTSettings(),
    "power": PowerNormSettings(),
    "unified": UnifiedNormSettings(warmup=4, window=3, allow_leak=True),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 9


def batch(number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and upstream gradients (8, 16, width) that `dtype` holds exactly, and the mask."""
    generator = torch.Generator().manual_seed(number)
    x, g = (torch.randn(8, 16, WIDTH, generator=generator).to(dtype).double() for _ in range(2))
    real = torch.arange(16) < torch.randint(1, 17, (8, 1), generator=generator)
    if number % 3 == 1:
        real[4:] = False
    return x, g, real


def build(settings: Any) -> Any:
    """The norm, its parameters random."""
    torch.manual_seed(0)
    norm = settings.build(WIDTH)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    return norm


def run(settings: Any, dtype: torch.dtype, rank: int, world: int) -> list[list[Tensor]]:
    """Output and gradients of every step for this process's rows, computed in `dtype`."""
    norm, found = build(settings), []
    norm = norm.double() if dtype == torch.float64 else norm
    statistics = RunningStatistics(norm, _sum if world > 1 else lambda values: values)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for number in range(STEPS):
        x, g, real = (t[rows] for t in batch(number, dtype))
        if isinstance(norm, RunningNorm):
            norm.begin(real)
        norm.zero_grad()
        leaf = x.to(dtype).requires_grad_()
        out = norm(leaf)
        out.backward(g.to(dtype))
        statistics.commit()
        found.append([t.detach().clone() for t in (out, leaf.grad, *_gradients(norm))])
    return found


def oracle(settings: Any, dtype: torch.dtype) -> list[list[Tensor]]:
    """What `run` should return for the whole batch, in float64."""
    norm, found = build(settings).double(), []
    step = by_hand(settings, norm) if isinstance(norm, RunningNorm) else None
    for number in range(STEPS):
        x, g, real = batch(number, dtype)
        if step is not None:
            found.append(list(step(x, g, real)))
            continue
        norm.zero_grad()
        leaf = x.requires_grad_()
        out = plain(settings, norm, leaf)
        out.backward(g)
        found.append([out.detach(), leaf.grad, *(t.clone() for t in _gradients(norm))])
    return found


def _gradients(norm: Any) -> list[Tensor]:
    return [parameter.grad for parameter in norm.parameters()]


def _sum(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def _process(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    for name, settings in NORMS.items():
        for precision, dtype in DTYPES.items():
            torch.save(run(settings, dtype, rank, 2), f"{directory}/{name}-{precision}-{rank}")
    dist.destroy_process_group()


def worst(got: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest relative error over all steps and tensors."""
    errors = []
    for ours, theirs in zip(got, expected, strict=True):
        for tensor, wanted in zip(ours, theirs, strict=True):
            errors.append(float((tensor.double() - wanted).abs().max() / wanted.abs().max()))
    return max(errors)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "norm_accuracy.json")
    options = parser.parse_args(arguments)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_process, (directory,), nprocs=2)
        for name, settings in NORMS.items():
            row = table[name] = {}
            for precision, dtype in DTYPES.items():
                expected = oracle(settings, dtype)
                row[f"{precision}, 1 process"] = worst(run(settings, dtype, 0, 1), expected)
                halves = [torch.load(f"{directory}/{name}-{precision}-{rank}") for rank in (0, 1)]
                joined = [
                    [torch.cat((a, b)) if k < 2 else a + b for k, (a, b) in enumerate(pairs)]
                    for pairs in (zip(*two, strict=True) for two in zip(*halves, strict=True))
                ]
                row[f"{precision}, 2 processes"] = worst(joined, expected)
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{row[column]:.1e}" for column in columns)] for name, row in table.items()]
    read = Table("largest error relative to the largest entry", ["norm", *columns], rows)
    publish(options.out, "Norms against their oracles", [read], {"relative_error": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
