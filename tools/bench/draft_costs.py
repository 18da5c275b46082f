"""Measures what passes of few tokens cost, for the choice of draft lengths; writes the table.

usage: python tools/bench/draft_costs.py [--quick] [--threads 1 2] [--rounds 5]
           [--table llmnorm/generation/cost_table.py] [--out docs/results/draft_costs.json]

A pass is `Decoder.step` of 1 to 17 tokens in each of 1 to 16 rows behind 32 tokens, rolled back
each time; float32, softmax attention. Three models take turns: 27M weights in 8 layers,
quickstart's size, and a draft of one layer. A time is the fastest of all rounds, with one thread in
CPU seconds, with more by the clock.

To the three times of every pass a cost for each layer and one for each million of weights are
fitted (least squares of relative errors, neither below 0), which is what the table holds. Beside
it: how far the fitted times are from the measured ones, and the drafts that pay by the table.
"""

import argparse
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from decode_candidates import SIZES, VOCABULARY, Clock
from report import RESULTS, ROOT, Table, machine, publish
from tqdm import tqdm

from llmnorm.generation import cost_table, costs
from llmnorm.generation.costs import Costs, Size, Times, size_of
from llmnorm.machine.processor import processor
from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.decoding import Decoder

DRAFT = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BATCHES, TOKENS, PROMPT, PASSES = (1, 2, 4, 8, 16), (1, 2, 3, 5, 9, 17), 32, 4
HEAD = '''"""Milliseconds of passes, by kind of processor; written by tools/bench/draft_costs.py.

TABLE[processor][threads][batch][tokens a row]: for a layer, and for a million weights. What it is
for and how it is read: costs.py.
"""

from llmnorm.machine.processor import Processor

Measured = dict[int, dict[int, dict[int, tuple[float, float]]]]

'''


def timed(decoder: Decoder, batch: int, tokens: int, clock: Clock) -> float:
    """Seconds of the fastest of some passes of so many tokens in each of so many rows."""
    cache, times = decoder.new_cache(), []
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.vocabulary, (batch, PROMPT), generator=drawn)
    decoder.step(ids, cache, last=True)
    for _ in range(PASSES):
        begin = clock.now()
        decoder.step(ids[:, :tokens], cache)
        times.append(clock.now() - begin)
        cache.rollback([tokens] * batch)
    return min(times)


def model_of(shape: dict[str, int]) -> LlmNormForCausalLM:
    """A random model."""
    config = LlmNormConfig(
        **shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return build_model(config, seed=0).eval()


def fitted(times: dict[Size, float]) -> tuple[float, float]:
    """(a, b), neither below 0, so that a layers + b millions is near the times, by their ratio."""
    rows = [(size.layers / t, size.millions / t) for size, t in times.items()]
    xx, xy, yy = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(r[i] for r in rows) for i in (0, 1))
    a = (x * yy - y * xy) / (xx * yy - xy * xy)
    b = (y * xx - x * xy) / (xx * yy - xy * xy)
    if a < 0:
        return 0.0, y / yy
    return (a, b) if b >= 0 else (x / xx, 0.0)


def measured(threads: int, sizes: dict[str, dict[str, int]], options: Any, bar: Any) -> dict:
    """name -> (batch, tokens) -> milliseconds, and the sizes."""
    torch.set_num_threads(threads)
    clock = Clock(threads)
    made = {name: model_of(shape) for name, shape in sizes.items()}
    decoders = {name: Decoder(model) for name, model in made.items()}
    times: dict[str, dict[tuple[int, int], float]] = {name: {} for name in sizes}
    for turn in range(options.rounds + 1):
        for batch in options.batches:
            for tokens in options.tokens:
                for name, decoder in decoders.items():
                    seconds = timed(decoder, batch, tokens, clock)
                    bar.update()
                    if turn:  # the first traces
                        known = times[name].get((batch, tokens), seconds * 1e3)
                        times[name][batch, tokens] = min(known, seconds * 1e3)
    return {"times": times, "sizes": {name: size_of(model) for name, model in made.items()}}


def table_of(found: dict[str, Any], options: Any) -> dict[int, dict[int, tuple[float, float]]]:
    """The fitted costs by batch and tokens."""
    sizes, times = found["sizes"], found["times"]

    def entry(batch: int, tokens: int) -> tuple[float, float]:
        a, b = fitted({sizes[n]: times[n][batch, tokens] for n in sizes})
        return round(a, 4), round(b, 4)

    return {b: {t: entry(b, t) for t in options.tokens} for b in options.batches}


def source(table: dict[Any, Any], machines: dict[Any, str]) -> str:
    """The text of cost_table.py."""
    lines = [HEAD + "# fmt: off\nMACHINES: dict[Processor, str] = {"]
    for kind, text in machines.items():
        lines += [f"    {_key(kind)}:", f'        "{text}",']
    lines += ["}", "", "TABLE: dict[Processor, Measured] = {"]
    for kind, by_threads in table.items():
        lines.append(f"    {_key(kind)}: {{")
        for threads, by_batch in by_threads.items():
            lines.append(f"        {threads}: {{")
            for batch, by_tokens in by_batch.items():
                entries = [f"{n}: ({a:.4f}, {b:.4f})" for n, (a, b) in by_tokens.items()]
                lines.append(f"            {batch}: {{")
                for start in range(0, len(entries), 3):
                    lines.append(" " * 16 + ", ".join(entries[start : start + 3]) + ",")
                lines.append("            },")
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}", "# fmt: on", ""])


def _key(kind: Any) -> str:
    return f'Processor("{kind.vendor}", {kind.family}, "{kind.instructions}")'


def tables(by_threads: dict[int, Any], table: Mapping[int, Times]) -> list[Table]:
    """v and c by batch, and what pays."""
    made = []
    for threads, found in by_threads.items():
        times, sizes = found["times"], found["sizes"]
        target, draft = list(sizes)[0], list(sizes)[-1]
        predicted = Costs([table[threads]], sizes[target], sizes[draft])
        batches = sorted({b for b, _ in times[target]})
        tokens = sorted({t for _, t in times[target]})
        rows = []
        for batch in batches:
            one = times[target][batch, 1]
            row = [str(batch), f"{one:.2f}", f"{times[draft][batch, 1] / one:.3f}"]
            row += [f"{times[target][batch, t] / one:.2f}" for t in tokens[1:]]
            for p in (0.6, 0.75):
                best = max(costs.LENGTHS, key=lambda k: costs.speed_up(p, k, batch, predicted))  # noqa: B023
                row.append(f"{costs.speed_up(p, best, batch, predicted):.2f} ({best})")
            rows.append(row)
        columns = ["rows", "ms a step", "c", *(f"v of {t}" for t in tokens[1:])]
        columns += ["speed-up at p = 0.6 (drafts)", "at 0.75"]
        made.append(Table(f"{target} with {draft}, {threads} thread(s)", columns, rows))
        errors = [
            abs(_of(table[threads], sizes[n], *key) / t - 1)
            for n in times
            for key, t in times[n].items()
        ]
        errors.sort()
        made.append(
            Table(
                f"fitted over measured times, {threads} thread(s)",
                ["", "median error", "largest"],
                [["all", f"{errors[len(errors) // 2]:.0%}", f"{errors[-1]:.0%}"]],
            )
        )
    return made


def _of(times: Times, size: Size, batch: int, tokens: int) -> float:
    a, b = times[batch][tokens]
    return a * size.layers + b * size.millions


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few small passes, no files")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.batches, options.tokens = BATCHES, TOKENS
    sizes = {"27M": SIZES["27M"], "quickstart": SIZES["quickstart"], "draft": DRAFT}
    if options.quick:
        sizes.pop("27M")
        options.batches, options.tokens, options.threads, options.rounds = (1, 2), (1, 2), [1], 1
    elif options.table is None:
        options.table = ROOT / "llmnorm" / "generation" / "cost_table.py"
        options.out = options.out or RESULTS / "draft_costs.json"
    before, found = torch.get_num_threads(), {}
    turns = len(options.threads) * (options.rounds + 1) * len(sizes)
    with tqdm(total=turns * len(options.batches) * len(options.tokens)) as bar:
        for threads in options.threads:
            found[threads] = measured(threads, sizes, options, bar)
    torch.set_num_threads(before)
    table = {threads: table_of(some, options) for threads, some in found.items()}
    entries = [
        {"threads": t, "model": n, "batch": b, "tokens": k, "milliseconds": ms}
        for t, some in found.items()
        for n, times in some["times"].items()
        for (b, k), ms in times.items()
    ]
    publish(
        options.out,
        "Passes of few tokens, for draft lengths (CPU, float32)",
        tables(found, table),
        {"entries": entries, "table": table},
    )
    if options.table is not None:
        where = f"{machine()['processor']}, {date.today().isoformat()}"
        options.table.write_text(
            source(
                cost_table.TABLE | {processor(): cost_table.TABLE.get(processor(), {}) | table},
                cost_table.MACHINES | {processor(): where},
            ),
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
