"""Writing a file so that a reader never sees half of it, and JSON that every reader takes."""

import json
import math
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, then rename it to `path`.

    A process that is killed in between leaves the old file. The bytes are not fsynced: a power cut
    may still lose them.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def json_text(value: dict[str, Any], *, indent: int | None = None, ascii: bool = True) -> str:
    """A JSON object as text, without NaN and Infinity, which JSON does not have.

    A number that is not finite is null, and `not_finite` at the object's end says what it was:
    {"loss": nan, "a": [inf]} -> {"loss": null, "a": [null], "not_finite": {"loss": "nan", "a.0":
    "infinity"}}.

    Args:
        value: what json.dumps takes.
        indent: as json.dumps has it.
        ascii: escape every other character.
    """
    try:  # almost always
        return json.dumps(value, indent=indent, ensure_ascii=ascii, allow_nan=False)
    except ValueError:
        words: dict[str, str] = {}
        finite = _finite(value, "", words)
        return json.dumps(
            {**finite, "not_finite": words}, indent=indent, ensure_ascii=ascii, allow_nan=False
        )


def _finite(value: Any, path: str, words: dict[str, str]) -> Any:
    """The value with null for numbers that are not finite; `words` gets what each was."""
    if isinstance(value, dict):
        return {
            key: _finite(v, f"{path}.{key}" if path else key, words) for key, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{index}", words) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        words[path] = "nan" if math.isnan(value) else f"{'-' * (value < 0)}infinity"
        return None
    return value
