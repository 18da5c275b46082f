"""Measures the training step against Hugging Face's Trainer and against a plain loop.

usage: python tools/bench/training_step.py [--quick] [--vocabulary 32768 4096] [--rows 4]
           [--rounds 9] [--steps 2] [--device cpu|cuda] [--out docs/results/training_step.json]

Three candidates train the same shape (width 384, 6 layers, 6 heads, context 512, untied head) from
the same weights on the same rows with the same AdamW and clipping at norm 1, and their losses must
agree:
  ours     the functions of llmnorm/training/step.py: model, chunked loss, clip, optimizer
  trainer  transformers.Trainer.train() with LlamaForCausalLM, its default optimizer
  loop     the same LlamaForCausalLM in a loop like nanoGPT's, torch's fused AdamW
Each lives in a process of its own and waits while the others work; they take turns, `steps` steps
each, so that a busy machine slows all. Speed is the median over the rounds of (candidate's time /
ours in that round). Memory is the process's highest resident size less what it held before the
model was made. Peers run with sdpa attention and without cache, which is their best.

The matmul rate is measured in the same turns: every product of a weight in the model (forward and
both backward ones) by torch.mm, by itself. A step's share of it is the time that the step's
products would take at that rate (attention's scores added, causal half) over the step's time; it
passes 100 % where our products are not torch.mm's (llmnorm/nn/linear.py), whose own rate is a
second row. `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` before the command makes any machine
one without AVX-512, with bars and a file of its own (training_step_avx2.json). `--device cuda`
measures bf16 with compiled blocks against Trainer with compile, and with Liger kernels if they are
installed.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import report  # noqa: E402
import torch  # noqa: E402
from report import Table, publish  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from turns import WARMUP, Candidate, Turns  # noqa: E402

from llmnorm.machine.processor import processor  # noqa: E402
from llmnorm.nn.linear import choice, onednn_product  # noqa: E402

LENGTH = 512
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Smallest tokens/s over the peer's and largest memory over the peer's, by vocabulary; the second
# table where torch may not use AVX-512 (the peers lose nothing there, and ours loses oneDNN's).
Bars = dict[tuple[int, str], tuple[float, float | None]]
BARS: Bars = {
    (32768, "trainer"): (1.20, 0.72),
    (32768, "loop"): (1.15, None),
    (4096, "trainer"): (1.10, None),
    (4096, "loop"): (1.05, None),
}
BARS_WITHOUT_AVX512: Bars = {
    (32768, "trainer"): (1.30, 0.72),
    (32768, "loop"): (1.25, None),
    (4096, "trainer"): (1.15, None),
    (4096, "loop"): (1.08, None),
}
Steps = Callable[[], Iterator[float]]


def rows(vocabulary: int, count: int, step: int) -> Tensor:
    """Token ids (count, LENGTH) of a step, the same for every candidate."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(vocabulary, (count, LENGTH), generator=generator)


def ours(vocabulary: int, count: int, device: str) -> Iterator[float]:
    """Our steps: the loss of each."""
    from llmnorm.config.tree import ParallelSettings, TrainingSettings
    from llmnorm.models import LlmNormConfig
    from llmnorm.models.building import empty_model
    from llmnorm.models.initialization import initialize
    from llmnorm.objectives.contract import MicroBatch
    from llmnorm.optim.groups import split
    from llmnorm.optim.settings import AdamWSettings
    from llmnorm.parallel.processes import Parallel
    from llmnorm.training.step import count as count_labels
    from llmnorm.training.step import forward_backward

    cuda = device == "cuda"
    training = TrainingSettings(
        steps=1,
        precision="bf16" if cuda else "fp32",
        device="cuda" if cuda else "cpu",
    )
    parallel = Parallel(ParallelSettings(compile=cuda), training)
    config = LlmNormConfig(vocab_size=vocabulary, **SHAPE)
    model = empty_model(config, device="meta").train()
    replica = parallel.prepare(model, lambda modules: initialize(model, seed=0, modules=modules))
    groups = split(model)
    parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
    optimizer = AdamWSettings(**ADAMW).build(groups)
    positions = torch.arange(LENGTH).expand(count, -1)
    step = 0
    while True:
        ids = rows(vocabulary, count, step)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        inputs: dict[str, torch.Tensor | int] = {
            **{"input_ids": ids, "position_ids": positions, "shift_labels": labels},
            "loss_only": True,
        }
        items = int((labels != -100).sum())
        batch = MicroBatch(inputs, items, items, torch.arange(count))
        counts = count_labels([batch], parallel)
        loss = forward_backward(replica, [batch], counts[0], parallel)
        norm = parallel.clip(parameters, 1.0)
        read = torch.stack([loss, norm]).tolist()  # the step's one wait for the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield read[0]


def stock(vocabulary: int) -> nn.Module:
    """LlamaForCausalLM with our initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmnorm.models import LlmNormConfig
    from llmnorm.models.building import build_model

    config = LlamaConfig(vocab_size=vocabulary, **SHAPE)
    config._attn_implementation = "sdpa"
    config.use_cache = False
    model = LlamaForCausalLM(config)
    weights = build_model(LlmNormConfig(vocab_size=vocabulary, **SHAPE), seed=0).state_dict()
    model.load_state_dict(weights)
    return model.train()


def loop(vocabulary: int, count: int, device: str) -> Iterator[float]:
    """Steps of the plain loop: the loss of each."""
    model = stock(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)  # type: ignore[arg-type]
    step = 0
    while True:
        ids = rows(vocabulary, count, step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield float(loss.detach())


class Rows(torch.utils.data.Dataset):
    """The rows of the first steps, for the Trainer."""

    def __init__(self, vocabulary: int, count: int, steps: int) -> None:
        self.ids = torch.cat([rows(vocabulary, count, step) for step in range(steps)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def run_trainer(
    vocabulary: int, count: int, steps: int, device: str, done: Callable[[float], None]
) -> None:
    """Trainer.train(); `done(loss)` is called after every step and may wait."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    cuda = device == "cuda"
    losses: list[Tensor] = []

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done(float(losses.pop()))

    class Recorder(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    arguments = TrainingArguments(
        output_dir="/nonexistent",
        use_cpu=not cuda,
        bf16=cuda,
        torch_compile=cuda,
        use_liger_kernel=cuda and find_spec("liger_kernel") is not None,
        per_device_train_batch_size=count,
        max_steps=steps,
        learning_rate=ADAMW["lr"],
        adam_beta1=ADAMW["betas"][0],
        adam_beta2=ADAMW["betas"][1],
        adam_epsilon=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Recorder(
        model=stock(vocabulary),
        args=arguments,
        train_dataset=Rows(vocabulary, count, steps),
        callbacks=[Turns()],
    ).train()


def serve(options: argparse.Namespace) -> None:
    """A candidate's process."""
    import transformers.trainer  # noqa: F401  every candidate carries the same libraries

    from llmnorm.training import loop as _  # noqa: F401

    turns = Turns(cuda=options.device == "cuda")
    vocabulary, count = options.vocabulary[0], options.rows
    if options.candidate == "trainer":
        steps = WARMUP + options.rounds * options.steps + 1
        run_trainer(vocabulary, count, steps, options.device, turns.done)
    else:
        for loss in {"ours": ours, "loop": loop}[options.candidate](
            vocabulary, count, options.device
        ):
            turns.done(loss)


def start(name: str, vocabulary: int, options: argparse.Namespace) -> Candidate:
    """Start a candidate's process."""
    command = [sys.executable, __file__, "--candidate", name, "--vocabulary", str(vocabulary)]
    for key in ("rows", "rounds", "steps", "device"):
        command += [f"--{key}", str(getattr(options, key))]
    return Candidate(name, command)


class Products:
    """Every product of a step with a weight, as torch.mm or as `linear` does it.

    For weight (out, in), input x (tokens, in) and gradient g (tokens, out): x W^T, g W and g^T x.
    """

    def __init__(self, vocabulary: int, count: int, device: str) -> None:
        width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
        shapes = {(width, width): 4, (width, inner): 2, (inner, width): 1}
        layers = SHAPE["num_hidden_layers"]
        self.counts = {shape: layers * n for shape, n in shapes.items()} | {(width, vocabulary): 1}
        self.tokens = count * LENGTH
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        make = {"device": device, "dtype": dtype}
        self.operands = {
            (inputs, outputs): (
                torch.randn(self.tokens, inputs, **make),  # type: ignore[call-overload]
                torch.randn(outputs, inputs, **make),  # type: ignore[call-overload]
                torch.randn(self.tokens, outputs, **make),  # type: ignore[call-overload]
            )
            for inputs, outputs in self.counts
        }
        scores = 6 * SHAPE["hidden_size"] * LENGTH * layers  # 12 width a pair, half of the pairs
        weights = 6 * sum(n * a * b for (a, b), n in self.counts.items())
        self.flops_per_token = weights + scores
        self.weight_flops = weights * self.tokens

    def rate(self, product: Callable[[Tensor, Tensor], Tensor]) -> float:
        """FLOPs/s of all of them, `product(a, b)` being a @ b.t()."""
        seconds = 0.0
        for shape, (x, weight, g) in self.operands.items():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                for a, b in ((x, weight), (g, weight.t()), (g.t(), x.t())):
                    product(a, b)
                if x.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            seconds += self.counts[shape] * min(times)
        return self.weight_flops / seconds


def product_rates(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The ways to multiply whose rate is measured."""
    rates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch.mm": lambda a, b: torch.mm(a, b.t())
    }
    if device == "cpu" and choice() is not None:
        rates["oneDNN"] = onednn_product
    return rates


def measure(vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """One vocabulary's table."""
    names = ["ours", "trainer"] + (["loop"] if options.device == "cpu" else [])
    candidates = [start(name, vocabulary, options) for name in names]
    products = Products(vocabulary, options.rows, options.device)
    ways = product_rates(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for number in range(options.rounds):
            turn = number % len(candidates)
            for candidate in candidates[turn:] + candidates[:turn]:
                seconds[candidate.name].append(candidate.run(options.steps) / options.steps)
            for way, product in ways.items():
                rates[way].append(products.rate(product))
    finally:
        for candidate in candidates:
            candidate.close()
    first = candidates[0].losses
    for candidate in candidates[1:]:
        worst = max(abs(a - b) / b for a, b in zip(first, candidate.losses, strict=True))
        tolerance = 2e-3 if options.device == "cpu" else 2e-2
        if worst > tolerance:
            sys.exit(f"bench: error: losses of ours and {candidate.name} differ by {worst:.1%}")
    tokens = options.rows * LENGTH
    table: dict[str, Any] = {"matmul_gflops": {}, "candidates": {}}
    for way, found in rates.items():
        table["matmul_gflops"][way] = round(statistics.median(found) / 1e9, 1)
    for candidate in candidates:
        own = seconds[candidate.name]
        ratio = statistics.median(o / t for o, t in zip(own, seconds["ours"], strict=True))
        memory = candidates[0].memory / candidate.memory
        share = {
            way: round(
                statistics.median(
                    products.flops_per_token * tokens / s / r
                    for s, r in zip(own, rates[way], strict=True)
                ),
                3,
            )
            for way in rates
        }
        row: dict[str, Any] = {
            "tokens_per_second": round(tokens / statistics.median(own), 1),
            "memory_mib": round(candidate.memory / 2**20),
            "share_of_matmul_rate": share,
        }
        if candidate.name != "ours":
            row |= {"ours_over_it": round(ratio, 3), "our_memory_over_its": round(memory, 3)}
            bars = BARS if processor().instructions == "AVX512" else BARS_WITHOUT_AVX512
            bar = bars.get((vocabulary, candidate.name)) if options.device == "cpu" else None
            if bar is not None:
                holds = ratio >= bar[0] and (bar[1] is None or memory <= bar[1])
                row |= {"bar_speed": bar[0], "bar_memory": bar[1], "holds": holds}
        row["seconds_a_step"] = [round(s, 4) for s in own]
        table["candidates"][candidate.name] = row
    return table


def profile(vocabulary: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Share of the step's CPU time that each operator takes by itself, ours and stock's."""
    shares = {}
    for name, steps in (("ours", ours), ("loop", loop)):
        generator = steps(vocabulary, options.rows, options.device)
        for _ in range(WARMUP):
            next(generator)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            for _ in range(options.steps):
                next(generator)
        events = record.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:16]
        shares[name] = {e.key: round(e.self_cpu_time_total / total, 4) for e in largest}
    return shares


def summary(vocabulary: int, count: int, table: dict[str, Any]) -> Table:
    """One vocabulary's table as it is read."""
    rates = ", ".join(f"{way} {rate} GFLOP/s" for way, rate in table["matmul_gflops"].items())
    shares = [f"share of {way}" for way in table["matmul_gflops"]]
    rows = []
    for name, row in table["candidates"].items():
        keys = ("ours_over_it", "bar_speed", "our_memory_over_its", "bar_memory")
        ratio, bar, memory, memory_bar = (
            "" if row.get(key) is None else f"{row[key]:.2f}" for key in keys
        )
        verdict = {None: "", True: "holds", False: "below"}[row.get("holds")]
        rows.append(
            [name, f"{row['tokens_per_second']:.0f}", ratio, bar]
            + [str(row["memory_mib"]), memory, memory_bar]
            + [f"{share:.0%}" for share in row["share_of_matmul_rate"].values()]
            + [verdict]
        )
    columns = ["", "tokens/s", "ours over it", "bar", "MiB", "ours over it", "bar", *shares, ""]
    return Table(
        f"vocabulary {vocabulary}, {count} rows of {LENGTH} tokens a step; products alone {rates}",
        columns,
        rows,
    )


def operators(profile: dict[str, dict[str, dict[str, float]]]) -> Iterator[Table]:
    """Where the time goes, ours beside stock's."""
    for vocabulary, shares in profile.items():
        names = list(dict.fromkeys([*shares["ours"], *shares["loop"]]))
        rows = [
            [name, *(f"{shares[who].get(name, 0):.1%}" for who in ("ours", "loop"))]
            for name in names
        ]
        yield Table(
            f"share of the step's CPU time by operator, vocabulary {vocabulary}",
            ["operator", "ours", "loop"],
            rows[:14],
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of one step, no file")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 4096])
    parser.add_argument("--rows", type=int, default=4, help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--candidate", choices=("ours", "trainer", "loop"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: error: --device cuda: torch sees no GPU here; `llmnorm doctor` tells why")
    if options.candidate:
        return serve(options)
    if options.quick:
        options.rounds, options.steps = 2, 1
    widest = processor().instructions
    suffix = "_cuda" if options.device == "cuda" else "" if widest == "AVX512" else "_avx2"
    out = options.out or report.RESULTS / f"training_step{suffix}.json"
    figures: dict[str, Any] = {
        "shape": SHAPE | {"rows": options.rows, "context": LENGTH},
        "rounds": options.rounds,
        "steps_a_turn": options.steps,
        "optimizers": {"ours": "llmnorm adamw", "loop": "torch AdamW, fused"}
        | {"trainer": "its default, adamw_torch_fused"},
        "vocabularies": {},
        "profile": {},
    }
    tables = []
    for vocabulary in options.vocabulary:
        found = measure(vocabulary, options)
        figures["vocabularies"][str(vocabulary)] = found
        tables.append(summary(vocabulary, options.rows, found))
        if options.device == "cpu":
            figures["profile"][str(vocabulary)] = profile(vocabulary, options)
    tables += operators(figures["profile"])
    where = "GPU, bf16, compiled" if options.device == "cuda" else "CPU, float32"
    if suffix == "_avx2":
        where += ", without AVX-512"
    publish(None if options.quick else out, f"Training step ({where})", tables, figures)


if __name__ == "__main__":
    main()
