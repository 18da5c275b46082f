"""AdamW, Muon and NorMuon on a small mixture of experts, with and without its balancing loss.

usage: python tools/reproduce/mixtures.py [--parallel 2] [--seeds 3] [--lr-points 3] [--plan]

The model is transformers' Qwen3-MoE, 4 layers of 8 experts of which a token uses 2, from random
weights; its length is tools/reproduce/mixtures.yaml. Every arm's learning rate is tuned alike.
The balanced arms train the class's own balancing loss with the coefficient .01 of Switch
Transformer (Fedus et al. 2021, arXiv 2101.03961, section 2.2). Each finished run is a line of
docs/results/mixtures/runs.jsonl, which is committed; such a run is not made again. Run directories
are in runs/reproduce. load.png in the directory of the results shows the load of the experts along
a run of each arm.

Conventions of the arms: those of tools/reproduce/optimizers.py (rates by the factor by which the
published ones differ from AdamW's, the same lr * weight_decay, the same AdamW for the rest).

What would surprise: all runs start from the same random weights, so a seed sets the order of rows
alone. The losses that are compared are validation losses, in which there is no balancing loss.
"""

import sys
from pathlib import Path
from typing import Any

from arms import mean_and_error, parser, reproduce

from llmnorm.analysis import expert_load
from llmnorm.analysis.compare.arms import read_arms, read_protocol
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.analysis.compare.report import markdown
from llmnorm.analysis.plots import save
from llmnorm.runs.record import read_metrics

BASE = Path("tools/reproduce/mixtures.yaml")
RESULTS = Path("docs/results/mixtures")
RUNS = Path("runs/reproduce/mixtures")
RANDOM = RUNS / "random"

LR = 6e-3
DECAY = 0.1 * LR  # lr * weight_decay
RULES = {
    "adamw": (LR, "optimizer.betas=[0.9,0.95]"),
    "muon": (1.3 * LR, "optimizer.update_rms=match_adamw"),
    "normuon": (1.3 * LR, "optimizer.preset=paper"),
}
BALANCE = 0.01


def arms() -> dict[str, list[str]]:
    """The overrides of every arm: each rule without and with the balancing loss."""
    found = {}
    for name, (lr, own) in RULES.items():
        words = [f"optimizer={name}", f"optimizer.lr={lr:g}", own]
        words += [f"optimizer.weight_decay={DECAY / lr:g}", f"optimizer.auxiliary.lr={LR:g}"]
        found[name] = [*words, "model.router_loss=off"]
        found[f"{name}_balanced"] = [*words, f"model.router_loss={BALANCE}"]
    return found


def make_random(directory: Path) -> None:
    """Write a Qwen3-MoE of random weights, always the same, unless it is there."""
    if (directory / "config.json").is_file():
        return
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=128,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


def table(found: dict[str, Any]) -> str:
    """Losses, rates and loads of every arm, in Markdown.

    Args:
        found: the tree of result.json.
    """
    head = ["rule", "balancing loss", "lr", "loss"]
    rows = []
    for name, arm in found["arms"].items():
        rule, _, balanced = name.partition("_")
        shown = f"{BALANCE:g}" if balanced else "off"
        rows.append([rule, shown, f"{arm['lr']:.3g}", mean_and_error(arm["losses"], 4)])
    return markdown(head, rows)


def draw(found: dict[str, Any]) -> None:
    """The load of the experts along a run of each arm, as load.png; runs must still be there."""
    loads = {}
    for name, arm in found["arms"].items():
        tuned, untuned = (
            RUNS.glob(f"{name}/{rate}seed*-x1") for rate in (f"lr{arm['lr']:.6g}-", "")
        )
        for run in sorted([*tuned, *untuned])[-1:]:
            loads[name] = read_metrics(run / "metrics.jsonl").expert_load
    if loads:
        save(expert_load.picture(loads), RESULTS / "load.png")


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then the report, the table and the picture."""
    every = arms()
    words = parser(__doc__, every, every)
    words.add_argument("--lr-points", type=int, default=3, help="learning rates of each arm")
    words.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all arms")
    options = words.parse_args(arguments)
    make_random(RANDOM)
    shared = [f"model.pretrained={RANDOM}", *options.set]

    def read() -> Protocol:
        return read_protocol(
            read_arms(BASE, shared, [[name, *every[name]] for name in options.arms]),
            seeds=options.seeds,
            lr_points=options.lr_points,
            horizons="none",
        )

    def show(_: Protocol, found: dict[str, Any]) -> str:
        draw(found)
        return table(found)

    return reproduce(read, show, RESULTS, RUNS, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
