"""The server under 1 to 64 clients: throughput, time to first token, time between tokens, equality.

    python tools/bench/serving.py RUN_OR_DIR [--clients 1,4,16,64] [--requests N] [--tokens N]
                                  [--draft none|lookup|RUN_OR_DIR] [--slots N] [--rounds N]
                                  [--chat N] [--stock DIR] [--out FILE]

Prompts are the beginnings of the texts in tests/data/text; answers are greedy streams of so many
tokens, end tokens ignored, so that every run has the same work. In turns, an engine without a
server makes them all with as many rows at once, and `llmnorm serve` does: the same draft, one
thread for the engine, both on one core; the clients (raw asyncio, this process) are on another.
Every number is the median of the rounds, before which one is not counted. Every text is compared.

Further tables: how much longer a token waits while a prompt of the full context is run, how soon
the second turn of a chat of so many tokens begins, and the same prompts at `transformers serve`
with continuous batching, which reads the same weights in a stock directory (`export --stock`).

Processor time is that of threads: the server's main one has HTTP, JSON and tokenizing, the other
one is the engine's. Ratios of it are what an idle machine would show; a busy one spoils seconds.
"""

import argparse
import asyncio
import gc
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import ROOT, Table, publish
from serving_clients import (
    Seconds,
    Server,
    Stream,
    ask,
    ask_peer,
    gaps_without_prompts,
    llmnorm_server,
    load,
    percentiles,
    transformers_server,
)

from llmnorm.config.generation import GenerationSettings
from llmnorm.exchange.served import Target, load_target
from llmnorm.generation.contract import Request, Sampling
from llmnorm.generation.engine import Engine

TEXTS = ROOT / "tests" / "data" / "text"
PROMPT = 64  # tokens
BESIDE = 8  # streams beside a prompt of full context
ANSWER = 16  # tokens of a chat's answer


@dataclass
class Made:
    """What an engine without a server has made.

    Attributes:
        texts: of the prompts.
        seconds, processor: of all of it.
        steps: seconds of rounds in which no prompt was run, all rows in use.
    """

    texts: list[str]
    seconds: float = 0.0
    processor: float = 0.0
    steps: list[float] = field(default_factory=list)


class Offline:
    """An engine without a server."""

    def __init__(self, target: Target, settings: GenerationSettings) -> None:
        engine = target.build(settings).engine
        assert isinstance(engine, Engine)
        self._engine, self._slots = engine, settings.slots

    def run(self, prompts: list[list[int]], tokens: int, together: int) -> Made:
        """Continue prompts by so many tokens, so many rows at once."""
        made = Made([""] * len(prompts))
        left, places = deque(enumerate(prompts)), dict[int, int]()
        began, processor, running = time.perf_counter(), time.process_time(), 0
        while left or not self._engine.idle:
            added = 0
            while left and running < together:
                place, prompt = left.popleft()
                places[self._engine.add(_request(prompt, tokens))] = place
                running, added = running + 1, added + 1
            start = time.perf_counter()
            for event in self._engine.step():
                made.texts[places[event.request]] += event.text
                running -= event.finish is not None
            full = self._engine.running == min(together, self._slots, len(prompts))
            if not added and not self._engine.waiting and full:
                made.steps.append(time.perf_counter() - start)
        made.seconds = time.perf_counter() - began
        made.processor = time.process_time() - processor
        return made

    def first(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token, alone."""
        began = time.perf_counter()
        number = self._engine.add(_request(prompt, 2))
        while not any(event.tokens for event in self._engine.step()):
            pass
        taken = time.perf_counter() - began
        self._engine.abort(number)
        return taken

    def beside(self, prompts: list[list[int]], long: list[int]) -> list[float]:
        """Seconds of each step of rows in whose turns a long prompt is run."""
        numbers = [self._engine.add(_request(prompt, 500)) for prompt in prompts]
        while self._engine.waiting:
            self._engine.step()
        numbers.append(self._engine.add(_request(long, 1)))
        steps: list[float] = []
        while self._engine.waiting:
            began = time.perf_counter()
            self._engine.step()
            steps.append(time.perf_counter() - began)
        for number in numbers:
            self._engine.abort(number)
        return steps


def _request(prompt: list[int], tokens: int) -> Request:
    return Request(tuple(prompt), Sampling(temperature=0, max_tokens=tokens, ignore_end=True))


@dataclass
class Round:
    """One number of clients, once: what the engine has made, and what clients have seen.

    Attributes:
        alone: seconds from prompts to first tokens, of an engine without a server.
        seconds: of the clients' round.
        server: processor time.
        clients: processor time of this process.
    """

    made: Made
    alone: list[float]
    streams: list[Stream]
    seconds: float
    server: Seconds
    clients: float


def figures_of(rounds: list[Round], tokens: int) -> dict[str, Any]:
    """The medians of rounds, as numbers."""
    texts = rounds[0].made.texts
    total = len(texts) * tokens
    step = [median(r.made.steps) for r in rounds]

    def middle(values: Any) -> float:
        return median(list(values))

    def each(find: Any) -> list[float]:
        found = [percentiles(find(r)) for r in rounds]
        return [middle(numbers) for numbers in zip(*found, strict=True)]

    between = each(lambda r: gaps_without_prompts(r.streams))
    found = {
        "tokens_per_second": middle(total / r.seconds for r in rounds),
        "of_offline": middle(r.made.seconds / r.seconds for r in rounds),
        "of_offline_by_processor": middle(r.made.processor / sum(r.server) for r in rounds),
        "first_ms": each(lambda r: [s.at[0] for s in r.streams]),
        "between_ms": between,
        "between_p95_in_rounds": middle(
            percentiles(gaps_without_prompts(r.streams))[1] / 1000 / one
            for r, one in zip(rounds, step, strict=True)
        ),
        "offline_p95_in_rounds": middle(
            percentiles(r.made.steps)[1] / 1000 / one for r, one in zip(rounds, step, strict=True)
        ),
        "http_of_engine": middle(r.server.main / r.server.others for r in rounds),
        "http_us_a_token": middle(1e6 * r.server.main / total for r in rounds),
        "client_of_core": middle(r.clients / r.seconds for r in rounds),
        "equal": min(
            sum(s.text() == text for s, text in zip(r.streams, texts, strict=True)) for r in rounds
        ),
    }
    if rounds[0].alone:  # what is left of the time to the first token when the prompt is run
        found["first_in_rounds"] = middle(
            (median(s.at[0] for s in r.streams) - (median(r.alone) - one)) / one
            for r, one in zip(rounds, step, strict=True)
        )
    return found


class Bench:
    """An engine, a server, and whose turn it is.

    Args:
        cores: the engine's and the server's, and the clients'.
    """

    def __init__(self, offline: Offline, server: Server, cores: tuple[int, int]) -> None:
        self._offline, self._server, self._cores = offline, server, cores

    def _alone(self) -> None:
        os.sched_setaffinity(0, {self._cores[0]})

    def _as_clients(self) -> None:
        os.sched_setaffinity(0, {self._cores[1]})

    def round(self, prompts: list[list[int]], tokens: int, clients: int) -> Round:
        """One turn of each."""
        self._alone()
        alone = [self._offline.first(prompt) for prompt in prompts[:8]] if clients == 1 else []
        made = self._offline.run(prompts, tokens, clients)
        self._as_clients()
        port, before = self._server.port, self._server.seconds()
        began, own = time.perf_counter(), time.process_time()
        streams = asyncio.run(load(port, prompts, clients, tokens))
        seconds, clients_own = time.perf_counter() - began, time.process_time() - own
        return Round(
            made, alone, streams, seconds, self._server.seconds().since(before), clients_own
        )

    def beside(self, prompts: list[list[int]], long: list[int]) -> tuple[float, float, float]:
        """The 95th percentile of the seconds between tokens while a long prompt is run; and of an
        engine without a server, that of a round with one of the prompt's pieces, and the median."""
        self._alone()
        steps = self._offline.beside(prompts, long)
        self._as_clients()

        async def both() -> tuple[list[Stream], Stream]:
            port = self._server.port
            asked = [ask(port, prompt=prompt, max_tokens=128) for prompt in prompts]
            streams = asyncio.gather(*asked)
            await asyncio.sleep(2 * len(prompts) * median(steps))  # all of them have begun
            one = await ask(port, prompt=long, max_tokens=1)
            return list(await streams), one

        streams, one = asyncio.run(both())
        end = one.began + one.at[0]
        gaps = [
            gap for stream in streams for _, now, gap in stream.between() if one.began <= now <= end
        ]
        return percentiles(gaps)[1] / 1000, percentiles(steps)[1] / 1000, median(steps)

    def turns(self, text: str, number: int) -> tuple[list[float], list[float]]:
        """Seconds to the first token of a chat's first and second turn, and of processor time."""
        self._as_clients()
        talk = [{"role": "user", "content": f"{number}. {text}"}]
        waited, processor = [], []
        for _ in range(2):
            clock: list[Seconds] = []

            def first(clock: list[Seconds] = clock) -> None:
                clock.append(self._server.seconds())

            before = self._server.seconds()
            about = {"messages": talk, "max_tokens": ANSWER}
            stream = asyncio.run(ask(self._server.port, "chat/completions", first, **about))
            waited.append(stream.at[0])
            processor.append(sum(clock[0].since(before)))
            talk += [{"role": "assistant", "content": stream.text()}]
            talk += [{"role": "user", "content": "Go on."}]
        return waited, processor


def _table(figures: list[dict[str, Any]], title: str, requests: int) -> Table:
    columns = ["clients", "tokens/s", "of offline", "by processor time"]
    columns += ["first token, ms (p50, p95, p99)", "after the prompt, rounds"]
    columns += ["between tokens, ms", "p95 in rounds (offline)", "HTTP side, of the engine"]
    columns += ["HTTP, us a token", "clients, of a core", "equal"]
    rows = []
    for f in figures:
        first, between = (
            ", ".join(f"{number:.1f}" for number in f[key]) for key in ("first_ms", "between_ms")
        )
        after = f"{f['first_in_rounds']:.2f}" if "first_in_rounds" in f else "-"
        rows.append(
            [
                *(str(f["clients"]), f"{f['tokens_per_second']:.0f}", f"{f['of_offline']:.2f}"),
                *(f"{f['of_offline_by_processor']:.2f}", first, after, between),
                f"{f['between_p95_in_rounds']:.2f} ({f['offline_p95_in_rounds']:.2f})",
                *(f"{f['http_of_engine']:.3f}", f"{f['http_us_a_token']:.0f}"),
                *(f"{f['client_of_core']:.2f}", f"{f['equal']} of {requests}"),
            ]
        )
    return Table(title, columns, rows)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=64, help="of each number of clients")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--draft", default="none")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chat", type=int, default=0, help="tokens of a chat of two turns")
    parser.add_argument("--stock", type=Path, metavar="DIR", help="for `transformers serve`")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("bench: error: the clients need a core of their own, and there is one")
    settings = GenerationSettings(slots=asked.slots, draft=asked.draft)
    target = load_target(asked.path, settings)
    text = " ".join(path.read_text() for path in sorted(TEXTS.glob("*.txt")))
    ids = target.asker.text(text[: (asked.requests * PROMPT + target.context) * 12])
    texts = [
        str(target.tokenizer.decode(ids[PROMPT * n : PROMPT * (n + 1)]))
        for n in range(asked.requests)
    ]
    prompts = [target.asker.text(text) for text in texts]
    long = ids[-target.context :][: target.context - 1]
    chat = target.tokenizer.decode(ids[: asked.chat]) if asked.chat else ""
    assert isinstance(chat, str)
    words = [f"--draft={asked.draft}", f"generation.slots={asked.slots}", "serving.queue=1000"]
    words += ["serving.chat_template=fallback", "serving.access_log=none"]
    server = llmnorm_server(asked.path, words, {cores[0]})
    try:
        asyncio.run(server.ready())
        bench = Bench(Offline(target, settings), server, (cores[0], cores[1]))
        gc.collect()
        gc.freeze()  # as the server does
        tables, figures = _measured(bench, asked, prompts, long, chat)
        if asked.stock is not None:
            tables.append(_beside_peer(server, asked, prompts, texts, figures, cores))
    finally:
        server.close()
    publish(asked.out, "The server", tables, figures)


def _measured(
    bench: Bench,
    asked: argparse.Namespace,
    prompts: list[list[int]],
    long: list[int],
    chat: str,
) -> tuple[list[Table], dict[str, Any]]:
    served = []
    for clients in map(int, asked.clients.split(",")):
        bench.round(prompts[:clients], asked.tokens, clients)
        rounds = [bench.round(prompts, asked.tokens, clients) for _ in range(asked.rounds)]
        served.append({"clients": clients, **figures_of(rounds, asked.tokens)})
    title = f"{len(prompts)} answers of {asked.tokens} tokens, draft {asked.draft}"
    tables, figures = [_table(served, title, len(prompts))], dict[str, Any](served=served)
    if asked.slots > BESIDE:
        # Another prompt in every round, or the cache would save it.
        longs = [[*long[n:], *long[:n]] for n in range(1, 1 + asked.rounds)]
        taken = [bench.beside(prompts[:BESIDE], some) for some in longs]
        waited, longest, step = (1000 * median(numbers) for numbers in zip(*taken, strict=True))
        ratios = [median(t[n] / t[2] for t in taken) for n in (0, 1)]
        figures["beside"] = {"p95_ms": waited, "offline_ms": step, "ratios": ratios}
        columns = ["", "p95, ms", "of a round and a piece"]
        rows = [
            [f"between tokens of {BESIDE} streams", f"{waited:.0f}", f"{ratios[0]:.2f}"],
            ["rounds without a server", f"{longest:.0f}", f"{ratios[1]:.2f}"],
        ]
        tables.append(Table("While a prompt of the full context is run", columns, rows))
    if chat:
        turns = [bench.turns(chat, number) for number in range(asked.rounds + 1)][1:]
        ratios = [median(turn[n][1] / turn[n][0] for turn in turns) for n in (0, 1)]
        first, second = (1000 * median(turn[0][n] for turn in turns) for n in (0, 1))
        figures["turns"] = {"first_ms": first, "second_ms": second, "ratios": ratios}
        columns = ["turn", "first token, ms", "of the first turn", "by processor time"]
        rows = [["1", f"{first:.0f}", "1", "1"], ["2", f"{second:.0f}"]]
        rows[1] += [f"{ratio:.2f}" for ratio in ratios]
        tables.append(Table(f"A chat of {asked.chat} tokens", columns, rows))
    return tables, figures


def _beside_peer(
    server: Server,
    asked: argparse.Namespace,
    prompts: list[list[int]],
    texts: list[str],
    figures: dict[str, Any],
    cores: list[int],
) -> Table:
    """The same prompts at both servers, in turns, with the largest number of clients."""
    clients = max(map(int, asked.clients.split(",")))
    peer = transformers_server(asked.stock, {cores[0]})
    rates: list[list[float]] = [[], []]
    equal = 0
    try:
        asyncio.run(peer.ready())
        asyncio.run(load(peer.port, texts[:1], 1, 2, ask_peer))  # it loads the model
        for _ in range(asked.rounds):
            found = []
            sides = ((server, prompts, ask), (peer, texts, ask_peer))
            for number, (one, asks, how) in enumerate(sides):
                before = one.seconds()
                streams = asyncio.run(load(one.port, asks, clients, asked.tokens, how))
                taken = sum(one.seconds().since(before))
                rates[number].append(len(prompts) * asked.tokens / taken)
                found.append([stream.text() for stream in streams])
            equal = sum(ours == theirs for ours, theirs in zip(*found, strict=True))
    finally:
        peer.close()
    ours, theirs = map(median, rates)
    figures["transformers_serve"] = {"ours": ours, "theirs": theirs, "equal": equal}
    columns = ["server", "tokens a second of processor time", "ratio", "equal"]
    rows = [
        ["llmnorm serve", f"{ours:.0f}", "1", "-"],
        ["transformers serve", f"{theirs:.0f}", f"{theirs / ours:.2f}", f"{equal}"],
    ]
    return Table(f"{clients} clients beside transformers serve", columns, rows)


if __name__ == "__main__":
    main()
