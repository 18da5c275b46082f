"""Files that travel inside the package: `llmnorm:NAME` can be written wherever a path is read.

    llmnorm:smoke.yaml  llmnorm:recipes/nala/nala.yaml    configurations; `llmnorm configs`
    llmnorm:text/prose.jsonl  llmnorm:labelled/train.tsv  the texts that two of them read

An installed package keeps them in llmnorm/shipped. A checkout keeps them where developers edit
them: the texts in tests/data, everything else in configs (pyproject.toml says the same to the
wheel; tests/test_wheel.py compares the two).

What would surprise: settings keep the text `llmnorm:NAME`, and `locate` is called where a file is
opened, so a run directory does not depend on where the package is installed. NAME is a file or a
directory, not a glob.
"""

import difflib
import posixpath
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from llmnorm.config.yaml_text import read_yaml
from llmnorm.part import InputError

PREFIX = "llmnorm:"
SCHEMA = "config.schema.json"
LEGEND = (
    "",
    "Size: parameters in hidden matrices. Hours of an H100: counted, at 40 % of its bf16 peak.",
    "To run one: llmnorm train llmnorm:NAME. To change it first: llmnorm configs NAME --copy DIR.",
)
_PACKAGE = Path(__file__).parents[1]
_IN_TESTS = ("text", "labelled")  # the directories that a checkout keeps in tests/data
_KINDS = (".yaml", ".json", ".jinja", ".txt", ".jsonl", ".tsv")  # tests/data/text has a script too


def is_shipped(path: str | Path) -> bool:
    """Whether the path is written `llmnorm:NAME`."""
    return str(path).startswith(PREFIX)


def locate(path: str | Path, key: str = "") -> Path:
    """Where `llmnorm:NAME` lies on this machine; any other path is returned as it is.

    Args:
        key: the setting that holds the path, for the message; "" where the path says enough.

    Raises:
        InputError: the package has no such file or directory.
    """
    if not is_shipped(path):
        return Path(path)
    name = _name(path)
    found = _path_of(name)
    inside = name[0] not in "./"  # `..` and `/` would leave the package
    if not (inside and (found.is_dir() or name in _names())):
        begin = f"{key}: " if key else ""
        raise InputError(f"{begin}{path}: the package has no such file; {_hint(name)}")
    return found


def beside(path: Path, other: str) -> Path:
    """The path that a file at `path` means by `other`: relative to it, absolute or shipped."""
    if is_shipped(other) or not is_shipped(path):
        return Path(other) if is_shipped(other) else path.parent / other
    if posixpath.isabs(other):
        return Path(other)
    return Path(PREFIX + posixpath.normpath(posixpath.join(posixpath.dirname(_name(path)), other)))


def stem(path: Path) -> str:
    """The file's name without its ending: `smoke` of `llmnorm:smoke.yaml`."""
    return Path(_name(path)).stem


def configurations() -> list[str]:
    """The NAME of every shipped YAML file, by directory, the top one first."""
    names = [name for name in _names() if name.endswith(".yaml")]
    return sorted(names, key=posixpath.split)


class Description(NamedTuple):
    """What the comment at the top of a shipped file says.

    Attributes:
        what: its first sentence.
        size: parameters in hidden matrices; "" where the file gives no model.
        time: how long the run takes, and on what; "" for a file that is no run by itself.
    """

    what: str
    size: str
    time: str


def describe(name: str) -> Description:
    """Read the comment: sentences, and one line `# size: ...; time: ...` that may lack either.

    Args:
        name: NAME, with `llmnorm:` or without.
    """
    lines = []
    for line in _path_of(_name(name)).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "yaml-language-server" not in line:
            lines.append(line.removeprefix("#").strip())
    figures = [line for line in lines if re.match(r"(size|time): ", line)]
    found = dict(part.split(": ", 1) for line in figures for part in line.split("; "))
    text = " ".join(line for line in lines if line not in figures)
    what = re.split(r"(?<=\.)\s", text, maxsplit=1)[0].removesuffix(".")
    return Description(what, found.get("size", ""), found.get("time", ""))


def listing(below: str = "") -> str:
    """A line a shipped configuration: what it is, its size, its time.

    Args:
        below: only those in this directory; "" for all.
    """
    names = [name for name in configurations() if name.startswith(f"{below}/" if below else "")]
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        what, size, time = describe(name)
        figures = "; ".join(text for text in (size and f"size {size}", time) if text)
        lines.append(f"{name:{width}}  {what}{figures and f' [{figures}]'}")
    texts = [PREFIX + name for name in _names() if name.startswith(_IN_TESTS)]
    return "\n".join([*lines, *LEGEND, f"Texts that are here too: {', '.join(texts)}."])


def show(name: str) -> str:
    """The text of a shipped file, or the listing of a directory of them.

    Raises:
        InputError: the package has no such file.
    """
    path = locate(_shipped(name))
    if path.is_dir():
        return listing(_name(name))
    return path.read_text(encoding="utf-8").rstrip("\n")


def copy(name: str, directory: Path) -> list[Path]:
    """Write a shipped configuration, the files of its `base` and the schema for editors.

    Below `directory` they have the names that they have in the package, so that `base` and
    `$schema` of every file still lead to the other files, and two configurations share them.

    Returns:
        All these files, the configuration first. Files that are there already and say the same are
        among them.

    Raises:
        InputError: the package has no such configuration, a file of another content is in the way,
            or the directory cannot be written. Nothing is written in the first two cases.
    """
    needed = [*_with_bases(_shipped(name)), Path(PREFIX + SCHEMA)]
    sources = {directory / _name(path): locate(path) for path in needed}
    for target, source in sources.items():
        if target.exists() and (target.is_dir() or target.read_bytes() != source.read_bytes()):
            raise InputError(
                f"--copy {directory}: {target} exists and is not llmnorm's own; move it away, or "
                "choose another directory (nothing was written)"
            )
    try:
        for target, source in sources.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        raise InputError(f"--copy {directory}: cannot be written: {error.strerror}") from None
    return list(sources)


def _with_bases(path: Path) -> list[Path]:
    """A configuration, then the files that it is based on, each once."""
    file = locate(path)
    if file.suffix != ".yaml":
        hint = "`llmnorm configs` lists those that are"
        raise InputError(f"{path}: is no configuration; {hint}")
    bases = read_yaml(file).get("base", [])
    found = [path]
    for base in [bases] if isinstance(bases, str) else bases:
        found += [below for below in _with_bases(beside(path, base)) if below not in found]
    return found


def _shipped(name: str) -> Path:
    """NAME as it may be typed where nothing else is meant: with the prefix or without."""
    return Path(name if is_shipped(name) else PREFIX + name)


def _name(path: str | Path) -> str:
    return posixpath.normpath(str(path).removeprefix(PREFIX))


def _path_of(name: str) -> Path:
    """Where a file of this NAME is, if there is one."""
    installed = _PACKAGE / "shipped"
    if installed.is_dir():
        return installed / name
    checkout = _PACKAGE.parent
    return checkout / ("tests/data" if name.split("/")[0] in _IN_TESTS else "configs") / name


def _names() -> list[str]:
    """The NAME of every file that `llmnorm:NAME` can mean."""
    found = []
    for directory in (".", *_IN_TESTS):
        top = _path_of(directory)
        names = (p.relative_to(top).as_posix() for p in top.rglob("*") if p.suffix in _KINDS)
        found += [posixpath.normpath(posixpath.join(directory, name)) for name in names]
    return sorted(set(found))


def _hint(name: str) -> str:
    """The nearest NAME, by all of it or by its last part."""
    names = _names()
    near = difflib.get_close_matches(name, names, n=1)
    if not near:
        last = {posixpath.basename(n): n for n in reversed(names)}
        close = difflib.get_close_matches(posixpath.basename(name), list(last), n=1)
        near = [last[found] for found in close]
    if near:
        return f"did you mean '{PREFIX}{near[0]}'?"
    return "`llmnorm configs` lists what there is"
