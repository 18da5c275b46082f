"""Answers of one schema: all of them valid, and the same with speculation and without.

    python -m tests.serving.forms SCHEMA ANSWERS lookup|itself SEED

A model with random weights, which is the hardest case, is served with a draft: what stands in the
text, or the model itself. Every answer is asked for twice, one of four greedily and the others with
a seed, and is read by jsonschema. The last line says what came of it, and what following the
grammar costs a token.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from llmnorm.serving.structured import Follower
from tests.serving.schemas import SCHEMAS
from tests.serving.served import Served, save_model, serving

CONTEXT = 2_048  # tokens; between the parts of JSON a weak model writes as much space as it may
LONGEST = 1_500
TOGETHER = 4  # answers of a request
HOW: list[dict[str, Any]] = [{"temperature": t} for t in (0, 0.7, 1, 1.5)]


@dataclass
class Outcome:
    """What came of the answers of one schema.

    Attributes:
        answers: asked for.
        wrong: one line for each that is not valid, or not the same without drafts.
        tokens, drafted, accepted: of the answers with drafts.
    """

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0


def ask_all(served: Served, name: str, answers: int, seed: int) -> Outcome:
    """Ask for so many answers of a schema, with drafts and without."""
    schema, outcome, chance = SCHEMAS[name], Outcome(), random.Random(seed)
    check = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    with httpx.Client(base_url=served.url, timeout=600) as http:

        def ask(**body: Any) -> Any:
            told = http.post("/completions", json={**body, "response_format": form})
            assert told.status_code == 200, told.text
            return told.json()

        while outcome.answers < answers:
            how = HOW[outcome.answers // TOGETHER % len(HOW)]
            number = chance.randrange(10**6)
            body = {
                "prompt": f"{number} {json.dumps(schema)[:200]} ",
                "seed": number,
                "max_tokens": LONGEST,
                "n": min(TOGETHER, answers - outcome.answers),
                **how,
            }
            before = sum(served.engine.counters.drafted)
            told, plain = ask(**body), None
            outcome.drafted += sum(served.engine.counters.drafted) - before
            plain = ask(**body, speculative=False)
            usage = told["usage"]
            outcome.tokens += usage["completion_tokens"]
            outcome.accepted += usage["completion_tokens_details"]["accepted_prediction_tokens"]
            outcome.answers += body["n"]
            for one, other in zip(told["choices"], plain["choices"], strict=True):
                outcome.wrong += [f"{body}: {fault}" for fault in _faults(check, one, other)]
    return outcome


def _faults(check: Any, one: Any, other: Any) -> Iterator[str]:
    if one["text"] != other["text"]:
        yield f"{one['text']!r}, and {other['text']!r} without drafts"
    if one["finish_reason"] != "stop":
        yield f"ended by {one['finish_reason']}: {one['text']!r}"
        return
    try:
        problems = list(check.iter_errors(json.loads(one["text"])))
    except ValueError as error:
        yield f"{one['text']!r}: {error}"
        return
    for problem in problems:
        yield f"{one['text']!r}: {problem.message}"


@contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds of every call by which grammars are followed, in all rows."""
    seconds: list[float] = []

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments)
            finally:
                seconds.append(time.thread_time() - began)

        return call

    names = ("apply", "advance", "rollback")
    before = {name: getattr(Follower, name) for name in names}
    for name, function in before.items():
        setattr(Follower, name, watched(function))
    try:
        yield seconds
    finally:
        for name, function in before.items():
            setattr(Follower, name, function)


def main(words: list[str]) -> int:
    """The answers of one schema; 1 where one of them is wrong."""
    name, answers, draft, seed = words[0], int(words[1]), words[2], int(words[3])
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", context=CONTEXT)
        chosen = str(model) if draft == "itself" else draft
        with (
            timed() as seconds,
            serving(model, draft=chosen, draft_tokens=4, slots=TOGETHER) as served,
        ):
            outcome = ask_all(served, name, answers, int(seed))
            served.idle()
            tokens = served.engine.counters.tokens
    for problem in outcome.wrong[:5]:
        print(problem)
    print(
        f"{outcome.answers} answers of '{name}', {len(outcome.wrong)} wrong: {outcome.tokens} "
        f"tokens, {outcome.accepted} of {outcome.drafted} drafted accepted; following the grammar "
        f"{1e6 * sum(seconds) / tokens:.0f} us a token"
    )
    return int(bool(outcome.wrong) or not outcome.accepted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
