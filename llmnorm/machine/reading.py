"""The gate for files that somebody else may have written, moved or damaged.

Every file that this project did not write a moment ago is opened here: only regular files (a fifo
or /dev/zero would be read for ever), up to a stated size, as UTF-8, with JSON of a stated depth.
Whatever is wrong is an `InputError` that begins with the file, so that no caller lists exceptions.

    open_file(path)              its bytes, as they are read
    read_text(path)              a small text
    read_json(path)              a JSON value
    read_settings(path, cls)     a JSON object, checked by a settings class
    json_lines(path)             the lines of a .jsonl file, broken ones included
    local_path(text)             text that a user typed, as a path of this machine
    is_address(text)             whether it is an address of a store instead

What would surprise: lines end at `\\n` alone. `str.splitlines` also splits at U+2028 and ten other
characters, which stand inside of JSON strings. JSON from outside may hold NaN and Infinity; what we
write never does (`machine/files.py`).
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from pydantic import ValidationError

from llmnorm.part import InputError, Settings, explain, one_line

MAX_BYTES = 1 << 28  # of a text or JSON file that is read whole; a tokenizer.json has 2**24
MAX_LINE = 1 << 26  # bytes of a line of a .jsonl file
MAX_DEPTH = 64  # of JSON and YAML; a run's configuration has 5
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_Cls = TypeVar("_Cls", bound=Settings)


def named(path: Path, key: str | None) -> str:
    """How a message about a file begins: with what named it, if that is known."""
    return f"{key}: {path}" if key else str(path)


def open_file(path: Path, key: str | None = None) -> IO[bytes]:
    """Open a regular file (or a link to one) for reading bytes.

    Args:
        path: the file.
        key: what named it, for the message; the file's name follows it.

    Raises:
        InputError: it is missing, not a regular file, or may not be read.
    """
    check_file(path, key)
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{named(path, key)}: {reason(error)}") from None


def check_file(path: Path, key: str | None = None) -> os.stat_result:
    """Size and time of a regular file (or of the one that a link leads to), without opening it.

    Raises:
        InputError: it is missing, or not a regular file.
    """
    where = named(path, key)
    if "\0" in str(path):
        raise InputError(f"{where!r}: a NUL byte is in the name, which no file has")
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{where}: {reason(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{where}: is {_kind(found.st_mode)}, not a file")
    return found


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def reason(error: OSError) -> str:
    """What an error of the system means, in words."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "there is no such file"
        case errno.ELOOP:
            return "is a link that leads back to itself"
        case errno.ENAMETOOLONG:
            return "the name is too long"
    return f"cannot be read ({error.strerror or error})"


def read_bytes(path: Path, key: str | None = None, *, limit: int = MAX_BYTES) -> bytes:
    """A file's bytes.

    Raises:
        InputError: as `open_file`; or it has more than `limit` bytes.
    """
    where = named(path, key)
    with open_file(path, key) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise InputError(f"{where}: {reason(error)}") from None
    if len(content) > limit:
        raise InputError(f"{where}: is larger than {limit:,} bytes, the most that is read of it")
    return content


def read_text(path: Path, key: str | None = None, *, limit: int = MAX_BYTES) -> str:
    """A file's text; a byte order mark at its start is left out.

    Raises:
        InputError: as `read_bytes`; or it is not UTF-8.
    """
    where = named(path, key)
    return decode(read_bytes(path, key, limit=limit), where).removeprefix("\ufeff")


def decode(content: bytes, where: str) -> str:
    """UTF-8 bytes as text.

    Raises:
        InputError: they are not UTF-8; the message begins with `where`.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, key: str | None = None, *, limit: int = MAX_BYTES) -> Any:
    """A file's JSON value.

    Raises:
        InputError: as `read_text`; or it is not JSON that is read (`parse_json`).
    """
    return parse_json(read_text(path, key, limit=limit), named(path, key))


def read_object(path: Path, key: str | None = None, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """A file's JSON value, which must be an object.

    Raises:
        InputError: as `read_json`; or it is a list, a text or a number.
    """
    value = read_json(path, key, limit=limit)
    if not isinstance(value, dict):
        where = named(path, key)
        raise InputError(f"{where}: expected a JSON object, got {_json_kind(value)}")
    return value


def read_settings(path: Path, cls: type[_Cls], key: str | None = None) -> _Cls:
    """A file's JSON object, checked by a settings class.

    Raises:
        InputError: as `read_object`; or a key is missing, unknown or of another type.
    """
    return checked(read_object(path, key), cls, named(path, key))


def checked(value: Any, cls: type[_Cls], where: str) -> _Cls:
    """A JSON value as a settings class.

    Raises:
        InputError: a key is missing, unknown or of another type; the message begins with `where`.
    """
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {one_line(explain(error, cls)[:3])}") from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON; NaN and Infinity, which are none, are let through as floats.
        where: the file, or file:line, with which the message begins.

    Raises:
        InputError: it is no JSON, nested deeper than `MAX_DEPTH`, or has a number of more digits
            than Python converts.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise InputError(f"{where}: not JSON ({error.msg}{line}, column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{where}: JSON that is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise InputError(f"{where}: a number in it has more than 4,300 digits") from None
    if text.count("{") + text.count("[") <= MAX_DEPTH:  # it cannot be deeper: spares the walk
        return value
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        if not containers:
            return value
        level = [child for n in containers for child in (n.values() if isinstance(n, dict) else n)]
    raise InputError(f"{where}: JSON that is nested deeper than {MAX_DEPTH} levels")


def _json_kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class Line(NamedTuple):
    """A line of a .jsonl file.

    Attributes:
        number: counted from 1.
        raw: its bytes, with the `\\n` that ends it.
        value: its JSON object; None where there is a problem.
        problem: why there is none, without the file's name; None for a good line.
    """

    number: int
    raw: bytes
    value: dict[str, Any] | None
    problem: str | None

    @property
    def unfinished(self) -> bool:
        """Whether it has no end: the last line of a process that was killed while it wrote."""
        return not self.raw.endswith(b"\n")


def json_lines(path: Path, key: str | None = None) -> Iterator[Line]:
    """The lines of a .jsonl file whose records are objects; a broken line is told, not raised.

    Raises:
        InputError: as `open_file`; or a line is longer than `MAX_LINE`.
    """
    with open_file(path, key) as file:
        yield from stream_lines(file, str(path))


def stream_lines(file: IO[bytes], where: str) -> Iterator[Line]:
    """As `json_lines`, of an open file, e.g. standard input; messages begin with `where`."""
    number = 0
    while True:
        try:
            raw = file.readline(MAX_LINE + 1)
        except OSError as error:
            raise InputError(f"{where}: {reason(error)}") from None
        if not raw:
            return
        number += 1
        if len(raw) > MAX_LINE:
            raise InputError(f"{where}:{number}: the line is longer than {MAX_LINE:,} bytes")
        yield Line(number, raw, *judge(raw))


def judge(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The JSON object on a line, or None and why there is none, as in `Line`."""
    try:
        value = parse_json(decode(raw, "it"), "it")
    except InputError as error:
        return None, str(error)
    return (value, None) if isinstance(value, dict) else (None, f"it is {_json_kind(value)}")


def is_address(text: str) -> bool:
    """Whether text names a place in a store (`s3://bucket/run`), not a path or a file:// URL."""
    return bool(_SCHEME.match(text)) and not text.startswith("file://")


def check_address(text: str) -> str:
    """An address of a store without a slash at its end.

    Raises:
        ValueError: it names no place below a bucket, or leads back with `..`.
    """
    address = text.rstrip("/")
    _, _, rest = address.partition("://")
    names = rest.split("/")
    if len(names) < 2 or "" in names or not {".", ".."}.isdisjoint(names) or not rest.isprintable():
        raise ValueError(f"'{text}' is no place in a store; write SCHEME://BUCKET/NAME")
    return address


def local_path(text: str) -> Path:
    """Text that a user typed as a path of this machine; a leading `~` is the home directory.

    Raises:
        ValueError: it names another place (`s3://bucket/run`), or can be no path.
    """
    if "\0" in text:
        raise ValueError(f"{text!r} has a NUL byte, which no path has")
    if text.startswith("file://"):
        raise ValueError(f"'{text}' is a URL; write the path alone")
    if match := _SCHEME.match(text):
        raise ValueError(
            f"'{text}' is not on this machine: {match[1]}:// is not taken here; mount it, or copy "
            "it, and give the local path"
        )
    if longest := next((p for p in text.split("/") if len(os.fsencode(p)) > 255), None):
        raise ValueError(f"the name '{longest[:20]}...' has more than 255 bytes")
    if len(os.fsencode(text)) > 4095:
        raise ValueError(f"the path '{text[:20]}...' has more than 4,095 bytes")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"'{text}': there is no such user") from None
