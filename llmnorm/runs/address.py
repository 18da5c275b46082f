"""Which directory of this machine a run works in whose `run_dir` is an address of a store.

The directory has a file `run.remote` that holds the address, so that `llmnorm train DIRECTORY` goes
on copying it up. This file is of this machine, and is itself not copied.

Nothing here imports torch, so that a mistake is answered at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llmnorm.config.tree import RunConfig
from llmnorm.machine.files import write_whole
from llmnorm.machine.reading import check_address, is_address, local_path, read_text
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory

MARKER = "run.remote"


class Remote(NamedTuple):
    """A run directory that is an address.

    Attributes:
        address: `s3://bucket/run`.
        going_on: as in `directory.agree`, which can be asked only when the directory of this
            machine has what the store has.
    """

    address: str
    going_on: bool


def on_this_machine(config: RunConfig) -> tuple[RunConfig, str | None]:
    """The settings with a `run_dir` of this machine, and the address that it is copied up to.

    Raises:
        InputError: the directory is copied up to another address, or its `run.remote` is damaged;
            `checkpoint.local` is given, and `run_dir` is no address.
    """
    assert config.run_dir is not None
    if isinstance(config.run_dir, Path):
        found = _address_of(RunDirectory(config.run_dir))
        if config.checkpoint.local is not None and found is None:
            raise InputError(
                "checkpoint.local: is for a run_dir that is an address (s3://bucket/run), and "
                f"run_dir is {config.run_dir}; leave one of them out"
            )
        return config, found
    address = config.run_dir
    path = config.checkpoint.local or Path("runs") / address.rpartition("/")[2]
    other = _address_of(RunDirectory(path))
    if other not in (None, address):
        raise InputError(
            f"checkpoint.local: {path} is copied up to {other}, not to {address}; set another "
            "directory"
        )
    return config.model_copy(update={"run_dir": path}), address


def fetch_settings(address: str, overrides: Sequence[str]) -> Path:
    """The directory of this machine for the run at an address, with the run's settings.

    Where the directory is new, settings and tokenizer are fetched; all else comes down when the run
    begins (download.py).

    Args:
        address: of the run.
        overrides: what was typed; the directory is `checkpoint.local` there, if it is among them.

    Raises:
        StoreError: the store does not answer, or refuses.
        InputError: there is no run; the directory is of another, or cannot be written.
    """
    from llmnorm.remote.objects import open_store

    typed = [text.partition("=")[2] for text in overrides if text.startswith("checkpoint.local=")]
    try:
        path = local_path(typed[-1] if typed else f"runs/{address.rpartition('/')[2]}")
    except ValueError as error:
        raise InputError(f"checkpoint.local: {error}") from None
    run = RunDirectory(path)
    other = _address_of(run)
    if run.config.exists() and other != address:
        has = f"is copied up to {other}" if other else "is another run"
        raise InputError(f"{run.path} {has}; give checkpoint.local=DIR for {address}")
    if not run.config.exists():
        store = open_store(address, "CONFIG")
        names = store.names()
        if run.config.name not in names:
            raise InputError(f"{address}: is no run (it has no {run.config.name})")
        wanted = [name for name in names if name.startswith(f"{run.tokenizer.name}/")]
        for name in (*wanted, run.config.name):
            with _explained(run.path / name):
                store.fetch(name, run.path / name)
    bind(run, address)
    return run.path


def bind(run: RunDirectory, address: str) -> None:
    """Write down that a directory is copied up to an address.

    Raises:
        InputError: the directory cannot be written.
    """
    if _address_of(run) == address:
        return
    with _explained(run.path / MARKER):
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.path / MARKER, f"{address}\n")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _address_of(run: RunDirectory) -> str | None:
    marker = run.path / MARKER
    if not marker.exists():
        return None
    text = read_text(marker, limit=10_000).strip()
    try:
        if is_address(text):
            return check_address(text)
    except ValueError:
        pass
    raise InputError(f"{marker}: holds no address; remove it to go on without copying the run up")
