"""Files of a store that a setting names (`s3://bucket/text/*.jsonl`), fetched to this machine once.

    <cache>/llmnorm/<mark>/<name>      <cache>: $XDG_CACHE_HOME, else ~/.cache

The mark is a hash of the address and of what the store says of the object: its size, its checksum
(ETag) or its time. An object that was changed has another mark, so what lies here is never stale,
and prepared data is found again without fetching anything.
"""

import os
from pathlib import Path

from llmnorm.machine.reading import check_file
from llmnorm.part import InputError
from llmnorm.remote.objects import find

_TIME = 10**18  # of every fetched file, ns: a file is known by its path, and the same elsewhere


def fetched(pattern: str, key: str) -> list[Path]:
    """The files that an address or a glob of addresses names, in the order of their addresses.

    Args:
        pattern: the address.
        key: the configuration key of it, for messages.

    Returns:
        An empty list where there are none.

    Raises:
        StoreError: the store does not answer, or refuses.
        InputError: fsspec knows no such store, its package is not installed, or the disk refuses.
    """
    try:
        store, found = find(pattern, key)
        paths = []
        for name, (size, mark) in sorted(found.items()):
            path = _cache() / mark / name.rpartition("/")[2]
            if not (path.exists() and check_file(path, key).st_size == size):
                store.fetch(name, path)
                os.utime(path, ns=(_TIME, _TIME))
            paths.append(path)
    except OSError as error:
        raise InputError(f"{key}: {_cache()}: cannot be written: {error.strerror}") from None
    return paths


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "llmnorm"
