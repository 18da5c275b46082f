"""A request's body: read up to a limit, and taken for JSON only if it is exactly that.

    raw = await read_body(receive, headers, limit)
    tree = parse_body(raw)              -> dict, or Refusal 400

What Python's parser lets through and JSON does not know is refused: NaN and Infinity, halves of
surrogate pairs; what is JSON and no request is too: a key twice, numbers of thousands of digits,
hundreds of brackets.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from llmnorm.machine.reading import parse_json
from llmnorm.part import InputError
from llmnorm.serving.refusals import Refusal

THROWN = 2**26
HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class ClientGone(Exception):
    """The client has closed the connection."""


async def read_body(receive: Receive, length: str | None, limit: int) -> bytes:
    """The bytes of a body.

    Args:
        receive: ASGI's.
        length: what the header Content-Length says.
        limit: bytes.

    Raises:
        Refusal: it is longer. The rest of it is thrown away before, up to `THROWN` bytes, since
            many clients read an answer only when they have sent all.
        ClientGone: the client has left before its end.
    """
    promised = int(length) if length is not None and re.fullmatch("[0-9]{1,19}", length) else 0
    if promised > THROWN:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            pieces = []
            if size > THROWN:
                break
        else:
            pieces.append(piece)
        more = message.get("more_body", False)
    if size > limit:
        raise _too_large(limit)
    return b"".join(pieces)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refusal: it holds none.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8 text (byte {error.start})") from None
    try:
        parse_json(text, "the body")  # its depth, and the digits of its numbers
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once
        )
        if HALF_A_PAIR.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except InputError as error:
        raise _invalid(str(error)) from None
    except UnicodeEncodeError:
        raise _invalid("the body: a text in it has half of a surrogate pair") from None
    if not isinstance(value, dict):
        raise _invalid("the body: expected a JSON object")
    return value


def _no_number(word: str) -> Any:
    raise InputError(f"the body: {word} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise InputError("the body: a number in it is too large")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"the body: has the key '{key:.40}' twice")
            seen.add(key)
    return found


def _invalid(message: str) -> Refusal:
    return Refusal(400, message, "invalid_json")


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413, f"the body has more than {limit:,} bytes (serving.body_limit)", "request_too_large"
    )
