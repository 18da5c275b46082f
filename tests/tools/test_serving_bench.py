"""What tools/bench/serving.py measures with: its client and its figures."""

import asyncio
import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT
from tests.serving.served import save_model, serving


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("serving")


def test_the_clients_see_the_offline_engines_answers(bench: Any, tmp_path: Path) -> None:
    """Oracle: the bench's own engine; every token has a time between it and the one before."""
    with serving(save_model(tmp_path), slots=2, draft="lookup") as served:
        prompts = [served.model.asker.text("It is 4. " * n) for n in (1, 2, 3)]
        texts, rate = bench.offline(served.target, served.settings, prompts, 10)
        streams = asyncio.run(bench.load(served.port, prompts, 2, 10))
    assert [stream.text() for stream in streams] == texts and rate > 0
    for stream in streams:
        first = 10 - len(stream.between())  # tokens of the first event
        assert 1 <= first <= 5
        assert stream.at == sorted(stream.at)


def test_percentiles(bench: Any) -> None:
    """Oracle: a hundred and one numbers, in milliseconds."""
    found = bench.percentiles([number / 1000 for number in range(101)])
    assert found == pytest.approx([50.0, 95.0, 99.0])
