"""What commit ae96d74 wrote, before the package was rearranged, still resumes, reads and loads.

tests/data/ae96d74 holds a run that was stopped after step 8 of 12 (Muon, a hybrid of NaLa and
softmax, a moving average), `whole.jsonl` with the metrics of the same run that was not stopped, and
the model of step 8 as it was exported, with logits of it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.running import ROOT, TIMES, llmnorm, metrics_of

OLD = ROOT / "tests" / "data" / "ae96d74"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run where it was written: its paths are relative to the working directory."""
    shutil.copytree(OLD / "run", tmp_path / "runs" / "before")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return Path("runs/before")


def test_an_older_run_resumes(run: Path) -> None:
    """Oracle: the metrics that ae96d74 has written without a stop; float32, other processors."""
    llmnorm("train", run)
    lines = [json.loads(line) for line in (OLD / "whole.jsonl").read_text().splitlines()]
    expected = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    found = metrics_of(run)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert _flat(found) == pytest.approx(_flat(expected), rel=2e-4)


def test_an_older_run_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the loss of step 8 in its metrics, which `eval` writes again."""
    llmnorm("eval", run)
    (file,) = (run / "eval").glob("*.json")
    validation = [line["validation"] for line in metrics_of(run) if "validation" in line][-1]
    assert json.loads(file.read_text())["validation"]["loss"] == pytest.approx(
        validation["loss"], rel=1e-5
    )
    llmnorm("generate", run, "--prompt", "The", "generation.max_new_tokens=4")
    assert capsys.readouterr().out.strip()


def test_an_older_export_loads() -> None:
    """Oracle: the logits of ae96d74."""
    from transformers import AutoModelForCausalLM

    import llmnorm.models  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(OLD / "exported")
    old = load_file(OLD / "logits.safetensors")
    with torch.no_grad():
        logits = model(input_ids=old["input_ids"]).logits
    torch.testing.assert_close(logits, old["logits"], rtol=1e-4, atol=1e-5)


def _flat(value: object, path: str = "") -> dict[str, float]:
    """Every number by where it stands."""
    if isinstance(value, dict):
        entries: list[tuple[object, object]] = [*value.items()]
    elif isinstance(value, list):
        entries = [*enumerate(value)]
    else:
        assert isinstance(value, int | float), path
        return {path: value}
    return {k: v for key, item in entries for k, v in _flat(item, f"{path}/{key}").items()}
