"""A run in three trackers at once, killed and resumed; each is read back by its own means.

What is killed is a fork that has torch imported; what resumes it is a real command.
"""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmnorm.config.tree import RunConfig
from llmnorm.runs import trackers
from llmnorm.runs.directory import RunDirectory
from tests.running import ROOT, SMOKE, Child

INSTALLED = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(len(INSTALLED) < 3, reason="needs the extra track")


class Killed(NamedTuple):
    """A run that was killed between two checkpoints and then finished."""

    run: RunDirectory
    trackio: Path  # where trackio keeps its database
    lines: list[dict[str, Any]]  # metrics.jsonl as it is in the end


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Killed:
    """Twelve steps, a checkpoint every five; killed after the seventh or a later one."""
    place = tmp_path_factory.mktemp("trackers")
    run = RunDirectory(place / "watched")
    settings = [
        f"run_dir={run.path}",
        f"data.dir={smoke_data}",
        "training.steps=12",
        "checkpoint.every=5",
        "evaluation.every=6",
        "evaluation.samples=1",
        "evaluation.sample_tokens=3",
        "logging.project=tests",
        f"logging.trackers=[{','.join(INSTALLED)}]",
    ]
    # Offline, and nothing outside this directory.
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(place / "trackio"),
        "HOME": str(place),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "llmnorm", "train", str(SMOKE), *settings]
    first = Child(["train", str(SMOKE), *settings], place / "log.txt", environment)
    while not run.metrics.exists() or '"step": 7,' not in run.metrics.read_text():
        assert first.process.is_alive(), first.log.read_text()
        time.sleep(0.001)
    first.process.kill()
    assert first.finish() == -signal.SIGKILL
    assert '"step": 12,' not in run.metrics.read_text(), "killed too late to show anything"
    ids = json.loads(run.tracker.read_text())
    with first.log.open("a") as log:
        code = subprocess.run(
            command, env=os.environ | environment, stdout=log, stderr=log
        ).returncode
    assert code == 0 and run.done.exists(), (place / "log.txt").read_text()
    assert json.loads(run.tracker.read_text()) == ids, "another chart than before"
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    return Killed(run, place / "trackio", lines)


def expected(killed: Killed, key: str) -> dict[int, float]:
    """Step -> figure of `key` over the whole run, from metrics.jsonl."""
    return {line["step"]: line[key] for line in killed.lines if key in line}


def test_tensorboard_shows_one_unbroken_curve(killed: Killed) -> None:
    """Oracle: metrics.jsonl, through TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(killed.run.path / "tensorboard"))
    reader.Reload()
    for key in ("loss", "grad_norm", "lr"):
        events = reader.Scalars(f"train/{key}")
        assert [event.step for event in events] == list(range(1, 13))
        shown = {event.step: event.value for event in events}
        assert shown == pytest.approx(expected(killed, key), rel=1e-6)  # float32 files
    assert [e.step for e in reader.Scalars("validation/prose/bits_per_byte")] == [6, 12]
    tags = reader.Tags()["tensors"]
    assert any(tag.startswith("samples/0") for tag in tags) and any("config" in t for t in tags)


def test_wandb_offline_holds_one_run(killed: Killed) -> None:
    """Oracle: metrics.jsonl; each directory that would be synced is read record by record."""
    from wandb.proto import wandb_internal_pb2

    files = sorted(killed.run.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2  # a process each
    wanted = json.loads(killed.run.tracker.read_text())["wandb"]
    shown: dict[int, float] = {}
    for file in files:
        for data in log_records(file):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                assert (record.run.run_id, record.run.project) == (wanted, "tests")
                assert record.run.display_name == "watched"
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "train/loss" in items:
                shown[json.loads(items["_step"])] = json.loads(items["train/loss"])
    assert shown == pytest.approx(expected(killed, "loss"), rel=1e-12)


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log (blocks of 32 KiB), which a .wandb file is."""
    data, at, record = path.read_bytes(), 7, b""  # ":W&B", magic number, version
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # a block's end has no room for a header
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_trackio_holds_one_run(killed: Killed) -> None:
    """Oracle: metrics.jsonl, through trackio's own storage in a process of its own."""
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps({run: S.get_logs('tests', run) for run in S.get_runs('tests')}))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(killed.trackio)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    ((name, logs),) = json.loads(done.stdout.splitlines()[-1]).items()
    assert name == json.loads(killed.run.tracker.read_text())["trackio"]
    points = [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log]
    shown = dict(points)
    assert len(points) == len(shown), "a step that was sent twice"
    assert shown == pytest.approx(expected(killed, "loss"), rel=1e-12)


def test_a_tracker_that_fails_is_reported_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the other tracker goes on; the broken one is asked once and named once."""
    from torch.utils.tensorboard import SummaryWriter

    config = RunConfig.model_validate(
        {
            "data": {"sources": [{"name": "a", "path": "a.txt"}]},
            "training": {"steps": 1},
            "logging": {"trackers": ["tensorboard"]},
        }
    )
    asked = []

    def broken(self: SummaryWriter, tag: str, *_: Any, **__: Any) -> None:
        asked.append(tag)
        raise RuntimeError("the server\nis gone")

    monkeypatch.setattr(SummaryWriter, "add_scalar", broken)
    with trackers.Trackers(
        config, RunDirectory(tmp_path), start=0, whole=0, enabled=True
    ) as opened:
        for step in (1, 2):
            opened.log({"step": step, "loss": 1.0})
    assert asked == ["train/loss"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "tracker tensorboard failed and gets nothing more; the run goes on, and metrics.jsonl has "
        "every line: the server is gone"
    ]


def test_what_a_tracker_is_told_of_a_line() -> None:
    """Oracle: by hand."""
    assert trackers.values({"step": 3, "loss": 2.0, "mfu": None, "skipped_in_a_row": 0}) == {
        "train/loss": 2.0
    }
    line = {"step": 3, "validation": {"loss": 1.0, "sources": {"prose": {"loss": 0.5}}}}
    assert trackers.values(line) == {"validation/loss": 1.0, "validation/prose/loss": 0.5}
    line |= {"tasks": {"weather": {"acc": 0.5}}, "ema_tasks": {"weather": {"acc": 0.75}}}
    assert trackers.values(line) == {
        "validation/loss": 1.0,
        "validation/prose/loss": 0.5,
        "tasks/weather/acc": 0.5,
        "ema_tasks/weather/acc": 0.75,
    }
    line = {"step": 3, "samples": [{"prompt": "The", "continuation": " end"}]}
    assert trackers.values(line) == {"samples/0": "The →  end"}
    line["samples"][0]["reference"] = "end"
    assert trackers.values(line) == {"samples/0": "The →  end (end)"}
