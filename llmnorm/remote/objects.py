"""Objects below an address of a store (`s3://bucket/run`): the few things that are done with them.

    store = open_store("s3://bucket/run", "run_dir")
    store.names()                  what is there: {"config.yaml": 812, "checkpoints/latest": 14}
    store.send(path, "a/b")        a file goes up; store.fetch("a/b", path) brings it down
    store.write("a/b", content)    a few bytes; store.read("a/b")
    store.create("a/b", content)   the same, if nothing is there of that name
    store.remove(["a/b"])

fsspec knows the kinds of stores by their schemes; `s3` needs the extra `remote`. Credentials and
endpoint are the client library's own business (for S3 AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL, ...), so that no secret is ever part of a configuration.

What would surprise:
- A store has no rename and no directories. One object appears whole or not at all; several do not
  appear together. So the object that makes the others count (a manifest) is sent last.
- A call ends within a limit of time that grows with its bytes. A request of it to S3 that fails is
  made again twice, within seconds; who calls decides whether to try again after that.
"""

import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, FSTimeoutError
from fsspec.callbacks import Callback

from llmnorm.machine.doctor import missing_extra
from llmnorm.part import InputError, nearest

log = logging.getLogger(__name__)

PART = 16 << 20  # bytes of a large file that are sent at once; two parts are in memory
CONNECT, ANSWER = 10, 60  # seconds until a connection stands, and without a byte of an answer
SLOWEST = 250_000  # bytes a second below which a store counts as not answering
# The packages of schemes whose own name fsspec's message would not say plainly.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
# What stores say of an object by which another content is told from it: sizes, checksums, times.
_MARKS = ("size", "ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created")
_NO_ACCESS = ("Credential", "Token", "Profile", "Refresh", "Auth")


class StoreError(InputError):
    """A store has refused something, or has not answered; the text begins with the address."""


class Absent(StoreError):
    """There is no object of this name."""


class Moved(Callback):
    """Counts the bytes that a transfer has moved so far, for a progress line."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def relative_update(self, inc: int = 1) -> None:
        """Called by fsspec for each part of a file."""
        self.bytes += inc


class ObjectStore:
    """All objects below an address. Its methods may be called from any thread.

    Args:
        address: `scheme://bucket/path`.
        files: fsspec's file system of that scheme.
        parts: what its `put_file` is told of the parts of a large file.

    Attributes:
        moved: counts the bytes that `send` and `fetch` have moved.
    """

    def __init__(
        self, address: str, files: fsspec.AbstractFileSystem, parts: Mapping[str, int]
    ) -> None:
        self.address, self.moved = address, Moved()
        self._files, self._parts = files, parts
        self._root = str(files._strip_protocol(address)).rstrip("/")
        self._limited = isinstance(files, AsyncFileSystem)

    def names(self, prefix: str = "") -> dict[str, int]:
        """The objects whose names begin with `prefix`, with their sizes in bytes.

        Args:
            prefix: "" or the name of a directory.

        Raises:
            StoreError: the store does not answer, refuses, or there is no such bucket.
        """
        path = self._path(prefix) if prefix else self._root
        try:
            found = self._ask("find", path, detail=True, withdirs=False)
        except Absent as error:
            bucket = self._root.partition("/")[0]
            raise Absent(f"{self.address}: there is no bucket {bucket}") from error
        root = f"{self._root}/"
        return {
            name.removeprefix(root): int(entry["size"] or 0)
            for name, entry in found.items()
            if name.startswith(root)
        }

    def matching(self, pattern: str) -> dict[str, dict[str, Any]]:
        """The objects whose names match a glob, with what the store says of them.

        Raises:
            StoreError: as `names`.
        """
        found = self._ask("glob", self._path(pattern), detail=True)
        root = f"{self._root}/"
        return {
            name.removeprefix(root): entry
            for name, entry in found.items()
            if entry.get("type") == "file"
        }

    def read(self, name: str) -> bytes:
        """The content of a small object.

        Raises:
            Absent: there is none of this name.
            StoreError: the store does not answer, or refuses.
        """
        content: bytes = self._ask("cat_file", self._path(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, in the place of one that may be there; errors as `read`."""
        self._ask("pipe_file", self._path(name), content, size=len(content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object if nothing of its name is there; of several who try, one succeeds.

        Returns:
            Whether it was written.

        Raises:
            StoreError: as `read`; also where the store has no such conditional write.
        """
        try:
            self._ask("pipe_file", self._path(name), content, size=len(content), mode="create")
        except FileExistsError:
            return False
        return True

    def send(self, path: Path, name: str) -> None:
        """Copy a file up; errors as `read`.

        Raises:
            FileNotFoundError: there is no such file on this machine.
        """
        size = path.stat().st_size
        keywords = {"callback": self.moved, **self._parts}
        try:
            self._ask("put_file", str(path), self._path(name), size=size, **keywords)
        except Absent:
            path.stat()  # it was the file that went away, not the bucket
            raise

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object down to `path`, which appears whole or not at all; errors as `read`.

        Raises:
            OSError: the disk refuses.
        """
        temporary = path.with_name(f".fetching-{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()  # an error of the disk is told from one of the store
            source, size = self._path(name), 1 << 40  # bytes: nobody has asked how many there are
            self._ask("get_file", source, str(temporary), size=size, callback=self.moved)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one after the other in this order; those that are gone are no error."""
        for name in names:
            try:
                self._ask("rm_file", self._path(name))
            except Absent:
                continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _ask(self, method: str, *arguments: Any, size: int = 0, **keywords: Any) -> Any:
        """A method of the file system; what it raises becomes one line.

        Args:
            size: bytes that it moves at most, for the limit of time.
        """
        seconds = ANSWER + size / SLOWEST
        if self._limited:
            keywords["timeout"] = seconds
        try:
            return getattr(self._files, method)(*arguments, **keywords)
        except FileExistsError:
            raise
        except FSTimeoutError as error:
            text = f"{self.address}: does not answer (not done after {seconds:.0f} s)"
            raise StoreError(text) from error
        except FileNotFoundError as error:
            path = next(text for text in map(str, arguments) if text.startswith(self._root))
            what = path.removeprefix(self._root).lstrip("/") or "object"
            raise Absent(f"{self.address}: there is no {what} ({_reason(error)})") from error
        except Exception as error:
            raise StoreError(f"{self.address}: {_explained(error)}") from error


def find(pattern: str, key: str) -> tuple[ObjectStore, dict[str, tuple[int, str]]]:
    """The objects that an address or a glob of addresses (`**` allowed) names.

    Args:
        pattern: `scheme://bucket/text/*.jsonl`.
        key: what named it, for messages.

    Returns:
        The store of their bucket; and for each object its name there, its size in bytes, and a mark
        (24 hexadecimal digits) that another content would not have.

    Raises:
        StoreError, InputError: as `ObjectStore.names` and `open_store`.
    """
    scheme, _, path = pattern.partition("://")
    bucket, _, names = path.partition("/")
    store = open_store(f"{scheme}://{bucket}", key)
    found = {}
    for name, entry in store.matching(names).items():
        told = [f"{scheme}://{bucket}/{name}", *(str(entry.get(key)) for key in _MARKS)]
        found[name] = (
            int(entry["size"]),
            blake2b("\n".join(told).encode(), digest_size=12).hexdigest(),
        )
    return store, found


def open_store(address: str, key: str) -> ObjectStore:
    """The objects below an address. Nothing is asked of the store yet.

    Args:
        address: `scheme://bucket/path`.
        key: what named it, for messages.

    Raises:
        InputError: fsspec has no such scheme, or its package is not installed.
    """
    scheme = address.partition("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    parts: dict[str, int] = {}
    if _PACKAGES.get(scheme) == "s3fs":
        if importlib.util.find_spec("s3fs") is None:
            raise missing_extra("s3fs")
        parts, tries = {"chunksize": PART}, {"total_max_attempts": 3, "mode": "standard"}
        options |= {
            "max_concurrency": 2,
            "config_kwargs": {"connect_timeout": CONNECT, "read_timeout": ANSWER, "retries": tries},
        }
    try:
        files = fsspec.filesystem(scheme, **options)
    except ValueError:
        hint = nearest(scheme, [*_PACKAGES, "az", "abfs", "oss", "sftp", "webdav"])
        raise InputError(f"{key}: fsspec knows no '{scheme}://' ({address}); {hint}") from None
    except ImportError as error:
        package = _PACKAGES.get(scheme) or error.name
        raise InputError(
            f"{key}: {scheme}:// needs a package that is not installed; run: pip install {package} "
            f"(of the same version as fsspec, {fsspec.__version__}, where there is one)"
        ) from None
    except Exception as error:
        raise InputError(f"{key}: {address}: {_explained(error)}") from error
    if _PACKAGES.get(scheme) == "s3fs":
        files.retries = 1
        # What a broken connection leaves behind is in the error of the call; asyncio would print
        # its traceback beside it.
        files.loop.set_exception_handler(lambda _, context: log.debug("%s", context["message"]))
    return ObjectStore(address, files, parts)


def _explained(error: Exception) -> str:
    """What an error of a client library means, in a line."""
    kinds = {type(found).__name__ for found in (error, error.__cause__) if found is not None}
    if isinstance(error, PermissionError) or any(n in kind for kind in kinds for n in _NO_ACCESS):
        return (
            f"access was refused ({_reason(error)}): are the credentials right, and may they list, "
            "read, write and delete there?"
        )
    return f"does not answer ({_reason(error)})"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if text else type(error).__name__
