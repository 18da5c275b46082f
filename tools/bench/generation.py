"""Measures generation: ours with each draft and method, transformers and llama.cpp, on a CPU.

usage: python tools/bench/generation.py --target RUN --draft RUN [KEY=VALUE ...] [--quick]
           [--parts drafts methods continuous] [--batches 1 4 8 16] [--temperatures 0 0.8]
           [--threads 1] [--rounds 3] [--new 64] [--llama-cpp PYTHON]
           [--out docs/results/generation.json]

RUN is a run or an exported directory with a stock class; KEY=VALUE changes the target's
configuration, to find its data (data.dir=...). Prompts are the first 16 to 48 tokens of held-out
documents; every row gets `--new` tokens, whatever they are. Candidates take turns, a round each;
scheduling, prompts and sampling are timed too. There are four prompts for each row of a batch, 8 at
least and 32 at most: the last rows with drafts do not end together, and run in smaller batches.

drafts: batches of every size, greedy and at a temperature (seeded). Of transformers, `generate`,
and at batch 1 its assisted generation with the same pair; of llama.cpp (`--llama-cpp`, a Python
that has llama-cpp-python) the greedy steps alone, without prompts.
  plain         our engine without a draft; the other ratios are over it, in the same round
  lookup, draft `ragged` with prompt lookup and with the draft; lengths by the table of costs
Beside them: p, accepted drafts of those that were looked at; drafted tokens a round; tokens a round
and row; distinct tokens of a row's (small models loop when greedy); rows that equal our plain ones
at batch 1; c and v, measured on these models in this run; the speed-up that p, c and v predict; and
that of the rounds alone, by the times less those of the same prompts with one new token.
methods: `ragged`, EQSPEC and EXSPEC at batch 8 with 4 drafted tokens, on prompts of one length (the
paper's condition) and of several. Grouping rate, and the share of the time that copies rows.
continuous: 32 prompts of uneven length, our engine with 16 slots beside `generate_batch`.

A rate is the median of the rounds, a ratio the median over the rounds. With one thread times are
CPU seconds, with more by the clock.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_candidates import Clock, write_gguf
from generation_ours import (
    SHORTEST,
    Copies,
    Pair,
    Told,
    by_method,
    measured_costs,
    our_engine,
    pair_of,
    predicted,
)
from generation_peers import Answers, ContinuousBatching, Work, generated, llama_cpp_seconds
from generation_tables import draw, tables
from report import RESULTS, publish
from tqdm import tqdm

from llmnorm.exchange.gguf_file import export_gguf
from llmnorm.generation.costs import LENGTHS, size_of

METHODS_BATCH, METHODS_TOKENS, SLOTS = 8, 4, 16
PAGES = ((32, 64), (32, 256), (128, 256))  # tokens of a page, and of a pass, of `generate_batch`

Candidates = dict[str, Callable[[Work], Any]]


def turns(
    candidates: Candidates, work: Work, rounds: int, clock: Clock, bar: Any
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every candidate in each round, and what it returned in the last one.

    Before the first round each runs the first prompts: graphs are traced then.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    found = {}
    part = Work(work.prompts[: work.batch], work.new, work.batch, work.temperature)
    for run in candidates.values():
        run(part)
    for _ in range(rounds):
        for name, run in candidates.items():
            begin = clock.now()
            found[name] = run(work)
            times[name].append(clock.now() - begin)
            bar.update()
    return times, found


def rates(times: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Tokens a second of each candidate."""
    return {name: tokens / statistics.median(some) for name, some in times.items()}


def over(times: dict[str, list[float]], name: str, reference: str) -> float:
    """A candidate's rate over another's, the median of the rounds."""
    pairs = zip(times[name], times[reference], strict=True)
    return statistics.median(b / a for a, b in pairs)


def equal(answers: Answers, reference: Answers) -> float:
    """The share of rows that are the same."""
    return statistics.mean(a == b for a, b in zip(answers, reference, strict=True))


def distinct(answers: Answers) -> float:
    """The mean share of a row's tokens that are not repetitions of earlier ones."""
    return statistics.mean(len(set(row)) / len(row) for row in answers)


def drafts_part(
    pair: Pair, prompts: Answers, options: argparse.Namespace, clock: Clock, bar: Any
) -> list[dict[str, Any]]:
    """An entry a temperature, batch and candidate."""
    entries: list[dict[str, Any]] = []
    for temperature in options.temperatures:
        alone = Work(prompts, options.new, 1, temperature)
        reference = our_engine(pair, "plain", alone, Told())
        for batch in options.batches:
            rows = 3 if options.quick else max(8, min(len(prompts), 4 * batch))
            work = Work(prompts[:rows], options.new, batch, temperature)
            told: dict[str, Told] = {}

            def ours(kind: str, work: Work, told: dict[str, Told] = told) -> Answers:
                told[kind] = Told()
                return our_engine(pair, kind, work, told[kind])

            def prompts_alone(work: Work) -> Answers:
                return our_engine(pair, "plain", replace(work, new=1), Told())

            candidates: Candidates = {k: partial(ours, k) for k in ("plain", "lookup", "draft")}
            candidates["generate"] = partial(generated, pair.theirs)
            candidates["prompts"] = prompts_alone
            if batch == 1:
                candidates["assisted"] = partial(
                    generated, pair.theirs, assistant_model=pair.assistant
                )
            times, found = turns(candidates, work, options.rounds, clock, bar)
            alone_times = times.pop("prompts")
            measured = measured_costs(pair, batch, clock, LENGTHS[:2] if options.quick else LENGTHS)
            for name, rate in rates(times, work.new * rows).items():
                entry = {
                    "temperature": temperature,
                    "batch": batch,
                    "name": name,
                    "tokens/s": rate,
                    "ratio": over(times, name, "plain"),
                    "over generate": over(times, name, "generate"),
                    "distinct": distinct(found[name]),
                }
                if not temperature or name in told:
                    entry["equal"] = equal(found[name], reference[:rows])
                if name in ("lookup", "draft"):
                    entry |= {
                        "p": told[name].acceptance,
                        "drafted": told[name].drafted,
                        "tokens a round": work.new * rows / told[name].rows,
                        "rounds over plain": statistics.median(
                            (plain - prompt) / (own - prompt)
                            for plain, own, prompt in zip(
                                times["plain"], times[name], alone_times, strict=True
                            )
                        ),
                        "predicted": predicted(told[name], measured, name == "lookup"),
                        "costs": measured,
                    }
                entries.append(entry)
    return entries


def methods_part(
    pair: Pair, prompts: Answers, options: argparse.Namespace, clock: Clock, bar: Any
) -> list[dict[str, Any]]:
    """An entry a method, on prompts of one length and of several."""
    entries = []
    batch = 2 if options.quick else METHODS_BATCH
    some = prompts[: 3 * batch]
    for lengths, rows in (
        ("one length", [prompt[:SHORTEST] for prompt in some]),
        ("several", some),
    ):
        work = Work(rows, options.new, batch, 0.0)
        seen: dict[str, Any] = {}

        def method(name: str, work: Work, seen: dict[str, Any] = seen) -> Answers:
            copies, begin = Copies(), clock.now()
            answers, seconds = by_method(pair, name, work, METHODS_TOKENS, copies, clock)
            seen[name] = copies, seconds / max(clock.now() - begin, 1e-9)
            return answers

        candidates: Candidates = {
            "plain": lambda work: our_engine(pair, "plain", work, Told()),
            "ragged": lambda work: our_engine(pair, "draft", work, Told(), METHODS_TOKENS),
            "eqspec": partial(method, "eqspec"),
            "exspec": partial(method, "exspec"),
        }
        times, found = turns(candidates, work, options.rounds, clock, bar)
        for name, rate in rates(times, work.new * len(rows)).items():
            entry = {
                "prompts": lengths,
                "name": name,
                "drafted": METHODS_TOKENS,
                "tokens/s": rate,
                "ratio": over(times, name, "eqspec"),
                "equal": equal(found[name], found["plain"]),
            }
            if name in seen:
                copies, share = seen[name]
                entry |= {
                    "grouping rate": copies.grouping_rate,
                    "realignment share of time": share,
                    "rows copied a row run": copies.realignment_share,
                    "padding share": copies.padding_share,
                }
            entries.append(entry)
    return entries


def continuous_part(
    pair: Pair, prompts: Answers, options: argparse.Namespace, clock: Clock, bar: Any
) -> list[dict[str, Any]]:
    """Our engine without a draft beside `generate_batch` with each of its settings."""
    rows = prompts[: 4 if options.quick else 32]
    work = Work(rows, max(2, options.new // 2), min(SLOTS, len(rows)), 0.0)
    entries: list[dict[str, Any]] = []
    for page, together in PAGES[: 1 if options.quick else None]:
        peer = ContinuousBatching(pair.theirs, rows, work.new, page, together)
        name = f"generate_batch, pages of {page}, {together} tokens a pass"
        candidates: Candidates = {
            "plain": lambda work: our_engine(pair, "plain", work, Told()),
            name: partial(ContinuousBatching.run, peer),
        }
        times, found = turns(candidates, work, 1, clock, bar)
        peer.close()
        for key, rate in rates(times, work.new * len(rows)).items():
            entry = {"name": key, "prompts": len(rows), "tokens/s": rate}
            entry |= {
                "ratio": over(times, key, "plain"),
                "equal": equal(found[key], found["plain"]),
            }
            entries.append(entry)
    return entries


PARTS = {"drafts": drafts_part, "methods": methods_part, "continuous": continuous_part}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="tiny random models, no file")
    parser.add_argument("--target", type=Path, metavar="RUN")
    parser.add_argument("--draft", type=Path, metavar="RUN")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.batches, options.rounds, options.new = [1, 2], 1, 6
    elif not (options.target and options.draft):
        parser.error("--target RUN and --draft RUN are needed, or --quick")
    elif options.llama_cpp and "drafts" not in options.parts:
        parser.error("--llama-cpp needs the part drafts, whose steps it is compared with")
    elif options.out is None:
        options.out = RESULTS / "generation.json"
    before, clock = torch.get_num_threads(), Clock(options.threads)
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made, tqdm() as bar:
        directory = Path(made)
        pair, prompts = pair_of(options, directory)
        for part in options.parts:
            figures[part] = PARTS[part](pair, prompts, options, clock, bar)
        if options.llama_cpp:
            file = directory / "target.gguf"
            if options.quick:
                write_gguf(pair.theirs, file)
            else:
                export_gguf(options.target, file, type="f32")
            seconds = llama_cpp_seconds(
                options.llama_cpp,
                file,
                prompts,
                options.batches,
                options.new,
                options.rounds,
                clock,
                directory,
            )
            figures["llama.cpp"] = {batch: batch / found for batch, found in seconds.items()}
    torch.set_num_threads(before)
    figures["sizes"] = [size_of(pair.ours)._asdict(), size_of(pair.small)._asdict()]
    title = "Generation: drafts, methods and other programs (CPU, float32)"
    publish(options.out, title, tables(figures, options), figures)
    print(pair.target.says)
    if options.out is not None and "drafts" in figures:
        draw(figures["drafts"], options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
