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
        made = bench.Offline(served.target, served.settings).run(prompts, 10, 2)
        streams = asyncio.run(bench.load(served.port, prompts, 2, 10))
    assert [stream.text() for stream in streams] == made.texts
    assert made.seconds > sum(made.steps) > 0 and made.processor > 0
    for stream in streams:
        gaps = stream.between()
        first = 10 - len(gaps)  # tokens of the first event
        assert 1 <= first <= 5
        assert stream.at == sorted(stream.at)
        assert all(gap <= now - before for before, now, gap in gaps)


def test_gaps_in_which_a_prompt_is_run_are_left_out(bench: Any) -> None:
    """Oracle: two streams by hand; the second one's prompt is run from 1.5 to 3.5."""
    event = b'{"choices": [{"tokens": 1}]}'
    old, new = bench.Stream(0.0, [1.0, 2.0, 4.0, 5.0], [event] * 4), bench.Stream(1.5)
    new.at, new.events = [2.0, 3.5], [event, event.replace(b"1", b"3")]
    assert bench.gaps_without_prompts([old]) == [1.0, 2.0, 1.0]
    assert bench.gaps_without_prompts([old, new]) == [1.0, 0.5, 0.5, 0.5]


def test_percentiles(bench: Any) -> None:
    """Oracle: a hundred and one numbers, in milliseconds."""
    found = bench.percentiles([number / 1000 for number in range(101)])
    assert found == pytest.approx([50.0, 95.0, 99.0])
