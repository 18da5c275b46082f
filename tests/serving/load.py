"""Many clients at once against one server, every text held to the offline engine's.

    python -m tests.serving.load CLIENTS REQUESTS SEED

Each client asks one thing after another: whole answers and streams, greedy and seeded, texts and
chats; a fifth of the streams are left in their middle. The last line says what came of it. The
clients share this process with the server, so nothing here measures speed (tools/bench/serving.py
does).
"""

import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.serving.served import Served, save_model, serving

PROMPTS = ["It is 4.", "2+2?", "final thoughts\n", "été 日本", "a " * 40, "user 3+3? assistant"]
SOAK = 200  # requests of a client from which on its memory is judged
LEFT = 0.2  # of the streams


@dataclass
class Outcome:
    """What came of the requests.

    Attributes:
        equal: answers that are the offline engine's.
        wrong: those that are not.
        left: streams that their client has left.
        memory: bytes of this process after each request, of the first client alone.
    """

    equal: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Known:
    """A request, and the text that it has."""

    route: str
    body: dict[str, Any]
    text: str
    finish: str


def known(served: Served) -> list[Known]:
    """Every prompt, as a text and as a message, greedy and seeded."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        for how in ({"temperature": 0}, {"temperature": 1.2, "seed": number, "top_p": 0.9}):
            body: dict[str, Any] = {**how, "max_tokens": 10 + 7 * number}
            ids = served.model.asker.text(prompt)
            text, _, finish = served.offline(ids, **body)
            found.append(Known("/v1/completions", {**body, "prompt": prompt}, text, finish))
            talk = [{"role": "user", "content": prompt}]
            stops = served.model.chat.stops
            ids = served.model.chat.tokens(talk, {})
            text, _, finish = served.offline(ids, **body, stop_tokens=stops)
            found.append(Known("/v1/chat/completions", {**body, "messages": talk}, text, finish))
    return found


async def load(served: Served, clients: int, requests: int, seed: int) -> Outcome:
    """Run so many clients, each with so many requests, against a server that runs."""
    outcome, asked = Outcome(), known(served)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=served.root, timeout=600, limits=limits) as http:

        async def client(number: int) -> None:
            chance = random.Random(f"{seed} {number}")
            for _ in range(requests):
                one = chance.choice(asked)
                if chance.random() < 0.5:
                    await _whole(http, one, outcome)
                else:
                    stays = chance.random() >= LEFT
                    pieces = None if stays else chance.randint(1, 4)
                    await _stream(http, one, outcome, pieces)
                if number == 0:
                    pages = Path("/proc/self/statm").read_text().split()[1]
                    outcome.memory.append(int(pages) * 4096)

        await asyncio.gather(*[client(number) for number in range(clients)])
    return outcome


async def _whole(http: httpx.AsyncClient, one: Known, outcome: Outcome) -> None:
    answer = await http.post(one.route, json=one.body)
    if answer.status_code != 200:
        outcome.wrong.append(f"{answer.status_code}: {answer.text}")
        return
    (choice,) = answer.json()["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    _compare(one, text, choice["finish_reason"], outcome, "whole")


async def _stream(
    http: httpx.AsyncClient, one: Known, outcome: Outcome, pieces: int | None
) -> None:
    text, finish, done, count = "", "", False, 0
    async with http.stream("POST", one.route, json={**one.body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            done = done or data == "[DONE]"
            if done:
                continue
            event = json.loads(data)
            if "error" in event:
                outcome.wrong.append(data)
                return
            (choice,) = event["choices"]
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            finish = choice["finish_reason"] or finish
            count += 1
            if count == pieces and not finish:
                outcome.left += 1
                return
    if not done:
        outcome.wrong.append(f"a stream without [DONE]: {text}")
        return
    _compare(one, text, finish, outcome, "stream")


def _compare(one: Known, text: str, finish: str, outcome: Outcome, kind: str) -> None:
    if (text, finish) == (one.text, one.finish):
        outcome.equal += 1
        outcome.kinds[kind] += 1
    else:
        outcome.wrong.append(f"{one.body}: {text!r} and not {one.text!r}")


def main(words: list[str]) -> int:
    """One load; 1 where an answer is lost or wrong, or memory grows."""
    clients, requests, seed = map(int, words)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(save_model(Path(folder)), slots=8, serving={"queue": clients}) as served,
    ):
        outcome = asyncio.run(load(served, clients, requests, seed))
        served.idle()
    for problem in outcome.wrong[:5]:
        print(problem)
    quarter = max(1, len(outcome.memory) // 4)
    second, last = outcome.memory[quarter : 2 * quarter], outcome.memory[-quarter:]
    grown = (sum(last) / len(last)) / (sum(second) / len(second)) - 1 if second else 0.0
    total = outcome.equal + outcome.left + len(outcome.wrong)
    print(
        f"{total} of {clients * requests} requests answered: {outcome.equal} equal "
        f"({dict(outcome.kinds)}), {outcome.left} left, {len(outcome.wrong)} wrong; memory of the "
        f"last quarter over the second: {grown:+.1%}"
    )
    swollen = len(outcome.memory) >= SOAK and grown > 0.02
    return int(total != clients * requests or bool(outcome.wrong) or swollen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
