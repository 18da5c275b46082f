"""Measures the two places where llmnorm/nn has a function of its own against torch's.

usage: python tools/bench/nn.py [--rounds 15] [--out docs/results/nn.json]

Forward and backward, one thread or as many as OMP_NUM_THREADS says, of RMS norm against F.rms_norm
and F.layer_norm, and of the chunked loss against logits + F.cross_entropy for several chunk sizes.
The candidates of a row alternate, so that a busy machine slows all; the table shows the best of all
rounds in ms and its ratio to the first.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from report import RESULTS, Table, publish
from torch import Tensor

from llmnorm.nn.loss import chunk_size, linear_cross_entropy
from llmnorm.nn.norms.rms import RMSNorm

Run = Callable[[], Tensor]


def best(candidates: dict[str, Run], leaves: list[Tensor], rounds: int) -> dict[str, float]:
    """Milliseconds of each candidate's forward and backward pass."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    upstream = torch.ones_like(next(iter(candidates.values()))())
    for turn in range(rounds + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            torch.autograd.grad(run(), leaves, upstream)
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(min(values), 3) for name, values in times.items()}


def norms(rows: int, width: int, rounds: int) -> dict[str, float]:
    """RMS norm over (rows, width) in float32."""
    norm = RMSNorm(width, eps=1e-6)
    x = torch.randn(rows, width, requires_grad=True)
    candidates: dict[str, Run] = {
        "F.rms_norm": lambda: F.rms_norm(x, (width,), norm.weight, 1e-6),
        "RMSNorm": lambda: norm(x),
        "F.layer_norm": lambda: F.layer_norm(x, (width,), norm.weight, None, 1e-6),
    }
    return best(candidates, [x, norm.weight], rounds)


def losses(tokens: int, width: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """The loss of (tokens, width) hidden states, float32."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))

    def chunked(size: int) -> Run:
        return lambda: linear_cross_entropy(hidden, weight, labels, chunk=size)

    candidates: dict[str, Run] = {
        "full logits": lambda: F.cross_entropy(hidden @ weight.t(), labels)
    }
    for size in (64, 128, 256, 512, 1024):
        ours = " (ours)" if size == chunk_size(vocabulary) else ""
        candidates[f"chunks of {size}{ours}"] = chunked(size)
    return best(candidates, [hidden, weight], rounds)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "nn.json")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tables = {
        f"RMS norm, {rows} x {width}": norms(rows, width, options.rounds)
        for rows, width in ((4096, 768), (2048, 192))
    } | {
        f"loss, {tokens} tokens x {width}, vocabulary {vocabulary}": losses(
            tokens, width, vocabulary, max(3, options.rounds * 4096 // vocabulary)
        )
        for tokens, width, vocabulary in ((1024, 192, 4096), (1024, 384, 32768))
    }
    read = []
    for title, row in tables.items():
        first = next(iter(row.values()))
        cells = [[name, f"{value:.2f}", f"{value / first:.3f}"] for name, value in row.items()]
        read.append(Table(title, ["", "ms", "over the first"], cells))
    publish(
        options.out,
        "RMS norm and loss against torch's (forward and backward, best of all rounds)",
        read,
        {"milliseconds": tables},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
