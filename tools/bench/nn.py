"""Measures where llmnorm/nn has a function of its own against torch's.

usage: python tools/bench/nn.py [--rounds 25] [--out docs/results/nn.json]

Forward and backward, one thread or as many as OMP_NUM_THREADS says: every norm in training against
F.rms_norm and F.layer_norm; a training step (forward, backward, AdamW) of a Pre-LN and a
Pre-RMSNorm model; the chunked loss against logits + F.cross_entropy for several chunk sizes. Of a
model with `unified` folded away, the profiled operations that could belong to a norm.
The candidates of a table take turns, so that a busy machine slows all, each with an untimed pass
before the timed one, so that none pays for memory that its predecessor gave back to the system. A
table shows medians over the rounds: of the ms, and of the ratios to another candidate in the same
round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import RESULTS, Table, publish
from torch import Tensor

from llmnorm.models.building import build_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import named_weights
from llmnorm.models.equivalence import Weights, convert
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.loss import chunk_size, linear_cross_entropy
from llmnorm.nn.norms.depth_scaling import scale_by_depth
from llmnorm.nn.norms.settings import (
    CRMSNormSettings,
    DyTSettings,
    LayerNormSettings,
    PowerNormSettings,
    RMSNormSettings,
    UnifiedNormSettings,
)

Run = Callable[[], Tensor]
Times = dict[str, list[float]]  # milliseconds of every round


def alternated(candidates: dict[str, Run], leaves: list[Tensor], rounds: int) -> Times:
    """Each candidate's forward and backward pass."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    upstream = torch.ones_like(next(iter(candidates.values()))())
    for turn in range(rounds + 2):
        for name, run in candidates.items():
            torch.autograd.grad(run(), leaves, upstream, allow_unused=True)
            start = time.perf_counter()
            torch.autograd.grad(run(), leaves, upstream, allow_unused=True)
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def norms(rows: int, width: int, rounds: int) -> Times:
    """Every norm in training over (rows, width) in float32."""
    x = torch.randn(rows, width, requires_grad=True)
    gain, offset = (t.requires_grad_() for t in (torch.ones(width), torch.zeros(width)))
    candidates: dict[str, Run] = {
        "F.rms_norm": lambda: F.rms_norm(x, (width,), gain, 1e-6),
        "F.layer_norm": lambda: F.layer_norm(x, (width,), gain, offset, 1e-6),
        "F.layer_norm without an offset": lambda: F.layer_norm(x, (width,), gain, None, 1e-6),
    }
    parts: dict[str, Any] = {
        "rms": RMSNormSettings(),
        "rms + lns": RMSNormSettings(),
        "layer": LayerNormSettings(),
        "crms": CRMSNormSettings(),
        "dyt": DyTSettings(),
        "power": PowerNormSettings(),
        "unified": UnifiedNormSettings(allow_leak=True),
    }
    leaves: list[Tensor] = [x, gain, offset]
    for name, settings in parts.items():
        norm = settings.build(width)
        if "lns" in name:
            scale_by_depth(norm, 3)
        leaves += norm.parameters()
        candidates[name] = _step_of(norm, x)
    return alternated(candidates, leaves, rounds)


def _step_of(norm: Any, x: Tensor) -> Run:
    """A micro-batch that counts as a step, where the norm counts steps."""

    def run() -> Tensor:
        if hasattr(norm, "begin"):
            norm.begin(None)
        y: Tensor = norm(x)
        return y

    return run


MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}


def training_steps(rounds: int) -> Times:
    """A step on 4 rows of 256 tokens."""
    ids = torch.randint(0, 4096, (4, 256))
    models = {
        name: build_model(LlmNormConfig(**MODEL, norm=norm), seed=0).train()
        for name, norm in (("Pre-LN", {"name": "layer", "eps": 1e-6}), ("Pre-RMSNorm", "rms"))
    }
    optimizers = {name: torch.optim.AdamW(m.parameters(), fused=True) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids, labels=ids, loss_only=True).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def norms_after_folding() -> dict[str, list[str]]:
    """Profiled operations that normalise, in evaluation, before and after `unified` is folded."""
    config = LlmNormConfig(**MODEL, norm={"name": "unified", "allow_leak": True})
    model = build_model(config, seed=0).eval()
    weights = convert(Weights(config.settings(), named_weights(model)), "identity")
    folded = LlmNormForCausalLM(LlmNormConfig.from_settings(weights.settings)).eval()
    for name, tensor in named_weights(folded).items():
        tensor.copy_(weights.tensors[name])
    found = {}
    for name, one in (("unified", model), ("folded", folded)):
        with torch.profiler.profile() as profile, torch.no_grad():
            one(torch.randint(0, 4096, (1, 64)))
        names = {event.key for event in profile.key_averages()}
        found[name] = sorted(n for n in names if any(w in n for w in ("norm", "rsqrt", "addcmul")))
    return found


def losses(tokens: int, width: int, vocabulary: int, rounds: int) -> Times:
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
        ours = " (ours)" if size == chunk_size(weight) else ""
        candidates[f"chunks of {size}{ours}"] = chunked(size)
    return alternated(candidates, [hidden, weight], rounds)


def over(times: list[float], others: list[float]) -> float:
    """The median of the ratios of two candidates' rounds."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "nn.json")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tables: dict[str, Times] = {
        f"norms, {rows} x {width}": norms(rows, width, options.rounds)
        for rows, width in ((4096, 768), (2048, 192))
    }
    tables["training step, 4 x 256 tokens, 6 layers of 256"] = training_steps(options.rounds)
    tables |= {
        f"loss, {tokens} tokens x {width}, vocabulary {vocabulary}": losses(
            tokens, width, vocabulary, max(3, options.rounds * 4096 // vocabulary)
        )
        for tokens, width, vocabulary in ((1024, 192, 4096), (1024, 384, 32768))
    }
    read = []
    for title, times in tables.items():
        others = [name for name in ("F.layer_norm",) if name in times]
        others.insert(0, next(iter(times)))
        cells = [
            [name, f"{statistics.median(row):.2f}", *(f"{over(row, times[o]):.3f}" for o in others)]
            for name, row in times.items()
        ]
        read.append(Table(title, ["", "ms", *(f"over {o}" for o in others)], cells))
    folded = norms_after_folding()
    names = [[name, ", ".join(found) or "none"] for name, found in folded.items()]
    read.append(Table("operations of norms in evaluation", ["model", "profiled"], names))
    publish(
        options.out,
        "Norms and loss (CPU, float32, forward and backward, medians of all rounds)",
        read,
        {
            "milliseconds": {
                title: {name: round(statistics.median(row), 3) for name, row in times.items()}
                for title, times in tables.items()
            },
            "operations_of_norms": folded,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
