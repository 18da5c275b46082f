"""Measure a training step of a 1B model on one GPU against the same step in plain PyTorch.

usage: python tools/bench/gpu_step.py [--rows 8] [--rounds 6] [--steps 3] [--peers bf16 autocast
           whole] [--out docs/results/gpu_step.json]
       python tools/bench/gpu_step.py --tiny     (on a CPU, to try the script itself; no file)

Llama of 1.1 billion parameters (width 2048, 16 layers, untied head of 32768), rows of 2048 tokens
that hold documents of 512 on average, FSDP2 on one process, every block compiled, fused AdamW,
clipping at norm 1. Ours is a step of `llmnorm train training.precision=bf16
parallel.compile=true` under fsdp2.yaml, without reading the batch. The peer is a Llama written
below with torch's own functions: F.rms_norm, all logits at once, a compiled F.cross_entropy,
fully_shard and compile block by block.
  bf16      torch's MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=float32): weights gathered
            and activations kept in bf16, which is torch's usual way
  autocast  weights gathered in float32, products in bf16, sums in float32: our arithmetic
  whole     bf16, the documents of a row not kept apart: F.scaled_dot_product_attention over the
            whole row instead of the kernel over documents (llmnorm/nn/mixers/varlen.py) that ours
            and the other peers use
All start from the same weights, and their first losses must agree. Ours and one peer at a time are
in one process and take turns of `steps` steps, with one synchronisation at the beginning and one at
the end of a turn. Ratios are medians over the rounds.

MFU counts six operations per token and weight of a matrix product, and attention as if every token
saw the whole row (llmnorm/models/flops.py; PaLM's convention); `weights alone` leaves attention
out. Both are divided by the card's dense bf16 peak. Memory is the peak during a candidate's turn
minus what the other candidate holds. `compiled again` counts graphs that were compiled after the
first steps: 0 unless something is wrong. Kernels' times are those of one step under torch's
profiler.
"""

import argparse
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from report import Table, publish
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.models import LlmNormConfig
from llmnorm.models.building import empty_model
from llmnorm.models.flops import flops_per_token
from llmnorm.nn.loss import linear_cross_entropy
from llmnorm.nn.masks import (
    document_boundaries,
    document_lengths,
    document_mask,
    document_segments,
)
from llmnorm.nn.mixers import varlen
from llmnorm.objectives.contract import MicroBatch
from llmnorm.optim.groups import split
from llmnorm.optim.settings import AdamWSettings
from llmnorm.parallel.processes import Parallel
from llmnorm.runs.metrics import peak_flops
from llmnorm.training.step import count, forward_backward

SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TINY = SHAPE | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DOCUMENT = 512  # tokens on average
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WARMUP = 3
PEERS = ("bf16", "autocast", "whole")
HEAD_CHUNKS = (512, 1024, 2048, 4096, 8192)  # tokens
# Kinds of kernels by what their names hold; the first that fits.
KINDS = {
    "compiled": r"^triton",
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk",
    "lists of tensors": r"multi_tensor|adam",
    "copies": r"copy|memcpy|memset|fill|cat",
}


def make_rows(shape: dict[str, Any], count: int, step: int) -> dict[str, Tensor]:
    """Ids, positions that restart at documents, and labels of a step, (count, length) each."""
    length = shape["max_position_embeddings"]
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(shape["vocab_size"], (count, length), generator=generator)
    starts = torch.rand(count, length, generator=generator) < 1 / min(DOCUMENT, length // 4)
    starts[:, 0] = True
    place = torch.arange(length)
    positions = place - (place * starts).cummax(1).values
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, :-1][starts[:, 1:]] = -100  # the next document's first token
    return {"input_ids": ids, "position_ids": positions, "shift_labels": labels}


class Ours:
    """Our model, and its step as training/step.py does it."""

    name = "ours"

    def __init__(self, shape: dict[str, Any], device: str) -> None:
        training = TrainingSettings(steps=1, precision="bf16", device=device)
        settings = ParallelSettings(sharding="fsdp2", compile=device == "cuda")
        self.parallel = Parallel(settings, training)
        self.config = LlmNormConfig(**shape)
        model = empty_model(self.config, device="meta").train()
        torch.manual_seed(0)
        self.replica = self.parallel.prepare(model, _fill)
        groups = split(model)
        self.parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
        self.optimizer = AdamWSettings(**ADAMW).build(groups, self.parallel.exchange())

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        """One step; the loss."""
        parallel, real = self.parallel, int((inputs["shift_labels"] != -100).sum())
        rows = torch.arange(len(inputs["input_ids"]))
        batches = [MicroBatch({**inputs, "loss_only": True}, real, real, rows)]
        counts = count(batches, parallel)
        loss = forward_backward(self.replica, batches, counts[0], parallel)
        norm = parallel.clip(self.parameters, 1.0)
        reduced = parallel.reduce(torch.stack([loss, loss.new_zeros(())]))
        read = torch.cat([reduced.double(), norm.double().view(1), counts.double()]).tolist()
        assert all(map(math.isfinite, read))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


@dataclass(frozen=True)
class Packing:
    """What the peer's blocks are told about their tokens; not a tuple, which FSDP would cast."""

    cos: Tensor
    """(batch, length, 1, head_dim/2), float32."""
    sin: Tensor
    boundaries: Tensor | None
    """Where documents begin, on a GPU; None: rows are whole, or `visible` says."""
    visible: Tensor | None
    """(batch, 1, length, length), on a CPU, where there is no kernel."""


class PlainBlock(nn.Module):
    """A Llama block in torch's parts."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, inner = shape["hidden_size"], shape["intermediate_size"]
        self.head_dim = width // shape["num_attention_heads"]
        narrow = self.head_dim * shape["num_key_value_heads"]
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, out, bias=False) for out in (width, narrow, narrow, width)
        )
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """hidden (batch, length, width) -> the same shape."""
        x = self.norms[0](hidden)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        q, k = _rotated(q, packing), _rotated(k, packing)
        hidden = hidden + self.o(_attention(q, k, v, packing).flatten(-2))
        x = self.norms[1](hidden)
        return hidden + self.down(F.silu(self.gate(x)) * self.up(x))


def _rotated(x: Tensor, packing: Packing) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = packing.cos, packing.sin
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    if packing.boundaries is not None:
        length = q.shape[1]
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        mixed = varlen.attention(flat[0], flat[1], flat[2], packing.boundaries, length)
        return mixed.view_as(q)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = packing.visible
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return mixed.transpose(1, 2)


class PlainLlama(nn.Module):
    """A Llama in torch's parts; its parameters are ours, in our order."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, vocabulary = shape["hidden_size"], shape["vocab_size"]
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape["num_hidden_layers"]))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, packing: Packing) -> Tensor:
        """Logits (batch, length, vocabulary)."""
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden, packing)
        return self.head(self.norm(hidden))


def plain_loss(logits: Tensor, labels: Tensor, items: Tensor) -> Tensor:
    """Mean cross-entropy of the labels."""
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=-100, reduction="sum") / items


class Plain:
    """The peer's model, and its step in a plain loop."""

    def __init__(self, name: str, shape: dict[str, Any], device: str) -> None:
        self.name, self.device = name, torch.device(device)
        compiled = device == "cuda"
        with torch.device("meta"):
            self.model = PlainLlama(shape).train()
        policy = MixedPrecisionPolicy()
        if name != "autocast":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device, (1,))
        self.model.to_empty(device=device)
        torch.manual_seed(0)  # the same numbers in the same order as ours
        for block in self.model.blocks:
            _fill(dict(block.named_modules()))
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy)
        for rest in (self.model.embedding, self.model.norm, self.model.head):
            _fill({"": rest})
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.loss = torch.compile(plain_loss) if compiled else plain_loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        head_dim = shape["hidden_size"] // shape["num_attention_heads"]
        turns = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(shape["max_position_embeddings"])[:, None] * turns
        self.tables = [t.unsqueeze(1).to(device) for t in (angles.cos(), angles.sin())]

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        """One step; the loss."""
        packing = self._packing(inputs["position_ids"])
        ids, labels = (
            inputs[key].to(self.device, non_blocking=True) for key in ("input_ids", "shift_labels")
        )
        items = (labels != -100).sum()
        autocast = self.name == "autocast"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = self.model(ids, packing)
        loss = self.loss(logits, labels, items)
        del logits
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _packing(self, positions: Tensor) -> Packing:
        boundaries, visible = None, None
        documents = document_lengths(positions)
        if self.name != "whole" and documents is not None:
            boundaries = document_boundaries(documents, self.device)
            if self.device.type == "cuda":
                torch._dynamo.maybe_mark_dynamic(boundaries, 0)
            else:
                visible = document_mask(document_segments(boundaries, *positions.shape))
                boundaries = None
        positions = positions.to(self.device, non_blocking=True)
        cos, sin = (table[positions] for table in self.tables)
        return Packing(cos, sin, boundaries, visible)


Candidate = Ours | Plain


@torch.no_grad()
def _fill(modules: Mapping[str, nn.Module]) -> None:
    """Initial weights, drawn on the device itself, which is faster than llmnorm's own way."""
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


class Turns:
    """Lets candidates take turns on the same rows, and records their time and memory."""

    def __init__(self, shape: dict[str, Any], device: str, options: argparse.Namespace) -> None:
        self.shape, self.cuda, self.options = shape, device == "cuda", options
        self.losses: dict[str, list[float]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}
        self.compiled_again: dict[str, int] = {}
        self.kernels: dict[str, dict[str, float]] = {}
        self._held: dict[str, int] = {}

    def build(self, name: str, make: Callable[[], Candidate]) -> Candidate:
        """A candidate that has compiled what it needs."""
        before, start = self._allocated(), time.perf_counter()
        candidate = make()
        losses = self.losses[name] = [float(candidate.step(rows)) for rows in self._rows(0, WARMUP)]
        self._held[name] = self._allocated() - before
        self.compiled_again[name] = self.memory[name] = 0
        self.seconds[name] = []
        took = time.perf_counter() - start
        _say(f"{name}: built, first {WARMUP} steps: {took:.1f} s; losses {losses}")
        worst = max(abs(a / b - 1) for a, b in zip(losses, self.losses["ours"], strict=True))
        if worst > 0.01:
            sys.exit(f"bench: error: losses of ours and {name} differ by {worst:.1%}")
        return candidate

    def compete(self, ours: Candidate, peer: Candidate) -> None:
        """All rounds of a pair."""
        for number in range(self.options.rounds):
            pair = [ours, peer] if number % 2 == 0 else [peer, ours]
            took = {candidate.name: self._turn(candidate, number) for candidate in pair}
            self.ratios.setdefault(peer.name, []).append(took[peer.name] / took["ours"])
        ratio = statistics.median(self.ratios[peer.name])
        shown = {name: round(seconds, 4) for name, seconds in took.items()}
        _say(f"{peer.name}: ours over it {ratio:.3f}; seconds a step at last {shown}")
        for candidate in (ours, peer):
            if self.cuda and candidate.name not in self.kernels:
                self._profile(candidate)

    def _turn(self, candidate: Candidate, number: int) -> float:
        """Seconds a step."""
        name, steps = candidate.name, self.options.steps
        rows, graphs = self._rows(WARMUP + number * steps, steps), _graphs()
        others = self._allocated() - self._held[name]
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        for inputs in rows:
            candidate.step(inputs)
        if self.cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        self.seconds[name].append(seconds)
        if self.cuda:
            self.memory[name] = max(self.memory[name], torch.cuda.max_memory_allocated() - others)
        self.compiled_again[name] += _graphs() - graphs
        return seconds

    def _profile(self, candidate: Candidate) -> None:
        """Milliseconds of one step by kind of kernel; the longest kernels are printed."""
        (inputs,) = self._rows(WARMUP, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
            candidate.step(inputs)
            torch.cuda.synchronize()
        kernels = {
            event.key: event.self_device_time_total / 1e3
            for event in record.key_averages()
            if not event.is_user_annotation  # which hold kernels that are counted already
        }
        kinds = dict.fromkeys([*KINDS, "others"], 0.0)
        for name, milliseconds in kernels.items():
            kind = next((k for k, holds in KINDS.items() if re.search(holds, name, re.I)), "others")
            kinds[kind] += milliseconds
        self.kernels[candidate.name] = {kind: round(ms, 2) for kind, ms in kinds.items()}
        longest = sorted(kernels, key=lambda name: -kernels[name])[:12]
        lines = [f"{candidate.name}: longest kernels, ms of one step"]
        _say("\n".join(lines + [f"{kernels[name]:10.2f}  {name[:110]}" for name in longest]))

    def _rows(self, first: int, count: int) -> list[dict[str, Tensor]]:
        return [make_rows(self.shape, self.options.rows, first + i) for i in range(count)]

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0


def _graphs() -> int:
    """How many graphs have been compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def product_rate(size: int = 8192) -> float:
    """FLOP/s of a product of square matrices in bf16, random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        torch.mm(a, b)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return 2 * size**3 / statistics.median(times[3:])


def head_times(shape: dict[str, Any], rows: int) -> dict[int, dict[str, float]]:
    """Forward and backward of our loss alone, for float32 hidden states, by tokens at a time."""
    tokens, width = rows * shape["max_position_embeddings"], shape["hidden_size"]
    hidden = torch.randn(tokens, width, device="cuda", requires_grad=True)
    weight = torch.randn(shape["vocab_size"], width, device="cuda").mul_(0.02).requires_grad_()
    labels = torch.randint(shape["vocab_size"], (tokens,), device="cuda")
    found = {}
    for chunk in HEAD_CHUNKS:
        torch.cuda.reset_peak_memory_stats()
        before, times = torch.cuda.memory_allocated(), []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, compiled=True)
            torch.autograd.grad(loss, (hidden, weight))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[chunk] = {
            "milliseconds": round(1e3 * statistics.median(times[2:]), 2),
            "mib": round((torch.cuda.max_memory_allocated() - before) / 2**20),
        }
    return found


def measure(shape: dict[str, Any], device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of ours and of each peer."""
    turns, rates = Turns(shape, device, options), list[float]()
    ours = turns.build("ours", lambda: Ours(shape, device))
    for name in options.peers:
        peer = turns.build(name, lambda name=name: Plain(name, shape, device))  # type: ignore[misc]
        turns.compete(ours, peer)
        del peer
        gc.collect()
        if turns.cuda:
            rates.append(product_rate())
            torch.cuda.empty_cache()
    assert isinstance(ours, Ours)
    ours.parallel.close()
    heads = head_times(shape, options.rows) if turns.cuda else {}
    tokens = options.rows * shape["max_position_embeddings"]
    flops = flops_per_token(ours.config, shape["max_position_embeddings"])
    weights_alone = flops_per_token(ours.config, 0)
    peak = peak_flops(torch.device(device))
    kernel = "flash-attn" if varlen.FLASH_ATTN else "torch.nn.attention.varlen"
    candidates = {}
    for name, seconds in turns.seconds.items():
        speed = tokens / statistics.median(seconds)
        row: dict[str, Any] = {"tokens_per_second": round(speed)}
        if peak:
            row["mfu"] = round(speed * flops / peak, 4)
            row["mfu_weights_alone"] = round(speed * weights_alone / peak, 4)
        row["memory_mib"] = round(turns.memory[name] / 2**20)
        if name != "ours":
            row["ours_over_it"] = round(statistics.median(turns.ratios[name]), 4)
        row |= {
            "compiled_again": turns.compiled_again[name],
            "first_losses": [round(loss, 4) for loss in turns.losses[name]],
            "seconds_a_step": [round(s, 4) for s in seconds],
            "kernels_ms": turns.kernels.get(name, {}),
        }
        candidates[name] = row
    return {
        "parameters": sum(p.numel() for p in ours.replica.parameters()),
        "flops_per_token": flops,
        "flops_per_token_weights_alone": weights_alone,
        "peak_flops": peak,
        "product_tflops": round(statistics.median(rates) / 1e12, 1) if rates else None,
        "attention": kernel if turns.cuda else "masks",
        "loss_by_chunk": heads,
        "candidates": candidates,
    }


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    """The tables of the figures."""
    candidates: dict[str, dict[str, Any]] = figures["candidates"]
    our_memory = candidates["ours"]["memory_mib"]
    rows = []
    for name, row in candidates.items():
        peer = name != "ours"
        mfu = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu", "mfu_weights_alone")]
        rows.append(
            [f"plain, {name}" if peer else name, f"{row['tokens_per_second']}"]
            + [
                f"{row['ours_over_it']:.3f}" if peer else "",
                *mfu,
                f"{row['memory_mib'] / 1024:.1f}",
            ]
            + [f"{our_memory / row['memory_mib']:.2f}" if peer and our_memory else ""]
            + [str(row["compiled_again"])]
        )
    shape, rate = figures["shape"], figures["product_tflops"]
    title = (
        f"{figures['parameters'] / 1e9:.2f} billion parameters, {figures['rows']} rows of "
        f"{shape['max_position_embeddings']} tokens a step; documents by {figures['attention']}"
    )
    if rate:
        title += f"; a product of 8192 x 8192 matrices in bf16 by itself: {rate:.0f} TFLOP/s"
    columns = ["", "tokens/s", "ours over it", "MFU", "weights alone", "GiB", "ours over it"]
    yield Table(title, [*columns, "compiled again"], rows)
    if candidates["ours"]["kernels_ms"]:
        kinds = [*candidates["ours"]["kernels_ms"]]
        yield Table(
            "milliseconds of one step by kind of kernel, and the step without a profiler",
            ["", *kinds, "step"],
            [
                [name, *(f"{row['kernels_ms'][kind]:.1f}" for kind in kinds)]
                + [f"{1e3 * statistics.median(row['seconds_a_step']):.1f}"]
                for name, row in candidates.items()
            ],
        )
    if figures["loss_by_chunk"]:
        yield Table(
            "our loss by itself, forward and backward, by tokens at a time",
            ["tokens", "ms", "MiB"],
            [
                [str(chunk), f"{row['milliseconds']:.1f}", str(row["mib"])]
                for chunk, row in figures["loss_by_chunk"].items()
            ],
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, no file")
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "gpu_step.json")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit(
            "bench: error: torch sees no GPU here; `llmnorm doctor` tells why, --tiny does not"
        )
    shape, device = (TINY, "cpu") if options.tiny else (SHAPE, "cuda")
    if options.tiny:
        options.rows, options.rounds, options.steps = 2, 2, 1
    figures = {"shape": shape, "rows": options.rows, "document": DOCUMENT}
    figures |= {"rounds": options.rounds, "steps_a_turn": options.steps}
    figures |= measure(shape, device, options)
    title = "Training step of a 1B model on one GPU (FSDP2, compiled, bf16)"
    publish(None if options.tiny else options.out, title, list(tables(figures)), figures)


if __name__ == "__main__":
    main()
