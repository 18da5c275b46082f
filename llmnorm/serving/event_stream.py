"""A stream of server-sent events: an answer's pieces as they come.

    response = EventStream(pieces(ticket, answers, record, usage=True), ticket)

Each event is one line `data: {JSON}` and an empty line; the last one is `data: [DONE]`. An error
behind the headers is an event of its own, and there is no [DONE] then: OpenAI's client raises it.

The objects of a stream differ in their choice alone, so the rest is written once: the JSON of a
token costs a third of the whole object's.

What would surprise: JSON is written in ASCII, since some clients split lines at U+2028, which may
stand in a text. And a generator that was never begun runs none of its `finally`, so it is the
response that closes the ticket.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse

from llmnorm.serving.answers import Answers
from llmnorm.serving.edge import Receive, Record, Scope, Send, internal
from llmnorm.serving.refusals import Refusal
from llmnorm.serving.service import Ticket

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


_encode = json.JSONEncoder(separators=(",", ":")).encode


def event(value: dict[str, Any]) -> bytes:
    """One event."""
    return f"data: {_encode(value)}\n\n".encode()


def with_choice(around: dict[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    """What makes events of choices.

    Args:
        around: the object that each stands in, without choices.
    """
    rest = _encode({key: value for key, value in around.items() if key != "choices"})
    return lambda choice: f'data: {rest[:-1]},"choices":[{_encode(choice)}]}}\n\n'.encode()


async def pieces(
    ticket: Ticket, answers: Answers, record: Record, *, usage: bool
) -> AsyncIterator[bytes]:
    """Yield an answer's events, those of a round together."""
    told = with_choice(answers.around)
    for choice in answers.roles():
        yield told(choice)
    try:
        async for gained in ticket.events():
            found = [answers.piece(number, some) for number, some in gained]
            if joined := b"".join([told(choice) for choice in found if choice is not None]):
                yield joined
    except Refusal as refusal:
        record.error = refusal.code
        yield event(refusal.body())
        return
    except Exception:
        print(f"request {record.id} has failed:", file=sys.stderr)
        traceback.print_exc(file=sys.stderr)
        record.error = "internal_error"
        yield event(internal(record.id).body())
        return
    if usage:
        yield event(answers.last(ticket))
    yield DONE


class EventStream(StreamingResponse):
    """The response that sends events, and closes the ticket at its end, whatever ends it.

    Args:
        content: events.
        ticket: whose they are.
    """

    def __init__(self, content: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(content, headers=HEADERS, media_type="text/event-stream")
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, as long as the client is there."""
        self._ticket.task = task = asyncio.current_task()
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            # By `Ticket.fail`, of a client that reads nothing: its connection is closed.
            if task is not None and task.cancelling():
                task.uncancel()
        finally:
            self._ticket.close()
