"""Check the results of GPU kernels against references, and measure the kernels' speed.

usage: python tools/bench/gpu_kernels.py [--tune] [--out docs/results/gpu_kernels.json]

It takes about a minute on one NVIDIA GPU; without one it prints a message and exits with 2. Where a
part fails, its row shows the reason and the next part runs. An error is the largest difference over
the largest value of the expected tensor. fla's kernels are judged by the root mean square of the
difference over that of the expected values, as in fla's own tests.
  fla        the kernels that llmnorm/nn/mixers/fla.py calls, on packed rows with states, against
             our engines in float64 on the same rounded inputs: outputs, states, gradients; ours in
             float32 beside them; isolation of documents; times against ours
  varlen     attention over documents in one kernel against attention with a mask in float32, bf16
             inputs: windows, grouped heads, both directions; isolation of documents
  mixers     a model of every mixer on packed rows, its outputs and gradients against float64 on the
             CPU; the same under bf16 autocast

Without --tune each of fla's kernels is compiled for one choice of tiles instead of dozens. Then
compiling takes seconds (parallel processes do it first), and the kernels' times are upper bounds.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import RESULTS, Table, publish
from torch import Tensor

from llmnorm.machine.gpus import fla_problem, one_decay_problem
from llmnorm.nn.masks import document_boundaries, document_mask, document_segments
from llmnorm.nn.mixers import fla, varlen
from llmnorm.nn.mixers.gated_delta import delta_recurrence
from llmnorm.nn.mixers.gla import channel_recurrence
from llmnorm.nn.mixers.linear_recurrence import linear_recurrence
from llmnorm.nn.mixers.nala import NaLa
from llmnorm.nn.mixers.normalised_sums import normalised_sums, sums_at_once

GPU = torch.device("cuda")
DOCUMENTS = (1, 2, 63, 64, 65, 127, 190, 512)  # two rows of 512 tokens
TIMED = ((8, 2048), (1, 32768))
HEADS, WIDTH = 16, 64
BOUND = 5e-3  # of the root mean square
VARLEN_BOUND = 3e-2
MIXER_BOUND = 1e-4
TENSORS = ("y", "after", "dq", "dk", "dv", "dg", "db", "dstate")
RECURRENT = ("linear", "nala", "ssd", "gla", "gated_delta", "hydra")
NAMES = {torch.bfloat16: "bf16", torch.float32: "TF32"}


class Recurrence(NamedTuple):
    """One of fla's kernels, by our name for it, and our engine for the same recurrence."""

    ours: Callable[..., tuple[Tensor, Tensor]]
    theirs: Callable[..., tuple[Tensor, Tensor]]
    heads: tuple[int, int, int]  # of q, k and v
    decay: str  # none, head or channel


RECURRENCES = {
    "linear": Recurrence(linear_recurrence, fla.linear, (4, 2, 2), "none"),
    "ssd": Recurrence(linear_recurrence, fla.linear, (1, 1, 4), "head"),
    "gla": Recurrence(channel_recurrence, fla.channel, (4, 4, 4), "channel"),
    "gated_delta": Recurrence(delta_recurrence, fla.delta, (2, 2, 4), "head"),
}
# What llmnorm gives them: bf16, and float32 numerators of linear attention in bf16 training.
CASES = [*((name, torch.bfloat16) for name in RECURRENCES), ("linear", torch.float32)]
Rows = list[list[str]]


def problem_of(error: BaseException) -> str:
    """An exception in one short cell."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[0][:110]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; inf where something is not finite."""
    found, expected = (t.detach().double().cpu() for t in (found, expected))
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def mean_difference(found: Tensor, expected: Tensor) -> float:
    """The same of root mean squares."""
    found, expected = (t.detach().double().cpu() for t in (found, expected))
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def leaves_of(
    name: str, batch: int, length: int, dtype: torch.dtype, widths: tuple[int, int], scale: int = 1
) -> dict[str, Tensor]:
    """Inputs as the mixers make them: unit keys for the delta rule, decays below 0, all on a GPU.

    Those that a kernel takes as `dtype` are rounded to it, the others are float32.
    """
    kind = RECURRENCES[name]
    generator = torch.Generator(GPU).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, device=GPU, generator=generator)

    (K, V), (q_heads, k_heads, v_heads) = widths, (n * scale for n in kind.heads)
    made = {
        "q": normal(q_heads, K) * K**-0.5,
        "k": normal(k_heads, K),
        "v": normal(v_heads, V),
    }
    if name == "gated_delta":
        made["q"] = F.normalize(made["q"], dim=-1) * K**-0.5
        made["k"] = F.normalize(made["k"], dim=-1)
        made["b"] = normal(v_heads).sigmoid()
    if kind.decay == "head":
        made["log_decay"] = -F.softplus(normal(v_heads) - 2)
    if kind.decay == "channel":
        made["log_gate"] = F.logsigmoid(normal(k_heads, K)) / 4
    rounded = {n: t.to(dtype) if n in ("q", "k", "v") else t for n, t in made.items()}
    state = torch.randn(batch, v_heads, K, V, device=GPU, generator=generator)
    return {**rounded, "state": state}


def through(
    run: Callable[..., tuple[Tensor, Tensor]],
    leaves: dict[str, Tensor],
    backward: bool,
    **keys: Any,
) -> dict[str, Tensor]:
    """Output, state, and (backward) the gradient of each leaf for fixed gradients of both."""
    leaves = {name: t.detach().requires_grad_(backward) for name, t in leaves.items()}
    y, state = run(**leaves, **keys)
    if not backward:
        return {"y": y, "after": state}
    generator = torch.Generator(GPU).manual_seed(1)
    given = [torch.randn(t.shape, device=GPU, generator=generator).to(t) for t in (y, state)]
    torch.autograd.backward((y, state), given)
    short = {"log_decay": "g", "log_gate": "g"}
    gradients = {f"d{short.get(n, n)}": t.grad for n, t in leaves.items() if t.grad is not None}
    return {"y": y.detach(), "after": state.detach(), **gradients}


def theirs_of(name: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of fla.py with the arguments of our engine."""

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        if name == "linear":
            inputs["log_decay"] = None
        return RECURRENCES[name].theirs(**inputs, dtype=dtype)

    return run


def packed() -> dict[str, Tensor]:
    """The documents of DOCUMENTS."""
    boundaries = document_boundaries(DOCUMENTS, GPU)
    segments = document_segments(boundaries, 2, sum(DOCUMENTS) // 2)
    return {"segments": segments, "boundaries": boundaries}


def fla_errors(name: str, dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    """For each tensor: fla's error, ours in float32, fla's root mean square; all against float64.

    float64 is our engine's.
    """
    leaves = leaves_of(name, 2, 512, dtype, (32, 64))
    backward = has_gradients(name, dtype)
    apart = packed()
    wide, single = ({n: t.to(to) for n, t in leaves.items()} for to in (torch.double, torch.float))
    expected = through(RECURRENCES[name].ours, wide, backward, **apart)
    ours = through(RECURRENCES[name].ours, single, backward, **apart)
    theirs = through(theirs_of(name, dtype), leaves, backward, **apart)
    return {
        n: (difference(theirs[n], e), difference(ours[n], e), mean_difference(theirs[n], e))
        for n, e in expected.items()
    }


def has_gradients(name: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether fla's kernels compute right gradients on this machine (gpus.py)."""
    one_decay = name in RECURRENCES and RECURRENCES[name].decay != "channel"
    return dtype == torch.float32 or not one_decay or one_decay_problem() is None


def fla_isolation(name: str, dtype: torch.dtype) -> bool:
    """Whether other documents stay equal to the bit when one changes."""
    leaves, run = leaves_of(name, 2, 512, dtype, (32, 64)), theirs_of(name, dtype)
    with torch.no_grad():
        y, _ = run(**leaves, **packed())
        changed = dict(leaves)
        for part in ("k", "v"):
            changed[part] = leaves[part].clone()
            changed[part][0, 66:130] *= -2  # the fourth document of the first row
        again, _ = run(**changed, **packed())
    same = y.eq(again).flatten(2).all(-1)
    return bool(same[0, :66].all() and same[0, 130:].all() and same[1].all()) and not bool(
        same[0, 66:130].all()
    )


def milliseconds(work: Callable[[], object]) -> float:
    """The median of CUDA events around repetitions that take a second at most."""
    work()
    work()
    times: list[float] = []
    stop = time.monotonic() + 0.4
    while len(times) < 3 or (len(times) < 20 and time.monotonic() < stop):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def both_ways(run: Callable[..., tuple[Tensor, Tensor]], leaves: dict[str, Tensor]) -> float:
    """Milliseconds of a forward and backward pass."""
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}

    def work() -> None:
        y, _ = run(**leaves)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)

    return milliseconds(work)


class Timed(NamedTuple):
    """The same work by fla and by us, with the inputs of each."""

    theirs: Callable[..., tuple[Tensor, Tensor]]
    ours: Callable[..., tuple[Tensor, Tensor]]
    leaves: dict[str, Tensor]
    wide: dict[str, Tensor]


def timed(name: str, batch: int, length: int) -> Timed:
    """A recurrence, or NaLa's sums, of bf16 inputs and HEADS heads, with no state before them."""
    if name != "nala":
        scale = HEADS // max(RECURRENCES[name].heads)
        leaves = leaves_of(name, batch, length, torch.bfloat16, (WIDTH, WIDTH), scale)
        del leaves["state"]
        wide = {n: t.float() for n, t in leaves.items()}
        return Timed(theirs_of(name, torch.bfloat16), RECURRENCES[name].ours, leaves, wide)
    nala = NaLa(WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    angle = torch.rand(1, length, 1, WIDTH // 2, device=GPU)
    states = tuple(torch.zeros(batch, HEADS, 2 * WIDTH, n, device=GPU) for n in (WIDTH, 1))

    def sums(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            row = angle.cos(), angle.sin(), None, None
            numerator, normaliser, state, _ = run(nala.both_features, states, q, k, v, *row)
            return numerator / (normaliser + 1), state

        return both

    qkv = {n: torch.randn(batch, length, HEADS, WIDTH, device=GPU) for n in ("q", "k", "v")}
    return Timed(sums(partial(sums_at_once, kernel=True)), sums(normalised_sums), qkv, qkv)


def fla_times(name: str, batch: int, length: int) -> Iterator[tuple[str, float | None, float]]:
    """fla's milliseconds and ours, forward alone and both ways."""
    theirs, ours, leaves, wide = timed(name, batch, length)
    with torch.no_grad():
        times = milliseconds(lambda: theirs(**leaves)), milliseconds(lambda: ours(**wide))
    yield "forward", *times
    spent = both_ways(theirs, leaves) if has_gradients(name) else None
    yield "forward and backward", spent, both_ways(ours, wide)


def one_choice_of_tiles() -> None:
    """Leave each of fla's kernels one configuration: the one we guess to suit heads of 64 best."""
    import fla.ops  # noqa: F401

    def cost(config: Any) -> tuple[int, int, int]:
        area = config.kwargs.get("BK", 64) * config.kwargs.get("BV", 64)
        return abs(area - 64 * 64), abs(config.num_warps - 4), config.num_stages

    modules = [m for n, m in list(sys.modules.items()) if n.startswith("fla.") and m is not None]
    for module in modules:
        for thing in list(vars(module).values()):
            while thing is not None and type(thing).__module__.startswith(("triton", "fla")):
                configs = getattr(thing, "configs", None)
                if isinstance(configs, list) and len(configs) > 1:
                    thing.configs = [min(configs, key=cost)]
                thing = getattr(thing, "fn", None)


def compile_for(case: str) -> None:
    """Compiles what the checks of a case need, into Triton's cache on disk."""
    kind, name, label = case.split("/")
    if kind == "mixer":
        with torch.autocast("cuda", torch.bfloat16):
            outputs(model_of(mixers()[name]), GPU, torch.float32)
        return
    if name != "nala":
        fla_errors(name, next(d for d, text in NAMES.items() if text == label))
    if label == NAMES[torch.bfloat16]:
        for batch, _ in TIMED:
            work = timed(name, batch, 256)
            through(work.theirs, work.leaves, has_gradients(name))


def compilers(tune: bool) -> list[subprocess.Popen[bytes]]:
    """Compile each case in a process; the checks meet a failure again, and report it."""
    cases = [f"fla/{name}/{NAMES[dtype]}" for name, dtype in CASES]
    cases += [f"fla/nala/{NAMES[torch.bfloat16]}"]
    cases += [f"mixer/{name}/" for name in RECURRENT]
    command = [sys.executable, __file__, *(["--tune"] if tune else []), "--compile"]
    return [subprocess.Popen([*command, case], stderr=subprocess.DEVNULL) for case in cases]


def fla_tables(figures: dict[str, Any]) -> Iterator[Table]:
    """Errors, isolation, times."""
    problem = fla_problem()
    if problem:
        yield Table("fla's kernels", ["", "why not"], [["not measured", problem]])
        return
    gated = one_decay_problem() or "served"
    chosen: Rows = [["gradients with one decay a head, on this machine", gated]]
    errors: Rows = []
    for name, dtype in CASES:
        try:
            found = fla_errors(name, dtype)
            figures[f"{name} {NAMES[dtype]}"] = found
            worst = max(mean for *_, mean in found.values())
            cells = [
                f"{found[n][0]:.0e} ({found[n][1]:.0e})" if n in found else "-" for n in TENSORS
            ]
            cells += [f"{worst:.1e}", f"{BOUND:g}"]
            verdict = "yes" if worst <= BOUND else "NO"
        except Exception as error:  # noqa: BLE001 - a row of the table
            cells, verdict = [problem_of(error), *["-"] * (len(TENSORS) + 1)], "NO"
        errors.append([f"{name}, {NAMES[dtype]}", *cells, verdict])
        try:
            apart = "equal to the bit" if fla_isolation(name, dtype) else "NO"
        except Exception as error:  # noqa: BLE001
            apart = problem_of(error)
        chosen.append([f"other documents when one changes: {name}, {NAMES[dtype]}", apart])
    for name, kind in RECURRENCES.items():
        q, k, v = (leaves_of(name, 2, 512, torch.bfloat16, (32, 64))[n] for n in "qkv")
        taken = fla.serves(q, k, v, one_decay=kind.decay != "channel")
        by = "fla" if taken else "ours"
        chosen.append([f"{kind.ours.__name__} of {name} in bf16 is computed by", by])
    yield Table(
        "fla's largest error against float64 (in brackets: ours in float32), packed rows, states",
        ["recurrence", *TENSORS, "mean", "allowed", "within"],
        errors,
    )
    yield Table("What fla's kernels do", ["", ""], chosen)
    times: Rows = []
    for batch, length in TIMED:
        for name in (*RECURRENCES, "nala"):
            where = [name, f"{batch} x {length}"]
            try:
                for what, theirs, ours in fla_times(name, batch, length):
                    figures[f"{name} {batch}x{length} {what}"] = {"fla": theirs, "ours": ours}
                    ratio = f"{ours / theirs:.1f}" if theirs else "-"
                    times.append(
                        [*where, what, f"{theirs:.2f}" if theirs else "-", f"{ours:.2f}", ratio]
                    )
            except Exception as error:  # noqa: BLE001
                times.append([*where, problem_of(error), "-", "-", "-"])
    yield Table(
        f"Milliseconds of a recurrence, {HEADS} heads of {WIDTH}, bf16 inputs (nala: float32)",
        ["recurrence", "rows x tokens", "passes", "fla", "ours", "ours / fla"],
        times,
    )


def varlen_row(heads: int, kv_heads: int, window: int | None, causal: bool) -> list[str]:
    """One kind of attention over documents."""
    generator = torch.Generator(GPU).manual_seed(0)
    tokens, width = sum(DOCUMENTS), 64
    shapes = ((tokens, n, width) for n in (heads, kv_heads, kv_heads))
    qkv = [
        torch.randn(shape, device=GPU, generator=generator).bfloat16().requires_grad_()
        for shape in shapes
    ]
    boundaries = document_boundaries(DOCUMENTS, GPU)
    given = torch.randn(tokens, heads, width, device=GPU, generator=generator).bfloat16()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen.attention(q, k, v, boundaries, max(DOCUMENTS), window, causal=causal)

    mixed = attend(*qkv)
    found = (mixed, *torch.autograd.grad(mixed, qkv, given))
    visible = document_mask(document_segments(boundaries, 1, tokens), causal=causal)
    if window is not None:
        visible = visible & torch.ones_like(visible).triu(1 - window)
    wide = [t.detach().float().requires_grad_() for t in qkv]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in wide)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    expected = expected.squeeze(0).transpose(0, 1)
    wanted = (expected, *torch.autograd.grad(expected, wide, given.float()))
    errors = [difference(a, b) for a, b in zip(found, wanted, strict=True)]
    first, last = sum(DOCUMENTS[:3]), sum(DOCUMENTS[:4])
    with torch.no_grad():
        changed = [t.detach().clone() for t in qkv]
        for t in changed:
            t[first:last] *= -2
        same = attend(*changed).eq(mixed).flatten(1).all(-1)
    inside = torch.zeros_like(given)
    inside[first:last] = given[first:last]
    leaks = torch.autograd.grad(attend(*qkv), qkv, inside)
    before, behind = slice(first), slice(last, None)
    outside = max(float(t[where].abs().max()) for t in leaks for where in (before, behind))
    apart = bool(same[:first].all() and same[last:].all()) and not same[first:last].all()
    exact = apart and outside == 0
    within = max(errors) <= VARLEN_BOUND and exact
    return [
        f"{heads} heads over {kv_heads}",
        "all" if window is None else str(window),
        "causal" if causal else "both",
        *(f"{e:.1e}" for e in errors),
        "exact" if exact else "NO",
        "yes" if within else "NO",
    ]


def varlen_tables(figures: dict[str, Any]) -> Iterator[Table]:
    """Every kind of attention that softmax.py asks for."""
    rows: Rows = []
    for case in (
        *((4, 4, None, True), (4, 4, 17, True), (4, 4, None, False)),
        *((8, 2, None, True), (8, 2, 17, True), (8, 2, None, False)),
    ):
        try:
            rows.append(varlen_row(*case))
        except Exception as error:  # noqa: BLE001
            rows.append([str(case), problem_of(error), *["-"] * 6, "NO"])
    columns = ["attention", "window", "sees", "out", "dq", "dk", "dv", "documents", "within"]
    yield Table(
        f"Attention over documents in one kernel, bf16, against a mask in float32 (allowed: "
        f"{VARLEN_BOUND:g})",
        columns,
        rows,
    )
    figures["varlen"] = [dict(zip(columns, row, strict=True)) for row in rows]


def mixers() -> dict[str, Any]:
    """Every mixer and every matrix family, small."""
    families: dict[str, Any] = {
        f"matrix {family}": {
            **{"name": "matrix", "head_dim": 8},
            "family": {"name": family, **({"qk_dim": 4} if qk else {})},
        }
        for family, qk in {
            **{"toeplitz": False, "vandermonde": True, "cauchy": True, "low_rank": True},
            **{"attention": True, "quasiseparable": True, "dense": False, "dft": False},
        }.items()
    }
    return {
        "softmax": "softmax",
        "softmax, window 17": {"name": "softmax", "sliding_window": 17},
        "softmax, both ways": {"name": "softmax", "bidirectional": True},
        "linear": "linear",
        "nala": "nala",
        "nala, both ways": {"name": "nala", "bidirectional": True, "conv_kernel": 5},
        "ssd": {"name": "ssd", "head_dim": 8, "state_size": 16},
        "gla": {"name": "gla", "num_heads": 2},
        "gated_delta": {"name": "gated_delta", "num_key_heads": 2, "key_head_dim": 16},
        "hydra": {"name": "hydra", "head_dim": 8, "state_size": 16},
        **families,
    }


def model_of(mixer: Any) -> Any:
    """Two blocks, grouped heads."""
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.initialization import initialize
    from llmnorm.models.modeling import LlmNormModel

    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlmNormConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "mixer": mixer},
        **{"initializer_range": 0.2, "max_position_embeddings": 128},
        **shape,
    )
    model = LlmNormModel(config)
    initialize(model, seed=0)
    return model


def packed_tokens() -> tuple[Tensor, Tensor]:
    """Two rows of 96 tokens and five documents."""
    tokens = torch.randint(0, 64, (2, 96), generator=torch.Generator().manual_seed(2))
    positions = [torch.arange(n) for n in (1, 30, 65, 70, 26)]
    return tokens, torch.cat(positions).view(2, 96)


def outputs(model: Any, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The hidden states and the gradient of every parameter."""
    model = copy.deepcopy(model).to(device, dtype)
    tokens, positions = (t.to(device) for t in packed_tokens())
    out = model(input_ids=tokens, position_ids=positions).last_hidden_state
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), *gradients]


def mixer_row(mixer: Any) -> list[str]:
    """Errors on the GPU and on the CPU in float32, and under autocast, against float64."""
    model, cpu = model_of(mixer), torch.device("cpu")
    expected = outputs(model, cpu, torch.float64)
    found, there = outputs(model, GPU, torch.float32), outputs(model, cpu, torch.float32)

    def worst(got: Sequence[Tensor]) -> tuple[float, float]:
        errors = [difference(a, b) for a, b in zip(got, expected, strict=True)]
        return errors[0], max(errors[1:])

    gpu, by_cpu = worst(found), worst(there)
    with torch.autocast("cuda", torch.bfloat16):
        half = worst(outputs(model, GPU, torch.float32))
    fine = all(a <= max(MIXER_BOUND, 4 * b) for a, b in zip(gpu, by_cpu, strict=True))
    fine = fine and all(map(torch.isfinite, torch.tensor(half)))
    return [*(f"{e:.0e}" for e in (*gpu, *by_cpu, *half)), "yes" if fine else "NO"]


def mixer_tables(figures: dict[str, Any]) -> Iterator[Table]:
    """A row for each mixer."""
    rows: Rows = []
    for name, mixer in mixers().items():
        try:
            rows.append([name, *mixer_row(mixer)])
        except Exception as error:  # noqa: BLE001
            rows.append([name, problem_of(error), *["-"] * 5, "NO"])
    columns = ["mixer", "out", "grads", "CPU out", "CPU grads", "bf16 out", "bf16 grads", "within"]
    yield Table(
        "Largest error of a model of two blocks against float64 on the CPU, packed rows, TF32 off "
        f"(allowed: {MIXER_BOUND:g}, or 4 times the CPU's in float32)",
        columns,
        rows,
    )
    figures["mixers"] = [dict(zip(columns, row, strict=True)) for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="let fla time its choices of tiles")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_kernels.json")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_kernels: error: no GPU that torch can use", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with_fla = fla_problem() is None
    if with_fla and not options.tune:
        one_choice_of_tiles()
    if options.compile:
        compile_for(options.compile)
        return 0
    begin = time.monotonic()
    figures: dict[str, Any] = {}
    waiting = compilers(options.tune) if with_fla else []
    tables = [*varlen_tables(figures)]
    for process in waiting:
        process.wait()
    figures["seconds_compiling"] = time.monotonic() - begin
    print(f"kernels compiled: {figures['seconds_compiling']:.0f} s", flush=True)
    tables += mixer_tables(figures)
    print(f"mixers checked: {time.monotonic() - begin:.0f} s", flush=True)
    tables += fla_tables(figures)
    figures["seconds"] = time.monotonic() - begin
    publish(options.out, "Kernels on a GPU", tables, figures)
    print(f"{figures['seconds']:.0f} s")
    return 1 if any("NO" in row for table in tables for row in table.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
