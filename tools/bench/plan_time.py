"""Compare planned times of a step with measured ones, at twice the depth and the width.

usage: python tools/bench/plan_time.py [--rounds 3] [--only softmax] [--gpu NAME]
           [--out docs/results/plan_time.json]

Each cell is a kind of run, by mixer and optimizer. A small run of it is trained on this machine,
and so is one that is twice as deep and twice as wide, in turns. `llmnorm plan` gets the efficiency
of the first (`--calibrate`) and plans the second. A ratio is planned over measured, the median of
the rounds; the limit is 25 %. On a GPU (`--gpu h200`) sizes are those of models that fill it, and
another column has the plan with the stated efficiency.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from report import ROOT, Table, publish

from llmnorm.analysis.plan.calibration import calibrate, step_seconds
from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.time import EFFICIENCY, StepWork, step_time, step_work
from llmnorm.config.file import load

LIMIT = 0.25
SMOKE = ROOT / "configs" / "smoke.yaml"
CELLS = {
    "softmax, adamw": ["model.mixer=softmax", "optimizer=adamw"],
    "softmax, muon": ["model.mixer=softmax", "optimizer=muon"],
    "nala, adamw": ["model.mixer=nala", "optimizer=adamw"],
    "ssd, adamw": ["model.mixer=ssd", "optimizer=adamw"],
    "recomputed, adamw": ["optimizer=adamw", "parallel.activation_checkpointing=true"],
}


class Size(NamedTuple):
    """Width, inner width, layers, heads, context, rows a step, steps."""

    hidden: int
    inner: int
    layers: int
    heads: int
    context: int
    rows: int
    steps: int

    def words(self, device: str) -> list[str]:
        """The settings."""
        return [
            f"model.hidden_size={self.hidden}",
            f"model.intermediate_size={self.inner}",
            f"model.num_hidden_layers={self.layers}",
            f"model.num_attention_heads={self.heads}",
            f"model.num_key_value_heads={self.heads}",
            f"model.max_position_embeddings={self.context}",
            f"data.context_length={self.context}",
            f"training.global_batch={self.rows}",
            f"training.steps={self.steps}",
            f"training.device={device}",
            *("evaluation.every=null", "evaluation.samples=0", "checkpoint.every=null"),
            *(["training.precision=bf16"] if device == "cuda" else []),
        ]

    def doubled(self, steps: int) -> "Size":
        """Twice as deep and twice as wide."""
        return self._replace(
            hidden=2 * self.hidden,
            inner=2 * self.inner,
            layers=2 * self.layers,
            heads=2 * self.heads,
            steps=steps,
        )


SIZES = {"cpu": Size(128, 344, 3, 4, 256, 8, 16), "cuda": Size(1024, 2816, 8, 16, 1024, 16, 30)}


def main(arguments: list[str] | None = None) -> int:
    """Train, plan, compare, print, write; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cells whose name has this")
    parser.add_argument("--gpu", default="cpu")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    gpu = gpu_named(options.gpu)
    small = SIZES[gpu.device]
    small = small._replace(steps=options.steps or small.steps)
    large = small.doubled(options.steps or max(6, small.steps // 2))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, words in CELLS.items():
            if options.only in name:
                rounds = [
                    _round(Path(root) / f"{name} {number}", words, small, large, gpu.name)
                    for number in range(options.rounds)
                ]
                found[name] = {"rounds": rounds, "ratio": median(r["ratio"] for r in rounds)}
    table = Table(
        f"a step planned by a run of {small.layers} layers, {small.hidden} wide, for "
        f"{large.layers} layers, {large.hidden} wide; the limit is {LIMIT:.0%}",
        ["cell", "small, s", "large, s", "planned, s", "ratio", "efficiency", "at the stated one"],
        [
            [
                name,
                *(
                    f"{median(r[key] for r in cell['rounds']):.4g}"
                    for key in ("small", "large", "planned")
                ),
                f"{cell['ratio']:.3f}",
                *(f"{median(r[k] for r in cell['rounds']):.3g}" for k in ("efficiency", "stated")),
            ]
            for name, cell in found.items()
        ],
    )
    publish(options.out, "Planned time of a step", [table], {"limit": LIMIT, "cells": found})
    return int(any(abs(cell["ratio"] - 1) > LIMIT for cell in found.values()))


def _round(root: Path, words: list[str], small: Size, large: Size, gpu: str) -> dict[str, float]:
    """Train both sizes and plan the larger."""
    card = gpu_named(gpu)
    runs = {
        name: _train(root / name, [*words, *size.words(card.device)])
        for name, size in (("small", small), ("large", large))
    }
    config = load(runs["large"]).config
    calibration = calibrate(runs["small"], config, card)
    layout = layout_of(config, card, 1)
    work: StepWork = step_work(layout, record(config, layout.micro_batch, card.device))
    planned = step_time(work, calibration.efficiency).seconds
    measured, _ = step_seconds(runs["large"])
    return {
        "small": calibration.seconds,
        "large": measured,
        "planned": planned,
        "ratio": planned / measured,
        "efficiency": calibration.efficiency,
        "stated": step_time(work, EFFICIENCY).seconds,
    }


def _train(run: Path, words: list[str]) -> Path:
    """A run of a process of its own; returns its directory."""
    places = [f"run_dir={run}", f"data.dir={run.parent.parent / 'data'}"]
    command = [sys.executable, "-m", "llmnorm", "train", str(SMOKE), *words, *places]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return run


if __name__ == "__main__":
    sys.exit(main())
