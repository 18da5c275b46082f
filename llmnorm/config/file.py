"""From a YAML file and overrides to a validated configuration, or to one line per mistake.

A run's tree is built in three steps. Plain mappings are merged: the files named under `base`, then
the file itself, then the overrides `key.sub=value`, left to right; wherever a part's name changes,
the old part's keys drop out at that moment. Pydantic validates the result. Then parts that are
given as import paths are imported and the tree is validated again.

What would surprise: YAML is read with the 1.2 core rules only (no dates, no `on`, no `1_000`;
`1e-3` is a number; a key given twice is refused), every scalar's written text is kept, and where a
field wants text it gets what was typed (`run_dir=2024_01`, `007`).
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from llmnorm.config.pretrained import FREE, describe
from llmnorm.config.tree import RunConfig
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import (
    Imports,
    InputError,
    Part,
    Settings,
    explain,
    key_path,
    one_line,
    part_classes,
    part_of,
    settings_in,
)


class Mark(NamedTuple):
    """What was written for a scalar, and where."""

    text: str
    where: str


Marks = dict[tuple[Any, ...], Mark]

_CORE = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader with the resolvers of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _scalar(node: yaml.ScalarNode, tag: str) -> Any:
    text = node.value
    match tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        case "float":
            special = text.lower().endswith((".inf", ".nan"))
            return float(text.lower().replace(".", "") if special else text)
        case "str":
            return text
    raise InputError(f"the YAML tag {tag} is not understood")


def _parse(text: str, where: str, *, line_numbers: bool) -> tuple[Any, Marks]:
    """YAML text as plain values, with the marks of its scalars."""
    marks: Marks = {}
    loader = _Loader(text)

    def place(node: yaml.Node) -> str:
        return f"{where}:{node.start_mark.line + 1}" if line_numbers else where

    def build(node: yaml.Node, path: tuple[Any, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            marks[path] = Mark("", place(node))
            for key_node, value_node in node.value:
                key = str(key_node.value)
                if key in values:
                    raise InputError(f"{place(key_node)}: {key_path((*path, key))} is given twice")
                values[key] = build(value_node, (*path, key))
                if not isinstance(value_node, yaml.ScalarNode):
                    marks[(*path, key)] = Mark("", place(key_node))
            return values
        if isinstance(node, yaml.SequenceNode):
            marks[path] = Mark("", place(node))
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        tag, plain = node.tag, not node.style
        if "${" in node.value:
            node.value = _expand(node.value, place(node))
            if plain:
                tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        value = _scalar(node, tag)
        marks[path] = Mark(node.value, place(node))
        return value

    try:
        node = loader.get_single_node()
        return (None if node is None else build(node, ())), marks
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None and line_numbers else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _expand(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{where}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _with_names(patch: Any, classes: list[type[Settings]], tree: Any = None) -> Any:
    """Every `part: x` becomes `part: {name: x}`, also in a part.

    `tree` is what the patch goes onto: it tells which part a mapping without a name is.
    """
    if not isinstance(patch, dict):
        return patch
    result = {}
    for key, value in patch.items():
        field = next((c.model_fields[key] for c in classes if key in c.model_fields), None)
        part = part_of(field)
        old = tree.get(key) if isinstance(tree, dict) else None
        if part is None or field is None:
            result[key] = _with_names(value, settings_in(field.annotation) if field else [], old)
        elif isinstance(value, list):
            result[key] = [_named(v, field, part, None) for v in value]
        elif isinstance(old, list) and isinstance(value, dict) and value and _indices(value):
            items = dict(enumerate(old))
            result[key] = {i: _named(v, field, part, items.get(int(i))) for i, v in value.items()}
        else:
            result[key] = _named(value, field, part, old)
    return result


def _named(value: Any, field: FieldInfo, part: Part, old: Any) -> Any:
    """One part with its name, and the parts in it with theirs."""
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        return value
    old_name = old.get("name", part.default) if isinstance(old, dict) else part.default
    name = value.get("name", old_name)
    kept = old if name == old_name else None
    return _with_names(value, _chosen(field, part, {"name": name}), kept)


def _chosen(field: FieldInfo, part: Part, value: Any) -> list[type[Settings]]:
    """The settings class that a part's mapping names (none for an import path)."""
    name = value.get("name", part.default) if isinstance(value, dict) else part.default
    cls = part_classes(field.annotation).get(name)
    return [cls] if cls else []


def _merge(
    tree: Any,
    patch: Any,
    classes: list[type[Settings]],
    marks: Marks,
    patch_marks: Marks,
    path: tuple[Any, ...] = (),
    dropped: list[tuple[Any, ...]] | None = None,
    field: FieldInfo | None = None,
) -> Any:
    """`patch` over `tree`, both with named parts; marks of what is replaced are replaced too.

    `field` is where both stand; `classes` are the settings that it may hold.
    """
    if isinstance(tree, list) and isinstance(patch, dict) and patch and _indices(patch):
        items = list(tree)
        for key, value in patch.items():
            if int(key) >= len(items):
                raise InputError(
                    f"{_where(patch_marks, (*path, key))}: {key_path((*path, key))}: the list has "
                    f"{len(items)} items, the last index is {len(items) - 1}"
                )
            moved = {
                (*path, int(key), *p[len(path) + 1 :]): m
                for p, m in patch_marks.items()
                if p[: len(path) + 1] == (*path, key)
            }
            below, old = (*path, int(key)), items[int(key)]
            items[int(key)] = _merge(old, value, classes, marks, moved, below, dropped, field)
        return items
    if (part := part_of(field)) is not None and field is not None and isinstance(patch, dict):
        old = {} if tree is None else tree
        old_name = old.get("name", part.default) if isinstance(old, dict) else None
        if patch.get("name", old_name) != old_name:
            if dropped is not None and isinstance(old, dict):
                dropped += [
                    (*path, k)
                    for k in old
                    if k != "name" and _where(marks, (*path, k)) == COMMAND_LINE
                ]
            for stale in [p for p in marks if p[: len(path)] == path]:
                del marks[stale]
            tree = {}
        classes = _chosen(field, part, {"name": patch.get("name", old_name)})
    if not (isinstance(tree, dict) and isinstance(patch, dict)):
        for old in [p for p in marks if p[: len(path)] == path]:
            del marks[old]
        marks |= {p: m for p, m in patch_marks.items() if p[: len(path)] == path}
        if path[-1:] == ("name",) and path not in marks and path[:-1] in patch_marks:
            marks[path] = marks[path[:-1]] = patch_marks[path[:-1]]  # was written `part: x`
        return patch
    result = dict(tree)
    for key, value in patch.items():
        field = next((c.model_fields[key] for c in classes if key in c.model_fields), None)
        inner = settings_in(field.annotation) if field else []
        below, old = (*path, key), result.get(key)
        result[key] = _merge(old, value, inner, marks, patch_marks, below, dropped, field)
    return result


def _indices(patch: Mapping[Any, Any]) -> bool:
    return all(str(key).isdigit() for key in patch)


COMMAND_LINE = "command line"


def _override(text: str) -> tuple[Any, Marks]:
    """`a.b=value` as a tree with one leaf."""
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"{COMMAND_LINE}: '{text}' is not an override; write key.sub=value")
    try:
        leaf, leaf_marks = _parse(value, COMMAND_LINE, line_numbers=False)
    except InputError as error:
        # A value that is no YAML (`a: b`, `[x`) can only be meant as text.
        if "not valid YAML" not in str(error):
            raise
        leaf, leaf_marks = value, {}
    marks = {(*keys, *path): mark for path, mark in leaf_marks.items()}
    if not isinstance(leaf, dict | list):
        written = leaf if value[:1] in ("'", '"') else _expand(value, COMMAND_LINE)
        marks[tuple(keys)] = Mark(str(written), COMMAND_LINE)
        leaf = written if isinstance(leaf, str) else leaf  # a command line has no comments: `a #b`
    tree: Any = leaf
    for name in reversed(keys):
        tree = {name: tree}
    return tree, marks


def _where(marks: Marks, loc: tuple[Any, ...]) -> str:
    """The place of a key, else of what is below it, else of the nearest mapping around it."""
    if loc not in marks:
        for path, mark in marks.items():
            if path[: len(loc)] == loc:
                return mark.where
    for length in range(len(loc), -1, -1):
        if loc[:length] in marks:
            return marks[loc[:length]].where
    return COMMAND_LINE


class Loaded(NamedTuple):
    """A validated configuration and what the user should be told about it."""

    config: RunConfig
    notes: list[str]


def load(path: Path, overrides: Iterable[str] = ()) -> Loaded:
    """Read, merge and validate the configuration at `path` (a YAML file or a run directory).

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
        patch, patch_marks = _override(text)
        patch = _with_names(patch, [RunConfig], tree)
        tree = _merge(tree, patch, [RunConfig], marks, patch_marks, dropped=dropped)
    notes = [f"{key_path(p)} was dropped: a later override chose another part" for p in dropped]
    if run is None:
        tree, brought = _with_pretrained(tree, marks)
    else:
        tree, brought = _with_own_tokenizer(tree, run)
    notes += brought
    config = _validate(tree, marks, path)
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": Path("runs") / path.stem})
    notes += config.model.notes()
    return Loaded(config, notes)


def _with_pretrained(tree: dict[str, Any], marks: Marks) -> tuple[dict[str, Any], list[str]]:
    """The tree with the settings and the tokenizer that `model.pretrained` brings, and notes.

    A run's own config.yaml needs none of it: what was brought stands there already.
    """
    model, loc = tree.get("model"), ("model", "pretrained")
    if not isinstance(model, dict) or model.get("pretrained") is None:
        return tree, []
    named = Path(str(marks[loc].text or model["pretrained"]))
    found = describe(named, f"{_where(marks, loc)}: model.pretrained")
    for key, value in model.items():
        if key in ModelSettings.model_fields and not found.admits(key, value):
            raise InputError(
                f"{_where(marks, ('model', key))}: model.{key}: {named} brings its own; leave it "
                f"out (beside model.pretrained may be given: {', '.join(FREE)})"
            )
    tree = tree | {"model": found.model | model}
    tokenizer = tree.get("tokenizer")
    if tokenizer:
        path = tokenizer.get("path") if isinstance(tokenizer, dict) else None
        if found.tokenizer is None or path == str(found.tokenizer):
            return tree, []
        return tree, [f"model.pretrained: the tokenizer section is given, so not {named}'s own"]
    if found.tokenizer is None:
        raise InputError(
            f"{_where(marks, loc)}: model.pretrained: {named} has no tokenizer.json; give the "
            "tokenizer that its weights belong to as tokenizer.path"
        )
    tree = tree | {"tokenizer": {"path": str(found.tokenizer)}}
    return tree, [f"tokenizer.path is {found.tokenizer}, which model.pretrained brings"]


def _with_own_tokenizer(tree: dict[str, Any], run: Path) -> tuple[dict[str, Any], list[str]]:
    """A run whose tokenizer directory is gone has its copy."""
    tokenizer, own = tree.get("tokenizer"), run / "tokenizer"
    if not isinstance(tokenizer, dict):
        return tree, []
    path = tokenizer.get("path")
    if path is None or Path(str(path)).is_dir() or not own.is_dir():
        return tree, []
    note = f"tokenizer.path: {path} is gone; the run's own copy is used"
    return tree | {"tokenizer": {**tokenizer, "path": str(own)}}, [note]


def _read(path: Path, marks: Marks, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's tree with the files under its `base` below it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), beside, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise InputError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if path.resolve() in seen:
        raise InputError(f"{path}: 'base' leads back to this file")
    own, own_marks = _parse(text, str(path), line_numbers=True)
    if own is None:
        raise InputError(f"{path}: the file is empty")
    if not isinstance(own, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {type(own).__name__}")
    bases = own.pop("base", [])
    if not isinstance(bases, str | list) or not all(isinstance(b, str) for b in bases):
        raise InputError(
            f"{_where(own_marks, ('base',))}: base: expected a file or a list of files"
        )
    tree: Any = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_marks: Marks = {}
        below = _read(path.parent / base, base_marks, (*seen, path.resolve()))
        tree = _merge(tree, below, [RunConfig], marks, base_marks)
    own = _with_names(own, [RunConfig], tree)
    return _merge(tree, own, [RunConfig], marks, own_marks)


def _validate(tree: Any, marks: Marks, path: Path) -> RunConfig:
    try:
        RunConfig.model_validate(tree, context={"imports": Imports.OPAQUE})
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
    return f"{_where(marks, loc)}: {key_path(loc)}: {message}" if loc else f"{path}: {message}"


def section(name: str, overrides: Iterable[str]) -> Any:
    """One section of settings from overrides alone, for a model that is no run's.

    Raises:
        InputError: an override is not valid, or belongs to another section.
    """
    cls = settings_in(RunConfig.model_fields[name].annotation)[0]
    tree: Any = {}
    marks: Marks = {}
    for text in overrides:
        patch, patch_marks = _override(text)
        patch = _with_names(patch, [RunConfig], tree)
        tree = _merge(tree, patch, [RunConfig], marks, patch_marks)
    if foreign := [key for key in tree if key != name]:
        raise InputError(f"{COMMAND_LINE}: {foreign[0]}: only {name}.* is read here")
    try:
        return cls.model_validate(tree.get(name, {}))
    except ValidationError as error:
        lines = [f"{COMMAND_LINE}: {name}.{one_line([e])}" for e in explain(error, cls)]
        raise InputError("\n".join(lines)) from None


def read_yaml(path: Path) -> Any:
    """One file's plain values, without its base."""
    return _parse(path.read_text(encoding="utf-8"), str(path), line_numbers=True)[0]
