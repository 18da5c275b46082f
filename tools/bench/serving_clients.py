"""What serving.py measures with: raw asyncio clients, a server on a core of its own, its clocks."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

READY = 300.0  # seconds in which a server has to start


@dataclass
class Stream:
    """One answer as its client saw it.

    Attributes:
        began: when it was asked for, in seconds of `time.perf_counter`.
        at: when each event came, in seconds after that.
        events: the data of each.
    """

    began: float = 0.0
    at: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)

    def text(self) -> str:
        """The answer."""
        choices = [c for event in self.events for c in json.loads(event)["choices"]]
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)

    def between(self) -> list[tuple[float, float, float]]:
        """Times before and behind each token but those of the first event, and the seconds between
        it and the one before; the tokens of a round share its time."""
        gaps = []
        times = [self.began + at for at in self.at]
        for before, now, event in zip(times, times[1:], self.events[1:], strict=False):
            tokens = json.loads(event)["choices"][0].get("tokens", 1)
            gaps += [(before, now, (now - before) / tokens)] * tokens
        return gaps


def gaps_without_prompts(streams: Sequence[Stream]) -> list[float]:
    """Seconds between tokens while none of the streams waited for its first one."""
    waiting = [(stream.began, stream.began + stream.at[0]) for stream in streams]
    return [
        gap
        for stream in streams
        for before, now, gap in stream.between()
        if not any(begun < now and before < first for begun, first in waiting)
    ]


OURS = {"temperature": 0, "ignore_eos": True, "stream": True, "accepted_marks": True}


async def ask(
    port: int, route: str = "completions", on_first: Callable[[], None] | None = None, **body: Any
) -> Stream:
    """One greedy stream of our server, which no end token ends.

    Args:
        on_first: called when the first tokens have come.
    """
    return await _stream(port, route, {**OURS, **body}, b"data: [DONE]", on_first)


async def ask_peer(port: int, *, prompt: str, max_tokens: int) -> Stream:
    """The same of `transformers serve`, whose streams have no [DONE]."""
    chosen = {"max_new_tokens": max_tokens, "do_sample": False}
    config = json.dumps({**chosen, "eos_token_id": -1, "pad_token_id": 0})
    body = {"prompt": prompt, "stream": True, "generation_config": config}
    return await _stream(port, "completions", body, b"0\r\n", None)


async def _stream(
    port: int, route: str, body: dict[str, Any], end: bytes, on_first: Callable[[], None] | None
) -> Stream:
    """A request over a connection of its own; `end` begins the line behind the last event."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stream = Stream(time.perf_counter())
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    said = b""
    while True:
        line = await reader.readline()
        if line.startswith(end):
            break
        if line.startswith(b"data: "):
            event = line[6:]
            if b'"role"' not in event:  # a chat's first event has no token
                stream.at.append(time.perf_counter() - stream.began)
                stream.events.append(event)
                if on_first is not None and len(stream.events) == 1:
                    on_first()
        elif not line:
            sys.exit(f"bench: error: a stream ended in its middle: {said[-500:].decode()}")
        said += line
    writer.close()
    return stream


Ask = Callable[..., Awaitable[Stream]]


async def load(
    port: int, prompts: Sequence[Any], clients: int, tokens: int, how: Ask = ask
) -> list[Stream]:
    """All prompts, by so many clients, each of which asks one after the other."""
    streams: list[Stream | None] = [None] * len(prompts)

    async def client(first: int) -> None:
        for number in range(first, len(prompts), clients):
            streams[number] = await how(port, prompt=prompts[number], max_tokens=tokens)

    await asyncio.gather(*[client(first) for first in range(clients)])
    return [stream for stream in streams if stream is not None]


class Seconds(NamedTuple):
    """Processor time of a server's main thread, which has HTTP, and of its other threads."""

    main: float
    others: float

    def since(self, before: "Seconds") -> "Seconds":
        """The difference."""
        return Seconds(self.main - before.main, self.others - before.others)


class Server:
    """A server on one core, and its process's clocks.

    Args:
        command: starts it.
        cores: that it may use.
        address: a pattern of the line on stderr that has its port.
    """

    def __init__(self, command: list[str], cores: set[int], address: str) -> None:
        self._process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        assert self._process.stderr is not None
        self.port, said = 0, ""
        for line in self._process.stderr:
            said += line
            if found := re.search(address, line):
                self.port = int(found[1])
                break
        if not self.port:
            code = self._process.wait()
            sys.exit(f"bench: error: {' '.join(command)} ended with code {code}:\n{said[-2000:]}")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # or it fills

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

    def seconds(self) -> Seconds:
        """Processor time until now."""
        number, main, others = self._process.pid, 0.0, 0.0
        for thread in Path(f"/proc/{number}/task").iterdir():
            taken = int((thread / "schedstat").read_text().split()[0]) / 1e9
            if thread.name == str(number):
                main = taken
            else:
                others += taken
        return Seconds(main, others)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def llmnorm_server(path: Path, words: Sequence[str], cores: set[int]) -> Server:
    """`llmnorm serve` on a port that is free."""
    command = [sys.executable, "-m", "llmnorm", "serve", str(path), "--port=0", *words]
    return Server(command, cores, r"serving at http://[^ ]*:(\d+)/v1")


def transformers_server(path: Path, cores: set[int]) -> Server:
    """`transformers serve` with continuous batching, on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(path)]
    command += ["--device=cpu", "--continuous-batching", f"--port={port}"]
    return Server(command, cores, r"Uvicorn running on http://[^ ]*:(\d+)")


def percentiles(numbers: Sequence[float]) -> list[float]:
    """The 50th, 95th and 99th, in milliseconds."""
    ordered = sorted(numbers)
    return [1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 0.99)]
