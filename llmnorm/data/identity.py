"""The identity of prepared data: a hash of what decides its tokens.

The identity is `hash_of(made_of(...))`: the settings that change the tokens, the content of every
input file, and the commits of the hub's datasets. `quick_key` hashes every file's path, size and
time in the place of its content, so that prepared data is found without reading the corpus.
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
    """Hash of the settings, and of every input file's path, size and time."""

    def stamp(path: Path) -> list[Any]:
        stat = path.stat()
        return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]

    return hash_of(_described(data, tokenizer, sources, stamp))


def made_of(
    data: DataSettings, tokenizer: TokenizerSettings, sources: list[SourceSettings]
) -> dict[str, Any]:
    """What decides the tokens: settings, contents of files, commits of the hub's datasets.

    Raises:
        InputError: an input file or a dataset of the hub cannot be found.
    """
    described = _described(
        data, tokenizer, sources, lambda path: [path.suffix, corpus.digest(path)]
    )
    for source, entry, key in zip(sources, described["sources"], source_keys(sources), strict=True):
        if not corpus.is_local(source):
            entry["commit"] = corpus.commit(source, key)
    return described


def hash_of(value: Any) -> str:
    """A hash of a JSON value, 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _described(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    sources: list[SourceSettings],
    describe: Callable[[Path], Any],
) -> dict[str, Any]:
    """The settings that change the tokens, with `describe(file)` in the place of each file."""
    entries = []
    for source, key in zip(sources, source_keys(sources), strict=True):
        files = _inputs(source, key)
        others = source.model_dump(exclude={"weight", *files})
        entries.append(
            others | {name: [describe(path) for path in paths] for name, paths in files.items()}
        )
    # `mask: false` is left out: data that was prepared before the key existed is still found.
    of_tokenizer: Any = tokenizer.model_dump(
        mode="json", exclude=set() if tokenizer.mask else {"mask"}
    )
    if tokenizer.path is not None:
        of_tokenizer = [[path.name, describe(path)] for path in _tokenizer_inputs(tokenizer)]
    return {
        "format": FORMAT,
        "sources": entries,
        "tokenizer": of_tokenizer,
        "validation_bytes": data.validation_bytes,
    }


def _inputs(source: SourceSettings, key: str) -> dict[str, list[Path]]:
    """A source's local files, by the setting that names them."""
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
        raise InputError(
            f"tokenizer.path: there is no directory {settings.path}; name a directory that holds "
            "tokenizer.json, or leave the key out to train a tokenizer"
        )
    return [p for name in FILES if (p := directory / name).is_file()]
