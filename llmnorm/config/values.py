"""Kinds of values that many settings have: numbers with sensible bounds, paths of this machine.

The upper bounds are far beyond any run. They are here so that a slip of the keyboard
(`training.global_batch=1e12`) is answered at once, and not by an allocation that fails, or by
minutes of silence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, GetPydanticSchema
from pydantic_core import core_schema

from llmnorm.machine.reading import check_address, is_address, local_path

Count = Annotated[int, Field(ge=1, le=10**12)]
"""Steps, intervals, files: at least 1."""
Rows = Annotated[int, Field(ge=1, le=2**24)]
"""Rows of a step, or tokens of a row or of a text."""
Width = Annotated[int, Field(ge=1, le=2**20)]
"""An axis of a weight."""
Layers = Annotated[int, Field(ge=1, le=10_000)]
"""Blocks of a model; the deepest that was trained had 1,000 (DeepNet)."""
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
"""Rows of an embedding."""
Positions = Annotated[int, Field(ge=1, le=2**31)]
"""Longest context that a model is meant for."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""What torch and numpy take."""


def _local(value: Any) -> Any:
    return local_path(str(value)) if isinstance(value, str | Path) else value


def _place(value: Any, as_path: Callable[[Any], Any]) -> Any:
    if isinstance(value, str) and is_address(value):
        return check_address(value)
    return as_path(value)


def _place_schema(_: Any, handler: Callable[[Any], Any]) -> Any:
    return core_schema.no_info_wrap_validator_function(_place, handler(LocalPath))


def _local_text(value: str) -> str:
    found = local_path(value)
    return str(found) if value.startswith("~") else value  # a Path would lose `./` and `//`


def _place_text(value: str) -> str:
    return check_address(value) if is_address(value) else _local_text(value)


LocalPath = Annotated[Path, BeforeValidator(_local)]
"""A path of this machine; `~` is the home directory, `s3://...` is refused."""
LocalText = Annotated[str, AfterValidator(_local_text)]
"""The same where the text is more than a path: a glob, or a dataset's name."""
PlaceText = Annotated[str, AfterValidator(_place_text)]
"""As `LocalText`, or an address of a store."""
Place = Annotated[Path | str, GetPydanticSchema(_place_schema)]
"""A path of this machine, or (as text) an address of a store: `s3://bucket/name`."""
