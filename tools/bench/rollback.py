"""Measure what it costs to take rejected tokens back, beside the pass that has verified them.

usage: python tools/bench/rollback.py [--width 512] [--layers 8] [--rows 8] [--drafted 4]
           [--rounds 500] [--mixers nala ssd] [--out FILE]

A round is a pass of a token and the drafted ones in every row, and a rollback of a drawn number of
them, in a model of this width with random weights, float32. The table gives medians over ten rounds
around the tenth and before the last, the share of both, the widest replay of all rounds, and the
bytes that the cache holds. Times are CPU seconds of one thread, so that other work on the machine
makes little difference.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from decode_profile import MIXERS
from report import Table, publish
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmnorm.models.building import build_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.nn.recurrent_cache import RecurrentCache
from tests.models.cache_rounds import held


def measure(mixer: Any, given: argparse.Namespace) -> dict[str, list[float]]:
    """Of every round: seconds of the pass and of the rollback, replayed tokens, bytes held."""
    config = LlmNormConfig(
        vocab_size=4096,
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.width // 64),
        mixer=mixer,
    )
    model = build_model(config, seed=0).eval()
    cache, chance, widths = model.model.new_cache(), random.Random(0), list[int]()
    cache.slots.reserve(
        given.rows,
        given.rounds * (given.drafted + 1) + 64,
        given.drafted + 1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for layer in cache.slots.layers:
        if isinstance(layer, RecurrentCache):
            layer.advance = _noting(layer.advance, widths)
    found: dict[str, list[float]] = {"pass": [], "rollback": [], "replayed": [], "bytes": []}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(given.rounds):
            shape = given.rows, given.drafted + 1
            ids = torch.randint(0, 4096, shape, generator=generator)
            times = [time.process_time()]
            model(ids, past_key_values=cache)
            times.append(time.process_time())
            del widths[:]
            cache.slots.rollback([chance.randint(0, given.drafted) for _ in range(given.rows)])
            times.append(time.process_time())
            found["pass"].append(times[1] - times[0])
            found["rollback"].append(times[2] - times[1])
            found["replayed"].append(max(widths, default=0))
            found["bytes"].append(held(cache.slots))
    return found


def _noting(advance: Any, widths: list[int]) -> Any:
    """`advance`, which notes how many tokens it is given."""

    def noting(state: Any, inputs: tuple[Tensor, ...], counts: Tensor) -> Any:
        widths.append(inputs[0].shape[1])
        return advance(state, inputs, counts)

    return noting


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--drafted", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures, rows = {}, []
    for name in tqdm(given.mixers, desc="rollback", unit="mixer", disable=None):
        found = figures[name] = measure(MIXERS[name], given)
        row = [name]
        for part in (slice(5, 15), slice(-10, None)):
            took, back = (statistics.median(found[key][part]) for key in ("pass", "rollback"))
            row += [f"{1000 * took:.1f}", f"{1000 * back:.2f}", f"{back / took:.3f}"]
        early, late = (found["bytes"][n] / 1e6 for n in (10, -1))
        rows.append([*row, f"{max(found['replayed']):.0f}", f"{early:.2f}", f"{late:.2f}"])
    each = [f"{what}, round {n}" for n in (10, given.rounds) for what in ("pass", "back", "share")]
    columns = ["mixer", *each, "replayed", "MB, round 10", f"MB, round {given.rounds}"]
    title = (
        f"Width {given.width}, {given.layers} layers, {given.rows} rows, a token and "
        f"{given.drafted} drafted ones; ms"
    )
    publish(given.out, "What a rollback costs", [Table(title, columns, rows)], figures)


if __name__ == "__main__":
    main()
