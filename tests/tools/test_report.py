"""The page of benchmarks is made from the committed figures, and they from scripts that exist."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.running import ROOT

FILES = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "tools" / "bench" / "report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_files_say(report: ModuleType) -> None:
    """Oracle: the page made again."""
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page()


@pytest.mark.parametrize(
    ("page", "figures"), [("fine-tuning", "skills"), ("selection", "row_features")]
)
def test_a_page_shows_its_figures(report: ModuleType, page: str, figures: str) -> None:
    """Oracle: the tables of the committed figures."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for table in json.loads((ROOT / "docs" / "results" / f"{figures}.json").read_text())["tables"]:
        assert report.markdown(table) in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_figures_name_the_script_that_measured_them(file: Path) -> None:
    """Oracle: the file system."""
    result = json.loads(file.read_text())
    script = next(word for word in result["command"].split() if word.endswith(".py"))
    assert (ROOT / script).is_file() and result["tables"] and result["machine"]["versions"]


def test_a_table_is_printed_and_written(
    report: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: by hand."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("sys.argv", [str(ROOT / "tools" / "bench" / "report.py")])
    table = report.Table("times", ["", "ms", "ratio"], [["ours", "1.5", ""], ["peer", "3", "2.0"]])
    report.publish(tmp_path / "x.json", "Things", [table], {"seconds": [1, 2]})
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:5] == ["times", "       ms  ratio", "ours  1.5", "peer    3    2.0"]
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["command"].startswith("ATEN_CPU_CAPABILITY=avx2 python tools/bench/report.py")
    assert (written["title"], written["seconds"]) == ("Things", [1, 2])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "|  | ms | ratio |\n| --- | --- | --- |\n| ours | 1.5 |  |\n" in report.page()
