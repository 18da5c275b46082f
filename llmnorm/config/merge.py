"""One tree of settings over another, where parts are swapped by name.

A part is written `norm: rms` or `norm: {name: rms, eps: 1e-5}`. `with_names` gives every part of a
tree its name; `merge` then puts one tree over another. Where a part's name changes, the old part's
keys are dropped: `optimizer=conda` over `optimizer: {name: adamw, eps: 1e-6}` has no eps.

What would surprise: a mapping whose keys are whole numbers reaches into a list
(`data.sources.0.weight=3`).
"""

import re
from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo

from llmnorm.config.yaml_text import COMMAND_LINE, Node
from llmnorm.part import InputError, Part, Settings, key_path, part_classes, part_of, settings_in

_INDEX = re.compile("[0-9]{1,9}")  # `²` is a digit for Python too


def with_names(patch: Node, classes: list[type[Settings]], tree: Node | None = None) -> Node:
    """The patch with `part: {name: x}` for every `part: x`, parts inside parts included.

    Args:
        patch: what will be merged.
        classes: the settings classes that it may be of.
        tree: what the patch will be merged onto; a part without a name has this tree's name.
    """
    if not isinstance(patch.value, dict):
        return patch
    result = {}
    for key, node in patch.value.items():
        field = _field(classes, key)
        part = part_of(field)
        old = tree.value.get(key) if tree is not None and isinstance(tree.value, dict) else None
        if part is None or field is None:
            result[key] = with_names(node, settings_in(field.annotation) if field else [], old)
        elif isinstance(node.value, list):
            items = [_named(item, field, part, None) for item in node.value]
            result[key] = node._replace(value=items)
        elif old is not None and isinstance(old.value, list) and _indices(node):
            there = dict(enumerate(old.value))
            below = {i: _named(n, field, part, there.get(int(i))) for i, n in node.value.items()}
            result[key] = node._replace(value=below)
        else:
            result[key] = _named(node, field, part, old)
    return patch._replace(value=result)


def _named(node: Node, field: FieldInfo, part: Part, old: Node | None) -> Node:
    """One part with its name, and the parts in it with theirs."""
    if isinstance(node.value, str):
        node = Node({"name": node}, "", node.where)
    if not isinstance(node.value, dict):
        return node
    old_name = _name_of(old, part.default)
    name = _name_of(node, old_name)
    kept = old if name == old_name else None
    return with_names(node, _chosen(field, name), kept)


def _name_of(node: Node | None, default: Any) -> Any:
    """The name that a part's mapping gives, whatever it is; `default` where it gives none."""
    if node is None or not isinstance(node.value, dict) or "name" not in node.value:
        return default
    return node.value["name"].value


def _chosen(field: FieldInfo, name: Any) -> list[type[Settings]]:
    """The settings class of a part's name (none for an import path, or what is no name)."""
    cls = part_classes(field.annotation).get(name) if isinstance(name, str) else None
    return [cls] if cls else []


def _field(classes: Iterable[type[Settings]], key: str) -> FieldInfo | None:
    return next((c.model_fields[key] for c in classes if key in c.model_fields), None)


def merge(
    tree: Node | None,
    patch: Node,
    classes: list[type[Settings]],
    path: tuple[Any, ...] = (),
    dropped: list[tuple[Any, ...]] | None = None,
    field: FieldInfo | None = None,
) -> Node:
    """`patch` over `tree`; both come from `with_names`.

    Args:
        tree, patch: what was written; None for nothing.
        classes: the settings classes that both may be of.
        path: the key path at which both stand.
        dropped: gets the key paths of overrides that a later change of a part's name drops.
        field: the settings field at `path`.

    Raises:
        InputError: what reaches into a list has no number of it.
    """
    if tree is not None and isinstance(tree.value, list) and _indices(patch):
        items = list(tree.value)
        for key, node in patch.value.items():
            if int(key) >= len(items):
                raise InputError(
                    f"{node.where}: {key_path((*path, key))}: the list has {len(items)} items, "
                    f"the last index is {len(items) - 1}"
                )
            below = (*path, int(key))
            items[int(key)] = merge(items[int(key)], node, classes, below, dropped, field)
        return tree._replace(value=items)
    part = part_of(field)
    of_list = tree is not None and isinstance(tree.value, list) and isinstance(patch.value, dict)
    if tree is not None and of_list and part is None and patch.value:
        raise InputError(
            f"{patch.where}: {key_path((*path, next(iter(patch.value))))}: {key_path(path)} is a "
            f"list, whose items have the numbers 0 to {len(tree.value) - 1}"
        )
    if part is not None and field is not None and isinstance(patch.value, dict):
        known = tree is None or tree.value is None or isinstance(tree.value, dict)
        old_name = _name_of(tree, part.default) if known else None
        name = _name_of(patch, old_name)
        if name != old_name:
            if dropped is not None and tree is not None and isinstance(tree.value, dict):
                written = [k for k, n in tree.value.items() if n.where == COMMAND_LINE]
                dropped += [(*path, k) for k in written if k != "name"]
            return patch
        classes = _chosen(field, name)
    if tree is None or not (isinstance(tree.value, dict) and isinstance(patch.value, dict)):
        return patch
    result = dict(tree.value)
    for key, node in patch.value.items():
        inner = _field(classes, key)
        of_key = settings_in(inner.annotation) if inner else []
        result[key] = merge(result.get(key), node, of_key, (*path, key), dropped, inner)
    return tree._replace(value=result)


def _indices(patch: Node) -> bool:
    keys = patch.value if isinstance(patch.value, dict) else ()
    return bool(keys) and all(_INDEX.fullmatch(key) for key in keys)
