"""Answers as they come: several requests in their order, and a conversation of many turns.

    answers(engine, requests)                  -> pieces of text, those of the first request first
    converse(engine, ask, lines, write, say)   a line a message, the answer written as it comes

What would surprise: Ctrl-C in an answer is a mark that the next round looks at, and not an
exception: an engine that is interrupted inside a round has rows of unequal layers.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Protocol

from llmnorm.generation.contract import Event, Request
from llmnorm.part import InputError

QUIT, CLEAR = "/quit", "/clear"
STOPPED = 2  # times of Ctrl-C in one answer that end the session, should a round hang


class Runs(Protocol):
    """What runs requests: `engine.Engine`, `grouped.Grouped`."""

    def add(self, request: Request) -> int:
        """Take a request; its number. Raises InputError where it cannot be answered."""
        ...

    def step(self) -> list[Event]:
        """One round."""
        ...


class Stops(Runs, Protocol):
    """What can end a request too: `engine.Engine`."""

    def abort(self, number: int) -> list[Event]:
        """End a request's rows; their last events."""
        ...


class Piece(NamedTuple):
    """A piece of an answer.

    Attributes:
        request: its place among the requests.
        row: which of its answers.
        event: what has come; its text may be empty.
    """

    request: int
    row: int
    event: Event


def answers(engine: Runs, requests: Sequence[Request]) -> Iterator[Piece]:
    """Yield the answers in their order, the first one's pieces as soon as they come.

    Raises:
        InputError: a request cannot be answered, or an answer failed.
    """
    numbers = {engine.add(request): place for place, request in enumerate(requests)}
    order = [(place, row) for place, request in enumerate(requests) for row in range(request.n)]
    waiting: dict[tuple[int, int], list[Piece]] = {key: [] for key in order}
    for key in order:
        ended = False
        while not ended:
            for piece in waiting.pop(key, []):
                yield piece
                ended = ended or piece.event.finish is not None
            if ended:
                break
            waiting[key] = []
            for event in engine.step():
                place = numbers[event.request]
                if event.finish == "error":
                    raise InputError(f"answer {place + 1}: {event.message}")
                waiting[place, event.row].append(Piece(place, event.row, event))


def converse(
    engine: Stops,
    ask: Callable[[list[dict[str, str]]], Request],
    lines: Iterable[str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Answer each line as a user's message, with all that was said before it.

    Args:
        ask: makes a request of messages; raises InputError where they cannot be answered.
        lines: the messages; empty ones are left out, /clear forgets what was said, /quit ends.
        write: takes the answers' text, as it comes.
        say: takes what is said about the conversation, a line each.
    """
    said: list[dict[str, str]] = []
    for line in lines:
        match line.strip():
            case "":
                continue
            case "/quit":
                return
            case "/clear":
                said = []
                continue
        turn = [*said, {"role": "user", "content": line.strip("\r\n")}]
        try:
            answer = _answer(engine, ask(turn), write)
        except InputError as error:
            again = f"; {CLEAR} begins anew" if said else ""
            say(f"{error}; this message is left out{again}")
            continue
        write("\n")
        said = [*turn, {"role": "assistant", "content": answer}]


def _answer(engine: Stops, request: Request, write: Callable[[str], None]) -> str:
    """Write the answer to a request; returns it, as far as it came.

    Raises:
        InputError: it cannot be answered, or the answer failed.
    """
    text = ""
    with _interrupts() as interrupted:
        number, going = engine.add(request), True
        while going:
            events = engine.step()
            if interrupted():
                events += engine.abort(number)
            for event in events:
                if event.finish == "error":
                    raise InputError(str(event.message))
                text += event.text
                write(event.text)
                going = going and event.finish is None
    return text


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Context manager in which Ctrl-C is counted; gives a function that says whether it came."""
    count = 0

    def counted(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count >= STOPPED:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, counted)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
