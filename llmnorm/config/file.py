"""From a YAML file and overrides to a validated configuration, or to one line per mistake.

First plain mappings are merged (`merge.py`): the files named under `base`, then the file itself,
then the overrides `key.sub=value`, left to right. Then pydantic validates the result. Last, parts
that are given as import paths are imported and the tree is validated again.

What would surprise: where a field wants text it gets what was typed (`run_dir=2024_01`, `007`),
even if YAML takes it for a number.
"""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from llmnorm.config import shipped
from llmnorm.config.merge import merge, with_names
from llmnorm.config.mistakes import MOST
from llmnorm.config.modules import import_modules, search_working_directory
from llmnorm.config.pretrained import FREE, describe
from llmnorm.config.tree import RunConfig
from llmnorm.config.yaml_text import (
    COMMAND_LINE,
    MAX_BYTES,
    Node,
    find,
    override,
    parse,
    plain,
    where_of,
)
from llmnorm.data.settings import OF_TEMPLATE
from llmnorm.machine.reading import MAX_DEPTH, local_path, read_text
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import (
    Imports,
    InputError,
    Mistake,
    Settings,
    explain,
    key_path,
    settings_in,
)

CLASSES = ("auto", "own", "transformers")  # of `model.classes`; another is refused with all else
MAX_FILES = 1_000  # that the `base` of files leads to, each counted as often as it is named
_Cls = TypeVar("_Cls", bound=Settings)


class Loaded(NamedTuple):
    """A validated configuration, and notes to the user about it."""

    config: RunConfig
    notes: list[str]


def load(path: Path, overrides: Iterable[str] = (), *, below: Path | None = None) -> Loaded:
    """Read, merge and validate a configuration.

    Args:
        path: a YAML file, a run directory, or `llmnorm:NAME` for a file that the package brings. A
            run directory's `run_dir` is that directory, wherever it was written.
        overrides: `key.sub=value`, applied left to right.
        below: a file that `path` is put over, as if it named it first under `base`. A run has been
            put over it already, so its config.yaml is taken as it is.

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
    home = run or _run_around(path)
    files = _Files()
    written = files.read(path, (), below=None if home or below is None else files.read(below, ()))
    if home is not None:  # older runs have saved their path, which a copy or a move has changed
        keys = {key: node for key, node in written.value.items() if key != "run_dir"}
        written = written._replace(value=keys)
    dropped: list[tuple[Any, ...]] = []
    for text in overrides:
        patch = with_names(override(text), [RunConfig], written)
        written = merge(written, patch, [RunConfig], dropped=dropped)
    notes = [f"{key_path(p)} was dropped: a later override chose another part" for p in dropped]
    tree = plain(written)
    if run is None:
        tree, brought = _with_pretrained(tree, written)
    else:
        tree, brought = _with_own_tokenizer(tree, run)
    notes += brought
    valid = _validated(RunConfig, tree, written, Imports.OPAQUE)
    search_working_directory()
    import_modules(valid.imports, f"{where_of(written, ('imports',))}: imports")
    config = _validated(RunConfig, tree, written, Imports.ALLOWED)
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": home or Path("runs") / shipped.stem(path)})
    notes += config.model.notes()
    return Loaded(config, notes)


def _run_around(path: Path) -> Path | None:
    """The run directory that a file is the saved configuration of; None for any other file."""
    beside = ("run.lock", "metrics.jsonl", "checkpoints")
    if path.name == "config.yaml" and any((path.parent / name).exists() for name in beside):
        return path.parent
    return None


def _with_pretrained(tree: dict[str, Any], written: Node) -> tuple[dict[str, Any], list[str]]:
    """Add the settings and the tokenizer that `model.pretrained` brings.

    A run's own config.yaml does not need this: it has them already.

    Returns:
        The tree, and notes to the user.
    """
    model = tree.get("model")
    node = find(written, ("model", "pretrained"))
    if not isinstance(model, dict) or node is None or not node.text or node.value is None:
        return tree, []  # a mapping or list is refused with all else
    key = f"{node.where}: model.pretrained"
    try:
        named = local_path(node.text)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None
    modules = tree.get("imports")
    modules = [m for m in modules if isinstance(m, str)] if isinstance(modules, list) else []
    classes = model.get("classes", "auto")
    found = describe(named, key, modules, classes=classes if classes in CLASSES else "auto")
    for name, value in model.items():
        if name in ModelSettings.model_fields and not found.admits(name, value):
            why = (
                "is trained as transformers' own class, which has none of llmnorm's parts and "
                "brings all of its settings; leave it out"
                if found.foreign
                else "brings its own; leave it out (these may be set beside model.pretrained: "
                f"{', '.join(FREE)})"
            )
            raise InputError(f"{where_of(written, ('model', name))}: model.{name}: {named} {why}")
    tree = tree | {"model": found.model | model}
    if found.foreign:
        tree["model"]["classes"] = "transformers"
    tokenizer = tree.get("tokenizer")
    kept: dict[str, Any] = {}  # what a section may hold beside the tokenizer that is brought
    if isinstance(tokenizer, dict) and tokenizer.keys() <= {*OF_TEMPLATE}:
        kept, tokenizer = tokenizer, None
    if tokenizer:
        path = tokenizer.get("path") if isinstance(tokenizer, dict) else None
        if found.tokenizer is None or path == str(found.tokenizer):
            return tree, []
        why = "since the configuration has a tokenizer section"
        return tree, [f"model.pretrained: {named}'s own tokenizer is not used, {why}"]
    if found.tokenizer is None:
        raise InputError(
            f"{key}: {named} has no tokenizer.json; give the tokenizer that its weights belong to "
            "as tokenizer.path"
        )
    tree = tree | {"tokenizer": {"path": str(found.tokenizer), **kept}}
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


class _Files:
    """The files that a configuration is made of; each is read once, however often it is a base."""

    def __init__(self) -> None:
        self._read: dict[Path, Node] = {}
        self._count = 0

    def read(
        self, path: Path, seen: tuple[Path, ...], named: str = "", below: Node | None = None
    ) -> Node:
        """A file's tree, over those of its `base`.

        Args:
            path: the file.
            seen: the files whose `base` led here.
            named: how messages about a file that is not there begin: with the `base` that names it.
            below: a tree that comes before those of its `base`.
        """
        try:
            file = shipped.locate(path)
            text = _text(path, file)
        except InputError as error:
            raise InputError(f"{named}{error}") from None
        real = file.resolve()
        if real in seen:
            raise InputError(f"{path}: 'base' leads back to this file")
        self._count += 1
        if self._count > MAX_FILES or len(seen) > MAX_DEPTH:
            raise InputError(
                f"{path}: 'base' leads to more than {MAX_FILES:,} files, or through more than "
                f"{MAX_DEPTH} one after the other"
            )
        if real not in self._read:
            self._read[real] = self._merged(path, text, (*seen, real), below)
        return self._read[real]

    def _merged(self, path: Path, text: str, seen: tuple[Path, ...], below: Node | None) -> Node:
        own = parse(text, str(path), line_numbers=True)
        if own is None or own.value is None:
            raise InputError(f"{path}: the file is empty")
        if not isinstance(own.value, dict):
            kind = "list" if isinstance(own.value, list) else type(own.value).__name__
            raise InputError(f"{path}: expected a mapping of sections, got {kind}")
        keys = dict(own.value)
        tree = below or Node({}, "", str(path))
        if "base" in keys:
            named = f"{keys['base'].where}: base: "
            for base in _bases(keys.pop("base"), path):
                tree = merge(tree, self.read(base, seen, named), [RunConfig])
        patch = with_names(own._replace(value=keys), [RunConfig], tree)
        return merge(tree, patch, [RunConfig])._replace(where=str(path))


def _bases(node: Node, path: Path) -> list[Path]:
    """The files that are named under `base` of the file at `path`."""
    named = node.value if isinstance(node.value, list) else [node]
    if not all(isinstance(base.value, str) for base in named):
        raise InputError(f"{node.where}: base: expected a file or a list of files")
    try:
        return [shipped.beside(path, str(local_path(base.value))) for base in named]
    except ValueError as error:
        raise InputError(f"{node.where}: base: {error}") from None


def _text(path: Path, file: Path) -> str:
    """A file's text; a name that nearly is that of another file is hinted at."""
    if file.is_dir():
        raise InputError(f"{path}: is a directory, not a YAML file")
    try:
        return read_text(file, limit=MAX_BYTES)
    except InputError as error:
        if os.path.lexists(file):
            raise
        beside = [str(p) for p in path.parent.glob("*.yaml")]
        close = difflib.get_close_matches(str(path), beside, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise InputError(f"{error}{hint}") from None


def _validated(cls: type[_Cls], tree: Any, written: Node, imports: Imports) -> _Cls:
    """Settings of class `cls`, made from plain values.

    Where a setting wants text, it gets what was typed. `tree` is changed so.
    """
    try:
        return cls.model_validate(tree, context={"imports": imports})
    except ValidationError as error:
        mistakes = explain(error, cls)
    texts = [m for m in mistakes if m.kind in ("string_type", "path_type")]
    if any([_put_text(tree, written, mistake.loc) for mistake in texts]):
        return _validated(cls, tree, written, imports)
    lines = [_line(mistake, written) for mistake in mistakes[:MOST]]
    if len(mistakes) > MOST:
        lines.append(f"{written.where}: and {len(mistakes) - MOST:,} more")
    raise InputError("\n".join(lines))


def _put_text(tree: Any, written: Node, loc: tuple[Any, ...]) -> bool:
    """Put what was typed at a key path in the place of what YAML takes it for.

    Returns:
        Whether that is another value than before; null and what is no scalar stay.
    """
    node = find(written, loc)
    if node is None or node.value is None or isinstance(node.value, dict | list | str):
        return False
    for key in loc[:-1]:
        tree = tree[key]
    changed = bool(tree[loc[-1]] != node.text)
    tree[loc[-1]] = node.text
    return changed


def _line(mistake: Mistake, written: Node) -> str:
    loc, message = mistake.loc, mistake.message
    node = find(written, loc)
    if mistake.kind == "value_error" and (node is None or isinstance(node.value, dict)):
        # An impossible pair names its keys in the message: point at the one that was typed last.
        words = [tuple(w.split(".")) for w in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", message)]
        keys = [word for word in words if len(word) > 1]
        keys += [(*loc, *word) for word in words if loc]
        keys = [key for key in keys if find(written, key)]
        if keys:
            keys.sort(key=lambda key: where_of(written, key) != COMMAND_LINE)
            named = not loc or f"{key_path(loc)}." in message
            section = "" if named else f"{key_path(loc)}: "
            return f"{where_of(written, keys[0])}: {section}{message}"
    return f"{where_of(written, loc)}: {key_path(loc)}{loc and ': ' or ''}{message}"


def section(name: str, overrides: Iterable[str]) -> Any:
    """One section of settings from overrides alone, for a model that belongs to no run.

    Raises:
        InputError: an override is not valid, or belongs to another section.
    """
    return sections((name,), overrides)[0]


def sections(
    names: Sequence[str],
    overrides: Iterable[str],
    *,
    run: Path | None = None,
    file: Path | None = None,
) -> list[Any]:
    """Some sections of settings: those of a run, under those of a file, under overrides.

    Args:
        names: of the sections.
        run: a run directory; its other sections are not looked at.
        file: a YAML file with no other sections.

    Raises:
        InputError: a setting is not valid, or belongs to another section.
    """
    written = Node({}, "", COMMAND_LINE)
    if run is not None:
        written = _Files().read(run / "config.yaml", ())
        written = written._replace(value={k: n for k, n in written.value.items() if k in names})
    if file is not None:
        patch = _Files().read(file, ())
        _check_sections(patch, names, str(file))
        written = merge(written, patch, [RunConfig])
    for text in overrides:
        patch = with_names(override(text), [RunConfig], written)
        _check_sections(patch, names, COMMAND_LINE)
        written = merge(written, patch, [RunConfig])
    return [_section(name, written) for name in names]


def _check_sections(patch: Node, names: Sequence[str], where: str) -> None:
    if foreign := [key for key in patch.value if key not in names]:
        read = " and ".join(f"{name}.*" for name in names)
        are = "is" if len(names) == 1 else "are"
        raise InputError(f"{where}: {foreign[0]}: only {read} {are} read here")


def _section(name: str, written: Node) -> Any:
    cls = settings_in(RunConfig.model_fields[name].annotation)[0]
    node = written.value.get(name, Node({}, "", COMMAND_LINE))
    try:
        return cls.model_validate(plain(node))
    except ValidationError as error:
        mistakes = [m._replace(loc=(name, *m.loc)) for m in explain(error, cls)[:MOST]]
        raise InputError("\n".join(_line(mistake, written) for mistake in mistakes)) from None
