"""What mkdocs.yml needs beside docs/: the README and the configurations, and links that reach them.

Pages link to files as they lie in the checkout, so that links work wherever the checkout is read.
In the site

    ../README.md               is the page readme.md
    ../configs/smoke.yaml      is the file configs/smoke.yaml
    ../configs/recipes         is the page configurations.md, which lists what llmnorm brings

A link to anything else outside docs/ is left as it is, and `strict` refuses it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llmnorm.config import shipped

ROOT = Path(__file__).parents[1]
CODE_IN_TABLE = re.compile(r"(?<=^\| )`[^`\n]*`", re.M)  # in the first column
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README, the configurations, and the page that lists them."""
    files.append(File.generated(config, "readme.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, "configurations.md", content=configurations()))
    for name in [*shipped.configurations(), shipped.SCHEMA]:
        path = str(shipped.locate(shipped.PREFIX + name))
        files.append(File.generated(config, f"configs/{name}", abs_src_path=path))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to where the site has the files; `a\\|b` in a table as mkdocs wants it, `a|b`."""
    source = page.file.src_uri
    folder = "" if source == "readme.md" else posixpath.dirname(f"docs/{source}")

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        in_site = place(target)
        if in_site is None:
            return match[0]
        return match[1] + posixpath.relpath(in_site, posixpath.dirname(source) or ".") + match[3]

    markdown = CODE_IN_TABLE.sub(lambda row: row[0].replace("\\|", "|"), markdown)
    return LINK.sub(rewritten, markdown)


def place(path: str) -> str | None:
    """Where the site has a file or directory of the checkout; None if nowhere."""
    if not (ROOT / path).exists():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "readme.md"
    if path == "configs" or path.startswith("configs/"):
        return path if (ROOT / path).is_file() else "configurations.md"
    return None


def configurations() -> str:
    """The page that lists the configurations, from their own comments."""
    lines = [
        "# Shipped configurations",
        "",
        "`llmnorm train llmnorm:NAME` runs one anywhere. `base: llmnorm:NAME` builds on one.",
        "`llmnorm configs NAME --copy DIR` writes one, with what it is based on, to change it.",
        "",
        "Size: parameters in hidden matrices. Hours of an H100: counted, at 40 % of its bf16 peak.",
    ]
    folder = None
    for name in shipped.configurations():
        here = posixpath.dirname(name)
        if here != folder:
            folder = here
            title = f"## {here}" if here else "## To begin with"
            lines += ["", title, "", "| name | what | size | time |", "|---|---|---|---|"]
        what, size, time = (text.replace("|", "\\|") for text in shipped.describe(name))
        file = posixpath.basename(name)
        lines.append(f"| [{file}](configs/{name}) | {what} | {size} | {time} |")
    return "\n".join([*lines, ""])
