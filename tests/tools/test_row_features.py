"""Features against true gradients, on a run of a tiny model."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("row_features")


def test_figures_of_inner_products_are_those_of_the_vectors(bench: Any) -> None:
    """Oracle: the vectors themselves; ranks by hand."""
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    products = bench.inner_products(rows)
    apart = torch.pdist(rows.double())
    torch.testing.assert_close(bench.apart(bench.coordinates(products), "l2"), apart)
    picks = torch.tensor([1, 4, 5])
    mean = rows.double().mean(0)
    expected = (rows.double()[picks].mean(0) - mean).norm() / mean.norm()
    assert bench.error(products, picks) == pytest.approx(float(expected))
    a, b = torch.tensor([1.0, 5.0, 2.0, 9.0]), torch.tensor([0.1, 0.4, 0.3, 0.2])
    # ranks 0 2 1 3 and 0 3 2 1: 1 - 6 (0 + 1 + 1 + 4) / (4 * 15)
    assert bench.correlation(a, b) == pytest.approx(1 - 36 / 60)


def test_more_directions_say_more(
    bench: Any, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the exact gradient agrees with itself, the whole one picks as the oracle does, and
    projections come near to the exact one."""
    found = []
    monkeypatch.setattr(bench, "publish", lambda *given: found.append(given))
    monkeypatch.setattr(bench, "PROJECTIONS", (1, 1024))
    bench.main([str(run), "--pools", "1", "--pool", "16", "--picks", "10"])
    (_, _, (table,), figures), pool = found[0], found[0][3]["pools"][0]
    assert figures["kept"] == ["notes"] and len(table.rows) == len(pool) == 9
    assert pool["exact"]["exact"] == pytest.approx(1) == pool["whole gradient"]["whole"]
    assert pool["whole gradient"]["overlap"] == 1
    assert pool["1024 projections"]["exact"] > 0.95 > pool["1 projection"]["exact"]
    assert all(0 < kind["error"] < 10 for kind in pool.values())
