"""What pydantic finds wrong in settings, as key paths and words for the user.

Pydantic's own path of an error also names the branch of a union that it tried (`lr.float`,
`sources.list[SourceSettings].0`). Such names are told from keys by walking the fields along the
path, since a user's key may be called `list` too.

What would surprise: an unknown key comes first, since it is often why another one is missing.
"""

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

MOST = 20  # mistakes that are worth a hint, and lines that are printed
_LONGEST = 60  # characters of a value or key in a message
_UNKNOWN = "extra_forbidden"


class Mistake(NamedTuple):
    """One thing that is wrong.

    Attributes:
        loc: the key path.
        message: what is wrong there.
        kind: pydantic's name for it.
    """

    loc: tuple[Any, ...]
    message: str
    kind: str


def nearest(word: str, choices: list[str]) -> str:
    """The end of a message: the valid choice nearest to `word`, or all choices if none is near."""
    close = difflib.get_close_matches(word[:200], choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(choices)}" if choices else "there is no valid choice"


def shown(value: Any) -> str:
    """A value of a configuration in a message: short, on one line, as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        value = int(value)  # 100000000 and not 100000000.0
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[: 2 * _LONGEST])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def key_path(loc: Iterable[Any]) -> str:
    """`("model", "norm", 0)` -> `model.norm.0`."""
    return ".".join(shown(key) if isinstance(key, str) else str(key) for key in loc)


def one_line(mistakes: Iterable[Mistake]) -> str:
    """Mistakes as one line of text."""
    return "; ".join(f"{key_path(m.loc)}: {m.message}" if m.loc else m.message for m in mistakes)


def below(prefix: tuple[Any, ...], mistakes: Iterable[Mistake]) -> list[Mistake]:
    """Mistakes of what stands at the key path `prefix`, with their whole key paths."""
    return [m._replace(loc=(*prefix, *m.loc)) for m in mistakes]


def explain(error: ValidationError, cls: type[BaseModel]) -> list[Mistake]:
    """What pydantic found wrong in settings of class `cls`: unknown keys, then the others.

    A mistake inside a part has the key path from `cls` down. The message of an unknown key names
    the nearest valid key (of the first `MOST`; the search takes long).
    """
    found: list[Mistake] = []
    items: dict[tuple[Any, ...], list[Any]] = {}
    hints = 0
    for item in error.errors(include_url=False):
        loc, parents = _keys(cls, item["loc"])
        if item["type"] == "default_factory_not_called":
            continue  # another field is wrong, which has an error of its own
        if inner := item.get("ctx", {}).get("mistakes"):
            found += below(loc, inner)
        elif item["type"] == _UNKNOWN:
            hints += 1
            hint = f"; {_nearest(str(loc[-1]), parents)}" if hints <= MOST else ""
            found.append(Mistake(loc, f"unknown key{hint}", _UNKNOWN))
        else:
            items.setdefault(loc, []).append(item)
    # Every branch of a union has an error; the deepest shows what was meant.
    around = {m.loc[:n] for m in found for n in range(len(m.loc))}
    around |= {loc[:n] for loc in items for n in range(len(loc))}
    found += [
        Mistake(loc, _message(at_loc), at_loc[0]["type"])
        for loc, at_loc in items.items()
        if loc not in around
    ]
    return sorted(found, key=lambda mistake: mistake.kind != _UNKNOWN)


def _nearest(key: str, parents: list[Any]) -> str:
    """What may have been meant by an unknown key: a valid one, or the key of another part."""
    fields = _fields(parents)
    if fields == ["name"] and len(parents) == 1:  # a part
        part = parents[0].model_fields["name"].default
        return f"valid: name alone, since '{part}' has no settings; choose another part by its name"
    return nearest(key, fields)


def _keys(cls: type[BaseModel], loc: Iterable[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """The keys of a path of pydantic's, and what may hold the last of them (annotations)."""
    keys: list[Any] = []
    places: list[Any] = [cls]
    parents: list[Any] = []
    for item in loc:
        branches = [branch for place in places for branch in _branches(place)]
        if len(branches) > len(places):
            places = branches  # pydantic names the branch here
            continue
        found = [inner for place in branches for inner in _inside(place, item)]
        if branches and not found and not any(map(_is_model, branches)):
            places = []  # the name of a validator, or `[key]` for a key that is wrong itself
            continue
        parents, places = branches, found
        keys.append(item)
    return tuple(keys), parents


def _branches(annotation: Any) -> list[Any]:
    """The members of a union but None; anything else alone."""
    annotation = _plain(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    members = [m for m in get_args(annotation) if m is not type(None)]
    return _branches(members[0]) if len(members) == 1 else [_plain(m) for m in members]


def _plain(annotation: Any) -> Any:
    """Without `Annotated`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _inside(annotation: Any, key: Any) -> list[Any]:
    """The annotation of what stands under `key`; empty where no such key is."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_model(annotation):
        fields = annotation.model_fields.items()
        return [f.annotation for name, f in fields if key in (name, f.alias)]
    if origin is dict and isinstance(key, str):
        return [arguments[1]]
    if origin in (list, tuple, set) and isinstance(key, int):
        return [arguments[min(key, len(arguments) - 1)]]
    return []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(parents: list[Any]) -> list[str]:
    models = [parent for parent in parents if _is_model(parent)]
    return list(dict.fromkeys(f.alias or n for m in models for n, f in m.model_fields.items()))


# What each kind of error expects; after "expected", before "got".
_EXPECTED = {
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _message(items: list[Any]) -> str:
    """What is wrong with a value, from the error of every branch that it could be."""
    given = shown(items[0]["input"])
    bounds = [_bound(i) for i in items if i["type"] in _BOUNDS]
    if bounds:  # it has the kind of a branch, and only its size is wrong
        return f"must be {' or '.join(dict.fromkeys(bounds))}, got {given}"
    if any(item["type"] == "finite_number" for item in items):
        return f"expected a finite number, got {given}"
    literals = [choice for i in items if i["type"] == "literal_error" for choice in _choices(i)]
    kinds = [_EXPECTED[i["type"]] for i in items if i["type"] in _EXPECTED]
    known = (*_EXPECTED, "literal_error")
    if other := [item for item in items if item["type"] not in known]:
        return _own_words(other[0])
    if not kinds:
        return f"'{given}' is not valid; {nearest(given, literals)}"
    expected = " or ".join(dict.fromkeys([*kinds, *(f"'{choice}'" for choice in literals)]))
    quote = "'" if isinstance(items[0]["input"], str) else ""
    near = difflib.get_close_matches(given, literals, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"expected {expected}, got {quote}{given}{quote}{hint}"


def _bound(item: Any) -> str:
    limits = {name: shown(limit) for name, limit in item["ctx"].items()}
    return _BOUNDS[item["type"]].format(**limits)


def _choices(item: Any) -> list[str]:
    return [c.strip(" '") for c in item["ctx"]["expected"].replace(" or ", ",").split(",")]


def _own_words(item: Any) -> str:
    match item["type"]:
        case "missing":
            return "is required"
        case "too_short":
            return (
                f"expected {item['ctx']['min_length']} values, got {item['ctx']['actual_length']}"
            )
        case "too_long":
            return (
                f"expected {item['ctx']['max_length']} values, got {item['ctx']['actual_length']}"
            )
        case "string_too_long":
            return f"has more than {item['ctx']['max_length']} letters: '{shown(item['input'])}'"
        case "string_pattern_mismatch":
            return f"'{shown(item['input'])}' has not the form {item['ctx']['pattern']}"
    return str(item["msg"]).removeprefix("Value error, ")
