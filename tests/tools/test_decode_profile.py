"""The bench of a decode step's calls: which kind a call is of, and that both ways see the same."""

import importlib
import json
import sys
from typing import Any

import pytest
import torch

from tests.running import ROOT


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The child's module."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("decode_kinds")


def test_the_innermost_file_of_ours_says_the_kind(kinds: Any) -> None:
    """Oracle: by hand."""

    def kind(*frames: tuple[str, str]) -> str:
        return kinds.kind_of([(f"/somewhere/llmnorm/{path}", name) for path, name in frames])

    assert kind(("nn/projections.py", "_product"), ("nn/mlp.py", "forward")) == "products"
    assert kind(("nn/mlp.py", "forward"), ("nn/block.py", "_feed")) == "rest"
    assert kind(("nn/norms/rms.py", "forward"), ("nn/mixers/gla.py", "finish")) == "norm"
    assert kind(("nn/mixers/softmax.py", "_attend_by_products")) == "attention"
    assert kind(("nn/mixers/softmax.py", "prepare")) == "rest"
    assert kind(("nn/mixers/rotary.py", "rotate"), ("nn/mixers/linear.py", "_turned")) == "rotation"
    assert kind(("nn/states.py", "write_inputs"), ("models/decoding.py", "append")) == "state"
    assert kinds.kind_of([("/torch/nn/functional.py", "silu")]) == "rest"


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_an_eager_and_a_captured_step_have_the_same_products_and_norms(
    mixer: str, kinds: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the eager step, of which the captured one is a trace; tables have a row for each."""
    given = {"mixer": mixer, "rows": 2, "dtype": "float32", "steps": 2, "hidden": 64, "layers": 1}
    monkeypatch.setattr(sys, "argv", ["decode_kinds.py", json.dumps(given)])
    threads = torch.get_num_threads()
    try:
        kinds.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["model", "eager", "captured"]
    for kind in ("products", "norm"):
        calls = found["eager"]["calls"][kind]
        assert calls == found["captured"]["calls"][kind] > 0
    mixing = "attention" if mixer == "softmax" else "state"
    assert all(figures["us"][mixing] > 0 and figures["step"] > 0 for figures in found.values())
    profile = importlib.import_module("decode_profile")
    keys = {(mixer, 2, "float32", way): [figures] for way, figures in found.items()}
    tables = profile.tables(keys, 1)
    assert [len(table.rows) for table in tables] == [3, 3, 3]
    assert tables[0].rows[0][2] == ("1.00" if mixer == "softmax" else "")
