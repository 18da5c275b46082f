"""What a run keeps for its next life under a launcher that restarts it, and what that life asks."""

import errno
import os
from pathlib import Path

import pytest

from llmnorm.machine.parent import parent
from llmnorm.part import InputError
from llmnorm.runs import restarts
from llmnorm.runs.directory import RunDirectory, asks_to_stop, end
from llmnorm.runs.restarts import Launcher, Restarts, in_vain, launcher


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch):
    """`life(restarts)`: from now on this is a process that torchrun has started."""

    def begin(count: int, name: str = "job", most: int = 9, rank: int = 0) -> None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setenv("RANK", str(rank))

    return begin


def fall(run: RunDirectory, start: int, *steps: int) -> str | None:
    """A life that begins at a step and ends without a word in the last of the steps."""
    record = Restarts(run, enabled=True)
    note = record.begin(start, 100 + 8 * start, 8)
    for step in steps:
        record.at(step)
    os.close(record._file)
    return note


def test_nothing_is_kept_without_a_launcher_that_restarts(
    run: RunDirectory, life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the directory stays empty."""
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with Restarts(run, enabled=True) as record:
        assert record.begin(0, 0, 8) is None
        record.at(1)
    life(0, most=0)
    assert launcher() is None and in_vain(run) is None
    life(0)
    with Restarts(run, enabled=False) as record:  # not process 0
        assert record.begin(0, 0, 8) is None
        record.at(1)
    assert not any(run.path.iterdir())


def test_a_run_that_falls_three_times_in_a_step_is_given_up_with_its_rows(
    run: RunDirectory, life
) -> None:
    """Oracle: by hand: rows count from 100, a step reads 8, and the life begins at step 2."""
    life(0)
    assert in_vain(run) is None and fall(run, 0, 1, 2, 3) is None
    life(1)
    assert in_vain(run) is None
    assert fall(run, 2, 3) == "the process before ended in step 3 (rows 116-123), or after it"
    life(2)
    assert in_vain(run) is None
    note = "the process before ended in step 3 (rows 116-123), or after it, 2 times now"
    assert fall(run, 2, 3) == note
    for restart in (3, 4):  # the launcher tries again, and is told the same
        for rank in (1, 0, 1):
            life(restart, rank=rank)
            code, line = in_vain(run) or (0, "")
            assert code == 74 and "3 times in step 3 (rows 116-123)" in line
            assert line.endswith(f"to try again: llmnorm train {run.path}")
    life(0, name="another")  # the user tries again
    assert in_vain(run) is None and fall(run, 2, 3) is None


def test_falls_at_other_steps_and_before_the_first_step_do_not_add_up(
    run: RunDirectory, life
) -> None:
    """Oracle: by hand; a life that ends before its first step is counted for no step."""
    for restart, steps in enumerate([(3,), (), (3,), (4,), (3,), (3,)]):
        life(restart)
        assert in_vain(run) is None
        fall(run, 2, *steps)
    life(6)
    assert in_vain(run) is None
    fall(run, 2, 3)
    life(7)
    assert in_vain(run) is not None


def test_a_life_that_ends_before_it_keeps_anything_is_not_counted_as_the_one_before(
    run: RunDirectory, life
) -> None:
    """Oracle: by hand; one fall in step 3, then lives that end while they load."""
    life(0)
    fall(run, 2, 3)
    for restart in (1, 2, 3, 4):
        life(restart)
        assert in_vain(run) is None


@pytest.mark.parametrize("code", [2, 3])
def test_a_refused_run_is_not_started_again(run: RunDirectory, life, code: int) -> None:
    """Oracle: the error's own code and line, by the same launcher alone."""
    error = InputError("disk: is full; make room")
    error.exit_code = code
    life(0)
    with pytest.raises(InputError), Restarts(run, enabled=True) as record:
        record.begin(0, 0, 8)
        record.at(1)
        raise error
    for rank in (0, 1):
        life(1, rank=rank)
        found, line = in_vain(run) or (0, "")
        assert found == code and line.endswith("it was refused: disk: is full; make room")
    life(0)  # a node has come or gone: the launcher counts no failure
    assert in_vain(run) is None
    life(1, name="another")
    assert in_vain(run) is None


def stop(run: RunDirectory, start: int, step: int, *, told: bool) -> None:
    """A life that stops after a step and saves."""
    with Restarts(run, enabled=True) as record:
        record.begin(start, 0, 8)
        record.at(step)
        end(run.preempted, step)
        if told:
            record.stopped(step)


def test_a_stopped_run_is_not_started_again_by_the_launcher_that_saw_it_stop(
    run: RunDirectory, life
) -> None:
    """Oracle: by hand; another launcher, or the same after a node has come, goes on."""
    life(0)
    stop(run, 0, 3, told=True)
    for rank in (1, 0):
        life(1, rank=rank)
        code, line = in_vain(run) or (0, "")
        assert code == 75 and "stopped at step 3 and is saved" in line
    life(0)
    assert in_vain(run) is None
    life(1, name="another")
    assert in_vain(run) is None


def test_a_run_that_saved_because_a_node_has_left_goes_on_and_has_not_fallen(
    run: RunDirectory, life
) -> None:
    """Oracle: by hand."""
    for restart in range(4):
        life(restart)
        assert in_vain(run) is None
        stop(run, 2, 3, told=False)
    life(4)
    assert in_vain(run) is None and fall(run, 3, 4) is None


def test_a_long_line_does_not_grow_the_page(run: RunDirectory, life) -> None:
    """Oracle: the file's size, with characters that JSON writes as six bytes."""
    life(0)
    with pytest.raises(InputError), Restarts(run, enabled=True) as record:
        record.begin(10**9, 10**15, 10**6)
        raise InputError("é" * 10_000)
    assert run.restarts.stat().st_size == restarts.PAGE
    life(1)
    assert "ééé" in (in_vain(run) or (0, ""))[1]


def test_a_full_disk_takes_the_refusal(
    run: RunDirectory, life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every write past what is there fails, as it does on a full disk."""
    life(0)
    real = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if at + len(data) > os.fstat(file).st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, at)

    with pytest.raises(InputError), Restarts(run, enabled=True) as record:
        record.begin(0, 0, 8)
        monkeypatch.setattr(os, "pwrite", full)
        record.at(1)
        raise InputError("checkpoints: no space")
    life(1)
    assert (in_vain(run) or (0, ""))[0] == 2


@pytest.mark.parametrize("text", ["", "x", "0\n{}", "1\n[]", '1\n{"launcher": "job"}', "\0" * 4096])
def test_a_damaged_record_is_none(run: RunDirectory, life, text: str) -> None:
    """Oracle: the run goes on, and the next record is whole."""
    run.restarts.write_text(text)
    life(1)
    assert in_vain(run) is None and fall(run, 0, 1) is None
    life(2)
    assert in_vain(run) is None and fall(run, 0, 1)


def test_a_launcher_without_an_id_is_known_by_its_process(
    life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the fields of /proc; two children of one process have one parent."""
    life(2, name="none")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert launcher() == Launcher(parent(), 2)
    assert str(os.getppid()) in parent().split()
    own = os.fork()
    if own == 0:
        os._exit(str(os.getppid()) not in parent().split())
    assert os.waitpid(own, 0)[1] == 0
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launcher() == Launcher("first:29500", 2)


@pytest.mark.parametrize(
    ("text", "asks"), [(None, False), ("", True), ("job 12\n", True), ("12\n", False)]
)
def test_a_file_that_holds_no_step_asks_to_stop(
    run: RunDirectory, text: str | None, asks: bool
) -> None:
    """Oracle: by hand."""
    if text is not None:
        run.preempted.write_text(text)
    assert asks_to_stop(run) == asks


def test_a_run_that_ends_in_good_order_has_not_fallen(run: RunDirectory, life) -> None:
    """Oracle: by hand; the launcher's name is used again, as a user may choose it."""
    for _ in range(3):
        life(0)
        assert in_vain(run) is None
        with Restarts(run, enabled=True) as record:
            assert record.begin(2, 0, 8) is None
            record.at(3)
