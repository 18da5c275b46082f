"""The lease: one holder at a time, taken over only where nobody renews it."""

import json
import os
import threading
import time

import pytest

from llmnorm.part import InputError
from llmnorm.remote import lease
from llmnorm.remote.lease import Lease
from llmnorm.remote.objects import ObjectStore, open_store
from tests.remote.served import Line
from tests.running import CHILDREN


@pytest.fixture
def store(address: str) -> ObjectStore:
    return open_store(address, "run_dir")


def elsewhere(number: int, store: ObjectStore, **fields: object) -> None:
    """Another machine's lease, as its process has written it."""
    content = {"host": "far", "machine": "another boot", "pid": 7, "started": 1, "renewed": 3}
    store.write(f"lease/{number:08d}.json", json.dumps({**content, **fields}).encode())


def test_a_second_process_is_refused_and_told_who_it_is(store: ObjectStore) -> None:
    """Oracle: the first one's number and host, which the kernel knows."""
    lines: list[str] = []
    with Lease(store, seconds=2.0) as first:
        with pytest.raises(InputError) as found, Lease(store, seconds=8.0, say=lines.append):
            pass
        assert f"process {os.getpid()} on " in str(found.value)
        assert "is training in this run" in str(found.value)
        assert len(lines) == 1 and "waiting 8 s" in lines[0]
        assert first.is_sure() and first.lost is None
    with Lease(store, say=lines.append) as second:  # the first has given it back: no wait
        assert second.is_sure() and len(lines) == 1
    assert list(store.names()) == ["lease/00000002.json"]


def test_a_lease_that_nobody_renews_is_taken_over(store: ObjectStore) -> None:
    """Oracle: the clock of this process, and the number after the other's."""
    elsewhere(4, store)
    lines: list[str] = []
    start = time.monotonic()
    with Lease(store, seconds=1.0, say=lines.append) as taken:
        assert time.monotonic() - start >= 1.0
        assert taken.is_sure() and "process 7 on far was training here" in lines[0]
        assert list(store.names()) == ["lease/00000005.json"]


def test_a_lease_that_is_renewed_meanwhile_is_not(store: ObjectStore) -> None:
    """Oracle: the other's next number of renewals."""
    elsewhere(1, store)
    timer = threading.Timer(0.5, elsewhere, (1, store), {"renewed": 4})
    timer.start()
    with pytest.raises(InputError, match="process 7 on far is training in this run"):
        Lease(store, seconds=30.0, say=lambda _: None).__enter__()
    timer.join()
    assert list(store.names()) == ["lease/00000001.json"]


def test_who_has_lost_it_is_told_so_and_does_not_write(store: ObjectStore) -> None:
    """Oracle: the higher number of the one who took it, whose object stays as it is."""
    held = Lease(store, seconds=1000.0).__enter__()
    elsewhere(2, store)
    assert held.is_sure()
    held.renew()
    assert not held.is_sure() and held.lost is not None
    assert "process 7 on far has taken this run over" in held.lost
    held.__exit__()
    assert json.loads(store.read("lease/00000002.json"))["pid"] == 7
    assert not json.loads(store.read("lease/00000001.json"))["released"]


def test_a_store_that_does_not_answer_makes_it_unsure_and_no_more(
    store: ObjectStore, line: Line
) -> None:
    """Oracle: the state of the line; it is renewed when the line is back."""
    with Lease(store, seconds=0.5) as held:
        line.mode = "closed"
        wait_until(lambda: not held.is_sure())
        line.mode = "open"
        wait_until(lambda: held.is_sure())
        assert held.lost is None


def wait_until(true: object) -> None:
    end = time.monotonic() + 120
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def take_and_die(address: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server of processes was started without it
    Lease(open_store(address, "run_dir")).__enter__()
    os._exit(9)


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(
    address: str, store: ObjectStore
) -> None:
    """Oracle: nothing is said of waiting; the numbers."""
    process = CHILDREN.Process(target=take_and_die, args=(address, dict(os.environ)))
    process.start()
    process.join()
    assert process.exitcode == 9 and list(store.names()) == ["lease/00000001.json"]
    lines: list[str] = []
    with Lease(store, say=lines.append):
        assert lines == [] and list(store.names()) == ["lease/00000002.json"]


def test_a_process_number_that_another_has_now_is_another_process() -> None:
    """Oracle: this process under a start that is not its own."""
    me = {**lease._this_process(), "released": False}
    assert not lease._is_free(me)
    assert lease._is_free({**me, "started": -1})
    assert not lease._is_free({**me, "started": -1, "machine": "another boot"})
