"""The bench of generation on tiny models: every candidate is run, and equals plain decoding."""

import importlib
import re
from typing import Any

import pytest
import torch

from llmnorm.generation.costs import expected_tokens
from tests.running import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("generation")


def test_every_candidate_generates_the_same_tokens(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the engine's plain rounds at batch 1, which the bench compares, of all that is greedy
    or seeded."""
    threads = torch.get_num_threads()
    assert bench.main(["--quick", "--batches", "1", "2"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    of_drafts = re.findall(r"^(\w+), ([12]) +\d+\.\d ", printed, re.M)
    assert [name for name, batch in of_drafts if batch == "1"] == 2 * [
        *("plain", "lookup", "draft", "generate", "assisted")
    ]
    assert [name for name, batch in of_drafts if batch == "2"] == 2 * [
        *("plain", "lookup", "draft", "generate")
    ]
    methods = re.findall(r"^(\w+, (?:one length|several)) .*?(\d+)%", printed, re.M)
    assert len(methods) == 8
    assert "generate_batch, pages of 32" in printed
    # Of transformers' sampled rows nothing is said; all others end in, or have, a share of equals.
    shares = re.findall(r" (\d+)%$", printed.split("methods,")[0], re.M)
    assert shares.count("100") >= 15
    assert {share for _, share in methods} == {"100"}


def test_the_prediction_is_that_of_its_parts(bench: Any) -> None:
    """Oracle: by hand: two rounds with drafts of two rows, and one without."""
    ours = importlib.import_module("generation_ours")
    told = ours.Told(rounds=3, drafts=[(2, [4, 2]), (2, [1, 0])], looked_at=10, accepted=5)
    measured = {"c": 0.1, "v": {2: 1.2, 5: 1.8}}
    made = 1 + sum(expected_tokens(0.5, k) for k in (4, 2, 1, 0)) / 2
    assert ours.predicted(told, measured, False) == pytest.approx(
        made / (1 + 4 * 0.1 + 1.8 + 0.1 + 1.2)
    )
    assert ours.predicted(told, measured, True) == pytest.approx(made / (1 + 1.8 + 1.2))
