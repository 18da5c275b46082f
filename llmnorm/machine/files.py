"""Files that are whole or as they were."""

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside `path`, then rename: a kill in between leaves what was there.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
