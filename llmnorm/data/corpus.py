"""Reading a source: files and Hugging Face datasets as a sequence of texts.

A .txt file is a document; so is a record of a .jsonl, .parquet or .arrow file or of a dataset. .txt
and .jsonl may end in .gz or .zst. Files are read in the order of their paths and records in the
order of their file, so a corpus gives the same sequence of texts in every format.

What would surprise:
- Texts are not normalised, neither Unicode nor newlines. A byte order mark is dropped, and a
  document without text is left out.
- A dataset of the hub is streamed once, into `.jsonl.zst` files, since preparing data reads a
  source several times.
- `datasets` and `pyarrow` are imported only where they are needed.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from llmnorm.config.shipped import is_shipped, locate
from llmnorm.data.settings import SourceSettings
from llmnorm.part import InputError, nearest

KINDS = (".txt", ".jsonl", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
STREAM_PART = 20_000  # records in a file of a streamed dataset; at most these are lost by a kill


def files(pattern: str, key: str) -> list[Path]:
    """The files that a path, a glob or `llmnorm:NAME` names, sorted.

    Args:
        pattern: the path or glob.
        key: the configuration key of the pattern, for messages.

    Raises:
        InputError: there are none, or one is of a kind that is not read.
    """
    if is_shipped(pattern):
        pattern = glob.escape(str(locate(pattern, key)))
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    if not found and not glob.has_magic(pattern):
        parent = Path(pattern).parent
        siblings = sorted(str(parent / p.name) for p in parent.iterdir()) if parent.is_dir() else []
        hint = f"; {nearest(pattern, siblings)}" if 0 < len(siblings) <= 20 else ""
        raise InputError(f"{key}: there is no file {pattern}{hint}")
    paths = [path for path in found if not path.is_dir()]
    if not paths and found:
        raise InputError(f"{key}: {pattern} is a directory; write a glob like {pattern}/*.txt")
    if not paths:
        raise InputError(f"{key}: no file matches {pattern}")
    for path in paths:
        kind(path, key)
    return paths


def dataset_files(directory: Path, key: str) -> list[Path]:
    """All files of a dataset in a local directory, sorted.

    Raises:
        InputError: there are none.
    """
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    if not found:
        raise InputError(f"{key}: the directory {directory} is empty")
    return found


def is_local(source: SourceSettings) -> bool:
    """Whether the source is on this machine: files, or a directory with a dataset."""
    return source.dataset is None or Path(source.dataset).is_dir()


def texts(source: SourceSettings, key: str, spool: Path | None = None) -> Iterator[str]:
    """The source's documents in their order, those without text left out.

    Args:
        source: where to read.
        key: the configuration key of the source, for messages.
        spool: the directory into which `stream` copied a dataset of the hub.
    """
    if source.path is not None:
        read = read_files(files(source.path, f"{key}.path"), source.text_field)
    elif spool is not None:
        read = read_files(sorted(spool.glob("*.jsonl.zst")), "text")
    else:
        read = _read_dataset(source, f"{key}.dataset")
    return (text for text in read if text)


def read_files(paths: list[Path], field: str) -> Iterator[str]:
    """The texts of files, one after the other.

    Raises:
        InputError: a file is damaged, binary or not UTF-8, or a record has no such text field.
    """
    for path in paths:
        suffix = kind(path, str(path))
        try:
            if suffix == ".txt":
                yield _read_text(path)
            elif suffix == ".jsonl":
                yield from _read_jsonl(path, field)
            else:
                yield from _read_table(path, field, suffix)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read ({reason})") from error


def kind(path: Path, key: str = "") -> str:
    """Which of `KINDS` a file is, by its name.

    Raises:
        InputError: none of them.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    compressed = path.suffix in COMPRESSED
    if last not in KINDS or (compressed and last not in KINDS[:2]):
        raise InputError(
            f"{key}: {path.name} is not of a kind that is read; "
            f"valid: {', '.join(KINDS)}, and {', '.join(COMPRESSED)} after the first two"
        )
    return last


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames; EOFError if it ends inside one.

    zstandard's own reader takes a truncated file for a whole one.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        # --long=31 writes windows larger than the default allows
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = self._file.read(1 << 17)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._pending = memoryview(self._frame.decompress(block))
            if self._frame.eof:  # the next frame begins in this block
                self._file.seek(-len(self._frame.unused_data), os.SEEK_CUR)
                self._frame = None
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _decode(raw: bytes, where: str) -> str:
    if b"\0" in raw:
        raise InputError(f"{where}: this is a binary file, not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); convert it") from None


def _read_text(path: Path) -> str:
    with _open(path) as file:
        return _decode(file.read(), str(path)).removeprefix("\ufeff")


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(line, where)
            if text.isspace():
                continue
            try:
                record = json.loads(text.removeprefix("\ufeff") if number == 1 else text)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not a JSON record ({error.msg})") from None
            if not isinstance(record, dict):
                raise InputError(f"{where}: a record must be an object with the field '{field}'")
            yield _field(record, field, where)


def _read_table(path: Path, field: str, suffix: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        if suffix == ".parquet":
            table = pq.ParquetFile(path)
            _has_field(table.schema_arrow.names, field, str(path))
            yield from table.iter_batches(columns=[field])
            return
        with pa.memory_map(str(path)) as source:
            try:  # `datasets` writes the streaming format, other tools the one with a footer
                reader = iter(pa.ipc.open_stream(source))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                reader = (file.get_batch(index) for index in range(file.num_record_batches))
            for batch in reader:
                _has_field(batch.schema.names, field, str(path))
                yield batch.select([field])

    number = 0
    try:
        for batch in batches():
            for value in batch.column(0).to_pylist():
                number += 1
                yield _field({field: value}, field, f"{path}: record {number}")
    except pa.ArrowInvalid as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a readable {suffix} file ({reason})") from None


def _has_field(names: list[str], field: str, where: str) -> None:
    if field not in names:
        raise InputError(
            f"{where}: there is no field '{field}' (text_field); the fields are: {', '.join(names)}"
        )


def _field(record: dict[str, Any], field: str, where: str) -> str:
    _has_field(list(record), field, where)
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: the field '{field}' holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")  # JSON can spell half a surrogate pair, which no UTF-8 has
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not UTF-8 text (character {error.start})") from None
    return value


def _load(source: SourceSettings, key: str, **options: Any) -> Any:
    """A source's dataset, streamed unless `datasets.save_to_disk` wrote it."""
    import datasets

    assert source.dataset is not None
    saved = [Path(source.dataset, name) for name in ("state.json", "dataset_dict.json")]
    try:
        if any(path.is_file() for path in saved):
            found = datasets.load_from_disk(source.dataset)
            if not isinstance(found, datasets.DatasetDict):
                return found
            if source.split not in found:
                hint = nearest(source.split, list(found))
                raise InputError(f"{key}: {source.dataset} has no split '{source.split}'; {hint}")
            return found[source.split]
        return datasets.load_dataset(
            source.dataset, source.subset, split=source.split, streaming=True, **options
        )
    except InputError:
        raise
    except Exception as error:  # `datasets` raises whatever its file systems and hub client raise
        raise InputError(f"{key}: cannot load {source.dataset} ({_first_line(error)})") from error


def _read_dataset(source: SourceSettings, key: str, skip: int = 0, **options: Any) -> Iterator[str]:
    records = iter(_load(source, key, **options).skip(skip))
    for number in itertools.count(skip):
        try:
            record = next(records, None)
        except Exception as error:
            raise InputError(
                f"{key}: record {number} of {source.dataset}: {_first_line(error)}"
            ) from error
        if record is None:
            return
        yield _field(record, source.text_field, f"{key}: record {number} of {source.dataset}")


def commit(source: SourceSettings, key: str) -> str:
    """The current commit of a dataset on the hub.

    Raises:
        InputError: there is no such dataset, or no network.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(source.dataset)).sha)
    except Exception as error:
        raise InputError(
            f"{key}.dataset: '{source.dataset}' is no local directory, and the hub did not show it "
            f"({_first_line(error)})"
        ) from error


def stream(source: SourceSettings, key: str, spool: Path, revision: str) -> None:
    """Copy a dataset of the hub into `spool` as `.jsonl.zst` files.

    Files that an interrupted call wrote are kept, and the records after them are streamed.

    Args:
        source: the source.
        key: its configuration key, for messages.
        spool: directory for the files; made if it is not there.
        revision: the commit that is read.
    """
    spool.mkdir(parents=True, exist_ok=True)
    if (spool / "complete").exists():
        return
    parts = len(list(spool.glob("*.jsonl.zst")))
    records = _read_dataset(source, f"{key}.dataset", skip=parts * STREAM_PART, revision=revision)
    for part in itertools.count(parts):
        block = list(itertools.islice(records, STREAM_PART))
        if not block:
            break
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in block)
        path = spool / f"{part:06d}.jsonl.zst"
        write_file(path, zstandard.ZstdCompressor(level=3).compress(lines.encode()))
        if len(block) < STREAM_PART:
            break
    write_file(spool / "complete", b"")


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, and safe from a power cut.

    It is written under a temporary name beside `path`, fsynced, then renamed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest(path: Path) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
