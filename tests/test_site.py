"""docs/ builds as a site, and nothing that is broken builds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm.config import shipped
from tests.running import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None,
    reason="mkdocs and its theme build the site: bash tools/bootstrap.sh docs",
)


def build(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build`, strict as mkdocs.yml says."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    place = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return place


def links(page: Path) -> list[str]:
    """What a page links to or loads, without anchors."""
    found = re.findall(r'(?:href|src)="([^"#]+)', page.read_text(encoding="utf-8"))
    return [link.partition("?")[0] for link in found]


def test_every_page_is_there_and_its_links_lead_somewhere(site: Path) -> None:
    """Oracle: the pages of docs/, and the file system of the built site."""
    pages = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    built = [p for p in pages if p.name != "table.md"]  # of which report.md holds the same
    assert all((site / page.with_suffix(".html")).is_file() for page in built)
    missing = [
        f"{page.relative_to(site)}: {link}"
        for page in site.rglob("*.html")
        if page.name != "404.html"
        for link in links(page)
        if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists()
    ]
    assert missing == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Oracle: the scripts, styles and pictures that the pages name."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img)[^>]*src="(?:https?:)?//', text) == []
        assert re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//', text) == []


def test_readme_and_configurations_are_in_the_site(site: Path) -> None:
    """Oracle: the files of the checkout."""
    assert "configurations.html" in links(site / "index.html")
    assert "readme.html" in links(site / "index.html")
    assert "configs/smoke.yaml" in links(site / "readme.html")
    assert "none|lookup|RUN_OR_DIR] [--adapter DIR]</code>" in (site / "readme.html").read_text()
    for name in shipped.configurations():
        assert (site / "configs" / name).read_bytes() == (ROOT / "configs" / name).read_bytes()
        assert f"configs/{name}" in links(site / "configurations.html")


def test_the_search_finds_every_page(site: Path) -> None:
    """Oracle: the headings of the pages."""
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert title in index, page


def test_a_broken_link_and_a_page_outside_the_navigation_are_refused(tmp_path: Path) -> None:
    """Oracle: mkdocs' own words, exit code 1."""
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("docs", "configs", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "*.jsonl")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    with (tmp_path / "docs/index.md").open("a") as file:
        file.write("\n[lost](nowhere.md) [gone](../configs/nowhere.yaml) [none](install.md#none)\n")
    (tmp_path / "docs/alone.md").write_text("# Alone\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for words in ("'nowhere.md'", "'../configs/nowhere.yaml'", "'#none'", "- alone.md"):
        assert words in done.stderr, done.stderr
