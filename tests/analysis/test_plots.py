"""Plots of recorded metrics, and what broken ones are answered with."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.analysis.plots import (
    compression,
    losses_against,
    plot_run,
    read_metrics,
    smoothed,
    table,
)
from llmnorm.data.packed import PackedData
from llmnorm.part import InputError

REFERENCES = {
    "gzip -9": {"all": 2.6, "code": 2.1, "letters": 2.9},
    "xz -9e": {"all": 2.4, "code": 1.9, "letters": 2.7},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 40 steps of 100 tokens, evaluated twice; the loss falls from 6 to 2."""
    lines = []
    for step in range(1, 41):
        record = {"step": step, "tokens": 100 * step, "lr": 1e-3, "grad_norm": 1.0}
        lines.append({**record, "loss": 2 + 4 * math.exp(-step / 8)})
        if step % 20 == 0:
            rates = {"code": 2.5 - step / 100, "letters": 3.0 - step / 100}
            sources = {
                name: {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": rate}
                for name, rate in rates.items()
            }
            figures = {"loss": 2.1, "perplexity": 8.2, "bits_per_byte": 2.9 - step / 100}
            validation = {**figures, "sources": sources}
            lines.append({"step": step, "tokens": 100 * step, "validation": validation})
    directory = tmp_path / "small-run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return directory


def test_the_picture_shows_both_curves_and_every_source(run: Path) -> None:
    """Oracle: the texts of the drawn SVG, whose glyphs matplotlib names in comments."""
    picture = run / "plots" / "loss.svg"
    plot_run(run, picture, REFERENCES)
    ElementTree.parse(picture)
    drawn = picture.read_text()
    for text in (
        "small-run",
        "training (smoothed)",
        "validation (last: 2.100)",
        "training tokens",
        "all sources",
        "letters",
        "gzip -9",
        "Behind xz -9e on all sources, code",
        "2.60",  # the last evaluation's bits per byte of the letters, and gzip's in all
    ):
        assert f"<!-- {text} -->" in drawn, text
    assert "Behind gzip" not in drawn


def test_a_run_without_evaluation_is_one_panel(run: Path) -> None:
    """Oracle: the PNG's own width in pixels, half of the two panels'."""
    plot_run(run, run / "two.png")
    metrics = run / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if "validation" not in line]
    metrics.write_text("\n".join(lines) + "\n")
    plot_run(run, run / "one.png")
    widths = [int.from_bytes((run / name).read_bytes()[16:20]) for name in ("one.png", "two.png")]
    assert widths[1] == 2 * widths[0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "holds no loss yet"),
        ('{"step": 1, "tokens": 5, "loss": NaN}\n', "holds no loss yet"),
        ('{"step": 1, "tok', "holds no loss yet"),
        ('{"step": 1, "tok\n{"step": 2}\n', "line 1: not a line of metrics"),
        ('{"step": 1, "loss": 2.0}\n', "line 1: not a line of metrics"),
        ("[1, 2]\n", "line 1: not a line of metrics"),
        (b"\xff\xfe\x00", "cannot be read: it is not text"),
    ],
)
def test_broken_metrics_are_one_line(
    tmp_path: Path, content: str | bytes | None, complaint: str
) -> None:
    """Oracle: the message names the file and what is wrong with it."""
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        plot_run(tmp_path, tmp_path / "loss.png")
    assert str(error.value).startswith(str(metrics)) and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_picture_that_cannot_be_written_is_named(run: Path) -> None:
    """Oracle: a file where its directory should be, and a suffix that is no picture's."""
    for output in (run / "metrics.jsonl" / "loss.png", run / "loss.txt"):
        with pytest.raises(InputError, match="cannot be written"):
            plot_run(run, output)


def test_a_half_written_last_line_is_left_out(run: Path) -> None:
    """Oracle: the same metrics without it."""
    metrics = run / "metrics.jsonl"
    whole = read_metrics(metrics)
    with metrics.open("a") as file:
        file.write('{"step": 41, "tokens": 4100, "lo')
    assert read_metrics(metrics) == whole


def test_compression_weighs_sources_by_training_bytes() -> None:
    """Oracle: the mean worked out by hand: (3 * 2 + 1 * 4) / 4 bits per byte."""

    def source(name: str, training_bytes: int, compressed: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            bytes=training_bytes,
            validation_bytes=800,
            validation_gzip_bytes=compressed,
            validation_xz_bytes=compressed // 2,
        )

    packed = SimpleNamespace(sources=[source("code", 300, 200), source("letters", 100, 400)])
    rates = compression(cast(PackedData, packed))
    assert rates["gzip -9"] == {"all": 2.5, "code": 2.0, "letters": 4.0}
    assert rates["xz -9e"] == {"all": 1.25, "code": 1.0, "letters": 2.0}


def test_table_names_who_is_behind_where(run: Path) -> None:
    """Oracle: the comparison of 2.5, 2.1 and 2.6 with the references, by hand."""
    rates = read_metrics(run / "metrics.jsonl").bits_per_byte
    assert losses_against(rates, REFERENCES) == {"xz -9e": ["all", "code"]}
    lines = table(rates, REFERENCES).splitlines()
    assert lines[2].split() == ["code", "2.100", "2.100", "1.900"]
    assert lines[-1] == "behind xz -9e on all sources, code"
    better = {who: {name: 9.0 for name in rates} for who in REFERENCES}
    assert table(rates, better).endswith("ahead of gzip -9 and xz -9e on every source")
    worse = {"xz -9e": {name: 0.1 for name in rates}}
    assert table(rates, worse).endswith("behind xz -9e on every source")


@given(st.lists(st.floats(-5, 20), min_size=1, max_size=50), st.integers(1, 10_000))
def test_smoothing_stays_between_the_losses(losses: list[float], stride: int) -> None:
    """Oracle: a weighted mean lies between its values; a constant loss is left as it is."""
    tokens = [stride * (index + 1) for index in range(len(losses))]
    smooth = smoothed(tokens, losses)
    assert all(min(losses) - 1e-9 <= mean <= max(losses) + 1e-9 for mean in smooth)
    assert smoothed(tokens, [3.0] * len(losses)) == pytest.approx([3.0] * len(losses))
