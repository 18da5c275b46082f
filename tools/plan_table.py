"""Plans of models from 130 million to 30 billion parameters: the table that ends docs/plan.md.

usage: python tools/plan_table.py         (plans; writes docs/results/plan/table.json and the page)
       python tools/plan_table.py --page  (writes the page from the figures)

Each row is the fastest layout that fits (`llmnorm plan --fit`), without a calibration. Beside it
stands AdamW's run on twice as many GPUs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.search import Candidate, fitting
from llmnorm.analysis.plan.time import run_time
from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "results" / "plan" / "table.json"
PAGE = ROOT / "docs" / "plan.md"
HEADING = """
## From 130 million parameters to 30 billion

The fastest layout that fits on H100s at 2.50 an hour, compiled, in bf16, without a calibration; made by `python tools/plan_table.py` ([figures](results/plan/table.json)). `rows at once` is the micro-batch, `waiting` and `update` are shares of a step.

"""  # noqa: E501
GPU, PRICE, VOCABULARY = "h100", 2.5, 32_000
OPTIMIZERS = ("adamw", "muon", "conda")


class Model(NamedTuple):
    """Width, inner width, layers, heads, context, rows a step, tokens of the run, GPUs."""

    hidden: int
    inner: int
    layers: int
    heads: int
    context: int
    rows: int
    tokens: int
    gpus: int


# Llama's shapes; about 20 tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556).
MODELS = {
    "130M": Model(768, 2048, 12, 12, 1024, 512, 2_600_000_000, 1),
    "1B": Model(2048, 5461, 24, 32, 2048, 512, 27_000_000_000, 8),
    "7B": Model(4096, 11008, 32, 32, 4096, 1024, 135_000_000_000, 64),
    "30B": Model(6656, 17920, 60, 52, 4096, 2048, 650_000_000_000, 1024),
}


def config_of(model: Model, optimizer: str) -> RunConfig:
    """The settings of a row."""
    settings = [
        f"model.hidden_size={model.hidden}",
        f"model.intermediate_size={model.inner}",
        f"model.num_hidden_layers={model.layers}",
        f"model.num_attention_heads={model.heads}",
        f"model.num_key_value_heads={model.heads}",
        f"model.vocab_size={VOCABULARY}",
        f"model.max_position_embeddings={model.context}",
        "model.tie_word_embeddings=false",
        f"data.context_length={model.context}",
        f"training.tokens={model.tokens}",
        "training.steps=null",
        f"training.global_batch={model.rows}",
        "training.precision=bf16",
        "parallel.compile=true",
        f"optimizer={optimizer}",
    ]
    return load(ROOT / "configs" / "smoke.yaml", settings).config


def measure() -> dict[str, Any]:
    """All rows."""
    rows = []
    for name, model in MODELS.items():
        for optimizer in OPTIMIZERS:
            config, began = config_of(model, optimizer), time.monotonic()
            best = fitting(config, gpu_named(GPU), model.gpus)[0]
            row = {"model": name, "optimizer": optimizer, **_figures(config, best)}
            if optimizer == OPTIMIZERS[0]:
                twice = fitting(config, gpu_named(GPU), 2 * model.gpus)[0]
                row["twice"] = _figures(config, twice)
            rows.append(row)
            print(f"{name} {optimizer}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return {"gpu": GPU, "price": PRICE, "rows": rows}


def _figures(config: RunConfig, best: Candidate) -> dict[str, Any]:
    layout, step = best.layout, best.step
    run = run_time(step, config.total_steps(0), PRICE)
    return {
        "gpus": layout.world,
        "sharding": layout.sharding,
        "replicas": layout.replicas if layout.sharding == "hsdp" else 1,
        "micro_batch": layout.micro_batch,
        "recompute": layout.recompute,
        "gib": best.needed / 2**30,
        "seconds": step.seconds,
        "waiting": step.waiting,
        "updating": step.updating,
        "mfu": step.mfu,
        "tokens_per_second": step.tokens_per_second,
        "days": run.seconds / 86_400,
        "cost": run.cost,
    }


def table(found: dict[str, Any]) -> str:
    """The table as it stands on the page."""
    lines = [
        "| model | GPUs | optimizer | layout | rows at once | GiB | a step | waiting | update "
        "| MFU | tokens/s | days | cost | on twice as many |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        copies = f" x {row['replicas']}" if row["replicas"] > 1 else ""
        again = ", recomputed" if row["recompute"] else ""
        twice = row.get("twice")
        faster = "" if twice is None else f"{row['seconds'] / twice['seconds']:.2f} times as fast"
        lines.append(
            f"| {row['model']} | {row['gpus']:,} | {row['optimizer']} "
            f"| {row['sharding']}{copies}{again} | {row['micro_batch']} | {row['gib']:.1f} "
            f"| {row['seconds']:.3g} s | {row['waiting'] / row['seconds']:.0%} "
            f"| {row['updating'] / row['seconds']:.0%} | {row['mfu']:.0%} "
            f"| {row['tokens_per_second']:,.0f} | {row['days']:.3g} | {row['cost']:,.0f} "
            f"| {faster} |"
        )
    return "\n".join(lines) + "\n"


def page(found: dict[str, Any], text: str) -> str:
    """The page, which ends with the table of the figures."""
    return text.partition(HEADING.splitlines()[1])[0].rstrip("\n") + "\n" + HEADING + table(found)


def main() -> None:
    """Plan, and write the page."""
    if "--page" not in sys.argv:
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(json.dumps(measure(), indent=1) + "\n")
    found = json.loads(FIGURES.read_text())
    PAGE.write_text(page(found, PAGE.read_text()))


if __name__ == "__main__":
    main()
