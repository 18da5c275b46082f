"""Measure how the mixers' time and memory grow with the length, beside softmax attention.

usage: python tools/bench/mixers.py [--quick] [--longest 32768] [--rounds 2] [--mixers nala ssd]
           [--out docs/results/mixers.json]

Lengths: forward and backward of every mixer's core (`mix`, with the feature maps of NaLa and linear
attention, without projections), for one row of 512 tokens up to the longest. Beside it stands
torch's scaled_dot_product_attention, causal or bidirectional as the mixer is. Quadratic mixers are
measured up to 8192 tokens, matrices that are made entry by entry up to 4096. The candidates of a
length take turns, and the best round counts. The slope is that of a least-squares line through log
seconds over log tokens from 2048 on. The picture, mixers.png beside the file, shows all lengths.

Decoding: seconds of one more token, and bytes of the state, after 128 tokens and after half of the
longest length.

Training step: models of equal parameters (the MLP's width makes up for the mixer's), context 512,
in turns; the ratio to softmax is the median over the rounds.

With `--mixers` only these and the attention beside them are measured, and no file is written unless
`--out` is given. Times are CPU seconds of one thread, so that other work on the machine makes
little difference.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import training_step
from report import RESULTS, Table, publish
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from llmnorm.nn.cache import KeyValues, RaggedCache
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.settings import ModelSettings
from llmnorm.nn.visibility import Cached

WIDTH, HEADS = 256, 4
MIXERS: dict[str, Any] = {
    "sdpa": "softmax",  # torch's own kernel instead of ours
    "softmax": "softmax",
    "softmax, window 512": {"name": "softmax", "sliding_window": 512},
    "linear": "linear",
    "nala": "nala",
    "ssd": {"name": "ssd", "expand": 1},
    "gla": "gla",
    "gated_delta": "gated_delta",
    "sdpa, both ways": {"name": "softmax", "bidirectional": True},
    "linear, both ways": {"name": "linear", "bidirectional": True},
    "nala, both ways": {"name": "nala", "bidirectional": True, "conv_kernel": 5},
    "hydra": {"name": "hydra", "expand": 1},
}
FAMILIES = ("quasiseparable", "low_rank", "toeplitz", "dft")
ENTRY_BY_ENTRY = ("attention", "dense", "vandermonde", "cauchy")
MIXERS |= {
    f"matrix {family}": {"name": "matrix", "expand": 1, "head_dim": 64, "family": family}
    for family in (*FAMILIES, *ENTRY_BY_ENTRY)
}
TRAINED = {name: MIXERS[name] for name in ("softmax", "linear", "nala", "gla", "gated_delta")}
TRAINED["ssd"] = "ssd"
# The longest rows for mixers whose time is quadratic.
QUADRATIC = {"sdpa": 8192, "softmax": 8192, "sdpa, both ways": 8192, "matrix attention": 8192}
QUADRATIC |= {f"matrix {family}": 4096 for family in ENTRY_BY_ENTRY[1:]}


def build(mixer: Any) -> Mixer:
    """One layer's mixer of the measured width."""
    settings = ModelSettings(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        mixer=mixer,
        max_position_embeddings=QUADRATIC["matrix dense"],
    )
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


def seconds(name: str, mixer: Mixer, length: int) -> float:
    """Forward and backward of the core for one row."""
    context = Context(*tables(torch.arange(length).unsqueeze(0)))
    with torch.no_grad():
        p = mixer.prepare(torch.randn(1, length, WIDTH), context)
    p = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), p)
    begin = time.process_time()
    if name.startswith("sdpa"):
        q, k, v = (t.transpose(1, 2) for t in p)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=mixer.causal)
    else:
        y = mixer.mix(p, context)
    y.backward(torch.ones_like(y))
    return time.process_time() - begin


def slope(times: dict[int, float]) -> float | None:
    """The exponent with which time grows from 2048 tokens on; None with fewer than two lengths."""
    known = {n: s for n, s in times.items() if n >= 2048 and math.isfinite(s)}
    points = [(math.log(n), math.log(s)) for n, s in known.items()]
    if len(points) < 2:
        return None
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


@torch.no_grad()
def decoding(mixer: Mixer, lengths: tuple[int, int]) -> list[dict[str, float]]:
    """Milliseconds of one more token, and bytes of the state, after each number of tokens."""
    found = []
    for length in lengths:
        cache = RaggedCache([mixer.new_cache()])
        for new, count in ((length - 70, 1), (1, 70)):
            times = []
            for _ in range(count):
                places = cache.places(1, new, torch.device("cpu"))
                context = Context(*tables(places.index), Cached(places))
                begin = time.process_time()
                mixer(torch.randn(1, new, WIDTH), context, cache.layers[0])
                times.append(time.process_time() - begin)
        layer: Any = cache.layers[0]
        attention = isinstance(cache.layers[0], KeyValues)
        kept: Any = (layer.keys, layer.values) if attention else layer.state
        size = sum(t.numel() * t.element_size() for t in kept)
        found.append({"tokens": length, "milliseconds": 1e3 * min(times), "bytes": size})
    return found


def training(names: list[str], rounds: int) -> dict[str, float]:
    """Training steps' times of models of equal parameters, as ratios to softmax."""
    shape = dict(training_step.SHAPE)

    def parameters(mixer: Any) -> int:
        settings = ModelSettings.model_validate(shape | {"mixer": mixer})
        with torch.device("meta"):
            return sum(p.numel() for p in settings.mixers()[0].build(settings, 0).parameters())

    steps = {}
    for name in names:
        more = parameters(TRAINED[name]) - parameters("softmax")
        inner = shape["intermediate_size"] - round(more / 3 / shape["hidden_size"])
        training_step.SHAPE |= {"mixer": TRAINED[name], "intermediate_size": inner}
        steps[name] = training_step.ours(4096, 4, "cpu")
        next(steps[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), desc="training step"):
        for name in names:
            begin = time.process_time()
            next(steps[name])
            times[name].append(time.process_time() - begin)
    return {
        name: statistics.median(a / b for a, b in zip(row, times["softmax"], strict=True))
        for name, row in times.items()
    }


def draw(
    times: dict[str, dict[int, float]],
    slopes: dict[str, float | None],
    both_ways: set[str],
    path: Path,
) -> None:
    """Draw seconds over tokens, both logarithmic: causal mixers left, bidirectional ones right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5), layout="constrained")
    halves = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(halves, ("causal", "both ways"), strict=True):
        names = [name for name in times if (name in both_ways) == (title == "both ways")]
        for number, name in enumerate(names):
            known = {n: s for n, s in times[name].items() if math.isfinite(s)}
            found = slopes[name]
            label = name if found is None else f"{name}: {found:.2f}"
            marker = "osv^"[number // 10 % 4]  # the colours repeat after ten
            axes.loglog(list(known), list(known.values()), marker=marker, label=label)
        axes.set_xlabel("tokens")
        axes.set_title(f"One row through the mixing core, {title}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3)
    halves[0].set_ylabel("seconds, forward and backward; slopes from 2048 tokens on")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 2048 tokens, one round")
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, metavar="NAME", help="only these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.longest, options.rounds = min(options.longest, 2048), 1
    if options.out is None and not options.mixers:
        options.out = RESULTS / "mixers.json"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixers = {name: build(mixer) for name, mixer in MIXERS.items()}
    both_ways = {name for name, mixer in mixers.items() if not mixer.causal}
    reference = {name: "sdpa, both ways" if name in both_ways else "sdpa" for name in mixers}
    asked = set(options.mixers or mixers)
    asked |= {reference[name] for name in asked}
    mixers = {name: mixer for name, mixer in mixers.items() if name in asked}
    lengths = [512 * 2**i for i in range(20) if 512 * 2**i <= options.longest]
    times: dict[str, dict[int, float]] = {name: dict.fromkeys(lengths, math.inf) for name in mixers}
    turns = [
        (name, length)
        for length in lengths
        for _ in range(options.rounds)
        for name in mixers
        if length <= QUADRATIC.get(name, length)
    ]
    tokens = sum(length for _, length in turns)
    with tqdm(desc="length", total=tokens, unit=" tokens", unit_scale=True) as bar:
        for name, length in turns:
            times[name][length] = min(times[name][length], seconds(name, mixers[name], length))
            bar.update(length)
    slopes = {name: slope(row) for name, row in times.items()}
    points = (128, options.longest // 2)
    decoded = [name for name in mixers if name != "sdpa" and name not in both_ways]
    steps = {name: decoding(mixers[name], points) for name in tqdm(decoded, desc="decoding")}
    others = [name for name in TRAINED if name in asked and name != "softmax"]
    ratios = training(["softmax", *others], 2 * options.rounds) if others else {}

    def cell(name: str, length: int) -> str:
        spent = times[name][length]
        if not math.isfinite(spent):
            return "-"
        against = times[reference[name]][length] / spent
        digits = ".0f" if against >= 10 else ".2g"
        return f"{1e3 * spent:.1f}" + (f" ({against:{digits}}x)" if math.isfinite(against) else "")

    def lines(names: list[str]) -> list[list[str]]:
        return [[n, *(cell(n, x) for x in lengths), f"{slopes[n] or math.nan:.2f}"] for n in names]

    columns = ["", *map(str, lengths), "slope"]
    what = "forward and backward of one row, ms (speed over SDPA's), and slope of log time"
    tables = []
    for way in ("causal", "both ways"):
        rows = lines([n for n in mixers if (n in both_ways) == (way == "both ways")])
        if rows:
            tables.append(Table(f"{what} (width {WIDTH}, {HEADS} heads), {way}", columns, rows))
    if steps:
        rows = [
            [name, str(p["tokens"]), f"{p['milliseconds']:.2f}", f"{p['bytes']:.0f}"]
            for name, pair in steps.items()
            for p in pair
        ]
        tables.append(Table("one more token", ["", "after", "ms", "bytes kept"], rows))
    if ratios:
        title = (
            "training step over softmax's, equal parameters (width 384, 6 layers, context 512, "
            "4 rows, vocabulary 4096)"
        )
        rows = [[name, f"{ratio:.2f}"] for name, ratio in ratios.items()]
        tables.append(Table(title, ["", "ratio"], rows))
    known = {n: {k: s for k, s in row.items() if math.isfinite(s)} for n, row in times.items()}
    figures = {"seconds": known, "slopes": slopes, "decoding": steps, "training_step": ratios}
    publish(options.out, "Sequence mixers (CPU, float32)", tables, figures)
    if options.out is not None:
        draw(times, slopes, both_ways, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
