"""The table of models: its page is made of its figures, and they are found again."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from tests.distributed.processes import run
from tests.running import ROOT

SAMPLE = ("gpt2", "mamba2")  # one that runs packed, and one with a state


def tool(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tool("models_table").FIGURES.read_text())
    return found


def test_the_page_is_what_the_figures_say(figures: dict[str, Any]) -> None:
    """Oracle: the page made again."""
    assert (ROOT / "docs" / "models.md").read_text() == tool("models_table").page(figures)


def test_every_decoder_of_this_transformers_is_in_the_table(figures: dict[str, Any]) -> None:
    """Oracle: transformers' own list of causal language models."""
    if figures["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the figures are of another transformers")
    assert set(figures["types"]) == set(tool("models_table").types())


def sample(directory: Path, rank: int, world: int) -> Any:
    for name in SAMPLE:
        place = directory.parent / name
        place.mkdir(exist_ok=True)
        tool("models_probe").probe(name, tool("models_table").tiny_of, place, rank, world)
    return [json.loads((directory.parent / n / "row.json").read_text()) for n in SAMPLE]


def told(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the sizes of errors, which rounding decides."""
    flat = {**row, **(row["adapter"] if isinstance(row["adapter"], dict) else {})}
    return {k: "yes" if isinstance(v, float) else v for k, v in flat.items() if k != "adapter"}


def test_a_sample_gives_its_figures_again(figures: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the committed figures, but for sizes of errors."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    found, _ = run(sample, tmp_path / "it")
    assert isinstance(found, list), found
    for name, row in zip(SAMPLE, found, strict=True):
        assert told(row) == told(figures["types"][name]), name
