"""YAML text as plain values, with what was written for each of them and where.

    parse("model: {norm: rms}", "a.yaml", ...)    ({"model": {"norm": "rms"}}, marks)
    override("model.norm=rms")                    the same from a word of the command line
    where_of(marks, ("model", "norm"))            "a.yaml:1", for a message

What would surprise: only the core rules of YAML 1.2 hold. There are no dates, `on` and `1_000` are
text, `1e-3` is a number, and a key that is given twice is refused. `${NAME}` is replaced by the
environment variable before the text is understood, so it can be a number.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmnorm.part import InputError, key_path

COMMAND_LINE = "command line"  # the `where` of an override


class Mark(NamedTuple):
    """The text that was written for a scalar ("" for a mapping or list), and its file and line."""

    text: str
    where: str


Marks = dict[tuple[Any, ...], Mark]  # key path -> its mark

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


def parse(text: str, where: str, *, line_numbers: bool) -> tuple[Any, Marks]:
    """YAML text as plain values, with their marks.

    Args:
        text: one document.
        where: the file, or `COMMAND_LINE`.
        line_numbers: whether marks and messages add the line to `where`.

    Raises:
        InputError: it is not valid YAML, a key is given twice, or `${NAME}` is not set.
    """
    marks: Marks = {}
    loader = _Loader(text)

    def position(node: yaml.Node) -> str:
        return f"{where}:{node.start_mark.line + 1}" if line_numbers else where

    def build(node: yaml.Node, path: tuple[Any, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            marks[path] = Mark("", position(node))
            for key_node, value_node in node.value:
                key = str(key_node.value)
                if key in values:
                    where_twice = position(key_node)
                    raise InputError(f"{where_twice}: {key_path((*path, key))} is given twice")
                values[key] = build(value_node, (*path, key))
                if not isinstance(value_node, yaml.ScalarNode):
                    marks[(*path, key)] = Mark("", position(key_node))
            return values
        if isinstance(node, yaml.SequenceNode):
            marks[path] = Mark("", position(node))
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        tag, plain = node.tag, not node.style
        if "${" in node.value:
            node.value = _expand(node.value, position(node))
            if plain:
                tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        value = _scalar(node, tag)
        marks[path] = Mark(node.value, position(node))
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


def override(text: str) -> tuple[Any, Marks]:
    """`a.b=value` as a tree with one leaf, and its marks.

    Raises:
        InputError: the text has no `=`, or its key has an empty part.
    """
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"{COMMAND_LINE}: '{text}' is not an override; write key.sub=value")
    try:
        leaf, leaf_marks = parse(value, COMMAND_LINE, line_numbers=False)
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


def where_of(marks: Marks, loc: tuple[Any, ...]) -> str:
    """Where a key was written; else a key below it; else the nearest mapping around it."""
    if loc not in marks:
        for path, mark in marks.items():
            if path[: len(loc)] == loc:
                return mark.where
    for length in range(len(loc), -1, -1):
        if loc[:length] in marks:
            return marks[loc[:length]].where
    return COMMAND_LINE


def read_yaml(path: Path) -> Any:
    """One file's plain values; its `base` is not read."""
    return parse(path.read_text(encoding="utf-8"), str(path), line_numbers=True)[0]
