"""Loads a part that is given as an import path, `my_pkg.my_norm:MyNormSettings`.

A module from outside may fail in any way while it is imported. Each becomes one line with the last
line of its traceback, since the mistake is in the user's file and not in ours.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from llmnorm.config.mistakes import nearest, shown

_Base = TypeVar("_Base", bound=BaseModel)


def import_class(
    path: str, base: type[_Base], known: Iterable[type[_Base]], *, allowed: bool
) -> type[_Base]:
    """The settings class at an import path.

    Args:
        path: `module:Class`.
        base: what it must be derived from.
        known: classes that are good without that.
        allowed: whether its module may be imported; else it must be imported already.

    Raises:
        PydanticCustomError: the path is none, its module is missing or fails, or the class is
            missing, of another kind, or has no `build`.
    """
    module_name, _, class_name = path.partition(":")
    if not all(word.isidentifier() for word in [*module_name.split("."), *class_name.split(".")]):
        raise error_of(f"'{shown(path)}' is no import path; write package.module:Class")
    found = _module(path, module_name, allowed)
    try:
        for word in class_name.split("."):
            found = getattr(found, word)
    except Exception as error:
        if not isinstance(error, AttributeError):
            raise error_of(f"cannot import '{path}': {last_line(error)}") from None
        found = None
    if not inspect.isclass(found) or not issubclass(found, BaseModel):
        names = getattr(sys.modules[module_name], "__dict__", {})
        there = [name for name, value in names.items() if _fits(value, base)]
        raise error_of(f"'{path}' is no settings class; {nearest(class_name, there)}")
    if any(found is cls for cls in known):
        return cast(type[_Base], found)
    if not issubclass(found, base):
        raise error_of(
            f"'{path}' is of another kind; what is wanted here is derived from {base.__name__} of "
            f"{base.__module__}"
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise error_of(f"'{path}' lacks the method {', '.join(missing)}")
    return cast(type[_Base], found)


def _module(path: str, name: str, allowed: bool) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    if not allowed:
        raise error_of(
            f"'{path}' is not imported; `import {name}` first (loading never imports code)"
        )
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may leave by SystemExit too
        raise error_of(f"cannot import '{path}': {last_line(error)}") from None


def _fits(value: Any, base: type[BaseModel]) -> bool:
    return inspect.isclass(value) and issubclass(value, base) and value is not base


def last_line(error: BaseException) -> str:
    """The exception, and the line of the file that raised it."""
    text = " ".join(str(error).split()) or "no reason is given"
    if isinstance(error, ImportError):
        return text
    place = ""
    if not isinstance(error, SyntaxError):  # which says it itself
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {shown(text)}{place}"


def error_of(message: str) -> PydanticCustomError:
    """What a validator raises, so that the message stands under the part's key."""
    return PydanticCustomError("part", "{message}", {"message": message})
