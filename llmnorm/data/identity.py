"""The identity of prepared data: a hash of what decides its tokens.

The identity is `hash_of(made_of(...))`: the settings that change the tokens, the content of every
input file, the commits of the hub's datasets, and the format, which is the version of the rules by
which all that becomes tokens. `quick_key` hashes every file's path, size and time in the place of
its content, so that prepared data is found without reading the corpus.

What would surprise: new data is prepared by the newest rules. A run keeps the identity that is in
its checkpoints, so a run of an older format is continued with data of that format, which is
prepared again by the older rules if it is gone.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmnorm.data import files, hub
from llmnorm.data.settings import (
    CHAT_TEMPLATE,
    FORMAT,
    TOKENIZER_FILES,
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    source_keys,
)
from llmnorm.data.templates import CONFIG, configured_template
from llmnorm.data.tokenizer import special_tokens

NO_RULES: Mapping[str, Any] = {}


def quick_key(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    sources: list[SourceSettings],
    format: int = FORMAT,
    rules: Mapping[str, Any] = NO_RULES,
) -> str:
    """Hash of the settings, of every input file's path, size and time, and of more rules.

    Raises:
        InputError: an input file cannot be found.
    """
    described = _described(data, tokenizer, sources, files.stamp)
    return hash_of({**described, **rules, "format": format})


def made_of(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    sources: list[SourceSettings],
    format: int = FORMAT,
    rules: Mapping[str, Any] = NO_RULES,
) -> dict[str, Any]:
    """What decides the tokens: settings, contents of files, commits of the hub's datasets, rules.

    Raises:
        InputError: an input file or a dataset of the hub cannot be found or read.
    """

    def content(path: Path, key: str) -> list[Any]:
        return [path.suffix, files.digest(path, key)]

    described = _described(data, tokenizer, sources, content)
    for source, entry, key in zip(sources, described["sources"], source_keys(sources), strict=True):
        if not hub.is_local(source):
            entry["commit"] = hub.commit(source, key)
    return {**described, **rules, "format": format}


def agrees(
    made: dict[str, Any],
    data: DataSettings,
    tokenizer: TokenizerSettings,
    sources: list[SourceSettings],
    rules: Mapping[str, Any] = NO_RULES,
) -> bool:
    """Whether settings are those of which data was made, the files apart, which may be gone."""

    def settings_of(entry: dict[str, Any]) -> dict[str, Any]:
        files = ("path", "dataset", "validation", "commit", "weight")
        found = {k: v for k, v in entry.items() if k not in files}
        return {"on_bad_record": "error", "fields": None} | found

    wanted = _settings_of_tokenizer(tokenizer)
    same_tokenizer = (
        made["tokenizer"] == wanted if tokenizer.path is None else type(made["tokenizer"]) is list
    )
    return (
        same_tokenizer
        and all(made.get(name) == rule for name, rule in rules.items())
        and made["validation_bytes"] == data.validation_bytes
        and [settings_of(entry) for entry in made["sources"]]
        == [settings_of(source.model_dump()) for source in sources]
    )


def hash_of(value: Any) -> str:
    """A hash of a JSON value, 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _described(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    sources: list[SourceSettings],
    describe: Callable[[Path, str], Any],
) -> dict[str, Any]:
    """The settings that change the tokens, with `describe(file, key)` in the place of each file."""
    entries = []
    for source, key in zip(sources, source_keys(sources), strict=True):
        inputs = _inputs(source, key)
        # Left out at its default: data that was prepared before the key existed is still found.
        default = {k for k in ("on_bad_record", "fields") if getattr(source, k) in ("error", None)}
        others = source.model_dump(exclude={"weight", *inputs, *default})
        described = {
            name: [describe(path, f"{key}.{name}") for path in paths]
            for name, paths in inputs.items()
        }
        entries.append(others | described)
    of_tokenizer: Any = _settings_of_tokenizer(tokenizer)
    paths = _tokenizer_inputs(tokenizer) if tokenizer.path is not None else []
    template = configured_template(tokenizer.directory, tokenizer)
    if template is not None:  # and not the files that it changes, in a copy of the tokenizer too
        paths = [path for path in paths if path.name not in (CONFIG, CHAT_TEMPLATE)]
    if tokenizer.path is not None:
        of_tokenizer = [[path.name, describe(path, "tokenizer.path")] for path in paths]
    return {
        "sources": entries,
        "tokenizer": of_tokenizer,
        "validation_bytes": data.validation_bytes,
        **({} if template is None else {"chat_template": _of_template(tokenizer, template)}),
    }


def _settings_of_tokenizer(tokenizer: TokenizerSettings) -> dict[str, Any]:
    """What a tokenizer is trained by; `mask: false` is left out for the same reason as above."""
    left_out = {"chat_template", "template_arguments"} | (set() if tokenizer.mask else {"mask"})
    return tokenizer.model_dump(mode="json", exclude=left_out)


def _of_template(tokenizer: TokenizerSettings, template: str) -> dict[str, Any]:
    """A configured template, and what it reads of the tokenizer's configuration."""
    directory = tokenizer.directory
    special = {} if directory is None else special_tokens(directory, "tokenizer.path")
    return {"text": template, "special": special}


def _inputs(source: SourceSettings, key: str) -> dict[str, list[Path]]:
    """A source's local files, by the setting that names them."""
    found = {}
    if source.path is not None:
        found["path"] = files.files(source.path, f"{key}.path")
    elif hub.is_local(source):
        found["dataset"] = files.dataset_files(Path(str(source.dataset)), f"{key}.dataset")
    if source.validation is not None:
        found["validation"] = files.files(source.validation, f"{key}.validation")
    return found


def _tokenizer_inputs(settings: TokenizerSettings) -> list[Path]:
    directory = settings.directory
    assert directory is not None
    if not directory.is_dir():
        raise files.MissingInput(
            f"tokenizer.path: there is no directory {settings.path}{files.looked_in(directory)}; "
            "name a directory that holds tokenizer.json, or leave the key out to train a tokenizer"
        )
    return [p for name in TOKENIZER_FILES if (p := directory / name).is_file()]
