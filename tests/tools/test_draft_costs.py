"""The bench of the costs of passes on a tiny scale, and what it writes."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.generation import cost_table
from llmnorm.generation.costs import Size
from llmnorm.machine.processor import processor
from tests.running import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    found = importlib.import_module("draft_costs")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    monkeypatch.setitem(found.SIZES, "quickstart", small | {"num_hidden_layers": 2})
    monkeypatch.setattr(found, "DRAFT", small | {"num_hidden_layers": 1})
    return found


def test_a_table_is_measured_and_written(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the file, run; it holds what was measured and what other machines have."""
    threads, file = torch.get_num_threads(), tmp_path / "cost_table.py"
    assert bench.main(["--quick", "--table", str(file)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\d +\d+\.\d\d +\d\.\d{3} +\d+\.\d\d ", printed, re.M)) == 2
    space: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), space)
    table = space["TABLE"]
    own = table.pop(processor())
    assert set(own[1]) == {1, 2} and all(len(pair) == 2 for pair in own[1][1].values())
    assert table == {k: v for k, v in cost_table.TABLE.items() if k != processor()}
    assert processor() in space["MACHINES"]


def test_the_committed_table_is_as_it_is_written(bench: Any) -> None:
    """Oracle: the bench's own text of the numbers in it."""
    text = bench.source(cost_table.TABLE, cost_table.MACHINES)
    assert text == (ROOT / "llmnorm/generation/cost_table.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("a", "b", "found"), [(0.3, 0.5, (0.3, 0.5)), (1.0, -0.1, None), (-0.1, 1.0, None)]
)
def test_times_are_fitted_by_layers_and_weights(bench: Any, a: float, b: float, found: Any) -> None:
    """Oracle: times made of both costs; where one would be below 0, the other alone."""
    sizes = [Size(8, 26.0), Size(4, 2.6), Size(1, 0.7)]
    fitted = bench.fitted({size: a * size.layers + b * size.millions for size in sizes})
    if found is not None:
        assert fitted == pytest.approx(found)
    else:
        assert (fitted[0] == 0) == (a < 0) and (fitted[1] == 0) == (b < 0) and max(fitted) > 0
