"""The bench of a step on a GPU, tried on a CPU: what it builds there trains, ours and the peers."""

import importlib
import re

import pytest

from tests.running import ROOT


def test_a_tiny_step_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the table's rows; that losses of ours and of the peers agree the script checks."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    monkeypatch.setattr("sys.argv", ["gpu_step.py", "--tiny"])
    importlib.import_module("gpu_step").main()
    rows = re.findall(r"^(ours|plain, \w+) +(\d+) .* (\d+)$", capsys.readouterr().out, re.M)
    names = ["ours", "plain, bf16", "plain, autocast", "plain, whole"]
    assert [name for name, _, _ in rows] == names
    assert all(int(speed) > 0 and again == "0" for _, speed, again in rows)
