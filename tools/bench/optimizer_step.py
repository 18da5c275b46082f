"""Measure the step of every optimizer on the hidden matrices of a 12-layer Llama, 768 / 2048.

usage: python tools/bench/optimizer_step.py [--quick] [--layers 12] [--rounds 10]
           [--only NAME] [--out docs/results/optimizer_step.json]

Everything is float32, with OMP_NUM_THREADS threads; the gradients are random matrices of full rank,
made outside the timer. After a step of warming up, candidates take turns of one step, so that a
busy machine slows all alike. Each round begins with another candidate, since the first one finds
less in the caches (2 % of AdamW). Times are CPU seconds of the process. The table shows medians and
quartiles; a ratio is the median over the rounds of (ours / peer in that round). Conda's first step,
which computes the bases, is timed separately; 1/2000 of its excess is added to a step.

Peers: torch's fused AdamW; `torch.optim.Muon` unchanged, and with its Newton-Schulz iteration in
float32 instead of bf16; the official Conda step, rewritten per matrix (its code has no licence).
The unchanged Muon casts to bf16 on any machine. On one without bf16 products a step takes minutes,
so there it is timed on one layer, and the table says so.

Work is counted as the operations that each rule's definition needs (4 k^2 L for Conda, k the
shorter, L the longer side), and compared with the rate of torch.mm on the same shapes. Temporaries
are the highest resident size during a step minus that before it. A training step is forward and
backward of the whole model, vocabulary 32000, measured on one row of 1024 tokens.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from report import Table, publish
from torch import Tensor, nn

LAYER = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768)} | {
    "gate": (2048, 768),
    "up": (2048, 768),
    "down": (768, 2048),
}
INTERVAL = 2000  # steps between two bases of Conda
BARS = {
    ("conda", "conda, official"): 0.7,
    ("muon", "muon, torch in fp32"): 1.02,
    ("muon, gram", "muon, torch in fp32"): 0.85,
    ("normuon", "muon"): 1.03,
    ("adamw", "adamw, torch fused"): 1.02,
}
Step = Callable[[], Any]


def matrices(layers: int) -> dict[str, nn.Parameter]:
    """The hidden matrices, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in range(layers):
        for name, shape in LAYER.items():
            parameter = nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02))
            parameter.grad = torch.randn(shape, generator=generator)
            made[f"{layer}.{name}"] = parameter
    return made


def ours(settings: Any, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Our optimizer for these parameters."""
    from llmnorm.optim.groups import Groups

    return settings.build(Groups(parameters, {}))


# --- peers ---


class TorchMuon(torch.optim.Muon):
    """torch's, its iteration in float32: torch/optim/_muon.py with `bfloat16()` left out."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As torch's single-tensor path, scale `match_rms_adamw`."""
        (group,) = self.param_groups
        for parameter in group["params"]:
            grad, state = parameter.grad, self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            update = self._orthogonal(grad.lerp(buffer, group["momentum"]))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * 0.2 * max(grad.shape) ** 0.5)

    def _orthogonal(self, x: Tensor) -> Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x.div_(x.norm().clamp(min=1e-7))
        for _ in range(5):
            gram = x @ x.T
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.addmm(x, polynomial, x, beta=a)
        return x.T if tall else x


class OfficialConda:
    """The official step, matrix by matrix: three products, the momentum in its own basis."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters, self.t = list(parameters.values()), 0
        zeros = torch.zeros_like
        self.state: list[Any] = [[zeros(p.data), zeros(p.data), None] for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """lr 0.01, betas (0.9, 0.99), eps 1e-8, scale 0.25, weight decay 0.025."""
        lr, beta1, beta2 = 0.01, 0.9, 0.99
        for parameter, state in zip(self.parameters, self.state, strict=True):
            grad: Any = parameter.grad
            momentum, second_moment, basis = state
            right = grad.shape[0] >= grad.shape[1]
            momentum.mul_(beta1).add_(grad, alpha=1 - beta1)
            if self.t % INTERVAL == 0:
                left, _, right_vectors = torch.linalg.svd(momentum, full_matrices=False)
                basis = state[2] = right_vectors.T.contiguous() if right else left
            rotated = grad @ basis if right else basis.T @ grad
            rotated_momentum = momentum @ basis if right else basis.T @ momentum
            second_moment.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
            normalized = rotated_momentum / second_moment.sqrt().add_(1e-8)
            update = normalized @ basis.T if right else basis @ normalized
            t = self.t + 1
            rate = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            parameter.add_(update * 0.25, alpha=-rate)
            parameter.add_(parameter, alpha=-lr * 0.025)
        self.t += 1


# --- measuring ---


def families() -> list[dict[str, Callable[[dict[str, nn.Parameter]], Any]]]:
    """Groups of candidates that take turns: name -> what makes its optimizer."""
    from llmnorm.optim import settings

    def rule(chosen: Any) -> Callable[[dict[str, nn.Parameter]], Any]:
        return lambda parameters: ours(chosen, parameters)

    muon = settings.MuonSettings(precision="fp32")
    gram = settings.MuonSettings(precision="fp32", orthogonalize="gram")
    bf16 = settings.MuonSettings(precision="bf16")
    torch_muon: Any = {"lr": 2e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    found: list[dict[str, Callable[[dict[str, nn.Parameter]], Any]]] = [
        {
            "adamw": rule(settings.AdamWSettings()),
            "adamw, torch fused": lambda p: torch.optim.AdamW(p.values(), fused=True),
        },
        {
            "conda": rule(settings.CondaSettings(refresh_every=INTERVAL)),
            "conda, eigh": rule(settings.CondaSettings(refresh_every=INTERVAL, basis="eigh")),
            "conda, official": OfficialConda,
        },
        {
            "muon": rule(muon),
            "muon, gram": rule(gram),
            "normuon": rule(settings.NorMuonSettings(precision="fp32")),
            "muon, torch in fp32": lambda p: TorchMuon(p.values(), **torch_muon),
        },
        {
            "muon, bf16": rule(bf16),
            "muon, torch as it is": lambda p: torch.optim.Muon(p.values(), **torch_muon),
        },
        {"adamp": rule(settings.AdamPSettings())},
        {"soap": rule(settings.SOAPSettings())},
    ]
    return found


def measure(
    family: dict[str, Callable[[dict[str, nn.Parameter]], Any]], layers: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every step, the first one's apart; state and temporary bytes."""
    parameters = matrices(layers)
    optimizers = {name: make(parameters) for name, make in family.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, optimizer in optimizers.items():
        found[name] = {"first": seconds(optimizer.step), "steps": []}
        states = optimizer.state if isinstance(optimizer.state, list) else None
        fields = (
            [t for state in states for t in state]
            if states is not None
            else [t for state in optimizer.state.values() for t in state.values()]
        )
        found[name]["state_bytes"] = sum(t.numel() * t.element_size() for t in fields)
    for turn in range(rounds + 1):
        generator = torch.Generator().manual_seed(turn)
        for parameter in parameters.values():
            parameter.grad.normal_(generator=generator)  # type: ignore[union-attr]
        names = list(optimizers)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds(optimizers[name].step)
            if turn:
                found[name]["steps"].append(taken)
    for name, optimizer in optimizers.items():
        found[name]["temporary_bytes"] = temporaries(optimizer.step)
    return found


def seconds(step: Step) -> float:
    """CPU time of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def temporaries(step: Step) -> int:
    """Bytes by which the resident size rises during one call (Linux)."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = report.memory_of("VmRSS")
    step()
    return max(0, report.memory_of("VmHWM") - before)


def operations(name: str, layers: int) -> float:
    """Products that the rule's definition needs, over all matrices."""
    total = 0.0
    for rows, columns in LAYER.values():
        k, long = sorted((rows, columns))
        newton_schulz = 20.0 * k * k * long + 10 * k**3
        gram = 4.0 * k * k * long + 34 * k**3 if long > 1.5 * k else newton_schulz
        total += {
            "conda": 4.0 * k * k * long,
            "muon": gram if "gram" in name else newton_schulz,
            "normuon": newton_schulz,
            "soap": 6.0 * (rows * rows * columns + rows * columns * columns),
        }.get(name.partition(",")[0], 0.0)
    return total * layers


def product_rate() -> float:
    """Operations a second of torch.mm on the shapes of the layer, best of five."""
    work, taken = 0.0, 0.0
    for rows, columns in set(LAYER.values()):
        a, b = torch.randn(rows, columns), torch.randn(columns, min(rows, columns))
        work += 2.0 * rows * columns * min(rows, columns)
        taken += min(seconds(partial(torch.mm, a, b)) for _ in range(5))
    return work / taken


def training_step(layers: int) -> float:
    """Seconds of forward and backward for 8 rows of 1024 tokens, from one row."""
    from llmnorm.models import LlmNormConfig
    from llmnorm.models.building import build_model

    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    config = LlmNormConfig(vocab_size=32000, num_hidden_layers=layers, **shape)
    model = build_model(config, seed=0).train()
    ids = torch.randint(32000, (1, 1024), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(input_ids=ids, labels=ids, loss_only=True).loss.backward()
        model.zero_grad()

    run()
    return 8 * min(seconds(run) for _ in range(3))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, two rounds, no file")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--only",
        choices=[name for family in families() for name in family],
        metavar="NAME",
        help="the family of this candidate; of others what the file has",
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "optimizer_step.json")
    options = parser.parse_args()
    layers, rounds = (1, 2) if options.quick else (options.layers, options.rounds)
    from llmnorm.optim.orthogonalize import multiplies_bf16

    known: dict[str, Any] = {}
    if options.only and not options.quick and options.out.is_file():
        known = json.loads(options.out.read_text(encoding="utf-8"))
        if known["layers"] != layers:
            parser.error(f"--layers {layers}: {options.out} has figures of {known['layers']}")
    rate = known.get("product_rate") or product_rate()
    step = known.get("training_step") or training_step(layers)
    found: dict[str, dict[str, Any]] = known.get("candidates", {})
    for family in families():
        if options.only and options.only not in family:
            continue
        slow = "muon, bf16" in family and not multiplies_bf16(torch.device("cpu"))
        many = 10 * rounds if "adamw" in family else rounds  # its steps take milliseconds
        size = {"layers": 1, "rounds": 1} if slow else {"layers": layers, "rounds": many}
        for name, figures in measure(family, **size).items():
            found[name] = figures | {"layers": size["layers"]}
    parameters = sum(rows * columns for rows, columns in LAYER.values())
    lines = []
    for name, figures in found.items():
        median = statistics.median(figures["steps"])
        quarters = statistics.quantiles(figures["steps"]) if len(figures["steps"]) > 1 else [0] * 3
        figures["amortised"] = median
        if name.startswith("conda"):
            figures["amortised"] += max(0.0, figures["first"] - median) / INTERVAL
        work, count = operations(name, figures["layers"]), figures["layers"] * parameters
        lines.append(
            [
                name if figures["layers"] == layers else f"{name} (one layer)",
                f"{1000 * median:.0f}",
                f"{1000 * (quarters[2] - quarters[0]):.0f}",
                f"{1000 * figures['first']:.0f}" if name.startswith("conda") else "",
                f"{work / median / rate:.0%}" if work else "",
                f"{figures['state_bytes'] / count:.2f}",
                f"{figures['temporary_bytes'] / 2**20:.0f}",
                f"{figures['amortised'] / (figures['amortised'] + step):.1%}"
                if figures["layers"] == layers
                else "",
            ]
        )
    bars = []
    for (name, peer), bar in BARS.items():
        if name in found and peer in found:
            pairs = zip(found[name]["steps"], found[peer]["steps"], strict=True)
            extra = [
                (found[n]["amortised"] - statistics.median(found[n]["steps"])) for n in (name, peer)
            ]
            ratio = statistics.median((a + extra[0]) / (b + extra[1]) for a, b in pairs)
            verdict = "met" if ratio <= bar else "missed"
            bars.append([f"{name} / {peer}", f"{ratio:.3f}", f"{bar:.2f}", verdict])
    columns = ["rule", "ms a step", "quartiles apart", "ms, new bases", "of torch.mm's rate"]
    columns += ["state bytes a parameter", "temporaries MiB", "of a training step"]
    tables = [
        Table(
            f"{layers} layer(s), float32; torch.mm {rate / 1e9:.0f} GFLOP/s; forward and backward "
            f"of 8 x 1024 tokens {step:.1f} s",
            columns,
            lines,
        ),
        Table("ratios, refreshes amortised", ["ours / peer", "ratio", "at most", "bar"], bars),
    ]
    figures = {"layers": layers, "rounds": rounds, "product_rate": rate, "training_step": step}
    out = None if options.quick else options.out
    publish(out, "Optimizer step (CPU, float32)", tables, figures | {"candidates": found})


if __name__ == "__main__":
    main()
