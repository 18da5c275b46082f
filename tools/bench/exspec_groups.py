"""How often EXSPEC finds rows of equal lengths, by its scheduler alone: no model is run.

usage: python tools/bench/exspec_groups.py [--quick] [--acceptance 0.6] [--drafted 5]
           [--out docs/results/exspec_groups.json]

480 prompts with lengths like those of Spec-Bench's first turns (80 of each kind: medians and
spreads below, words times 1.35, at most 1024 tokens), 128 new tokens each. A row drafts 5 tokens,
or what it may still get. Whether a token is accepted is drawn, and no row is run because it has
waited (as in the released code). A rate is the share of rounds that found a group:
  exact       a batch of equal lengths
  half        or at least half a batch of them
  pages       a batch of lengths that are equal rounded up to 16 tokens, as rows need in slots
in the order of the data (unsorted), and with prompts sorted by length. Beside the rates the rows of
a round, since a smaller group is a smaller round. `one length`: prompts all of the mean length, as
in the paper.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from report import RESULTS, Table, publish
from tqdm import tqdm

from llmnorm.generation.exspec import Schedule, group

# kind -> median of the words of a first turn, and the standard deviation of their logarithm.
KINDS = {
    "qa": (9, 0.25),
    "translation": (24, 0.35),
    "math": (39, 0.40),
    "mt-bench": (35, 0.90),
    "summarization": (526, 0.35),
    "rag": (508, 0.10),
}
NEW, TOKENS_A_WORD, LONGEST, PAGE = 128, 1.35, 1024, 16
PAIRS = ((4, 12), (4, 48), (8, 24), (8, 64), (16, 48))  # batch, window


class Rate(NamedTuple):
    """Of a run of all prompts: the share of rounds with a group, and rows a round."""

    grouped: float
    rows: float


def prompt_lengths(each: int, seed: int = 0) -> list[int]:
    """Tokens of `each` prompts of every kind, in a random order."""
    drawn = random.Random(seed)
    words = [
        median * drawn.lognormvariate(0, spread)
        for median, spread in KINDS.values()
        for _ in range(each)
    ]
    drawn.shuffle(words)
    return [min(LONGEST, max(1, round(some * TOKENS_A_WORD))) for some in words]


def simulated(
    lengths: list[int], schedule: Schedule, acceptance: float, drafted: int, new: int
) -> Rate:
    """Run all prompts through the scheduler's window; tokens are accepted by chance."""
    drawn, waiting = random.Random(1), list(reversed(lengths))
    window: list[list[int]] = []  # length, tokens left, rounds waited
    rounds = grouped = rows = 0
    while True:
        while len(window) < schedule.size and waiting:
            window.append([waiting.pop(), new, 0])
        if not window:
            return Rate(grouped / rounds, rows / rounds)
        found = group([row[0] for row in window], [row[2] for row in window], schedule)
        rounds, grouped, rows = rounds + 1, grouped + found.equal, rows + len(found.rows)
        for row in window:
            row[2] += 1
        for place in found.rows:
            row = window[place]
            most = min(drafted, row[1] - 1)
            gained = 1
            while gained <= most and drawn.random() < acceptance:
                gained += 1
            row[0], row[1], row[2] = row[0] + gained, row[1] - gained, 0
        window = [row for row in window if row[1]]


def main(arguments: list[str] | None = None) -> int:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few short rows, no file")
    parser.add_argument("--acceptance", type=float, default=0.6)
    parser.add_argument("--drafted", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    each, new, pairs = (2, 12, PAIRS[:1]) if options.quick else (80, NEW, PAIRS)
    if options.out is None and not options.quick:
        options.out = RESULTS / "exspec_groups.json"
    unsorted = prompt_lengths(each)
    mean = round(statistics.mean(unsorted))
    orders = {
        "unsorted": unsorted,
        "sorted": sorted(unsorted),
        "one length": [mean] * len(unsorted),
    }
    kinds: dict[str, dict[str, Any]] = {"exact": {}, "half": {"part": 0.5}, "pages": {"page": PAGE}}
    entries = []
    with tqdm(total=len(pairs) * len(orders) * len(kinds)) as bar:
        for batch, window in pairs:
            for order, lengths in orders.items():
                for kind, more in kinds.items():
                    schedule = Schedule(batch=batch, window=window, patience=sys.maxsize, **more)
                    rate = simulated(lengths, schedule, options.acceptance, options.drafted, new)
                    bar.update()
                    entry = {"batch": batch, "window": window, "order": order, "kind": kind}
                    entries.append(entry | rate._asdict())
    columns = ["", *(f"{order}, {kind}" for order in orders for kind in kinds)]
    rows = [
        [
            f"{batch} rows of {window}",
            *(
                f"{e['grouped']:.1%} ({e['rows']:.1f})"
                for e in entries
                if (e["batch"], e["window"]) == (batch, window)
            ),
        ]
        for batch, window in pairs
    ]
    title = f"share of rounds with a group (rows a round), acceptance {options.acceptance}"
    publish(
        options.out,
        "EXSPEC's groups, simulated",
        [Table(title, columns, rows)],
        {"entries": entries},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
