"""Records out of opened files: a line of a .jsonl file, a row of a table, a whole .txt file.

A record that cannot be read (not UTF-8, no JSON, no text in its field, too long) is a bad record.
`BadRecords` refuses it or counts it, as `data.sources.N.on_bad_record` says. A file that is damaged
as a whole is always refused.

What would surprise:
- Lines end at `\\n` alone.
- A NUL byte is noticed in the block of a megabyte in which it stands, and a line without an end
  when it has `MAX_RECORD` bytes, so that a refusal needs little memory.
- `pyarrow` is imported only where it is needed.
"""

import codecs
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from llmnorm.data.files import opened
from llmnorm.machine.reading import MAX_LINE, check_file, parse_json
from llmnorm.part import InputError

MAX_DOCUMENT = 1 << 29  # bytes of a .txt file, which is one document; tests make it smaller
MAX_RECORD = MAX_LINE  # bytes of a line of a .jsonl file
BLOCK = 1 << 20  # bytes that are read at once
SHOWN = 3  # bad records that are named


class BadRecords:
    """What is done with records that cannot be read.

    Args:
        key: the configuration key of their source.
        skip: leave them out and count them; else the first one raises.

    Attributes:
        count: how many were left out.
        first: the problems of the first of them.
    """

    def __init__(self, key: str, *, skip: bool) -> None:
        self._key, self._skip = key, skip
        self.count = 0
        self.first: list[str] = []

    def __call__(self, problem: str) -> None:
        """Count a record, or refuse it.

        Raises:
            InputError: bad records are not to be left out.
        """
        if not self._skip:
            cure = f"{self._key}.on_bad_record=skip leaves such records out"
            raise InputError(f"{problem}; {cure}")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(problem)


Bad = Callable[[str], None]  # is told what is wrong with a record, and raises or returns


class Record(NamedTuple):
    """A record: where it stands (`file:line`), and its fields."""

    where: str
    fields: dict[str, Any]


def text_record(path: Path, field: str, key: str, bad: Bad) -> Iterator[Record]:
    """The record that a .txt file is: its text, without a byte order mark, as the only field."""
    content, problem = bytearray(), None
    with opened(path, key) as file:
        while not problem and (block := file.read(BLOCK)):
            content += block
            if b"\0" in block:
                marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                problem = "this is UTF-16 text" if marked else "this is a binary file, not text"
                problem += "; convert it to UTF-8" if marked else ""
            elif len(content) > MAX_DOCUMENT:
                problem = (
                    f"has more than {MAX_DOCUMENT:,} bytes, the most of a .txt file, which is one "
                    "document; write its documents as records of a .jsonl file"
                )
    if problem:
        bad(f"{path}: {problem}")
        return
    text = _text(content, str(path), bad)
    if text is not None:
        yield Record(str(path), {field: text.removeprefix("\ufeff")})


def json_records(path: Path, fields: Collection[str], key: str, bad: Bad) -> Iterator[Record]:
    """The records of a .jsonl file; lines without text between them are passed over.

    Args:
        fields: that are wanted, for the message.
    """
    with opened(path, key) as file:
        for where, raw in lines(file, str(path), bad):
            text = _text(raw, where, bad)
            if text is None or text.isspace():
                continue
            try:
                record = parse_json(text, where)
            except InputError as error:
                bad(str(error))
                continue
            if isinstance(record, dict):
                yield Record(where, record)
            else:
                bad(f"{where}: a record must be an object with {_listed(fields)}")


def _listed(fields: Collection[str]) -> str:
    if len(fields) == 1:
        return f"the field '{next(iter(fields))}'"
    return f"one of the fields {', '.join(fields)}"


def lines(file: IO[bytes], name: str, bad: Bad) -> Iterator[tuple[str, bytes]]:
    """Every line of text, and where it stands (`name:number`).

    A line with a NUL byte, or of more than `MAX_RECORD` bytes, is a bad record; what follows of it
    is read and not kept. A byte order mark before the first line is left out.
    """
    for number in itertools.count(1):
        where = f"{name}:{number}"
        parts: list[bytes] = []
        size, good = 0, True
        while part := file.readline(BLOCK):
            size += len(part)
            if good and (problem := _problem(part, size)):
                good, parts = False, []
                bad(f"{where}: {problem}")
            if good:
                parts.append(part)
            if part.endswith(b"\n"):
                break
        if not size:
            return
        if good:
            raw = b"".join(parts)
            yield where, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def _problem(part: bytes, size: int) -> str | None:
    """What is wrong with the next part of a line that has `size` bytes up to here."""
    if b"\0" in part:
        return "a NUL byte is in the line, which no text has"
    if size > MAX_RECORD:
        return f"the line has more than {MAX_RECORD:,} bytes, the most of a record"
    return None


def table_records(
    path: Path, suffix: str, fields: Collection[str], key: str, bad: Bad
) -> Iterator[Record]:
    """The records of a .parquet or .arrow file, with those of the fields that it has.

    Raises:
        InputError: it is damaged, or has none of the fields.
    """
    import pyarrow as pa

    check_file(path, key)
    number = 0
    try:
        for names, columns in _columns(path, suffix, fields):
            kept = []
            for column in columns:
                is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                if is_text:  # as bytes, so that one text that is not UTF-8 is one bad record
                    large = pa.types.is_large_string(column.type)
                    column = column.cast(pa.large_binary() if large else pa.binary())
                column.validate(full=True)  # offsets that lead elsewhere would be followed
                kept.append((column, is_text))
            for row in range(len(columns[0])):
                number += 1
                found = _row(names, kept, row, f"{path}: record {number}", bad)
                if found is not None:
                    yield found
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{key}: {path}: not a readable {suffix} file ({reason})") from None


def _row(
    names: list[str], columns: list[tuple[Any, bool]], row: int, where: str, bad: Bad
) -> Record | None:
    """A row of a table; None for a bad record."""
    fields = {}
    for name, (column, is_text) in zip(names, columns, strict=True):
        try:
            value = column[row].as_py()
        except UnicodeDecodeError as error:  # of a text inside of a list
            bad(f"{where}: not UTF-8 text (byte {error.start}); convert it")
            return None
        if is_text and value is not None:
            value = _text(value, where, bad)
            if value is None:
                return None
        fields[name] = value
    return Record(where, fields)


def _columns(
    path: Path, suffix: str, fields: Collection[str]
) -> Iterator[tuple[list[str], list[Any]]]:
    """The parts of a table's columns, and their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix == ".parquet":
        table = pq.ParquetFile(path)
        names = _there(table.schema_arrow.names, fields, str(path))
        for batch in table.iter_batches(columns=names):
            yield names, [batch.column(name) for name in names]
        return
    with pa.memory_map(str(path)) as source:
        try:  # `datasets` writes the streaming format, other tools the one with a footer
            reader = iter(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            reader = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in reader:
            names = _there(batch.schema.names, fields, str(path))
            yield names, [batch.column(name) for name in names]


def _there(names: list[str], fields: Collection[str], where: str) -> list[str]:
    """Those of the fields that are among the names."""
    found = [field for field in fields if field in names]
    if not found:
        raise InputError(f"{where}: {lacks(names, fields)}")
    return found


def lacks(names: Collection[str], fields: Collection[str]) -> str:
    """What is wrong where none of the fields is among the names."""
    listed = ", ".join(itertools.islice(names, 20)) + (", ..." if len(names) > 20 else "")
    if len(fields) == 1:
        return f"there is no field '{next(iter(fields))}' (text_field); the fields are: {listed}"
    return f"there is none of the fields {', '.join(fields)}; the fields are: {listed}"


def text_of(record: Record, field: str, bad: Bad) -> str | None:
    """The text in a record's field; None for a bad record."""
    problem = None
    if field not in record.fields:
        problem = lacks(record.fields, [field])
    else:
        value = record.fields[field]
        if isinstance(value, str):
            problem = half_a_pair(value)
        else:
            problem = f"the field '{field}' holds {type(value).__name__}, not text"
    if problem is None:
        return str(value)
    bad(f"{record.where}: {problem}")
    return None


def half_a_pair(text: str) -> str | None:
    """What is wrong with a text of JSON, which can spell half a surrogate pair; None if nothing."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not UTF-8 text (character {error.start})"
    return None


def _text(raw: bytes | bytearray, where: str, bad: Bad) -> str | None:
    """UTF-8 bytes as text; None for a bad record."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad(f"{where}: not UTF-8 text (byte {error.start}); convert it")
        return None
