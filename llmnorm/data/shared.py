"""Prepared data in a store, through which machines share it: `data.dir: s3://bucket/data`.

The objects have the names that the files have below `data.dir` (prepared.py), and MANIFEST.json is
sent last. What one machine has prepared another fetches: of every file that the manifest lists, the
checksum is compared, and a file that is here already with its checksum is not fetched again.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from llmnorm.data import files
from llmnorm.data.manifest import NAME
from llmnorm.data.packed import file_record
from llmnorm.part import InputError
from llmnorm.remote.objects import Absent, ObjectStore, open_store


class SharedData:
    """What a store has of prepared data.

    Args:
        address: `data.dir`.
    """

    def __init__(self, address: str) -> None:
        self._store: ObjectStore = open_store(f"{address}/packed", "data.dir")

    def known(self, quick: str) -> bytes | None:
        """The identity that was written down for a quick key; None where none is.

        Raises:
            StoreError: the store does not answer, or refuses.
        """
        try:
            return self._store.read(f"found/{quick}")
        except Absent:
            return None

    def fetch(self, directory: Path) -> bool:
        """Fetch prepared data into their directory, which is named by their identity.

        Returns:
            Whether the store has them.

        Raises:
            StoreError: the store does not answer, or refuses.
            InputError: a file there is damaged.
            OSError: the disk refuses.
        """
        identity = directory.name
        names = self._store.names(identity)
        if f"{identity}/{NAME}" not in names:
            return False
        recorded = _records(
            self._store.read(f"{identity}/{NAME}"), f"{self._store.address}/{identity}"
        )
        for name in sorted(names):
            below = name.removeprefix(f"{identity}/")
            path, record = directory / below, recorded.get(below)
            if below == NAME or ".." in path.parts or (record and file_record(path) == record):
                continue
            self._store.fetch(name, path)
            if record and file_record(path) != record:
                path.unlink()
                raise InputError(
                    f"data.dir: {self._store.address}/{name} is damaged (its checksum differs); "
                    "delete what is there below its identity, and prepare the data again"
                )
        self._store.fetch(f"{identity}/{NAME}", directory / NAME)
        return True

    def send(self, directory: Path, quick: str) -> None:
        """Copy prepared data up, unless they are there, and write their identity down.

        Raises:
            StoreError: the store does not answer, or refuses; the data are whole on this machine.
        """
        identity = directory.name
        there = self._store.names(identity)
        if f"{identity}/{NAME}" not in there:
            found = [path for path in directory.rglob("*") if path.is_file()]
            for path in sorted(found, key=lambda path: (path.name == NAME, path)):
                self._store.send(path, f"{identity}/{path.relative_to(directory)}")
        if self.known(quick) != identity.encode():
            self._store.write(f"found/{quick}", identity.encode())


def write_known(path: Path, identity: bytes) -> None:
    """Write an identity that the store knows down on this machine, if the disk lets us."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_file(path, identity)


def _records(manifest: bytes, where: str) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file that a manifest lists, by its name below the directory.

    Raises:
        InputError: it is none.
    """
    try:
        tree: dict[str, Any] = json.loads(manifest)
        found = {f"tokenizer/{name}": record for name, record in tree.get("tokenizer", {}).items()}
        for source in tree["sources"]:
            for stream in ("train", "validation"):
                for shard in source[stream]["shards"]:
                    found |= {f"{source['name']}/{n}": r for n, r in shard["files"].items()}
        return {name: (int(size), str(checksum)) for name, (size, checksum) in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"data.dir: {where}/{NAME} is damaged; delete it there") from None
