"""Measures a LoRA step against PEFT with Hugging Face's Trainer, and against TRL's SFTTrainer.

usage: python tools/bench/lora_step.py [--quick] [--rows 8] [--rounds 7] [--steps 1]
           [--candidates trainer sft] [--out docs/results/lora_step.json]

All train rank 16 on every linear layer of the blocks of the same shape (width 384, 6 layers,
vocabulary 32,768, context 512, untied head: 36M parameters) from the same weights and first values
on the same rows, of which a quarter of the tokens is labelled, with the same AdamW and clipping at
norm 1, in float32 on the CPU; their losses must agree.
  ours     the functions of llmnorm/training/step.py, with the head at labelled positions
  trainer  transformers.Trainer.train() with PEFT around LlamaForCausalLM
  sft      TRL's SFTTrainer, whose loss skips labels that are ignored, as it does on GPUs; left out
           where trl is not installed
They take turns (turns.py). Speed is the median over the rounds of (candidate's time / ours in that
round). Memory is the process's highest resident size less what it held before the model was made.
Peers run with sdpa attention, without cache and without recomputation, which is their best.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import report
import torch
import training_step
from report import Table, publish
from torch import Tensor, nn
from training_step import LENGTH, SHAPE, rows
from turns import WARMUP, Candidate, Turns

VOCABULARY, RANK, ALPHA = 32_768, 16, 32
ADAMW: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
# Smallest tokens/s over the peer's, and largest memory over the peer's.
BARS: dict[str, tuple[float, float | None]] = {"trainer": (1.6, 0.6), "sft": (1.1, None)}
Done = Callable[[float], None]


def labelled(count: int, step: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels (count, LENGTH) of a step: the last 32 of every 128 tokens count."""
    ids = rows(VOCABULARY, count, step)
    return ids, torch.where(torch.arange(LENGTH) % 128 >= 96, ids, -100)


def base() -> dict[str, Tensor]:
    """The weights of the base, by parameter name."""
    from llmnorm.models import LlmNormConfig
    from llmnorm.models.building import build_model

    return build_model(LlmNormConfig(vocab_size=VOCABULARY, **SHAPE), seed=0).state_dict()


def ours(count: int) -> Iterator[float]:
    """Our steps: the loss of each."""
    from llmnorm.config.adapter import LoraSettings
    from llmnorm.config.tree import ParallelSettings, TrainingSettings
    from llmnorm.models import LlmNormConfig
    from llmnorm.models.adapters import inject, is_adapter, loaded_name, set_first_values
    from llmnorm.models.building import empty_model
    from llmnorm.models.convert import named_weights
    from llmnorm.models.frozen import freeze
    from llmnorm.objectives.contract import MicroBatch
    from llmnorm.optim.groups import split
    from llmnorm.optim.settings import AdamWSettings
    from llmnorm.parallel.processes import Parallel
    from llmnorm.training.step import count as count_labels
    from llmnorm.training.step import forward_backward

    parallel = Parallel(ParallelSettings(), TrainingSettings(steps=1, device="cpu"))
    model = empty_model(LlmNormConfig(vocab_size=VOCABULARY, **SHAPE), device="meta").train()
    inject(model, LoraSettings(rank=RANK, alpha=ALPHA))
    freeze(model, norms=False, new_head=False)
    weights = base()

    def fill(modules: Any) -> None:
        for name, tensor in named_weights(modules).items():
            if not is_adapter(name):
                tensor.copy_(weights[loaded_name(name)])
        set_first_values(modules, seed=0)

    replica = parallel.prepare(model, fill)
    weights.clear()
    groups = split(model)
    parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
    optimizer = AdamWSettings(**ADAMW).build(groups)
    positions = torch.arange(LENGTH).expand(count, -1)
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
        counts = count_labels([batch], parallel)
        loss = forward_backward(replica, [batch], counts[0], parallel)
        norm = parallel.clip(parameters, 1.0)
        read = torch.stack([loss, norm]).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield read[0]


def stock() -> nn.Module:
    """LlamaForCausalLM with the base's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCABULARY, **SHAPE)
    config._attn_implementation = "sdpa"
    config.use_cache = False
    model = LlamaForCausalLM(config)
    model.load_state_dict(base())
    return model.train()


def lora() -> Any:
    """PEFT's configuration of the same adapter."""
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM")


def train(name: str, base: nn.Module, adapter: Any, count: int, steps: int, done: Done) -> None:
    """A peer's train() of an adapter beside a base, with our first values.

    `done(loss)` is called after every step and may wait.
    """
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llmnorm.models.adapters import set_first_values

    losses: list[Tensor] = []

    class Turn(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done(float(losses.pop()))

    class Recorded:
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(super().training_step(*args, **kwargs))  # type: ignore[misc]
            return losses[-1]

    options: dict[str, Any] = {
        "output_dir": "/nonexistent",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": count,
        "max_steps": steps,
        "learning_rate": ADAMW["lr"],
        "adam_beta1": ADAMW["betas"][0],
        "adam_beta2": ADAMW["betas"][1],
        "adam_epsilon": ADAMW["eps"],
        "weight_decay": ADAMW["weight_decay"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    model = get_peft_model(base, adapter)
    set_first_values(dict(model.base_model.model.named_modules()), seed=0)
    both = [torch.cat(of) for of in zip(*(labelled(count, n) for n in range(steps)), strict=True)]
    data = Dataset.from_dict({"input_ids": both[0].tolist(), "labels": both[1].tolist()})
    if name == "trainer":
        cls = type("Recorder", (Recorded, Trainer), {})
        trainer = cls(
            model=model,
            args=TrainingArguments(**options),
            train_dataset=data.with_format("torch"),
            callbacks=[Turn()],
        )
    else:
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer
        from trl.trainer import utils

        # On a CPU trl 1.16 scores ignored positions too; its way for GPUs is its fastest here.
        assert hasattr(utils, "_use_triton")
        utils._use_triton = lambda device: True

        cls = type("Recorder", (Recorded, SFTTrainer), {})
        trainer = cls(
            model=model,
            args=SFTConfig(
                **options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
            ),
            train_dataset=data,
            processing_class=tokenizer(PreTrainedTokenizerFast),
            callbacks=[Turn()],
        )
    trainer.train()


def tokenizer(cls: Any) -> Any:
    """A tokenizer of one word, which SFTTrainer asks for and does not use here."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return cls(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


def serve(options: argparse.Namespace) -> None:
    """A candidate's process."""
    import datasets  # noqa: F401  every candidate carries the same libraries
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    from llmnorm.training import loop as _  # noqa: F401

    if options.candidate == "sft":
        import trl  # noqa: F401
    turns = Turns()
    if options.candidate == "ours":
        for loss in ours(options.rows):
            turns.done(loss)
    else:
        steps = WARMUP + options.rounds * options.steps + 1
        train(options.candidate, stock(), lora(), options.rows, steps, turns.done)


def start(name: str, options: argparse.Namespace) -> Candidate:
    """Start a candidate's process."""
    command = [sys.executable, __file__, "--candidate", name]
    for key in ("rows", "rounds", "steps"):
        command += [f"--{key}", str(getattr(options, key))]
    return Candidate(name, command)


def measure(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each candidate's figures."""
    candidates = [start(name, options) for name in names]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for number in range(options.rounds):
            turn = number % len(candidates)
            for candidate in candidates[turn:] + candidates[:turn]:
                seconds[candidate.name].append(candidate.run(options.steps) / options.steps)
    finally:
        for candidate in candidates:
            candidate.close()
    found = {}
    tokens = options.rows * LENGTH
    for candidate in candidates:
        pairs = zip(candidates[0].losses, candidate.losses, strict=True)
        worst = max(abs(mine - its) / its for mine, its in pairs)
        if worst > 2e-3:
            sys.exit(f"bench: error: losses of ours and {candidate.name} differ by {worst:.1%}")
        own = seconds[candidate.name]
        row: dict[str, Any] = {
            "tokens_per_second": round(tokens / statistics.median(own), 1),
            "memory_mib": round(candidate.memory / 2**20),
            "seconds_a_step": [round(s, 4) for s in own],
        }
        if candidate.name in BARS:
            ratio = statistics.median(o / t for o, t in zip(own, seconds["ours"], strict=True))
            memory = candidates[0].memory / candidate.memory
            speed, most = BARS[candidate.name]
            row |= {"ours_over_it": round(ratio, 3), "our_memory_over_its": round(memory, 3)}
            row |= {"bar_speed": speed, "bar_memory": most}
            row["holds"] = ratio >= speed and (most is None or memory <= most)
        found[candidate.name] = row
    return found


def summary(found: dict[str, dict[str, Any]], count: int) -> Table:
    """The table as it is read."""
    lines = []
    for name, row in found.items():
        keys = ("ours_over_it", "bar_speed", "our_memory_over_its", "bar_memory")
        ratio, bar, memory, most = (
            "" if row.get(key) is None else f"{row[key]:.2f}" for key in keys
        )
        verdict = {None: "", True: "holds", False: "below"}[row.get("holds")]
        speed = f"{row['tokens_per_second']:.0f}"
        lines.append([name, speed, ratio, bar, str(row["memory_mib"]), memory, most, verdict])
    return Table(
        f"LoRA rank {RANK}, {count} rows of {LENGTH} tokens a step, a quarter of them labelled",
        ["", "tokens/s", "ours over it", "bar", "MiB", "ours over it", "bar", ""],
        lines,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, no file")
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--candidates", nargs="+", choices=tuple(BARS), default=list(BARS))
    parser.add_argument("--out", type=Path, default=report.RESULTS / "lora_step.json")
    parser.add_argument("--candidate", choices=("ours", *BARS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.candidate:
        return serve(options)
    if options.quick:
        options.rounds = 2
    names = ["ours", *options.candidates]
    if "sft" in names and find_spec("trl") is None:
        names.remove("sft")
        print("bench: trl is not installed, so its trainer is left out", file=sys.stderr)
    found = measure(names, options)
    figures: dict[str, Any] = {
        "shape": training_step.SHAPE
        | {"vocabulary": VOCABULARY, "rows": options.rows, "context": LENGTH, "rank": RANK},
        "rounds": options.rounds,
        "steps_a_turn": options.steps,
        "candidates": found,
    }
    table = summary(found, options.rows)
    publish(None if options.quick else options.out, "LoRA step (CPU, float32)", [table], figures)


if __name__ == "__main__":
    main()
