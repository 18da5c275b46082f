"""A run's JSON lines: what is whole is used, what is lost is told, nothing whole is deleted."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import append_whole, plan_cut, read_lines
from llmnorm.runs.metrics import keep_until
from llmnorm.runs.record import read_metrics

STEPS = 40
PLACES = 200


def metrics(steps: int = STEPS) -> list[dict[str, Any]]:
    """Lines as a run writes them: steps, and an evaluation after every tenth."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 64 * step, "loss": 3.0 + 1 / step, "grad_norm": 0.5}
        lines.append(line | {"lr": 1e-3, "tokens_per_second": 9.5, "seconds": 0.25 * step})
        if step % 10 == 0:
            figures = {"loss": 3.5, "sources": {"prose": {"loss": 3.5, "bits_per_byte": 2.0}}}
            lines.append({"step": step, "tokens": 64 * step, "validation": figures, "seconds": 1.0})
    return lines


def samples(steps: int = STEPS) -> list[dict[str, Any]]:
    """Lines of texts with every character that some reader takes for the end of a line."""
    text = 'a\u2028b\u2029c\x85d\x0be"{"step": 7, '
    each = [{"prompt": text, "continuation": "\N{SNOWMAN}" * 9}]
    return [{"step": step, "tokens": step, "samples": each} for step in range(1, steps + 1)]


def written(path: Path, lines: list[dict[str, Any]]) -> list[bytes]:
    """Write lines; returns them as bytes."""
    raw = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
    path.write_bytes(b"".join(raw))
    return raw


def damaged(content: bytes, kind: str, chance: random.Random) -> tuple[bytes, int, int]:
    """Content with one place damaged, and the interval of the original that the damage touched."""
    start = chance.randrange(len(content))
    length = min(chance.choice([1, 1, 5, 100, 700]), len(content) - start)
    before, touched, after = (
        content[:start],
        content[start : start + length],
        content[start + length :],
    )
    match kind:
        case "flip":
            bits = bytes(byte ^ (1 << chance.randrange(8)) for byte in touched)
            return before + bits + after, start, start + length
        case "nul":
            return before + bytes(length) + after, start, start + length
        case "cut":
            return before + after, start, start + length
    return before + chance.randbytes(length) + touched + after, start, start


@pytest.mark.parametrize("kind", ["flip", "nul", "cut", "insert"])
@pytest.mark.parametrize("lines", [metrics(), samples()], ids=["metrics", "samples"])
def test_whole_lines_survive_damage_anywhere(
    tmp_path: Path, lines: list[dict[str, Any]], kind: str
) -> None:
    """Oracle: the lines that the damage did not touch; 200 places, seeded by the case's name."""
    path = tmp_path / "metrics.jsonl"
    raw = written(path, lines)
    content, chance = path.read_bytes(), random.Random(f"{kind} {len(raw)} {raw[0]!r}")
    for _ in range(PLACES):
        path.unlink()
        broken, start, end = damaged(content, kind, chance)
        path.write_bytes(broken)
        plan = plan_cut(path, STEPS)
        notes = plan.notes()
        plan.apply()
        found = path.read_bytes().split(b"\n")[:-1]
        at, untouched, hurt = 0, [], []
        for line in raw:
            # An insertion touches the line that it stands in; between two lines, neither.
            body = (at, at + len(line) - 1)
            hit = start < body[1] and end > body[0] if end > start else body[0] < start < body[1]
            (hurt if hit else untouched).append(line[:-1])
            at += len(line)
        assert [line for line in found if line in untouched] == untouched
        assert all(line in broken for line in found), "a line that was never there"
        lost = [line for line in hurt if line not in found]
        # A flipped digit leaves a line that is whole but for its meaning: nobody can tell.
        if lost and not any(_readable(line) and line not in raw for line in found):
            gone = end == len(content) and kind == "cut"  # up to the end: only the run can tell
            boundary = kind == "cut" and not plan.damaged and not plan.unfinished
            assert notes or gone or boundary, (kind, start, end)
        if plan.damaged:
            kept = plan.aside.read_bytes()
            assert all(piece.rstrip(b"\n") in kept for _, piece in plan.damaged)
            plan.aside.unlink()
        assert all(_readable(line) for line in found)
        again = plan_cut(path, STEPS)
        assert not again.damaged and not again.notes()


def _readable(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


def test_a_bad_line_in_the_middle_is_kept_aside_and_told(tmp_path: Path) -> None:
    """Oracle: every other line, byte by byte; line 21 is overwritten."""
    path = tmp_path / "metrics.jsonl"
    raw = written(path, metrics())
    bad = bytes(len(raw[20]) - 1) + b"\n"
    path.write_bytes(b"".join([*raw[:20], bad, *raw[21:]]))
    plan = plan_cut(path, STEPS)
    plan.apply()
    assert path.read_bytes() == b"".join(raw[:20] + raw[21:])
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == bad
    assert plan.notes() == [
        f"{path}: line 21 is damaged and is kept in metrics.damaged.jsonl; whole lines stay"
    ]


def test_a_file_without_damage_is_not_written(tmp_path: Path) -> None:
    """Oracle: the file's number, and that nothing else is in the directory."""
    path = tmp_path / "metrics.jsonl"
    written(path, metrics())
    before = path.stat()
    plan_cut(path, STEPS).apply()
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_steps_past_the_checkpoint_go_and_a_torn_end_with_them(tmp_path: Path) -> None:
    """Oracle: by hand. A torn line past the checkpoint is what a kill leaves: no word about it."""
    path = tmp_path / "metrics.jsonl"
    raw = written(path, metrics(20))
    path.write_bytes(b"".join(raw) + b'{"step": 21, "lo')
    plan = plan_cut(path, 15)
    assert plan.notes() == [] and [entry.step for entry in plan.past][0] == 16
    plan.apply()
    assert path.read_bytes() == b"".join(raw[:16])
    path.write_bytes(b"".join(raw[:16])[:-9])
    assert plan_cut(path, 15).notes() == [f"{path}: the last line has no end and is dropped"]
    path.write_bytes(b"".join(raw[:16])[:-1])  # whole, but for the end of the line
    plan_cut(path, 15).apply()
    assert path.read_bytes() == b"".join(raw[:16])


def test_a_step_that_a_damage_raised_is_kept_aside(tmp_path: Path) -> None:
    """Oracle: by hand; step 12 reads 92, though 13 follows."""
    path = tmp_path / "metrics.jsonl"
    raw = written(path, metrics(20))
    wrong = raw[12].replace(b'"step": 12', b'"step": 92')
    path.write_bytes(b"".join([*raw[:12], wrong, *raw[13:]]))
    plan = plan_cut(path, 20)
    assert [number for number, _ in plan.damaged] == [13]
    plan.apply()
    assert path.read_bytes() == b"".join(raw[:12] + raw[13:])


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b'{"step": "x"}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"loss": 2.0}',
        b"\xff\xfe",
        b"null",
        b'{"step": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_lines_that_are_no_records_are_damage(tmp_path: Path, line: bytes) -> None:
    """Oracle: the two lines around it."""
    path = tmp_path / "metrics.jsonl"
    raw = written(path, metrics(2))
    path.write_bytes(raw[0] + line + b"\n" + raw[1])
    found = read_lines(path)
    assert [entry.step for entry in found.entries] == [1, 2]
    assert [number for number, _ in found.damaged] == [2]
    record = read_metrics(path)
    assert record.training["step"] == [1, 2]
    assert record.damaged == f"{path}: line 2 is damaged"


def test_null_and_what_older_versions_wrote_for_it_are_left_out(tmp_path: Path) -> None:
    """Oracle: the steps whose loss is a number."""
    path = tmp_path / "metrics.jsonl"
    lines = metrics(4)
    lines[1] |= {"loss": None, "not_finite": {"loss": "nan"}}
    lines[2] |= {"loss": float("nan")}
    written(path, lines)
    record = read_metrics(path)
    assert record.training["step"] == [1, 4] and record.damaged is None


def test_a_directory_or_a_pipe_is_one_line(tmp_path: Path) -> None:
    """Oracle: the message names the file and its kind; neither is waited for."""
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(InputError, match=r"metrics.jsonl: is a directory, not a file"):
        plan_cut(path, 3)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"metrics.jsonl: is a named pipe, not a file"):
        plan_cut(path, 3)
    path.unlink()
    assert plan_cut(path, 3).kept == []


def test_samples_of_an_evaluation_without_its_line_are_made_again(tmp_path: Path) -> None:
    """Oracle: by hand; a kill came between samples.jsonl and metrics.jsonl."""
    run = RunDirectory(tmp_path)
    lines = metrics(20)
    written(run.metrics, lines)
    written(run.samples, [{"step": s, "tokens": s, "samples": []} for s in (10, 20)])
    assert keep_until(run, 20).validation_loss == 3.5
    assert [entry.step for entry in keep_until(run, 20).samples.kept] == [10, 20]
    written(run.metrics, lines[:-1])
    there = keep_until(run, 20)
    assert there.validation_loss is None
    assert [entry.step for entry in there.samples.kept] == [10]


def test_a_kill_while_a_file_is_cut_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the old file; the rename fails."""
    path = tmp_path / "metrics.jsonl"
    raw = written(path, metrics(20))
    bad = b"x\n"
    path.write_bytes(b"".join([raw[0], bad, *raw[1:]]))
    old = path.read_bytes()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", dies)
        plan_cut(path, 20).apply()
    assert path.read_bytes() == old
    shutil.copy(tmp_path / "metrics.damaged.jsonl", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bad


def test_lines_are_appended_once_and_a_torn_one_is_removed(tmp_path: Path) -> None:
    """Oracle: by hand; the second call was killed in the middle of its last line."""
    path = tmp_path / "metrics.repeated.jsonl"
    append_whole(path, [])
    assert not path.exists()
    append_whole(path, [b"a", b"b"])
    with path.open("ab") as file:
        file.write(b"c\nd")
    append_whole(path, [b"b", b"c", b"d1"])
    assert path.read_bytes() == b"a\nb\nc\nd1\n"
    before = path.stat().st_mtime_ns
    append_whole(path, [b"d1", b"a"])
    assert path.stat().st_mtime_ns == before
