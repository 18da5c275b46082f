"""Writing a file so that a reader never sees half of it."""

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, then rename it to `path`.

    A process that is killed in between leaves the old file. The bytes are not fsynced: a power cut
    may still lose them.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
