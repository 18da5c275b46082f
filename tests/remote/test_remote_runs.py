"""Runs whose directory is an address, against a real S3 server: killed, moved, cut off, refused."""

import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from llmnorm.config.manifest import MANIFEST
from llmnorm.remote.lease import Lease
from llmnorm.remote.objects import ObjectStore, open_store
from llmnorm.runs import remote_run
from tests.remote.served import Line, environment
from tests.running import PATIENCE, SMOKE, Child, assert_same_run, llmnorm

STEPS = 12
SETTINGS = (
    *(f"training.steps={STEPS}", "checkpoint.every=3", "evaluation.every=6"),
    *("evaluation.samples=0", "training.ema=0.9", "checkpoint.grace=1000"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """The run as it is without a store and without a stop."""
    run = tmp_path_factory.mktemp("whole") / "run"
    llmnorm("train", SMOKE, *SETTINGS, f"run_dir={run}", f"data.dir={smoke_data}")
    return run


@pytest.fixture
def begin(line: Line, smoke_data: Path, tmp_path: Path) -> Callable[..., Child]:
    """`begin(CONFIG, "key=value", ...)` -> a training child with a line to the store."""

    def start(*words: str | Path, before: Callable[[], None] | None = None) -> Child:
        command = ["train", *map(str, words), f"data.dir={smoke_data}"]
        log = tmp_path / f"log-{len(list(tmp_path.glob('log-*')))}.txt"
        return Child(command, log, environment(line.port), before)

    return start


def steps_of(store: ObjectStore) -> list[int]:
    """The steps with a manifest in the store."""
    names = [Path(name) for name in store.names("checkpoints")]
    return sorted(int(name.parent.name[5:]) for name in names if name.name == MANIFEST)


def wait_until(true: Callable[[], object], child: Child) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert child.process.is_alive() and time.monotonic() < end, child.log.read_text()
        time.sleep(0.02)


def slowly() -> None:
    """Steps that leave time to do something between them; how they compute is as it is."""
    from llmnorm.training import loop

    real = loop.step

    def slow(*arguments: object) -> object:
        time.sleep(0.15)
        return real(*arguments)  # type: ignore[arg-type]

    loop.step = slow  # type: ignore[assignment]


def test_a_run_that_moves_from_machine_to_machine_is_bit_equal(
    begin: Callable[..., Child], address: str, whole: Path, tmp_path: Path
) -> None:
    """Oracle: the run that was never stopped. Killed, begun with nothing, stopped, gone back."""
    store, first, second = open_store(address, "run_dir"), tmp_path / "first", tmp_path / "second"
    words = [SMOKE, *SETTINGS, f"run_dir={address}", f"checkpoint.local={first}"]
    child = begin(*words, before=slowly)
    wait_until(lambda: steps_of(store), child)
    child.process.kill()
    child.process.join()
    reached = max(steps_of(store))
    assert 3 <= reached < STEPS

    child = begin(address, f"checkpoint.local={second}", before=slowly)  # has nothing of it
    wait_until(lambda: max(steps_of(store)) > reached, child)
    os.kill(child.process.pid or 0, signal.SIGTERM)
    assert child.finish() == 143, child.log.read_text()
    assert f"fetching step {reached} (" in child.log.read_text()
    stopped = max(steps_of(store))
    assert store.read("PREEMPT") == f"{stopped}\n".encode()
    shutil.rmtree(second)

    child = begin(first)  # knows its address; the store is ahead of it
    assert child.finish() == 0, child.log.read_text()
    assert f"fetching step {stopped} (" in child.log.read_text() or stopped == STEPS
    assert_same_run(whole, first, STEPS)
    kept = steps_of(store)
    assert kept == [*(s for s in kept if s < STEPS), STEPS] and len(kept) == 2
    there = store.names()
    assert "PREEMPT" not in there and not [n for n in there if "run." in n or ".tmp" in n]
    for name in there:
        if not name.startswith("lease/"):
            assert store.read(name) == (first / name).read_bytes(), name


def test_a_store_that_is_away_in_the_middle_of_a_save(
    begin: Callable[..., Child], address: str, line: Line, whole: Path, tmp_path: Path
) -> None:
    """Oracle: the run that was never disturbed; every step is trained while nobody answers."""
    store, local = open_store(address, "run_dir"), tmp_path / "run"
    child = begin(SMOKE, *SETTINGS, f"run_dir={address}", f"checkpoint.local={local}")
    wait_until(lambda: (local / "checkpoints" / "step_00000003").is_dir(), child)
    line.mode, line.after = "cut", line.sent + 300_000  # a checkpoint has a million bytes
    wait_until((local / "DONE").exists, child)
    line.mode = "closed"  # also where everything was up before the cut
    wait_until(lambda: "the run goes on" in child.log.read_text(), child)
    line.mode = "open"
    assert child.finish() == 0, child.log.read_text()
    text = child.log.read_text()
    assert "does not answer" in text and "answers again" in text
    assert f"all of it is in {address}" in text
    shutil.rmtree(local)
    child = begin(address, f"checkpoint.local={tmp_path / 'other'}")
    assert child.finish() == 0 and "is finished (step 12)" in child.log.read_text()
    assert_same_run(whole, tmp_path / "other", STEPS)
    assert steps_of(store) == [9, 12]


def impatient() -> None:
    """Patience is short, and counts from when the client has given its own tries up."""
    remote_run.PATIENCE = 2.0
    remote_run.PART = 0.5
    real = remote_run.RemoteRun._wait_for_all

    def wait_for_all(self: remote_run.RemoteRun) -> None:
        while self._upload is not None and self._upload.problem is None:
            time.sleep(0.05)
        real(self)

    remote_run.RemoteRun._wait_for_all = wait_for_all  # type: ignore[method-assign]


def test_a_store_that_stays_away_is_told_of_at_the_end(
    begin: Callable[..., Child], address: str, line: Line, tmp_path: Path
) -> None:
    """Oracle: the files of the directory; the command that is named then copies them up."""
    store, local = open_store(address, "run_dir"), tmp_path / "run"
    words = (SMOKE, *SETTINGS, f"run_dir={address}", f"checkpoint.local={local}")
    child = begin(*words, before=impatient)
    wait_until((local / "metrics.jsonl").exists, child)
    line.mode = "closed"
    assert child.finish() == 2, child.log.read_text()
    text = child.log.read_text()
    assert f"llmnorm: error: {address}: " in text and " did not get up: does not answer" in text
    assert f"copying up to {address}: " in text and (local / "DONE").exists()
    (command,) = {part.split("\n")[0] for part in text.split("this copies them up: ")[1:]}
    assert command == f"llmnorm train {local}"
    line.mode = "open"
    child = begin(local)
    assert child.finish() == 0, child.log.read_text()
    assert steps_of(store) == [9, 12] and store.read("DONE") == b"12\n"


def short_lease() -> None:
    Lease.__init__.__kwdefaults__["seconds"] = 5.0
    slowly()


def test_a_second_machine_is_refused(
    begin: Callable[..., Child], address: str, tmp_path: Path
) -> None:
    """Oracle: the exit codes, and the process that the second one names."""
    words = (SMOKE, *SETTINGS, "training.steps=1000", f"run_dir={address}")
    first = begin(*words, f"checkpoint.local={tmp_path / 'first'}", before=short_lease)
    wait_until(lambda: steps_of(open_store(address, "run_dir")), first)
    second = begin(*words, f"checkpoint.local={tmp_path / 'second'}", before=short_lease)
    assert second.finish() == 2
    text = second.log.read_text()
    assert f"process {first.process.pid} on " in text and "is training in this run" in text
    assert not (tmp_path / "second").exists()
    assert first.process.is_alive()
    first.process.kill()
    first.process.join()


def reset_auth(server: int, unchecked: str) -> None:
    """Tell the server how many requests it answers before it looks at credentials."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server}/moto-api/reset-auth",
        data=unchecked.encode(),
        headers={"Content-Type": "text/plain"},
    )
    urllib.request.urlopen(request).close()


def test_wrong_credentials_are_one_line(
    begin: Callable[..., Child], address: str, server: int, tmp_path: Path
) -> None:
    """Oracle: the server's own refusal; nothing is made here."""
    reset_auth(server, "0")
    try:
        child = begin(SMOKE, f"run_dir={address}", f"checkpoint.local={tmp_path / 'run'}")
        assert child.finish() == 2, child.log.read_text()
    finally:
        reset_auth(server, "inf")
    lines = [text for text in child.log.read_text().splitlines() if text.startswith("llmnorm: ")]
    assert len(lines) == 1 and f"llmnorm: error: {address}: access was refused (" in lines[0]
    assert "are the credentials right" in lines[0]
    assert not (tmp_path / "run").exists()


def test_what_does_not_belong_together_is_refused(
    address: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line, exit code 2, and the store as it was."""
    from llmnorm import cli

    def refused(*words: str | Path) -> str:
        assert cli.main([str(word) for word in words]) == 2
        (line,) = [t for t in capsys.readouterr().err.splitlines() if "llmnorm: error" in t]
        return line.removeprefix("llmnorm: error: ")

    store = open_store(address, "run_dir")
    to = partial(refused, "train", SMOKE, f"run_dir={address}")
    assert to("training.steps=5", "--dry-run", "run_dir=s3://no-bucket/x").endswith(
        "there is no bucket no-bucket"
    )
    assert refused("train", address) == f"{address}: is no run (it has no config.yaml)"
    store.write("notes.txt", b"mine")
    local = f"checkpoint.local={tmp_path / 'run'}"
    assert "holds other files and no config.yaml" in to(local)
    store.write("config.yaml", (whole / "config.yaml").read_bytes())
    assert "training.ema" in to(local) and not (tmp_path / "run" / "metrics.jsonl").exists()
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(whole, tmp_path / "run")
    fresh = open_store(f"{address}-fresh", "run_dir")
    assert "training.ema" in to(local, f"run_dir={fresh.address}")  # another run of this machine
    assert [*fresh.names()] == ["lease/00000001.json"]
    assert not (tmp_path / "run" / "run.remote").exists()
    nothing = f"checkpoint.local={tmp_path / 'nothing'}"
    assert "data.sources.0.path" in to(nothing, f"run_dir={fresh.address}", "data.sources.0.path=x")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "run" / "run.remote").write_text("s3://bucket/another\n")
    assert "is copied up to s3://bucket/another, not to" in to(local)
    (tmp_path / "run" / "run.remote").write_text("nonsense\n")
    assert "run.remote: holds no address" in to(local)
    assert set(store.names()) - {"notes.txt", "config.yaml"} <= {
        f"lease/{number:08d}.json" for number in range(9)
    }
