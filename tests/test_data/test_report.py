"""What a run reads is printed before its first step, and by `llmnorm data --stats`."""

from pathlib import Path

import pytest

from llmnorm.config.file import load
from llmnorm.data import packing
from tests.running import ROOT, SMOKE, llmnorm

HEADER = "source  documents    MB  tokens  bytes/token  rows  share  epochs  held out kB"


def test_a_run_prints_the_table_of_stats_before_its_first_step(
    tmp_path: Path, smoke_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the table of `data --stats`; shares of weights 2 and 1, epochs written out."""
    words = [f"data.dir={smoke_data}", f"run_dir={tmp_path}/run", "training.steps=20"]
    llmnorm("data", SMOKE, *words, "--stats")
    table = capfd.readouterr().out
    llmnorm("train", SMOKE, *words, "--dry-run")
    assert capfd.readouterr().err.count(table) == 1
    llmnorm("train", SMOKE, *words, "training.steps=2", "schedule.warmup=1")
    said = capfd.readouterr().err
    assert said.count(HEADER) == 1
    assert said.index(HEADER) < said.index("step 2: validation")

    config = load(SMOKE, words).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    header, *lines, _ = table.splitlines()
    names = header.replace("held out kB", "held_out").split()
    assert header == HEADER
    for line, source, share in zip(lines, packed.sources, (2 / 3, 1 / 3), strict=True):
        cells = dict(zip(names, line.split(), strict=True))
        assert cells["source"] == source.name and cells["rows"] == str(source.rows)
        assert cells["share"] == f"{share:.1%}"
        assert cells["epochs"] == f"{20 * 16 * share / source.rows:.2f}"
        assert cells["held_out"] == f"{source.validation_bytes / 1000:.0f}"


def test_a_classification_prints_its_files(
    tmp_path: Path, smoke_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the lines of the files, counted."""
    tokenizer = next((smoke_data / "packed").glob("*/tokenizer"))
    words = [f"tokenizer.path={tokenizer}", "model.hidden_size=32", "model.vocab_size=512"]
    words += ["model.num_hidden_layers=1", "training.device=cpu", f"run_dir={tmp_path}/run"]
    llmnorm("train", ROOT / "configs/finetune/smoke.yaml", *words, "--dry-run")
    lines = capfd.readouterr().err.splitlines()
    labelled = ROOT / "tests/data/labelled"
    train = (labelled / "train.tsv").read_text().count("\n") - 1
    held_out = (labelled / "validation.jsonl").read_text().count("\n")
    (start,) = [number for number, line in enumerate(lines) if line.startswith("file ")]
    first, second, classes = (line.split() for line in lines[start + 1 : start + 4])
    assert first[0].endswith("train.tsv") and first[1] == str(train)
    assert first[3] == "training" and float(first[4]) == pytest.approx(4, abs=0.1)
    assert second[0].endswith("validation.jsonl") and second[1] == str(held_out)
    assert second[3:] == ["validation", "-"] and classes[1] == "classes"
    assert not (tmp_path / "run").exists()
