"""From a YAML file and overrides to a validated configuration, or to one line per mistake.

First plain mappings are merged (`merge.py`): the files named under `base`, then the file itself,
then the overrides `key.sub=value`, left to right. Then pydantic validates the result. Last, parts
that are given as import paths are imported and the tree is validated again.

What would surprise: where a field wants text it gets what was typed (`run_dir=2024_01`, `007`),
even if YAML takes it for a number.
"""

import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from llmnorm.config import shipped
from llmnorm.config.imports import import_modules
from llmnorm.config.merge import merge, with_names
from llmnorm.config.pretrained import FREE, describe
from llmnorm.config.tree import RunConfig
from llmnorm.config.yaml_text import COMMAND_LINE, Mark, Marks, override, parse, where_of
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import Imports, InputError, explain, key_path, one_line, settings_in


class Loaded(NamedTuple):
    """A validated configuration, and notes to the user about it."""

    config: RunConfig
    notes: list[str]


def load(path: Path, overrides: Iterable[str] = ()) -> Loaded:
    """Read, merge and validate a configuration.

    Args:
        path: a YAML file, a run directory, or `llmnorm:NAME` for a file that the package brings.
        overrides: `key.sub=value`, applied left to right.

    Raises:
        InputError: one line per mistake, each with its place, key, value and nearest valid choice.
    """
    run = path if path.is_dir() else None
    if run is not None:
        if not (run / "config.yaml").is_file():
            raise InputError(
                f"{run}: is a directory without config.yaml, so it is no run directory"
            )
        path = run / "config.yaml"
    marks: Marks = {(): Mark("", str(path))}
    tree = _read(path, marks, seen=())
    dropped: list[tuple[Any, ...]] = []
    for text in overrides:
        patch, patch_marks = override(text)
        patch = with_names(patch, [RunConfig], tree)
        tree = merge(tree, patch, [RunConfig], marks, patch_marks, dropped=dropped)
    notes = [f"{key_path(p)} was dropped: a later override chose another part" for p in dropped]
    if run is None:
        tree, brought = _with_pretrained(tree, marks)
    else:
        tree, brought = _with_own_tokenizer(tree, run)
    notes += brought
    config = _validate(tree, marks, path)
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": Path("runs") / shipped.stem(path)})
    notes += config.model.notes()
    return Loaded(config, notes)


def _with_pretrained(tree: dict[str, Any], marks: Marks) -> tuple[dict[str, Any], list[str]]:
    """Add the settings and the tokenizer that `model.pretrained` brings.

    A run's own config.yaml does not need this: it has them already.

    Returns:
        The tree, and notes to the user.
    """
    model, loc = tree.get("model"), ("model", "pretrained")
    if not isinstance(model, dict) or model.get("pretrained") is None:
        return tree, []
    named = Path(str(marks[loc].text or model["pretrained"]))
    modules = tree.get("imports")
    modules = [m for m in modules if isinstance(m, str)] if isinstance(modules, list) else []
    found = describe(named, f"{where_of(marks, loc)}: model.pretrained", modules)
    for key, value in model.items():
        if key in ModelSettings.model_fields and not found.admits(key, value):
            raise InputError(
                f"{where_of(marks, ('model', key))}: model.{key}: {named} brings its own; leave it "
                f"out (these may be set beside model.pretrained: {', '.join(FREE)})"
            )
    tree = tree | {"model": found.model | model}
    tokenizer = tree.get("tokenizer")
    if tokenizer:
        path = tokenizer.get("path") if isinstance(tokenizer, dict) else None
        if found.tokenizer is None or path == str(found.tokenizer):
            return tree, []
        why = "since the configuration has a tokenizer section"
        return tree, [f"model.pretrained: {named}'s own tokenizer is not used, {why}"]
    if found.tokenizer is None:
        raise InputError(
            f"{where_of(marks, loc)}: model.pretrained: {named} has no tokenizer.json; give the "
            "tokenizer that its weights belong to as tokenizer.path"
        )
    tree = tree | {"tokenizer": {"path": str(found.tokenizer)}}
    return tree, [f"tokenizer.path is {found.tokenizer}, which model.pretrained brings"]


def _with_own_tokenizer(tree: dict[str, Any], run: Path) -> tuple[dict[str, Any], list[str]]:
    """Use the run's copy of the tokenizer where the directory that it came from is gone.

    Returns:
        The tree, and notes to the user.
    """
    tokenizer, own = tree.get("tokenizer"), run / "tokenizer"
    if not isinstance(tokenizer, dict):
        return tree, []
    path = tokenizer.get("path")
    if path is None or not own.is_dir() or _is_directory(str(path)):
        return tree, []
    note = f"tokenizer.path: {path} is gone; the run's own copy is used"
    return tree | {"tokenizer": {**tokenizer, "path": str(own)}}, [note]


def _is_directory(path: str) -> bool:
    try:
        return shipped.locate(path).is_dir()
    except InputError:
        return False


def _read(path: Path, marks: Marks, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's tree, over those of its `base`; `seen` are the files whose `base` led here."""
    file = shipped.locate(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), beside, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise InputError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory, not a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if file.resolve() in seen:
        raise InputError(f"{path}: 'base' leads back to this file")
    own, own_marks = parse(text, str(path), line_numbers=True)
    if own is None:
        raise InputError(f"{path}: the file is empty")
    if not isinstance(own, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {type(own).__name__}")
    bases = own.pop("base", [])
    if not isinstance(bases, str | list) or not all(isinstance(b, str) for b in bases):
        raise InputError(
            f"{where_of(own_marks, ('base',))}: base: expected a file or a list of files"
        )
    tree: Any = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_marks: Marks = {}
        below = _read(shipped.beside(path, base), base_marks, (*seen, file.resolve()))
        tree = merge(tree, below, [RunConfig], marks, base_marks)
    own = with_names(own, [RunConfig], tree)
    return merge(tree, own, [RunConfig], marks, own_marks)


def _validate(tree: Any, marks: Marks, path: Path) -> RunConfig:
    try:
        valid = RunConfig.model_validate(tree, context={"imports": Imports.OPAQUE})
    except ValidationError as error:
        errors = explain(error, RunConfig)
        typed = [e for e in errors if e["type"] in ("string_type", "path_type")]
        typed = [e for e in typed if marks.get(e["loc"], Mark("", "")).text]
        if typed:
            for e in typed:
                tree = _replaced(tree, e["loc"], marks[e["loc"]].text)
                marks[e["loc"]] = marks[e["loc"]]._replace(text="")
            return _validate(tree, marks, path)
        raise InputError("\n".join(_line(e, marks, path) for e in errors)) from None
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script has not got it
    import_modules(valid.imports, f"{where_of(marks, ('imports',))}: imports")
    try:
        return RunConfig.model_validate(tree, context={"imports": Imports.ALLOWED})
    except ValidationError as error:
        raise InputError(
            "\n".join(_line(e, marks, path) for e in explain(error, RunConfig))
        ) from None


def _replaced(tree: Any, loc: tuple[Any, ...], value: Any) -> Any:
    if not loc:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[loc[0]] = _replaced(copy[loc[0]], loc[1:], value)
    return copy


def _line(error: dict[str, Any], marks: Marks, path: Path) -> str:
    loc, message = error["loc"], error["msg"]
    # An impossible pair names its keys in the message: point at the one that was typed last.
    words = [tuple(word.split(".")) for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", message)]
    typed = [key for word in words for key in (word, (*loc, *word)) if key in marks]
    if typed and error["type"] == "value_error":
        typed.sort(key=lambda k: marks[k].where != COMMAND_LINE)
        return f"{marks[typed[0]].where}: {message}"
    return f"{where_of(marks, loc)}: {key_path(loc)}: {message}" if loc else f"{path}: {message}"


def section(name: str, overrides: Iterable[str]) -> Any:
    """One section of settings from overrides alone, for a model that belongs to no run.

    Raises:
        InputError: an override is not valid, or belongs to another section.
    """
    cls = settings_in(RunConfig.model_fields[name].annotation)[0]
    tree: Any = {}
    marks: Marks = {}
    for text in overrides:
        patch, patch_marks = override(text)
        patch = with_names(patch, [RunConfig], tree)
        tree = merge(tree, patch, [RunConfig], marks, patch_marks)
    if foreign := [key for key in tree if key != name]:
        raise InputError(f"{COMMAND_LINE}: {foreign[0]}: only {name}.* is read here")
    try:
        return cls.model_validate(tree.get(name, {}))
    except ValidationError as error:
        lines = [f"{COMMAND_LINE}: {name}.{one_line([e])}" for e in explain(error, cls)]
        raise InputError("\n".join(lines)) from None
