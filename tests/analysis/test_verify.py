"""`llmnorm doctor RUN` says what is whole, what is lost, and what to type; it changes nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmnorm import cli
from tests.running import llmnorm


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The smoke run (steps 4, 8 and 12) to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


def contents(directory: Path) -> dict[str, bytes]:
    files = [p for p in directory.rglob("*") if p.is_file() and not p.is_symlink()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def doctor(capsys: pytest.CaptureFixture[str], run: Path) -> tuple[int, str, str]:
    capsys.readouterr()
    before = contents(run)
    code = cli.main(["doctor", str(run)])
    assert contents(run) == before
    said = capsys.readouterr()
    assert said.err.count("\n") == (1 if code else 0), said.err
    return code, said.out, said.err


def test_a_whole_run_is_whole(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: what the run was made with."""
    code, out, _ = doctor(capsys, copy)
    assert code == 0 and "nothing is lost" in out
    for line in ("config.yaml ", "step_00000004", "step_00000012", "metrics.jsonl ", "data "):
        assert any(line in text and "whole" in text for text in out.splitlines()), line
    assert f"go on:  llmnorm train {copy} (from step 12)" in out


def flipped(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        file = run / name
        content = bytearray(file.read_bytes())
        content[-3] ^= 4
        file.write_bytes(content)

    return change


def line_lost(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    lines[2] = "\0" * 20
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def all_damaged(run: Path) -> None:
    for step in (4, 8, 12):
        os.truncate(run / f"checkpoints/step_{step:08d}/MANIFEST.json", 10)


NEWEST = "checkpoints/step_00000012"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights": (
        flipped(f"{NEWEST}/rank_00000.safetensors"),
        NEWEST,
        "(from step 8; the steps up to 12 are trained again)",
    ),
    "a line": (line_lost, "metrics.jsonl", "line 3 is damaged"),
    "the tokenizer": (
        lambda run: (run / "tokenizer/tokenizer.json").unlink(),
        "tokenizer",
        "go on:  llmnorm train",
    ),
    "every checkpoint": (all_damaged, "step_00000004", "begin anew:  llmnorm train"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints", "begin anew"),
    "a file in their place": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
        "checkpoints",
        "is no directory",
    ),
    "the settings": (
        lambda run: (run / "config.yaml").write_text("a: [", encoding="utf-8"),
        "config.yaml",
        "the weights can be used as they are:  llmnorm export",
    ),
    "a pipe": (
        lambda run: ((run / "metrics.jsonl").unlink(), os.mkfifo(run / "metrics.jsonl")),
        "metrics.jsonl",
        "is a named pipe",
    ),
}


@pytest.mark.parametrize(("damage", "name", "what"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_lost_is_named(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    name: str,
    what: str,
) -> None:
    """Oracle: damage done by hand; exit code 2 and the name of what is lost."""
    damage(copy)
    code, out, err = doctor(capsys, copy)
    assert code == 2 and what in out
    assert f"{copy}: lost: " in err and name in err


def test_the_command_that_it_prints_goes_on(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the run itself, which then is whole again."""
    flipped(f"{NEWEST}/rank_00000.safetensors")(copy)
    _, out, _ = doctor(capsys, copy)
    words = out.split("llmnorm train ")[1].split(" (from")[0]
    llmnorm("train", words, "training.steps=13", f"run_dir={copy}")
    steps = [json.loads(x)["step"] for x in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 13
    assert doctor(capsys, copy)[0] == 0


def test_prepared_data_is_read_too(
    copy: Path, smoke_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a byte of the tokens that was flipped by hand, its size kept."""
    data = shutil.copytree(smoke_data, tmp_path / "data")
    config = (copy / "config.yaml").read_text(encoding="utf-8")
    (copy / "config.yaml").write_text(config.replace(str(smoke_data), str(data)), encoding="utf-8")
    assert doctor(capsys, copy)[0] == 0
    for tokens in data.glob("packed/*/prose/train-*.tokens.npy"):
        flipped(tokens.name)(tokens.parent)
    code, out, err = doctor(capsys, copy)
    assert code == 2 and "lost: data" in err
    assert f"prepare the data again:  llmnorm data {copy}" in out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: an empty directory."""
    assert "is no run directory" in doctor(capsys, tmp_path)[2]
