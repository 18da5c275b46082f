"""Which directory of this machine a run works in whose `run_dir` is an address of a store.

The directory has a file `run.remote` that holds the address, so that `llmnorm train DIRECTORY` goes
on copying it up. This file is of this machine, and is itself not copied.

Nothing here imports torch or asks a store, so that a mistake is answered at once.
"""

from pathlib import Path
from typing import NamedTuple

from llmnorm.config.tree import RunConfig
from llmnorm.machine.files import write_whole
from llmnorm.machine.reading import check_address, is_address, read_text
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory


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
        InputError: the directory is copied up to another address, or its `run.remote` is damaged.
    """
    assert config.run_dir is not None
    if isinstance(config.run_dir, Path):
        return config, _address_of(RunDirectory(config.run_dir))
    address = config.run_dir
    path = config.checkpoint.local or Path("runs") / address.rpartition("/")[2]
    other = _address_of(RunDirectory(path))
    if other not in (None, address):
        raise InputError(
            f"checkpoint.local: {path} is copied up to {other}, not to {address}; set another "
            "directory"
        )
    return config.model_copy(update={"run_dir": path}), address


def bind(run: RunDirectory, address: str) -> None:
    """Write down that a directory is copied up to an address.

    Raises:
        InputError: the directory cannot be written.
    """
    if _address_of(run) == address:
        return
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.remote, f"{address}\n")
    except OSError as error:
        raise InputError(f"{run.remote}: cannot be written: {error.strerror}") from None


def _address_of(run: RunDirectory) -> str | None:
    if not run.remote.exists():
        return None
    text = read_text(run.remote, limit=10_000).strip()
    try:
        if is_address(text):
            return check_address(text)
    except ValueError:
        pass
    raise InputError(
        f"{run.remote}: holds no address; remove it to go on without copying the run up"
    )
