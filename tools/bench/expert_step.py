"""Measure a step of Muon on a stack of experts beside AdamW's, alone and inside a training step.

usage: python tools/bench/expert_step.py [--device cpu] [--experts 64] [--rows 512] [--columns 256]
           [--tokens 16384 65536] [--rounds 10] [--out docs/results/expert_step.json]

The layer is a stack of up and one of down projections; every token goes to two experts, as many to
each. Experts multiply by torch's grouped products, in bf16 on a GPU. A training step is a forward
and backward pass on `--tokens` tokens and the optimizer's step; the bar is on the last number of
tokens. Candidates take turns; a figure is the median over the rounds, and a ratio the median of the
ratios of a round.

    adamw       torch's fused kernel
    muon        our rule on the stacks
    muon apart  our rule on the same experts as parameters of their own, for what batching gains

On a CPU times are seconds of the process, on a GPU seconds on the clock after a synchronisation.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, Table, publish
from torch import Tensor, nn
from torch.nn import functional as F

from llmnorm.optim.groups import Groups
from llmnorm.optim.settings import AdamWSettings, MuonSettings

BAR = 1.1  # training steps: muon over adamw
CHOSEN = 2  # experts of a token


class Experts(nn.Module):
    """Stacks (experts, rows, columns) and (experts, columns, rows)."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, rows, columns) * columns**-0.5)
        self.down = nn.Parameter(torch.randn(experts, columns, rows) * rows**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, columns), each token to `CHOSEN` experts; (tokens, columns)."""
        tokens = len(x) * CHOSEN // self.num_experts
        ends = torch.arange(1, self.num_experts + 1, device=x.device, dtype=torch.int32) * tokens
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
        sent = x.repeat(CHOSEN, 1).to(dtype)
        inner = F.silu(F.grouped_mm(sent, self.up.to(dtype).mT, offs=ends))
        out = F.grouped_mm(inner, self.down.to(dtype).mT, offs=ends)
        return out.view(CHOSEN, len(x), -1).sum(0).float()


def candidates(layer: Experts) -> dict[str, Callable[[], Any]]:
    """A step of each optimizer on the gradients that the layer has now."""
    stacks = dict(layer.named_parameters())
    apart = {
        f"{name}.{number}": nn.Parameter(matrix.clone())
        for name, stack in stacks.items()
        for number, matrix in enumerate(stack.detach())
    }
    adamw = AdamWSettings(lr=1e-4).build(Groups(stacks, {}))
    muon = MuonSettings(lr=1e-4).build(Groups(stacks, {}))
    single = MuonSettings(lr=1e-4).build(Groups(apart, {}))
    for name, stack in stacks.items():
        assert stack.grad is not None
        for number, grad in enumerate(stack.grad.clone()):
            apart[f"{name}.{number}"].grad = grad
    return {"adamw": adamw.step, "muon": muon.step, "muon apart": single.step}


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of some work."""
    if device == "cpu":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in (("experts", 64), ("rows", 512), ("columns", 256), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--out", type=Path, default=RESULTS / "expert_step.json")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device(options.device):
        layer = Experts(options.experts, options.rows, options.columns)
        inputs = {tokens: torch.randn(tokens, options.columns) for tokens in options.tokens}

    def pass_(x: Tensor) -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    for x in inputs.values():
        pass_(x)
    steps = candidates(layer)
    for step in steps.values():
        step()
    alone: dict[str, list[float]] = {name: [] for name in steps}
    whole: dict[int, dict[str, list[float]]] = {
        tokens: {"adamw": [], "muon": []} for tokens in inputs
    }
    for number in range(options.rounds):
        first = number % len(steps)
        order = [*steps][first:] + [*steps][:first]
        for name in order:
            alone[name].append(timed(steps[name], options.device))
        for tokens, x in inputs.items():
            for name in [name for name in order if name in whole[tokens]]:
                work = partial(both, partial(pass_, x), steps[name])
                whole[tokens][name].append(timed(work, options.device))
    ratios = {tokens: ratio(found["muon"], found["adamw"]) for tokens, found in whole.items()}
    batching = ratio(alone["muon"], alone["muon apart"])
    met = ratios[options.tokens[-1]] <= BAR
    sizes = f"{options.experts} experts of {options.rows} x {options.columns}"
    tables = [
        Table(
            f"{sizes}, {options.device}: milliseconds (median)",
            ["", "optimizer's step", *(f"training step, {tokens} tokens" for tokens in inputs)],
            [
                [name, milliseconds(found), *(milliseconds(whole[t].get(name)) for t in inputs)]
                for name, found in alone.items()
            ],
        ),
        Table(
            "ratios",
            ["", "measured", "bar", ""],
            [
                ["optimizer's step, muon / muon apart", f"{batching:.3f}", "", ""],
                *(
                    [f"training step, {tokens} tokens, muon / adamw", f"{found:.3f}", "", ""]
                    for tokens, found in [*ratios.items()][:-1]
                ),
                [
                    f"training step, {options.tokens[-1]} tokens, muon / adamw",
                    f"{ratios[options.tokens[-1]]:.3f}",
                    f"{BAR}",
                    "met" if met else "missed",
                ],
            ],
        ),
    ]
    figures = {"alone": alone, "training": whole, "ratios": ratios, "batching": batching}
    publish(options.out, f"A step on {sizes} ({options.device})", tables, figures)
    return 0 if met else 1


def both(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """One after the other."""
    first()
    second()


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def milliseconds(seconds: list[float] | None) -> str:
    """The median; empty where nothing was measured."""
    return "" if seconds is None else f"{1e3 * statistics.median(seconds):.1f}"


if __name__ == "__main__":
    sys.exit(main())
