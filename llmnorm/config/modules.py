"""Modules of the user's own, imported because he named them: `imports:` in YAML, `--import`.

What would surprise: no directory of weights is a reason to import anything. A config.json that
names a class `my_norm:MyNormSettings` is loaded only once `my_norm` has been imported, since the
file may come from anybody.
"""

import importlib
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from llmnorm.part import InputError

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def search_working_directory() -> None:
    """Let imports look into the working directory, which a console script has not got."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def import_modules(modules: Iterable[str], where: str) -> None:
    """Import modules that the user named; the working directory is searched too.

    Args:
        modules: dotted names, as in an `import` statement.
        where: what named them, for messages.

    Raises:
        InputError: a name is none, there is no such module, or its code fails.
    """
    for module in modules:
        if not _MODULE.fullmatch(module):
            raise InputError(
                f"{where}: '{module}' is no module; give what stands after `import`, as in "
                "my_package.my_norm"
            )
        search_working_directory()
        try:
            importlib.import_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of any kind, SystemExit too: it is the user's code
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{where}: cannot import '{module}': {type(error).__name__}: {reason}"
            ) from None


def outside_modules(settings: Any) -> list[str]:
    """The modules outside the package whose classes a model's settings name, sorted.

    Args:
        settings: plain values; a part from outside is the text `module:Class`, or a mapping with
            such a `name`. No other setting of a model has a colon.
    """
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list):
        return sorted({module for item in settings for module in outside_modules(item)})
    named = isinstance(settings, str) and ":" in settings
    return [settings.partition(":")[0]] if named else []


def refuse_unimported(settings: Any, where: str, cure: str, named: Collection[str] = ()) -> None:
    """Raise an InputError if a model's settings name a module that is not imported.

    Args:
        settings: as in `outside_modules`.
        where: the file that holds them, for the message.
        cure: what imports a module, with {module} in its place.
        named: modules that the user has named, and that are imported later.
    """
    for module in outside_modules(settings):
        if module not in sys.modules and module not in named:
            raise InputError(
                f"{where}: names a class of the module '{module}', which is not of llmnorm; "
                f"{cure.format(module=module)} (loading alone never imports code)"
            )
