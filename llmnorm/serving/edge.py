"""What every request passes, around the routes: its id, its key, its line in the log, its count.

    app = Edge(routes, keys, metrics, log, root_path)

An ASGI application around another one. A body is never touched here, and a stream passes as it is.
"""

import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from llmnorm.serving.access import AccessLog
from llmnorm.serving.json_body import ClientGone
from llmnorm.serving.keys import Keys
from llmnorm.serving.metrics import Metrics
from llmnorm.serving.refusals import Refusal
from llmnorm.serving.service import Ticket

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RECORD = "llmnorm.record"  # in the scope
WITHOUT_KEY = ("/", "/health", "/ready", "/metrics", "/version")
STATIC = "/static/"
CLOSED = 499  # nginx's status of a request whose client has left; nobody gets it
ID = re.compile("[A-Za-z0-9._-]{1,64}")


@dataclass
class Record:
    """What is known of a request, for its line in the log.

    Attributes:
        id: what the client calls it, or a number of ours.
        ticket: its answers, once the engine was asked.
    """

    id: str
    began: float
    status: int = 0
    key: int | None = None
    ticket: Ticket | None = None
    prompt_tokens: int = 0
    stream: bool = False
    unknown: list[str] = field(default_factory=list)
    error: str | None = None


class Edge:
    """The outermost application.

    Args:
        app: with the routes.
        keys: which may be asked with; none: no key is asked for.
        root_path: what a proxy may leave before the paths.
    """

    def __init__(
        self, app: App, keys: Keys, metrics: Metrics, log: AccessLog, root_path: str
    ) -> None:
        self._app, self._keys, self._metrics, self._log = app, keys, metrics, log
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(f"{self._root}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._root)}
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        given = headers.get(b"x-request-id", "")
        record = Record(given if ID.fullmatch(given) else uuid.uuid4().hex, time.monotonic())
        scope[RECORD] = record

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                took = (time.monotonic() - record.began) * 1000
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", record.id.encode()),
                    (b"openai-processing-ms", f"{took:.0f}".encode()),
                ]
            await send(message)

        try:
            self._check_key(scope["path"], headers.get(b"authorization"), record)
            await self._app(scope, receive, told)
        except Refusal as refusal:
            record.error = refusal.code
            await send_refusal(refusal, told)
        except ClientGone:
            record.status = CLOSED
        except Exception:
            print(f"request {record.id} has failed:", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)
            if not record.status:
                await send_refusal(internal(record.id), told)
        finally:
            self._tell(scope, record)

    def _check_key(self, path: str, header: str | None, record: Record) -> None:
        if not self._keys:
            return
        record.key = self._keys.number(header)
        if record.key is None and path not in WITHOUT_KEY and not path.startswith(STATIC):
            what = "is not known" if header else "is missing: send the header Authorization"
            raise Refusal(401, f"the key {what}", "invalid_api_key")

    def _tell(self, scope: Scope, record: Record) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, record.status)
        line: dict[str, Any] = {
            "id": record.id,
            "method": scope["method"],
            "route": route,
            "status": record.status,
            "seconds": round(time.monotonic() - record.began, 4),
        }
        if record.key is not None:
            line["key"] = record.key
        if (ticket := record.ticket) is not None:
            line |= {
                "stream": record.stream,
                "prompt_tokens": record.prompt_tokens,
                "tokens": ticket.tokens,
                "cached": ticket.cached,
                "accepted": ticket.accepted,
                "queue_seconds": _rounded(ticket.waited),
                "first_seconds": _rounded(ticket.first),
                "finished": ticket.finished,
            }
        if record.unknown:
            line["ignored"] = record.unknown[:20]
        if record.error is not None:
            line["error"] = record.error
        self._log.write(line)


def internal(number: str) -> Refusal:
    """The refusal of a request that met a defect of ours; the trace is in the server's log."""
    return Refusal(500, f"the server has failed at request {number}", "internal_error")


async def send_refusal(refusal: Refusal, send: Send) -> None:
    """Answer with an error, where nothing was answered yet."""
    response = JSONResponse(refusal.body(), refusal.status, refusal.headers())
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": response.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": response.body})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
