"""The bench of a decode step on a tiny scale: every candidate decodes the same tokens."""

import importlib
import re

import pytest
import torch

from tests.running import ROOT


def test_every_candidate_decodes_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the tokens of Hugging Face's generate, which the bench compares."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    bench = importlib.import_module("decode_step")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    monkeypatch.setitem(bench.SIZES, "quickstart", small | {"num_attention_heads": 2})
    threads = torch.get_num_threads()
    assert bench.main(["--quick"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    names = re.findall(r"^(.+?)  +\d+\.\d+ \(\d+\.\d+x\) ", printed, re.M)
    assert names == ["generate", "loop", "eager", "laid out", "captured", "ours"]
    assert re.findall(r"(\d+)%$", printed, re.M) == ["100", "100"]
    assert "decoding: steps are captured (float32 on cpu)" in printed
