"""Documentation made from the settings: JSON schema for editors, list of parts, list of keys."""

from collections.abc import Iterator
from typing import Any

from llmnorm.config.schema import field_docs
from llmnorm.config.tree import RunConfig
from llmnorm.part import (
    InputError,
    Part,
    Settings,
    nearest,
    part_classes,
    part_of,
    settings_in,
)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    base = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"] = {
        "base": {**base, "description": "File or files, relative to this one, applied first."},
        **schema["properties"],
    }
    # A file with a `base` leaves out what the base gives.
    schema.pop("required", None)
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    for node in _nodes(schema):
        # `${NAME}` is text until it is expanded.
        if node.get("type") in ("integer", "number", "boolean") and "const" not in node:
            kind = {
                k: node.pop(k) for k in list(node) if k not in ("title", "description", "default")
            }
            node["anyOf"] = [kind, {"type": "string", "pattern": r"^\$\{\w+\}$"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    children = (
        list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    )
    for child in children:
        yield from _nodes(child)
    if isinstance(node, dict):
        yield node


def parts() -> dict[str, tuple[Part, dict[str, type[Settings]]]]:
    """Every part of the tree, also of a part: key path -> (its annotation, its classes by name)."""
    found: dict[str, tuple[Part, dict[str, type[Settings]]]] = {}

    def walk(cls: type[Settings], path: str) -> None:
        for name, field in cls.model_fields.items():
            key = f"{path}.{name}" if path else name
            part = part_of(field)
            if part is not None:
                found[key] = (part, part_classes(field.annotation))
            for inner in settings_in(field.annotation):
                walk(inner, key)

    walk(RunConfig, "")
    return found


def describe_parts(name: str | None = None) -> str:
    """The text of `llmnorm parts [NAME]`: every part with settings, defaults and source.

    Raises:
        InputError: no part and no key is called `name`.
    """
    lines: list[str] = []
    everything = parts()
    for key, (part, classes) in everything.items():
        chosen = {
            n: c for n, c in classes.items() if name in (None, n, key, key.rpartition(".")[2])
        }
        if not chosen:
            continue
        lines.append(
            f"{key}: (default: {part.default}"
            + (", a list repeats over the layers)" if part.many else ")")
        )
        for part_name, cls in chosen.items():
            doc = [line.strip() for line in (cls.__doc__ or "").strip().splitlines()]
            lines.append(f"  {part_name}: {' '.join(line for line in doc if line)}")
            docs = field_docs(cls)
            for field_name, field in cls.model_fields.items():
                if field_name != "name":
                    default = field.get_default(call_default_factory=False)
                    if isinstance(default, Settings):
                        default = default.model_dump(mode="json")
                    shown = repr(default)
                    if field.default_factory is not None:
                        shown = "(depends on other settings)"
                    elif field.is_required():
                        shown = "(required)"
                    key_name = field.alias or field_name
                    lines.append(f"    {key_name} = {shown}  {docs.get(field_name, '')}".rstrip())
        lines.append("")
    if not lines:
        names = [n for _, classes in everything.values() for n in classes]
        raise InputError(f"no part is called '{name}'; {nearest(str(name), [*names, *everything])}")
    lines.append("A part of your own: write module:SettingsClass for the name.")
    return "\n".join(lines)


def key_paths() -> list[str]:
    """Every key path of the tree, a part's keys over all its classes."""
    found: list[str] = []

    def walk(cls: type[Settings], path: str) -> None:
        for name, field in cls.model_fields.items():
            name = field.alias or name
            key = f"{path}.{name}" if path else name
            inner = settings_in(field.annotation)
            if part_of(field) or field.annotation not in inner:
                found.append(key)
            for below in inner:
                walk(below, key)

    walk(RunConfig, "")
    return list(dict.fromkeys(found))
