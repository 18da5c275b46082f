"""YAML text as plain values, with what was written for each of them and where.

    parse("model: {norm: rms}", "a.yaml", ...)    a tree of nodes
    override("model.norm=rms")                    the same from a word of the command line
    plain(node)                                   {"model": {"norm": "rms"}}
    where_of(node, ("model", "norm"))             "a.yaml:1", for a message

What would surprise: only the core rules of YAML 1.2 hold. There are no dates, `on` and `1_000` are
text, `1e-3` is a number, and a key that is given twice is refused. `${NAME}` is replaced by the
environment variable before the text is understood, so it can be a number.

The nodes are made from the parser's events and not by yaml's own composer, which crashes at 100,000
nested brackets and writes out what aliases repeat. So depth and number of nodes have limits, those
behind aliases counted.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmnorm.config.mistakes import key_path, shown
from llmnorm.machine.reading import MAX_DEPTH, read_text
from llmnorm.part import InputError

COMMAND_LINE = "command line"  # the `where` of an override
MAX_BYTES = 1 << 22  # of a file; the longest that the package brings has 4,000
MAX_NODES = 100_000  # values of a file; a configuration has a hundred
MAX_DIGITS = 300  # of a number; a float ends at 1e308

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|"
        r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
    "str": re.compile(r".*", re.DOTALL),
}
_CALLED = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number"}


class Node(NamedTuple):
    """A value, and where it was written.

    Attributes:
        value: a mapping of nodes by key, a list of nodes, or a text, number, truth value or None.
        text: what was written for a scalar; "" for a mapping or list.
        where: file and line, or `COMMAND_LINE`.
    """

    value: Any
    text: str
    where: str


class NotYAML(InputError):
    """The text is not YAML at all."""


class _Built(NamedTuple):
    """A node with the number of nodes in it, and how deep they are nested."""

    node: Node
    size: int
    depth: int


class _Composer:
    """Makes nodes from the events of one document."""

    def __init__(self, where: str, line_numbers: bool, events: Iterator[yaml.Event]) -> None:
        self._file = where
        self._line_numbers = line_numbers
        self._events = events
        self._anchors: dict[str, _Built | None] = {}  # None: the node is not finished
        self._count = 0

    def document(self, keys: tuple[Any, ...]) -> Node | None:
        """The only document; None where there is none."""
        next(self._events)  # the stream begins
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        built = self._build(next(self._events), keys, 0)
        next(self._events)  # the document ends
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise NotYAML(f"{self._place(after)}: not valid YAML: a second document begins here")
        return built.node

    def _place(self, event: Any) -> str:
        return f"{self._file}:{event.start_mark.line + 1}" if self._line_numbers else self._file

    def _build(self, event: Any, keys: tuple[Any, ...], level: int) -> _Built:
        """The node that begins with `event`, at a key path."""
        where, anchor = self._place(event), event.anchor
        if isinstance(event, yaml.AliasEvent):
            built = self._repeated(where, anchor, keys)
        else:
            if anchor is not None:
                self._anchors[anchor] = None
            if level == MAX_DEPTH:
                raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels")
            if isinstance(event, yaml.ScalarEvent):
                built = _Built(self._scalar(event, where, keys), 1, 0)
            elif isinstance(event, yaml.SequenceStartEvent):
                built = self._list(event, where, keys, level)
            else:
                built = self._mapping(event, where, keys, level)
            if anchor is not None:
                self._anchors[anchor] = built
            self._count += 1
        if self._count > MAX_NODES:
            raise InputError(f"{where}: more than {MAX_NODES:,} values, those of aliases counted")
        if level + built.depth > MAX_DEPTH:
            raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        return built

    def _repeated(self, where: str, anchor: str, keys: tuple[Any, ...]) -> _Built:
        if anchor not in self._anchors:
            raise NotYAML(f"{where}: not valid YAML: there is no &{anchor} before *{anchor}")
        built = self._anchors[anchor]
        if built is None:
            raise InputError(f"{where}: {key_path(keys)}: *{anchor} stands inside of &{anchor}")
        self._count += built.size
        return built._replace(node=built.node._replace(where=where))

    def _list(self, event: Any, where: str, keys: tuple[Any, ...], level: int) -> _Built:
        _refuse_tag(event.tag, "seq", where, keys)
        items: list[_Built] = []
        while not isinstance(below := next(self._events), yaml.SequenceEndEvent):
            items.append(self._build(below, (*keys, len(items)), level + 1))
        return _around([item.node for item in items], items, where)

    def _mapping(self, event: Any, where: str, keys: tuple[Any, ...], level: int) -> _Built:
        _refuse_tag(event.tag, "map", where, keys)
        items: dict[str, _Built] = {}
        while not isinstance(below := next(self._events), yaml.MappingEndEvent):
            line = self._place(below)
            if not isinstance(below, yaml.ScalarEvent) or below.anchor is not None:
                inside = f" of {key_path(keys)}" if keys else ""
                raise InputError(f"{line}: a key{inside} is not plain text")
            key = below.value
            if key in items:
                raise InputError(f"{line}: {key_path((*keys, key))} is given twice")
            item = self._build(next(self._events), (*keys, key), level + 1)
            if isinstance(item.node.value, dict | list):
                item = item._replace(node=item.node._replace(where=line))
            items[key] = item
        values = {name: item.node for name, item in items.items()}
        return _around(values, list(items.values()), where)

    def _scalar(self, event: Any, where: str, keys: tuple[Any, ...]) -> Node:
        text, tag = event.value, event.tag
        if "${" in text:
            text = _expand(text, where)
        if tag is None and not event.style:
            kind = next(k for k, pattern in _CORE.items() if pattern.fullmatch(text))
        else:
            kind = "str" if tag in (None, "!") else tag.removeprefix(_TAG)
            if kind not in _CORE:
                _refuse_tag(tag, "", where, keys)
            integer = kind == "float" and _CORE["int"].fullmatch(text)
            if not (_CORE[kind].fullmatch(text) or integer):
                raise InputError(f"{where}: {key_path(keys)}: {shown(text)} is not {_CALLED[kind]}")
        try:
            return Node(_value(kind, text), text, where)
        except ValueError as error:
            raise InputError(f"{where}: {key_path(keys)}: {error}") from None


def _around(value: Any, items: list[_Built], where: str) -> _Built:
    size = 1 + sum(item.size for item in items)
    return _Built(Node(value, "", where), size, 1 + max((i.depth for i in items), default=0))


def _refuse_tag(tag: str | None, kind: str, where: str, keys: tuple[Any, ...]) -> None:
    if tag not in (None, "!", _TAG + kind):
        where = f"{where}: {key_path(keys)}" if keys else where
        raise InputError(f"{where}: the YAML tag {tag} is not understood")


def _value(kind: str, text: str) -> Any:
    """The value of a scalar that has the pattern of its kind.

    Raises:
        ValueError: it is a number that no number can be.
    """
    if kind in ("int", "float") and len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits; at most {MAX_DIGITS} are read")
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        case "float":
            special = text.lower().endswith((".inf", ".nan"))
            value = float(text.lower().replace(".", "") if special else text)
            if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
                raise ValueError(f"{text} is so small that it would be 0; write 0 if that is meant")
            return value
    return text


def parse(text: str, where: str, *, line_numbers: bool, keys: tuple[Any, ...] = ()) -> Node | None:
    """The node of a YAML text; None for an empty one.

    Args:
        text: one document.
        where: the file, or `COMMAND_LINE`.
        line_numbers: whether nodes and messages add the line to `where`.
        keys: the key path at which the text stands, for messages.

    Raises:
        NotYAML: it is not valid YAML.
        InputError: a key is given twice or is no text, `${NAME}` is not set, a tag is not
            understood, a number cannot be one, or there are more or deeper nodes than is allowed.
    """
    try:
        return _Composer(where, line_numbers, yaml.parse(text, Loader=_LOADER)).document(keys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None and line_numbers else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise NotYAML(f"{where}{line}: not valid YAML: {problem}") from None
    except UnicodeEncodeError:  # a word of the command line with bytes that are not UTF-8
        raise InputError(f"{where}: {key_path(keys)}: is not UTF-8 text") from None


def _expand(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{where}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def override(text: str) -> Node:
    """`a.b=value` as a tree with one leaf.

    Raises:
        InputError: the text has no `=`, its key has an empty part or more parts than a
            configuration is deep, or the value is refused (`parse`).
    """
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise InputError(f"{COMMAND_LINE}: '{shown(text)}' is not an override; write key.sub=value")
    if len(keys) > MAX_DEPTH:
        raise InputError(f"{COMMAND_LINE}: {shown(key)}: no setting is nested so deep")
    try:
        leaf = parse(value, COMMAND_LINE, line_numbers=False, keys=keys)
    except NotYAML:  # a value that is no YAML (`*.txt`, `[x`) can only be meant as text
        leaf = Node("", "", COMMAND_LINE)
    if leaf is None:
        leaf = Node(None, "", COMMAND_LINE)
    elif not isinstance(leaf.value, dict | list):
        written = str(leaf.value) if value[:1] in ("'", '"') else _expand(value, COMMAND_LINE)
        # A command line has no comments: `a #b` is text.
        leaf = Node(written if isinstance(leaf.value, str) else leaf.value, written, COMMAND_LINE)
    for name in reversed(keys):
        leaf = Node({name: leaf}, "", COMMAND_LINE)
    return leaf


def plain(node: Node) -> Any:
    """The values alone."""
    if isinstance(node.value, dict):
        return {key: plain(below) for key, below in node.value.items()}
    if isinstance(node.value, list):
        return [plain(below) for below in node.value]
    return node.value


def find(node: Node, loc: tuple[Any, ...]) -> Node | None:
    """The node at a key path; None where nothing was written."""
    for key in loc:
        is_list = isinstance(node.value, list)
        there = range(len(node.value)) if is_list else node.value
        if not isinstance(there, dict | range) or key not in there:
            return None
        node = node.value[key]
    return node


def where_of(node: Node, loc: tuple[Any, ...]) -> str:
    """Where a key was written; else the nearest mapping or list around it."""
    found = (find(node, loc[:length]) for length in range(len(loc), -1, -1))
    return next(near.where for near in found if near is not None)


def read_yaml(path: Path) -> Any:
    """One file's plain values; its `base` is not read.

    Raises:
        InputError: as `read_text` and `parse`.
    """
    node = parse(read_text(path, limit=MAX_BYTES), str(path), line_numbers=True)
    return None if node is None else plain(node)
