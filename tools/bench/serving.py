"""The server under 1 to 64 clients: throughput, time to first token, time between tokens, equality.

    python tools/bench/serving.py RUN_OR_DIR [--clients 1,4,16,64] [--requests N] [--tokens N]
                                  [--draft none|lookup|RUN_OR_DIR] [--slots N] [--out FILE]

Prompts are the beginnings of the texts in tests/data/text; answers are greedy streams of so many
tokens, end tokens ignored, so that every run has the same work. First an engine without a server
makes them all, with as many slots, the same draft and one thread; then `llmnorm serve` does, its
engine with one thread, on one core, and the clients (raw asyncio, this process) on another. Each
number of clients starts with a round that is not counted. Every text is compared.

What is told of the server's own work is the processor time of its main thread, which has HTTP, JSON
and tokenizing; the engine's is another one.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import ROOT, Table, publish

from llmnorm.config.tree import GenerationSettings
from llmnorm.exchange.served import Target, load_target
from llmnorm.generation.contract import Request, Sampling

TEXTS = ROOT / "tests" / "data" / "text"
PROMPT = 64  # tokens
READY = 300.0  # seconds in which a server has to start


@dataclass
class Stream:
    """One answer as its client saw it.

    Attributes:
        at: when each event came, in seconds after the request.
        events: the data of each.
    """

    at: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)

    def text(self) -> str:
        """The answer."""
        choices = [c for event in self.events for c in json.loads(event)["choices"]]
        return "".join(choice["text"] for choice in choices)

    def between(self) -> list[float]:
        """Seconds between tokens; those of a round share its time."""
        gaps = []
        for before, now, event in zip(self.at, self.at[1:], self.events[1:], strict=False):
            tokens = json.loads(event)["choices"][0]["tokens"]
            gaps += [(now - before) / tokens] * tokens if tokens else []
        return gaps


async def ask(port: int, prompt: list[int], tokens: int) -> Stream:
    """One request over a connection of its own."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "accepted_marks": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stream, began = Stream(), time.perf_counter()
    writer.write(head.encode() + body)
    while True:
        line = await reader.readline()
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            stream.at.append(time.perf_counter() - began)
            stream.events.append(line[6:])
        elif not line:
            raise SystemExit("bench: error: a stream ended without [DONE]")
    writer.close()
    return stream


async def load(port: int, prompts: list[list[int]], clients: int, tokens: int) -> list[Stream]:
    """All prompts, by so many clients, each of which asks one after the other."""
    streams: list[Stream | None] = [None] * len(prompts)

    async def client(first: int) -> None:
        for number in range(first, len(prompts), clients):
            streams[number] = await ask(port, prompts[number], tokens)

    await asyncio.gather(*[client(first) for first in range(clients)])
    return [stream for stream in streams if stream is not None]


def offline(
    target: Target, settings: GenerationSettings, prompts: list[list[int]], tokens: int
) -> tuple[list[str], float]:
    """The answers of an engine without a server, and its tokens a second behind a first round."""
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_end=True)
    engine = target.build(settings).engine
    requests = [Request(tuple(prompt), sampling) for prompt in prompts]
    for _ in engine.generate(requests[: settings.slots]):  # type: ignore[union-attr]
        pass
    texts, began = [""] * len(prompts), time.perf_counter()
    for event in engine.generate(requests):  # type: ignore[union-attr]
        texts[event.request] += event.text
    return texts, len(prompts) * tokens / (time.perf_counter() - began)


class Server:
    """`llmnorm serve` on one core."""

    def __init__(self, words: list[str], cores: set[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmnorm", "serve", *words],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        assert self._process.stderr is not None
        self.port = 0
        for line in self._process.stderr:
            if found := re.search(r"serving at http://[^ ]*:(\d+)/v1", line):
                self.port = int(found[1])
                break
        if not self.port:
            sys.exit(f"bench: error: the server ended with code {self._process.wait()}")

    async def ready(self) -> None:
        """Wait until it takes connections."""
        until = time.perf_counter() + READY
        while time.perf_counter() < until:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.1)
                continue
            writer.close()
            return
        sys.exit("bench: error: the server does not start")

    def main_seconds(self) -> float:
        """Processor time of its main thread."""
        number = self._process.pid
        line = Path(f"/proc/{number}/task/{number}/stat").read_text().rpartition(")")[2].split()
        return (int(line[11]) + int(line[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def percentiles(numbers: list[float]) -> list[float]:
    """The 50th, 95th and 99th, in milliseconds."""
    ordered = sorted(numbers)
    return [1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 0.99)]


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=64, help="of each number of clients")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--draft", default="none")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("bench: error: the clients need a core of their own, and there is one")
    settings = GenerationSettings(slots=asked.slots, draft=asked.draft)
    target = load_target(asked.path, settings)
    text = " ".join(path.read_text() for path in sorted(TEXTS.glob("*.txt")))
    ids = target.asker.text(text[: asked.requests * PROMPT * 12])
    prompts = [ids[PROMPT * n : PROMPT * (n + 1)] for n in range(asked.requests)]
    prompts = [prompt for prompt in prompts if len(prompt) == PROMPT]
    os.sched_setaffinity(0, {cores[0]})
    texts, rate = offline(target, settings, prompts, asked.tokens)
    os.sched_setaffinity(0, {cores[1]})
    words = [str(asked.path), "--port=0", f"--draft={asked.draft}"]
    server = Server([*words, f"generation.slots={asked.slots}", "serving.queue=1000"], {cores[0]})
    try:
        rows, figures = asyncio.run(
            _measured(server, prompts, texts, rate, asked.clients, asked.tokens)
        )
    finally:
        server.close()
    columns = ["clients", "tokens/s", "of offline", "first token, ms (p50, p95, p99)"]
    columns += ["between tokens, ms", "HTTP side, of a core", "client, of a core", "equal"]
    table = Table(f"{len(prompts)} answers of {asked.tokens} tokens", columns, rows)
    publish(asked.out, "The server", [table], {"offline": rate, "served": figures})


async def _measured(
    server: Server,
    prompts: list[list[int]],
    texts: list[str],
    rate: float,
    numbers: str,
    tokens: int,
) -> tuple[list[list[str]], list[dict[str, object]]]:
    await server.ready()
    rows, figures = [], []
    for clients in map(int, numbers.split(",")):
        await load(server.port, prompts[:clients], clients, tokens)
        began, own, main = time.perf_counter(), time.process_time(), server.main_seconds()
        streams = await load(server.port, prompts, clients, tokens)
        took = time.perf_counter() - began
        shares = [(server.main_seconds() - main) / took, (time.process_time() - own) / took]
        served = len(prompts) * tokens / took
        first = percentiles([stream.at[0] for stream in streams])
        between = percentiles([gap for stream in streams for gap in stream.between()])
        equal = sum(s.text() == text for s, text in zip(streams, texts, strict=True))
        figures.append(
            {
                "clients": clients,
                "tokens_per_second": served,
                "first_ms": first,
                "between_ms": between,
                "http_share": shares[0],
                "client_share": shares[1],
                "equal": equal,
            }
        )
        told = [", ".join(f"{number:.1f}" for number in some) for some in (first, between)]
        rows.append(
            [str(clients), f"{served:.0f}", f"{served / rate:.2f}", *told]
            + [f"{share:.2f}" for share in shares]
            + [f"{equal} of {len(prompts)}"]
        )
    return rows, figures


if __name__ == "__main__":
    main()
