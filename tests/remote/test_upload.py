"""What goes up of a run directory, in which order, and what comes down, with a real S3 server."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.checkpoints.store import Keep
from llmnorm.config.manifest import MANIFEST
from llmnorm.part import InputError
from llmnorm.remote.objects import ObjectStore, StoreError, open_store
from llmnorm.remote.sender import LARGE, Sender
from llmnorm.runs import upload
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.download import bring_down
from llmnorm.runs.upload import There, Upload
from tests.remote.served import Line

KEEP = Keep(2, None, True)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "LOOK", 0.02)
    monkeypatch.setattr(upload, "EVERY", 0.02)
    monkeypatch.setattr(upload, "LONGEST", 0.1)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run directory with settings and a line of metrics."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text("# the settings\n")
    run.metrics.write_text('{"step": 0}\n')
    return run


class Watched(ObjectStore):
    """A store that notes the names of what is sent, written and removed."""

    def __init__(self, of: ObjectStore) -> None:
        super().__init__(of.address, of._files, of._parts)
        self.calls: list[str] = []

    def send(self, path: Path, name: str) -> None:
        super().send(path, name)
        self.calls.append(name)

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        self.calls.append(name)


@pytest.fixture
def store(address: str) -> Watched:
    return Watched(open_store(address, "run_dir"))


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((8, 8), float(step))}


def up(run: RunDirectory, store: ObjectStore, keep: Keep = KEEP) -> Upload:
    """Everything that is there is copied up; what the store has is looked at first."""
    there = There()
    for _ in bring_down(run, store, there, print):
        pass
    found = Upload(run, store, keep, there)
    found.start()
    found.finish()
    assert found.is_up(120), found.problem
    found.stop()
    return found


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_of(store: ObjectStore) -> list[int]:
    names = [Path(name) for name in store.names("checkpoints")]
    return sorted(int(name.parent.name[5:]) for name in names if name.name == MANIFEST)


def test_the_order_in_which_things_go_up(run: RunDirectory, store: Watched) -> None:
    """Oracle: the order that the module states; the sign of the end is the last of all."""
    checkpoints = Checkpoints(run.checkpoints)
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    run.done.write_text("2\n")
    (run.path / ".hidden").write_text("x")
    (run.path / "config.tmp").write_text("x")
    (run.path / "run.lock").write_text("x")
    run.preempted.touch()  # a request to this process, which is of this machine
    up(run, store)
    first = [f"checkpoints/step_00000002/{n}" for n in ("rank_00000.safetensors", MANIFEST)]
    second = [name.replace("2/", "1/") for name in first]
    latest = "checkpoints/latest"
    files = ["config.yaml", "metrics.jsonl"]
    assert store.calls == [*files, *first, latest, *second, latest, "DONE"]
    assert store.read(latest) == b"step_00000002\n"


def test_the_store_keeps_what_the_directory_would(run: RunDirectory, store: Watched) -> None:
    """Oracle: retention on this machine, of the same checkpoints with the same losses."""
    keep = Keep(2, 4, True)
    checkpoints = Checkpoints(run.checkpoints, keep=2, keep_every=4, keep_best=True)
    for step, loss in zip(range(1, 10), [9, 5, 2, 6, 7, 8, 8, 8, 8], strict=True):
        checkpoints.save(step, state(step), {})
        checkpoints.add_loss(step, float(loss))
        up(run, store, keep)
        assert steps_of(store) == checkpoints.steps()
    assert steps_of(store) == [3, 4, 8, 9]
    wanted = {f"checkpoints/step_{s:08d}/rank_00000.safetensors" for s in (3, 4, 8, 9)}
    assert {name for name in store.names() if name.endswith(".safetensors")} == wanted


def test_a_directory_with_the_newest_alone_takes_nothing_from_the_store(
    run: RunDirectory, store: Watched, tmp_path: Path
) -> None:
    """Oracle: the store's steps before; the best one is there, and not on the second machine."""
    checkpoints = Checkpoints(run.checkpoints, keep_best=True)
    for step, loss in ((1, 1.0), (2, 3.0), (3, 3.0)):
        checkpoints.save(step, state(step), {}, validation_loss=loss)
    up(run, store)
    assert steps_of(store) == [1, 2, 3]
    other = RunDirectory(tmp_path / "other")
    up(other, store)
    assert Checkpoints(other.checkpoints).steps() == [3] and steps_of(store) == [1, 2, 3]
    assert other.metrics.read_bytes() == run.metrics.read_bytes()
    Checkpoints(other.checkpoints, keep_best=True).save(4, state(4), {})
    up(other, store)
    assert steps_of(store) == [1, 3, 4]


def test_an_older_checkpoint_that_would_be_removed_there_does_not_go_up(
    run: RunDirectory, store: Watched, tmp_path: Path
) -> None:
    """Oracle: the store's steps; the copying comes to an end."""
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(1, state(1), {})
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    other.config.write_text("# the settings\n")
    elsewhere = Checkpoints(other.checkpoints)
    for step in (2, 3):
        elsewhere.save(step, state(step), {})
    up(other, store)
    store.calls.clear()
    up(run, store)
    assert checkpoints.steps() == [1, 3] and steps_of(store) == [2, 3]
    assert not [name for name in store.calls if "step_" in name]


def test_a_checkpoint_is_kept_here_until_it_is_up(
    run: RunDirectory, store: Watched, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the steps of the directory while the store is away, and when it is back."""
    copying = Upload(run, store, KEEP, There())
    checkpoints = Checkpoints(run.checkpoints, keep=2, needed=copying.needs)
    copying.start()
    checkpoints.save(1, state(1), {})
    wait_until(lambda: steps_of(store) == [1] and not copying.needs(1))
    line.mode = "closed"
    with caplog.at_level(logging.WARNING):
        for step in range(2, 6):
            checkpoints.save(step, state(step), {})
        assert checkpoints.steps() == [2, 3, 4, 5]
        wait_until(lambda: copying.problem is not None)
        line.mode = "open"
        wait_until(lambda: 5 in steps_of(store) and not copying.needs(5))
        wait_until(lambda: copying.problem is None)
    checkpoints.save(6, state(6), {})
    assert checkpoints.steps() == [5, 6]
    copying.finish()
    assert copying.is_up(120)
    copying.stop()
    assert steps_of(store) == [5, 6]
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "the run goes on" in told[0] and "answers again" in told[1]


def test_whatever_is_cut_off_there_is_no_half_of_a_checkpoint(
    run: RunDirectory,
    store: Watched,
    line: Line,
    server: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: a fresh machine after each cut, which finds a whole checkpoint or none."""
    assert store.names() == {}  # a client is told where its server is by its first call
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    undisturbed = open_store(store.address, "run_dir")
    assert undisturbed.names() == {}
    checkpoints = Checkpoints(run.checkpoints)
    copying = Upload(run, store, KEEP, There())
    copying.start()
    seen = set()
    for number in range(1, 13):
        line.mode, line.after = "cut", line.sent + number * 500
        checkpoints.save(number, state(number), {})
        wait_until(lambda: line.mode == "closed" or copying.left().files == 0)
        fresh = RunDirectory(tmp_path / f"fresh-{number}")
        for _ in bring_down(fresh, undisturbed, There(), print):
            pass
        found = Checkpoints(fresh.checkpoints).newest()
        if found is not None:
            into = state(0)
            Checkpoints(fresh.checkpoints).load(found, into)
            assert into["weight"].equal(state(found.meta["step"])["weight"])
            seen.add(found.meta["step"] == number)
        line.mode = "open"
        wait_until(lambda: copying.left().files == 0)
    copying.finish()
    assert copying.is_up(120)
    copying.stop()
    assert False in seen, "no cut fell into a checkpoint: the test saw nothing"
    assert steps_of(undisturbed) == [11, 12]


def test_a_loss_that_comes_later_goes_up(run: RunDirectory, store: Watched) -> None:
    """Oracle: the manifest of this machine."""
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(1, state(1), {})
    up(run, store)
    checkpoints.add_loss(1, 2.5)
    store.calls.clear()
    up(run, store)
    name = f"checkpoints/step_00000001/{MANIFEST}"
    assert [n for n in store.calls if "step_" in n] == [name]
    assert store.read(name) == (run.path / name).read_bytes()


def test_a_damaged_checkpoint_in_the_store_is_passed_over_and_mended(
    run: RunDirectory, store: Watched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the bits of the older one; the newer one goes up again when it is made again."""
    checkpoints = Checkpoints(run.checkpoints)
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    up(run, store)
    name = "checkpoints/step_00000002/rank_00000.safetensors"
    content = store.read(name)
    store.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    other, there = RunDirectory(tmp_path / "other"), There()
    for _ in bring_down(other, store, there, print):
        pass
    assert Checkpoints(other.checkpoints).steps() == [1]
    assert "rank_00000.safetensors is damaged (its checksum differs)" in caplog.text
    copying = Upload(other, store, KEEP, there)
    copying.start()
    Checkpoints(other.checkpoints).save(2, state(2), {})
    copying.finish()
    assert copying.is_up(120)
    copying.stop()
    assert store.read(name) == content and steps_of(store) == [1, 2]
    store.write(f"checkpoints/step_00000002/{MANIFEST}", b"{}")
    store.write("checkpoints/step_00000001/rank_00000.safetensors", b"cut off")
    third = RunDirectory(tmp_path / "third")
    for _ in bring_down(third, store, There(), print):
        pass
    assert not Checkpoints(third.checkpoints).steps()
    assert f"{store.address}/checkpoints/step_00000002 is damaged" in caplog.text


def test_signs_come_and_go(run: RunDirectory, store: Watched) -> None:
    """Oracle: the files here."""
    run.preempted.write_text("3\n")
    up(run, store)
    assert store.read("PREEMPT") == b"3\n"
    run.preempted.unlink()
    run.diverged.write_text("4\n")
    up(run, store)
    assert "PREEMPT" not in store.names() and store.read("DIVERGED") == b"4\n"


def test_nothing_is_written_without_the_lease(run: RunDirectory, store: Watched) -> None:
    """Oracle: the names in the store, before the lease is sure and after."""
    sure = False
    Checkpoints(run.checkpoints).save(1, state(1), {})
    copying = Upload(run, store, KEEP, There(), lambda: sure)
    copying.start()
    wait_until(lambda: copying.problem)
    assert "lease there is not renewed" in str(copying.problem) and store.names() == {}
    sure = True
    copying.finish()
    assert copying.is_up(120) and steps_of(store) == [1]
    copying.stop()


def test_a_run_in_the_store_that_has_no_whole_checkpoint_is_refused(
    run: RunDirectory, store: Watched, tmp_path: Path
) -> None:
    """Oracle: the one line; nothing that could be taken for a run is left here."""
    Checkpoints(run.checkpoints).save(1, state(1), {})
    up(run, store)
    name = "checkpoints/step_00000001/rank_00000.safetensors"
    store.write(name, bytes(len(store.read(name))))
    with pytest.raises(InputError, match="no checkpoint is whole: .*its checksum differs"):
        for _ in bring_down(RunDirectory(tmp_path / "other"), store, There(), print):
            pass


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(os.urandom(LARGE + 1))
    return tmp_path / "large"


@pytest.fixture
def sender(store: Watched) -> Iterator[Sender]:
    found = Sender(store)
    yield found
    found.close()


def test_a_large_file_goes_up_from_another_process(
    store: Watched, sender: Sender, large: Path, line: Line
) -> None:
    """Oracle: the bytes; the calls of this process; what is said where the store is away."""
    sender.send(large, "large")
    assert store.read("large") == large.read_bytes()
    assert store.calls == [] and store.moved.bytes == LARGE + 1
    line.mode = "closed"
    with pytest.raises(StoreError, match=f"^{store.address}: does not answer"):
        sender.send(large, "again")
    line.mode = "open"
    process = sender._process
    assert process is not None and process.poll() is None
    sender.send(large, "again")
    assert sender._process is process and store.read("again") == large.read_bytes()
    process.kill()
    with pytest.raises(StoreError, match="the process that sends files has ended"):
        sender.send(large, "third")
    sender.send(large, "third")  # by a new one
    large.unlink()
    with pytest.raises(FileNotFoundError):
        sender.send(large, "gone")


def test_the_process_ends_with_the_run(sender: Sender, large: Path) -> None:
    """Oracle: the kernel; its standard input ends, as it does when this process is killed."""
    sender.send(large, "large")
    process = sender._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(120) == 0
