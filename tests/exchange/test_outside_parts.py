"""Models that name a class outside the package: nothing is imported but what was typed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.config.saved import to_tree
from tests.running import ROOT, SMOKE, llmnorm

SOURCE = """
from pathlib import Path
from typing import Literal
from llmnorm.nn.norms.settings import RMSNormSettings
Path("imported").write_text("x", encoding="utf-8")

class MyNormSettings(RMSNormSettings):
    \"\"\"A norm of one's own.\"\"\"
    name: Literal["mine"] = "mine"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module `my_norm`, which no process has imported yet."""
    (tmp_path / "my_norm.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    forget(tmp_path)
    sys.path[:] = path


def forget(place: Path) -> None:
    sys.modules.pop("my_norm", None)
    (place / "imported").unlink(missing_ok=True)


@pytest.fixture
def exported(place: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run with `my_norm`, exported; the module is forgotten again."""
    words = ["model.norm=my_norm:MyNormSettings", "training.steps=2", f"data.dir={smoke_data}"]
    llmnorm("train", SMOKE, *words, f"run_dir={place / 'run'}")
    llmnorm("export", place / "run", place / "out")
    assert "needs your module my_norm: llmnorm generate" in capsys.readouterr().out
    card = (place / "out" / "README.md").read_text(encoding="utf-8")
    assert "import my_norm\nfrom transformers" in card and "--import my_norm" in card
    forget(place)
    return place / "out"


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_directory_is_read_once_its_module_is_named(
    place: Path, exported: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a file that the module leaves when it is imported."""
    line = refused(capsys, "generate", exported)
    assert "module 'my_norm', which is not of llmnorm; add --import my_norm" in line
    line = refused(capsys, "export", exported, "again")
    assert "add --import my_norm" in line and not (place / "imported").exists()
    short = ("--import", "my_norm", "generation.max_new_tokens=2")
    llmnorm("generate", exported, "--prompt", "The", *short)
    assert (place / "imported").exists() and capsys.readouterr().out.startswith("The")
    forget(place)
    llmnorm("export", exported, "again", "--import", "my_norm")
    assert (place / "again" / "model.safetensors").is_file()


def test_a_run_starts_from_it_once_its_yaml_names_the_module(
    place: Path, exported: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a file that the module leaves when it is imported; the run's config.yaml."""
    tree = {"data": {"sources": [{"name": "t", "path": "t.txt"}], "context_length": 32}}
    tree |= {"training": {"steps": 1, "global_batch": 2}, "model": {"pretrained": str(exported)}}
    tree["data"] |= {"validation_bytes": 1000}
    (place / "t.txt").write_text("The river. " * 2000, encoding="utf-8")
    (place / "a.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    line = refused(capsys, "train", "a.yaml", "run_dir=new")
    assert "model.pretrained: " in line and "add `imports: [my_norm]`" in line
    assert not (place / "imported").exists() and not (place / "new").exists()
    line = refused(capsys, "train", "a.yaml", "run_dir=new", "imports=[my_norm]", "seed=x")
    assert "seed" in line and not (place / "imported").exists()  # all else is validated before
    llmnorm("train", "a.yaml", "run_dir=new", "imports=[my_norm]", "evaluation.samples=0")
    saved = yaml.safe_load((place / "new" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["imports"] == ["my_norm"]
    forget(place)
    llmnorm("train", "new", "training.steps=2")
    assert (place / "imported").exists()


def test_what_is_saved_names_the_class_by_its_path(place: Path) -> None:
    """Oracle: the import path that was given, for one part and in a list of parts."""
    (place / "my_mixer.py").write_text(
        "from typing import Literal\n"
        "from llmnorm.nn.mixers.settings import SoftmaxSettings\n"
        "class Mine(SoftmaxSettings):\n"
        "    name: Literal['mine'] = 'mine'\n",
        encoding="utf-8",
    )
    words = ["model.norm=my_norm:MyNormSettings", "model.mixer=[my_mixer:Mine, nala]"]
    model = to_tree(load(ROOT / SMOKE, words).config)["model"]
    assert model["norm"]["name"] == "my_norm:MyNormSettings"
    assert [mixer["name"] for mixer in model["mixer"]] == ["my_mixer:Mine", "nala"]


@pytest.mark.parametrize(
    ("source", "module", "what"),
    [
        ("raise ValueError('of my own\\nmaking')", "bad", "ValueError: of my own making"),
        ("raise SystemExit(0)", "bad", "SystemExit"),
        ("def f(:", "bad", "SyntaxError"),
        ("", "nowhere", "No module named 'nowhere'"),
        ("", "../bad", "is no module"),
        ("", "..bad", "is no module"),
        ("", "a b", "is no module"),
        ("", "", "is no module"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], source: str, module: str, what: str
) -> None:
    """Oracle: the exception's kind and text."""
    (place / "bad.py").write_text(source, encoding="utf-8")
    line = refused(capsys, "generate", "run", "--import", module)
    assert "--import" in line and what in line


def test_a_file_cannot_name_a_module_that_lies_beside_it(
    place: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a file that the code of a downloaded directory would leave if it were run."""
    (exported / "evil.py").write_text(SOURCE, encoding="utf-8")
    tree = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    for named in ("out.evil:MyNormSettings", {"name": "out.evil:MyNormSettings"}):
        tree["norm"] = named
        (exported / "config.json").write_text(json.dumps(tree), encoding="utf-8")
        for words in (("generate", "out"), ("train", SMOKE, "model=null", "model.pretrained=out")):
            line = refused(capsys, *words)
            assert "module 'out.evil'" in line
            assert not (place / "imported").exists()
