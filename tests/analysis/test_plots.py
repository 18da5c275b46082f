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

from llmnorm.analysis.compression import compression, losses_against, verdict
from llmnorm.analysis.plots import draw, names, plot
from llmnorm.data.packed import PackedData
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.record import read_metrics, smoothed

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
        record |= {"seconds": 10.0 * step, "tokens_per_second": 10.0}
        lines.append({**record, "loss": 2 + 4 * math.exp(-step / 8)})
        if step % 20 == 0:
            rates = {"code": 2.5 - step / 100, "letters": 3.0 - step / 100}
            sources = {
                name: {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": rate}
                for name, rate in rates.items()
            }
            figures = {"loss": 2.1, "perplexity": 8.2, "bits_per_byte": 2.9 - step / 100}
            validation = {**figures, "sources": sources}
            place = {"step": step, "tokens": 100 * step, "seconds": 10.0 * step}
            lines.append({**place, "validation": validation})
    directory = tmp_path / "small-run"
    directory.mkdir()
    (directory / "config.yaml").write_text("{}")
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return directory


def drawn(picture: Path) -> str:
    """The SVG, in which matplotlib names every text that it draws in a comment."""
    ElementTree.parse(picture)
    return picture.read_text()


def test_the_picture_of_a_run_shows_every_curve_and_source(run: Path) -> None:
    """Oracle: the texts of the drawn SVG."""
    picture = run / "plots" / "loss.svg"
    draw({"small-run": read_metrics(run / "metrics.jsonl")}, picture, REFERENCES)
    texts = drawn(picture)
    for text in (
        "small-run",
        "training (smoothed)",
        "validation (last: 2.100)",
        "training tokens",
        "training time (minutes)",
        "Learning rate",
        "Gradient norm",
        "Throughput (tokens a second)",
        "all sources",
        "letters",
        "gzip -9",
        "Bits per byte: behind xz -9e on all sources, code",
        "2.60",  # the last evaluation's bits per byte of the letters, and gzip's in all
    ):
        assert f"<!-- {text} -->" in texts, text
    assert "behind gzip" not in texts


def test_scores_of_tasks_have_a_row_of_their_own(run: Path) -> None:
    """Oracle: the texts of the drawn SVG; the points of the record, read by hand."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "validation" in line]
    for number, line in enumerate(scored):
        line["tasks"] = {"weather": {"acc": number / 9, "acc_stderr": 0.1}, "tides": {"f1": 0.5}}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    record = read_metrics(run / "metrics.jsonl")
    tokens = [float(line["tokens"]) for line in scored]
    assert record.tasks == {
        "weather acc": (tokens, [number / 9 for number in range(len(tokens))]),
        "tides f1": (tokens, [0.5] * len(tokens)),
    }
    picture = run / "plots" / "loss.svg"
    plot([run], picture)
    text = drawn(picture)
    for expected in ("Scores on benchmark tasks", "weather acc", "tides f1"):
        assert f"<!-- {expected} -->" in text


def test_several_runs_share_a_picture_and_are_told_by_name(run: Path, capsys) -> None:
    """Oracle: the texts of the SVG; one run has no evaluation yet."""
    other = run.parent / "other"
    other.mkdir()
    (other / "config.yaml").write_text("{}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(x for x in lines if "validation" not in x))
    plot([run, other], run.parent / "both.svg")
    assert capsys.readouterr().out == f"plot: {run.parent / 'both.svg'}\n"
    texts = drawn(run.parent / "both.svg")
    for text in ("small-run", "other", "training (smoothed)", "validation", "2.10"):
        assert f"<!-- {text} -->" in texts, text
    plot([other], run.parent / "one.svg")
    assert "<!-- not evaluated yet -->" in drawn(run.parent / "one.svg")


def test_the_load_of_experts_has_a_picture_of_its_own(run: Path, capsys) -> None:
    """Oracle: the texts of the SVG; of two runs one has measured loads, in two layers of three."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    load = {"expert_load": [0.7, 0.2, 0.1]}
    lines = [
        line | {"health": {"0": {"entropy": 0.5}, "1": load, "3": load}}
        if line["step"] % 10 == 0 and "loss" in line
        else line
        for line in lines
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    record = read_metrics(run / "metrics.jsonl")
    assert [*record.expert_load] == ["1", "3"] and record.damaged is None
    assert record.expert_load["3"][1] == (2000, [0.7, 0.2, 0.1])
    plot([run], run / "one.svg")
    assert capsys.readouterr().out == f"plot: {run}/one.svg\nplot: {run}/one-experts.svg\n"
    texts = drawn(run / "one-experts.svg")
    for text in ("Load of the experts: small-run", "layer 1", "layer 3", "expert"):
        assert f"<!-- {text} -->" in texts, text
    assert "layer 0" not in texts


def test_more_runs_than_colours_are_drawn(run: Path) -> None:
    """Oracle: every name stands in the legend."""
    record = read_metrics(run / "metrics.jsonl")
    draw({f"run {i}": record for i in range(30)}, run / "many.svg")
    texts = drawn(run / "many.svg")
    assert all(f"<!-- run {i} -->" in texts for i in range(30))


def test_names_are_as_long_as_needed() -> None:
    """Oracle: by hand."""

    def named(*paths: str) -> list[str]:
        return names([RunDirectory(Path(path)) for path in paths])

    assert named("/r/a", "/r/b") == ["a", "b"]
    assert named("/r/x/a", "/r/y/a", "/r/y/b") == ["x/a", "y/a", "y/b"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "there is no such file"),
        ("", "holds no loss yet"),
        (
            '{"step": 1, "tokens": 5, "seconds": 1, "loss": NaN, "grad_norm": 1, "lr": 1, '
            '"tokens_per_second": 1}\n',
            "holds no loss yet",
        ),
        ('{"step": 1, "tok', "holds no loss yet"),
        ('{"step": 1, "tok\n{"step": 2}\n', "lines 1, 2 are damaged"),
        ('{"step": 1, "loss": 2.0}\n', "line 1 is damaged"),
        ("[1, 2]\n", "line 1 is damaged"),
        (b"\xff\xfe\x00", "holds no loss yet"),
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
        read_metrics(metrics)
    assert str(error.value).startswith(str(metrics)) and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_picture_that_cannot_be_written_is_named(run: Path) -> None:
    """Oracle: a file where its directory should be, and a suffix that is no picture's."""
    record = read_metrics(run / "metrics.jsonl")
    for output in (run / "metrics.jsonl" / "loss.png", run / "loss.txt"):
        with pytest.raises(InputError, match="cannot be written"):
            draw({"run": record}, output)
    assert not (run / "loss.txt").exists()


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


def test_the_verdict_names_who_is_behind_where(run: Path) -> None:
    """Oracle: the comparison of 2.5, 2.1 and 2.6 with the references, by hand."""
    rates = read_metrics(run / "metrics.jsonl").bits_per_byte
    assert losses_against(rates, REFERENCES) == {"xz -9e": ["all", "code"]}
    assert verdict(rates, REFERENCES) == "behind xz -9e on all sources, code"
    better = {who: {name: 9.0 for name in rates} for who in REFERENCES}
    assert verdict(rates, better) == "ahead of gzip -9 and xz -9e on every source"
    worse = {"xz -9e": {name: 0.1 for name in rates}}
    assert verdict(rates, worse) == "behind xz -9e on every source"


@given(st.lists(st.floats(-5, 20), min_size=1, max_size=50), st.integers(1, 10_000))
def test_smoothing_stays_between_the_losses(losses: list[float], stride: int) -> None:
    """Oracle: a weighted mean lies between its values; a constant loss is left as it is."""
    tokens = [stride * (index + 1) for index in range(len(losses))]
    smooth = smoothed(tokens, losses)
    assert all(min(losses) - 1e-9 <= mean <= max(losses) + 1e-9 for mean in smooth)
    assert smoothed(tokens, [3.0] * len(losses)) == pytest.approx([3.0] * len(losses))
