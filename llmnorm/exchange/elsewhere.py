"""Exports to an address of a store: written on this machine, then copied up.

The object by which others take the export for a model (`config.json`, or the one file of a .gguf)
is sent last, so that half an export is none.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmnorm.part import InputError
from llmnorm.remote.objects import open_store

LAST = "config.json"


@contextmanager
def written_up(target: Path | str) -> Iterator[Path]:
    """Context manager: what to write to for a target; of an address, a place that is copied there.

    Args:
        target: a path, which is given as it is; or an address, below which nothing may be yet.

    Raises:
        InputError: there is something at the address already.
        StoreError: the store does not answer, or refuses; what it has got by then is no model.
    """
    if isinstance(target, Path):
        yield target
        return
    store = open_store(target, "export")
    above, _, name = target.rpartition("/")
    single = name.endswith(".gguf")
    if single:
        store = open_store(above, "export")
    there = name in store.names() if single else bool(store.names())
    if there:
        raise InputError(f"{target}: is not empty; name a new one")
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with contextlib.redirect_stdout(printed):
            yield path
        files = [path] if single else [found for found in path.rglob("*") if found.is_file()]
        root = path.parent if single else path
        names = {str(file.relative_to(root)): file for file in files}
        for file in sorted(names, key=lambda file: (file == LAST, file)):
            store.send(names[file], file)
        print(printed.getvalue().replace(str(path), target), end="")
