"""What made the tokens, as a hash: the identity of prepared data.

The identity is `hash_of(made_of(...))`: the settings that matter to the tokens, the content of
every input file, the commits of the hub's datasets. `quick_key` is a hash of the same settings with
every file's path, size and time instead: prepared data is found without reading the corpus.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmnorm.data import corpus
from llmnorm.data.settings import DataSettings, SourceSettings, TokenizerSettings, source_keys
from llmnorm.data.tokenizer import FILES
from llmnorm.part import InputError

FORMAT = 1  # raised when the same sources and settings would give other files


def quick_key(
    data: DataSettings, tokenizer: TokenizerSettings, sources: list[SourceSettings]
) -> str:
    """Hash of the settings and of every input file's path, size and time."""

    def stamp(path: Path) -> list[Any]:
        stat = path.stat()
        return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]

    return hash_of(_described(data, tokenizer, sources, stamp))


def made_of(
    data: DataSettings, tokenizer: TokenizerSettings, sources: list[SourceSettings]
) -> dict[str, Any]:
    """What decides the tokens: settings, contents of files, commits of the hub's datasets."""
    described = _described(
        data, tokenizer, sources, lambda path: [path.suffix, corpus.digest(path)]
    )
    for source, entry, key in zip(sources, described["sources"], source_keys(sources), strict=True):
        if not corpus.is_local(source):
            entry["commit"] = corpus.commit(source, key)
    return described


def hash_of(value: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _described(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    sources: list[SourceSettings],
    note: Callable[[Path], Any],
) -> dict[str, Any]:
    """The settings that matter to the tokens, files replaced by what `note` says of them."""
    entries = []
    for source, key in zip(sources, source_keys(sources), strict=True):
        files = _inputs(source, key)
        named = source.model_dump(exclude={"weight", *files})
        entries.append(
            named | {name: [note(path) for path in paths] for name, paths in files.items()}
        )
    # Without a mask as before there was one, so that what was prepared then is still found.
    trained: Any = tokenizer.model_dump(mode="json", exclude=set() if tokenizer.mask else {"mask"})
    if tokenizer.path is not None:
        trained = [[path.name, note(path)] for path in _tokenizer_inputs(tokenizer)]
    return {
        "format": FORMAT,
        "sources": entries,
        "tokenizer": trained,
        "validation_bytes": data.validation_bytes,
    }


def _inputs(source: SourceSettings, key: str) -> dict[str, list[Path]]:
    """The local files that a source is read from, by the setting that names them."""
    found = {}
    if source.path is not None:
        found["path"] = corpus.files(source.path, f"{key}.path")
    elif corpus.is_local(source):
        found["dataset"] = corpus.dataset_files(Path(str(source.dataset)), f"{key}.dataset")
    if source.validation is not None:
        found["validation"] = corpus.files(source.validation, f"{key}.validation")
    return found


def _tokenizer_inputs(settings: TokenizerSettings) -> list[Path]:
    directory = settings.directory
    assert directory is not None
    if not directory.is_dir():
        raise InputError(f"tokenizer.path: there is no directory {settings.path}")
    return [p for name in FILES if (p := directory / name).is_file()]
