"""One tree of settings over another, where parts are swapped by name.

A part is written `norm: rms` or `norm: {name: rms, eps: 1e-5}`. `with_names` gives every part of a
tree its name; `merge` then puts one tree over another. Where a part's name changes, the old part's
keys are dropped: `optimizer=conda` over `optimizer: {name: adamw, eps: 1e-6}` has no eps.

What would surprise: a mapping whose keys are whole numbers reaches into a list
(`data.sources.0.weight=3`).
"""

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from llmnorm.config.yaml_text import COMMAND_LINE, Marks, where_of
from llmnorm.part import InputError, Part, Settings, key_path, part_classes, part_of, settings_in


def with_names(patch: Any, classes: list[type[Settings]], tree: Any = None) -> Any:
    """The patch with `part: {name: x}` for every `part: x`, parts inside parts included.

    Args:
        patch: a tree of plain values.
        classes: the settings classes that it may be of.
        tree: what the patch will be merged onto; a part without a name has this tree's name.
    """
    if not isinstance(patch, dict):
        return patch
    result = {}
    for key, value in patch.items():
        field = next((c.model_fields[key] for c in classes if key in c.model_fields), None)
        part = part_of(field)
        old = tree.get(key) if isinstance(tree, dict) else None
        if part is None or field is None:
            result[key] = with_names(value, settings_in(field.annotation) if field else [], old)
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
    return with_names(value, _chosen(field, part, {"name": name}), kept)


def _chosen(field: FieldInfo, part: Part, value: Any) -> list[type[Settings]]:
    """The settings class that a part's mapping names (none for an import path)."""
    name = value.get("name", part.default) if isinstance(value, dict) else part.default
    cls = part_classes(field.annotation).get(name)
    return [cls] if cls else []


def merge(
    tree: Any,
    patch: Any,
    classes: list[type[Settings]],
    marks: Marks,
    patch_marks: Marks,
    path: tuple[Any, ...] = (),
    dropped: list[tuple[Any, ...]] | None = None,
    field: FieldInfo | None = None,
) -> Any:
    """`patch` over `tree`; both come from `with_names`.

    Args:
        tree, patch: plain values.
        classes: the settings classes that both may be of.
        marks: of `tree`; changed in place to those of the result.
        patch_marks: of `patch`.
        path: the key path at which both stand.
        dropped: gets the key paths of overrides that a later change of a part's name drops.
        field: the settings field at `path`.

    Raises:
        InputError: an index is past the end of a list.
    """
    if isinstance(tree, list) and isinstance(patch, dict) and patch and _indices(patch):
        items = list(tree)
        for key, value in patch.items():
            if int(key) >= len(items):
                where = where_of(patch_marks, (*path, key))
                raise InputError(
                    f"{where}: {key_path((*path, key))}: the list has {len(items)} items, "
                    f"the last index is {len(items) - 1}"
                )
            moved = {
                (*path, int(key), *p[len(path) + 1 :]): m
                for p, m in patch_marks.items()
                if p[: len(path) + 1] == (*path, key)
            }
            below, old = (*path, int(key)), items[int(key)]
            items[int(key)] = merge(old, value, classes, marks, moved, below, dropped, field)
        return items
    if (part := part_of(field)) is not None and field is not None and isinstance(patch, dict):
        old = {} if tree is None else tree
        old_name = old.get("name", part.default) if isinstance(old, dict) else None
        if patch.get("name", old_name) != old_name:
            if dropped is not None and isinstance(old, dict):
                dropped += [
                    (*path, k)
                    for k in old
                    if k != "name" and where_of(marks, (*path, k)) == COMMAND_LINE
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
        result[key] = merge(old, value, inner, marks, patch_marks, below, dropped, field)
    return result


def _indices(patch: Mapping[Any, Any]) -> bool:
    return all(str(key).isdigit() for key in patch)
