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


def test_stages_are_printed_with_their_rows_shares_and_epochs(
    tmp_path: Path, smoke_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: rows counted one by one in the run's own order; a source without a row left over."""
    words = [f"data.dir={smoke_data}", f"run_dir={tmp_path}/run", "training.steps=200"]
    words += ["data.stages=[{rows: 192, weights: {prose: 3, notes: 1}}, {weights: {notes: 1}}]"]
    llmnorm("data", SMOKE, *words, "--stats", "--show", "200")
    out = capfd.readouterr().out
    rows, table = out[: out.index(HEADER)], out[out.index(HEADER) :]
    llmnorm("train", SMOKE, *words, "--dry-run")
    assert capfd.readouterr().err.count(table) == 1

    shown = [line.split()[3] for line in rows.splitlines() if line.startswith("row ")]
    assert shown == ["notes," if s == "notes," else "prose," for s in shown]
    assert shown[192:] == ["notes,"] * 8 and shown[:192].count("notes,") == 48
    config = load(SMOKE, words).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    prose, notes = (source.rows for source in packed.sources)
    _, *sources, _, first, second = [x for x in table.splitlines() if not x.startswith("  ")]
    assert first == (
        f"stage 1 of 2, rows 0 to 191: prose 75.0% (epochs 0.00 to {144 / prose:.2f}), "
        f"notes 25.0% (epochs 0.00 to {48 / notes:.2f})"
    )
    assert second == (
        "stage 2 of 2, rows 192 to 3199, from step 13 on: notes 100.0% "
        f"(epochs {48 / notes:.2f} to {3056 / notes:.2f})"
    )
    again = [line for line in table.splitlines() if line.startswith("  no row of")]
    wanted = [
        f"  no row of {name} is left over: by the end of stage {number} each was read "
        f"{read / count:.2f} times"
        for number, name, read, count in (
            (1, "prose", 144, prose),
            (1, "notes", 48, notes),
            (2, "notes", 3056, notes),
        )
        if read > count
    ]
    assert again == wanted and wanted
    assert [line.split()[6:8] for line in sources] == [
        [f"{read / 3200:.1%}", f"{read / count:.2f}"]
        for read, count in ((144, prose), (3056, notes))
    ]


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
