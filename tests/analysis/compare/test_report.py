"""Results, report and picture of comparisons whose runs follow a known law."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmnorm.analysis.compare.arms import read_arms, read_protocol
from llmnorm.analysis.compare.command import write
from llmnorm.analysis.compare.ledger import Record
from llmnorm.analysis.compare.plan import Horizons
from llmnorm.analysis.compare.plot import draw
from llmnorm.analysis.compare.report import page
from llmnorm.analysis.compare.results import results
from tests.running import SMOKE

ARMS = {"plain": [], "quick": ["model.norm=layer"], "shipped": ["optimizer.betas=[0.9,0.999]"]}
FACTOR, SLOWNESS, BETA = 1.3, 0.8, 0.12


def found(
    horizons: Horizons = "baseline",
    *,
    seeds: int = 3,
    lr_points: int = 5,
    both: bool = False,
    diverges: str = "",
) -> dict[str, Any]:
    """`quick` is worth 1.3 times the tokens at 0.8 of the speed, and seeds add the same to all."""
    protocol = read_protocol(
        read_arms(SMOKE, [], [[name, *words] for name, words in ARMS.items()]),
        baselines=["plain", "shipped"] if both else [],
        untuned=["shipped"],
        seeds=seeds,
        lr_points=lr_points,
        horizons=horizons,
    )
    gains = {"plain": 0.0, "quick": BETA * math.log(FACTOR), "shipped": -0.05}
    records: dict[str, Record] = {}
    while todo := [
        run
        for run in protocol.needed({key: r.final for key, r in records.items()})
        if run.key not in records
    ]:
        for run in todo:
            octaves = math.log2((run.lr or 3e-3) / 3e-3)
            loss = 3 + 0.03 * run.seed - gains[run.arm] - BETA * math.log(run.horizon)
            loss += 0.02 * octaves**2
            rate = 1000.0 * (SLOWNESS if run.arm == "quick" else 1)
            lost = run.key == diverges
            records[run.key] = Record(
                run=run.key,
                steps=protocol.steps_of(run),
                tokens=protocol.tokens_of(run),
                loss=None if lost else loss,
                bits_per_byte=None if lost else loss / 2,
                curve=[] if lost else [[1000 * k, loss + 1 / k] for k in range(1, 31)],
                tokens_per_second=None if lost else rate,
                place="CPU, 1 thread, 1 at a time",
                version="0",
            )
    return results(protocol, records, validation_tokens=900_000)


@pytest.mark.parametrize("horizons", ["baseline", "arms"])
def test_a_known_speed_up_is_reported(horizons: Horizons) -> None:
    """Oracle: the law that the losses were made by; both conversions agree on it."""
    result = found(horizons)
    quick = result["against"]["plain"]["quick"]
    assert quick["tokens"]["value"] == pytest.approx(FACTOR)
    assert quick["tokens"]["low"] == pytest.approx(FACTOR)
    assert quick["timing"]["seconds"]["value"] == pytest.approx(FACTOR * SLOWNESS)
    assert quick["timing"]["relative_speed"] == pytest.approx(SLOWNESS)
    equal = quick["timing"]["gap_at_equal_seconds"]["value"]
    assert equal == pytest.approx(BETA * math.log(FACTOR * SLOWNESS))
    assert quick["nats_for_e_times_the_length"] == pytest.approx(BETA)
    assert (quick["verdict"], quick["tokens"]["extrapolated"]) == ("better", False)
    assert result["against"]["plain"]["shipped"]["verdict"] == "worse"
    assert [len(arm["tuning"]) for arm in result["arms"].values()] == [5, 5, 0]
    assert result["arms"]["plain"]["lr"] == 3e-3 and not result["arms"]["plain"]["at_edge"]


def test_without_other_lengths_the_answer_is_the_gap(tmp_path: Path) -> None:
    """Oracle: the law's gap; no factor stands anywhere on the page."""
    result = found("none")
    quick = result["against"]["plain"]["quick"]
    assert quick["gap"]["value"] == pytest.approx(BETA * math.log(FACTOR))
    assert quick["verdict"] == "better" and math.isnan(quick["tokens"]["value"])
    write(result, tmp_path, "llmnorm compare base.yaml --horizons none")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    written = (tmp_path / "report.md").read_text()
    assert "**quick** is better: a gap in loss of +0.0315 [+0.0315, +0.0315]." in written
    assert "| quick | 0.003 | 3.0285 ± 0.0173 | +0.0315 [+0.0315, +0.0315] | - | - | - |" in written
    assert "so gaps in loss are not converted into factors." in written


def test_two_baselines_invert_each_other() -> None:
    """Oracle: the factor of A against B is one over that of B against A, as both have the slope."""
    against = found(both=True)["against"]
    one, other = against["plain"]["shipped"], against["shipped"]["plain"]
    assert one["tokens"]["value"] == pytest.approx(1 / other["tokens"]["value"])


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    """Oracle: the law's numbers, in the words of the page."""
    directory = tmp_path / "norms"
    directory.mkdir()
    write(found(), directory, "llmnorm compare base.yaml --arm quick")
    written = (directory / "report.md").read_text()
    for text in (
        "**quick** is better: plain needs 1.30 [1.30, 1.30] times the tokens of quick",
        "1.04 [1.04, 1.04] times the seconds",
        "| quick | 0.003 | 3.0285 ± 0.0173 | +0.0315 [+0.0315, +0.0315] | 1.30 [1.30, 1.30] |",
        "- not tuned, as written: shipped.",
        "| plain | 5 | 0.00075: 3.0800, 0.0015: 3.0200, **0.003: 3.0000**,",
        "| quick | 800 | 23,631 |",
        "![Losses, factors and learning rates of the arms](comparison.png)",
        "`model.norm=layer`",
    ):
        assert text in written, text
    result = json.loads((directory / "result.json").read_text())
    assert result["against"]["plain"]["quick"]["verdict"] == "better"
    rows = list(csv.DictReader((directory / "table.csv").open()))
    assert float(rows[0]["tokens_value"]) == pytest.approx(FACTOR)


def test_the_picture_names_what_it_shows(tmp_path: Path) -> None:
    """Oracle: the texts of the SVG, which matplotlib names in comments."""
    picture = tmp_path / "comparison.svg"
    draw(found(diverges="shipped/seed2-x1"), picture, "norms")
    texts = picture.read_text()
    for text in ("norms", "plain (baseline)", "quick", "shipped", "diverged", "1.30 [1.30, 1.30]"):
        assert f"<!-- {text} -->" in texts, text
    draw(found("arms", lr_points=1, seeds=1), picture, "norms")
    assert "Paired seeds" in picture.read_text()


def test_what_weakens_an_answer_is_noted() -> None:
    """Oracle: by hand."""
    one = found(seeds=1, lr_points=1)
    assert one["against"]["plain"]["quick"]["verdict"] == "one seed"
    assert any("one seed says nothing" in note for note in one["notes"])
    assert any("no learning rate was tuned" in note for note in one["notes"])
    assert "**quick**: one seed" in page(one, "a", "b", "c.png")
    lost = found(diverges="plain/lr0.003-seed2-x1")
    assert lost["against"]["plain"]["quick"]["verdict"] == "better"
    assert any("plain: diverged" in note for note in lost["notes"])
    assert "**quick** is better: plain diverged." in page(lost, "a", "b", "c.png")
    far = found("arms")["against"]["plain"]["shipped"]
    assert far["tokens"]["value"] == pytest.approx(math.exp(-0.05 / BETA))
    assert not far["tokens"]["extrapolated"]
