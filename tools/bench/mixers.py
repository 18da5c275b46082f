"""Measures how the mixers' time and memory grow with the length, beside softmax attention.

usage: python tools/bench/mixers.py [--longest 8192] [--rounds 3] [--out docs/results/mixers.json]

For rows of 512 tokens up to the longest: seconds of forward and backward of the mixing core (`mix`,
features of NaLa included; projections not) of every mixer, of one width; the candidates of a length
alternate, so that a busy machine slows all, and the best of all rounds counts. The slope is that of
a least-squares line through log seconds over log tokens from 2048 on. Decoding: seconds of one
token and bytes carried after 128 and after the longest number of tokens.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, Table, publish
from torch import Tensor

from llmnorm.nn.cache import KeyValues, RaggedCache
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.settings import ModelSettings

WIDTH, HEADS = 256, 4
MIXERS: dict[str, Any] = {
    "softmax": "softmax",
    "softmax, window 512": {"name": "softmax", "sliding_window": 512},
    "linear": "linear",
    "nala": "nala",
    "ssd": {"name": "ssd", "expand": 1},
    "gla": "gla",
    "gated_delta": "gated_delta",
}


def build(mixer: Any) -> Mixer:
    """One layer's mixer of the measured width."""
    settings = ModelSettings(hidden_size=WIDTH, num_attention_heads=HEADS, mixer=mixer)
    built = settings.mixers()[0].build(settings, 0)
    for parameter in built.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return built


def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables for positions (batch, length)."""
    settings = ModelSettings(hidden_size=WIDTH, num_attention_heads=HEADS)
    rotary = Rotary(settings.rope_parameters, settings.head_dim, 2048)
    return rotary(positions, torch.float32)


def seconds(mixer: Mixer, length: int) -> float:
    """Forward and backward of the core for one row."""
    context = Context(*tables(torch.arange(length).unsqueeze(0)))
    with torch.no_grad():
        p = mixer.prepare(torch.randn(1, length, WIDTH), context)
    leaves = [t.detach().requires_grad_() for t in p if t is not None]
    given = iter(leaves)
    p = type(p)(*(None if t is None else next(given) for t in p))
    begin = time.process_time()
    y = mixer.mix(p, context)
    y.backward(torch.ones_like(y))
    return time.process_time() - begin


def slope(times: dict[int, float]) -> float | None:
    """The exponent of the growth from 2048 tokens on."""
    points = [(math.log(n), math.log(s)) for n, s in times.items() if n >= 2048]
    if len(points) < 2:
        return None
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


@torch.no_grad()
def decoding(mixer: Mixer, lengths: tuple[int, int]) -> list[dict[str, float]]:
    """Seconds of one token, and bytes carried, after each number of tokens."""
    found = []
    for length in lengths:
        cache = RaggedCache([mixer.new_cache()])
        for new, count in ((length - 70, 1), (1, 70)):
            times = []
            for _ in range(count):
                places = cache.places(1, new, torch.device("cpu"))
                context = Context(
                    *tables(places.index), places.mask(), causal=places.causal, places=places
                )
                begin = time.process_time()
                mixer(torch.randn(1, new, WIDTH), context, cache.layers[0])
                times.append(time.process_time() - begin)
        layer: Any = cache.layers[0]
        attention = isinstance(cache.layers[0], KeyValues)
        kept: Any = (layer.keys, layer.values) if attention else layer.state
        size = sum(t.numel() * t.element_size() for t in kept)
        found.append({"tokens": length, "milliseconds": 1e3 * min(times), "bytes": size})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "mixers.json")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    mixers = {name: build(mixer) for name, mixer in MIXERS.items()}
    lengths = [512 * 2**i for i in range(20) if 512 * 2**i <= options.longest]
    times: dict[str, dict[int, float]] = {name: dict.fromkeys(lengths, math.inf) for name in mixers}
    for length in lengths:
        for _ in range(options.rounds):
            for name, mixer in mixers.items():
                times[name][length] = min(times[name][length], seconds(mixer, length))
    slopes = {name: slope(row) for name, row in times.items()}
    steps = {name: decoding(m, (128, options.longest)) for name, m in mixers.items()}
    rows = [
        [name, *(f"{1e3 * s:.1f}" for s in row.values()), f"{slopes[name] or math.nan:.2f}"]
        for name, row in times.items()
    ]
    tables = [
        Table(
            f"forward and backward, ms by length; slope of log time (width {WIDTH}, {HEADS} heads)",
            ["", *map(str, lengths), "slope"],
            rows,
        ),
        Table(
            "one more token",
            ["", "after", "ms", "bytes kept"],
            [
                [name, str(p["tokens"]), f"{p['milliseconds']:.2f}", f"{p['bytes']:.0f}"]
                for name, pair in steps.items()
                for p in pair
            ],
        ),
    ]
    figures = {"seconds": times, "slopes": slopes, "decoding": steps}
    publish(options.out, "Sequence mixers (CPU, float32)", tables, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
