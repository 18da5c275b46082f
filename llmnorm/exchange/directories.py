"""New directories that are written whole: under a temporary name, which is renamed at the end."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmnorm.part import InputError


def check_empty(directory: Path) -> None:
    """Raise an InputError if there is something in the directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is not empty; name a new directory")


@contextmanager
def new_directory(directory: Path, card: str) -> Iterator[Path]:
    """Context manager: a temporary directory beside `directory`, which it becomes at the end.

    Args:
        directory: new or empty.
        card: its README.md.

    Raises:
        InputError: the disk is full or not writable; nothing has been written.
    """
    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for file in temporary.glob("*.safetensors"):  # safetensors lets nobody else read them
            file.chmod((temporary / "README.md").stat().st_mode)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
