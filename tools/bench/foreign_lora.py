"""Measures a LoRA step of classes of transformers against PEFT with Hugging Face's Trainer.

usage: python tools/bench/foreign_lora.py [FAMILY ...] [--quick] [--rows 4] [--rounds 7]
           [--steps 1] [--out docs/results/foreign_lora.json]

Both train rank 16 on every linear layer of the blocks that PEFT wraps, in the same class with the
same weights and first values, on the same rows of 512 tokens, of which a quarter is labelled, with
the same AdamW and clipping at norm 1, in float32 on the CPU; their losses must agree. The shapes
have a width of 512, two to four layers and a vocabulary of 32,768: 24 to 60M parameters, phi3 39M,
gemma3_text 27M, mamba2 37M. `mixture` is a qwen3_moe of 35M with 8 experts a layer, and `mixture
experts` has rank 16 around its stacks of experts too (adapter.parameters).
  ours     the functions of llmnorm/training/step.py, the class as models/looks.py has found it
  trainer  transformers.Trainer.train() with PEFT around the class
They take turns (turns.py); speed is the median over the rounds of (its time / ours in that round),
memory the process's highest resident size less what it held before the model was made.

A family that --out has already is not measured again, so the command can be repeated after a stop.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_step
import report
import torch
from lora_step import ADAMW, ALPHA, RANK, VOCABULARY, Done, labelled
from report import Table, publish
from torch import Tensor, nn
from training_step import LENGTH
from transformers import PreTrainedModel
from turns import WARMUP, Candidate, Turns

from llmnorm.config.adapter import LoraSettings
from llmnorm.models.adapters import is_adapter, loaded_name, set_first_values
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import empty_foreign, skeleton
from llmnorm.models.foreign_adapters import Targets, foreign_targets, inject_in_blocks
from tests.families import FAMILIES, class_of, configuration

# The three of the bar, and what the others are to reach.
BARS = dict.fromkeys(("phi3", "gemma3_text", "mamba2"), (1.3, 0.65))
OTHERS = (1.0, None)
_SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1280,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LENGTH,
}
_MIXTURE: dict[str, Any] = {
    **{"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6},
    **{"num_experts": 8, "moe_intermediate_size": 224},
}
# transformers' own code for a CPU keeps (chunk x state) numbers a token and head.
_MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_chunk_size": 16}
_LARGER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": LENGTH, "n_inner": 2048},
    "mamba2": {
        **{"hidden_size": 512, "num_hidden_layers": 2, "num_heads": 16, "head_dim": 64},
        **{"state_size": 16, "chunk_size": 16},
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 1024},
    "bamba": _MAMBA,
    "lfm2": {"block_multiple_of": 256, "block_ff_dim": 1280, "block_dim": 512, "conv_dim": 512},
    "qwen3_moe": {"moe_intermediate_size": 640},
    "mixture": _MIXTURE,
    "mixture experts": _MIXTURE,
    "gpt_oss": {"intermediate_size": 640},
    "qwen3_next": {
        **{"moe_intermediate_size": 640, "shared_expert_intermediate_size": 640},
        **{"linear_num_key_heads": 4, "linear_num_value_heads": 8},
        **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    },
}
_WINDOW = {"sliding_window": 128}
# What has another name than its family.
OF_FAMILY = dict.fromkeys(("mixture", "mixture experts"), "qwen3_moe")
STACKS = {"mixture experts": ["gate_up_proj", "down_proj"]}


def made(family: str) -> PreTrainedModel:
    """A model of a family with random weights, always the same."""
    kind = OF_FAMILY.get(family, family)
    shape = _SHAPE if kind not in ("gpt2", "mamba2") else {}
    window = _WINDOW if "sliding_window" in FAMILIES[kind] else {}
    config = configuration(
        kind, **(shape | window | _LARGER.get(family, {}) | {"vocab_size": VOCABULARY})
    )
    for name, value in vars(config).items():  # the peer has dropout off too
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    config.use_cache = False
    torch.manual_seed(0)
    return class_of(config)(config).float().train()


def settings_of(family: str) -> LoraSettings:
    """The adapter that both train."""
    return LoraSettings(rank=RANK, alpha=ALPHA, parameters=STACKS.get(family))


def targets(model: PreTrainedModel, family: str) -> Targets:
    """What both train an adapter around."""
    plain = skeleton(type(model), model.config)
    blocks = [*empty_foreign(type(model), model.config).units()]
    return foreign_targets(plain, settings_of(family), blocks)


def ours(family: str, count: int) -> Iterator[float]:
    """Our steps: the loss of each."""
    from llmnorm.config.tree import ParallelSettings, TrainingSettings
    from llmnorm.models.frozen import freeze
    from llmnorm.models.looks import look
    from llmnorm.objectives.apart import as_asked
    from llmnorm.objectives.contract import MicroBatch
    from llmnorm.optim.groups import split
    from llmnorm.optim.settings import AdamWSettings
    from llmnorm.parallel.processes import Parallel
    from llmnorm.training.step import count as count_labels
    from llmnorm.training.step import forward_backward

    parallel = Parallel(ParallelSettings(), TrainingSettings(steps=1, device="cpu"))
    own = made(family)
    model = empty_foreign(type(own), own.config).train()
    around = targets(own, family)
    blocks = [*model.units()]
    inject_in_blocks(model, settings_of(family), around.names, blocks, around.stacks)
    freeze(model, norms=False, new_head=False)
    weights = own.state_dict()
    del own

    def fill(modules: Any) -> None:
        for name, tensor in named_weights(modules).items():
            if not is_adapter(name):
                tensor.copy_(weights[loaded_name(name)])
        set_first_values(modules, seed=0)

    replica = parallel.prepare(model, fill)
    weights.clear()
    look(model, autocast=parallel.autocast)
    groups = split(model)
    parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
    optimizer = AdamWSettings(**ADAMW).build(groups)
    positions = torch.arange(LENGTH).repeat(count, 1)
    step = 0
    while True:
        ids, labels = labelled(count, step)
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        places = torch.nonzero(shifted.flatten() != -100).squeeze(1)
        inputs: dict[str, Tensor | int] = {
            **{"input_ids": ids, "position_ids": positions, "shift_labels": shifted},
            **{"label_positions": places, "loss_only": True},
        }
        batch = MicroBatch(inputs, len(places), ids.numel(), torch.arange(count))
        batches = as_asked(model, [batch], parallel)
        counts = count_labels(batches, parallel)
        loss = forward_backward(replica, batches, counts[0], parallel)
        norm = parallel.clip(parameters, 1.0)
        read = torch.stack([loss, norm]).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield read[0]


def peer(family: str, count: int, steps: int, done: Done) -> None:
    """Trainer's train() on PEFT's model; `done(loss)` is called after every step and may wait."""
    from peft import LoraConfig

    own = made(family)
    around = targets(own, family)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=around.names,
        target_parameters=[stack.name for stack in around.stacks] or None,
        task_type="CAUSAL_LM",
    )
    lora_step.train("trainer", own, config, count, steps, done)


def serve(options: argparse.Namespace) -> None:
    """A candidate's process."""
    import datasets  # noqa: F401  both carry the same libraries
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    from llmnorm.training import loop as _  # noqa: F401

    (family,) = options.families
    turns = Turns()
    if options.candidate == "ours":
        for loss in ours(family, options.rows):
            turns.done(loss)
    else:
        steps = WARMUP + options.rounds * options.steps + 1
        peer(family, options.rows, steps, turns.done)


def measure(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a family."""
    candidates = []
    for name in ("ours", "trainer"):
        command = [sys.executable, __file__, family, "--candidate", name]
        for key in ("rows", "rounds", "steps"):
            command += [f"--{key}", str(getattr(options, key))]
        candidates.append(Candidate(name, command))
    seconds: dict[str, list[float]] = {"ours": [], "trainer": []}
    try:
        for number in range(options.rounds):
            for candidate in candidates if number % 2 else candidates[::-1]:
                seconds[candidate.name].append(candidate.run(options.steps) / options.steps)
    finally:
        for candidate in candidates:
            candidate.close()
    own, other = candidates
    pairs = zip(own.losses, other.losses, strict=True)
    worst = max(abs(mine - its) / its for mine, its in pairs)
    if worst > 2e-3:
        sys.exit(f"bench: error: losses of ours and Trainer differ by {worst:.1%} in {family}")
    ratios = [o / t for o, t in zip(seconds["trainer"], seconds["ours"], strict=True)]
    speed, memory = statistics.median(ratios), own.memory / other.memory
    bar, most = BARS.get(family, OTHERS)
    spread = max(ratios) - min(ratios)
    return {
        "tokens_per_second": round(options.rows * LENGTH / statistics.median(seconds["ours"]), 1),
        "ours_over_it": round(speed, 3),
        "spread": round(spread, 3),
        "our_memory_over_its": round(memory, 3),
        "memory_mib": [round(c.memory / 2**20) for c in candidates],
        "bar_speed": bar,
        "bar_memory": most,
        "holds": speed >= bar - (0 if most else spread) and (most is None or memory <= most),
    }


def summary(found: dict[str, dict[str, Any]], rows: int) -> Table:
    """The table as it is read."""
    lines = [
        [
            *(family, f"{row['tokens_per_second']:.0f}", f"{row['ours_over_it']:.2f}"),
            *(f"{row['spread']:.2f}", f"{row['bar_speed']:.2f}"),
            f"{row['our_memory_over_its']:.2f}",
            "" if row["bar_memory"] is None else f"{row['bar_memory']:.2f}",
            "holds" if row["holds"] else "below",
        ]
        for family, row in found.items()
    ]
    return Table(
        f"LoRA rank {RANK} in transformers' classes, {rows} rows of {LENGTH} tokens a step, a "
        "quarter of them labelled: against PEFT with Trainer",
        ["", "tokens/s", "speed over its", "spread", "bar", "memory over its", "bar", ""],
        lines,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if none")
    parser.add_argument("--quick", action="store_true", help="two rounds, no file")
    parser.add_argument("--rows", type=int, default=4, help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "foreign_lora.json")
    parser.add_argument("--candidate", choices=("ours", "trainer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.candidate:
        return serve(options)
    if options.quick:
        options.rounds = 2
    found: dict[str, dict[str, Any]] = {}
    if options.out.is_file() and not options.quick:
        found = json.loads(options.out.read_text())["families"]
    others = [family for family in (*FAMILIES, *OF_FAMILY) if family not in BARS]
    for family in options.families or [*BARS, *others]:
        if family in found:
            continue
        found[family] = measure(family, options)
        figures = {"rows": options.rows, "rounds": options.rounds, "families": found}
        out = None if options.quick else options.out
        publish(out, "LoRA in transformers' classes (CPU)", [summary(found, options.rows)], figures)


if __name__ == "__main__":
    main()
