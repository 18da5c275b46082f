"""Who is lost, judged from beats that are written out, by a clock of the test's own."""

from typing import Any

import pytest

from llmnorm.parallel.beats import GRACE, SUSPECTED, Beat, Judge, Summary, Verdict

TIMEOUT, FIRST = 10.0, 100.0


class Run:
    """Processes that beat every second, and a judge who hears them."""

    def __init__(self, world: int = 3) -> None:
        self.now = 1000.0
        self.beats = [Beat(r, f"host{r}", 100 + r, first=False) for r in range(world)]
        self.judge = Judge(self.beats, TIMEOUT, FIRST, lambda: self.now)

    def second(self, **changes: dict[int, Any] | Any) -> Verdict | None:
        """All beat once more, but those in `silent`; the verdict after it.

        `silent`, `works` and `calls` are ranks: who says nothing, who advances, who begins a call.
        """
        self.now += 1
        silent, works, calls = (changes.get(n, ()) for n in ("silent", "works", "calls"))
        for beat in self.beats:
            if beat.rank in silent:
                continue
            self.beats[beat.rank] = beat._replace(
                number=beat.number + 1,
                progress=beat.progress + (beat.rank in works),
                calls=(beat.calls[0] + (beat.rank in calls), beat.calls[1]),
            )
        self.judge.hear(self.beats)
        return self.judge.verdict()

    def say(self, rank: int, **values: Any) -> None:
        self.beats[rank] = self.beats[rank]._replace(**values)


def test_a_run_that_goes_on_has_no_verdict() -> None:
    """Oracle: none, however long it goes on."""
    run = Run()
    assert all(run.second(works=(0, 1, 2), calls=(0, 1, 2)) is None for _ in range(50))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_process_that_says_nothing_is_lost(victim: int) -> None:
    """Oracle: 10 seconds after its last beat, though the others stand still as long."""
    run = Run()
    run.second(works=(0, 1, 2))
    verdicts = [run.second(silent=(victim,)) for _ in range(11)]
    assert verdicts[:10] == [None] * 10
    found = verdicts[10]
    assert found is not None and found.reason == "silent"
    assert [beat.rank for beat in found.lost] == [victim] and found.seconds == 11


def test_a_silent_process_is_lost_at_once_where_a_connection_broke() -> None:
    """Oracle: after the seconds of suspicion, not after the limit."""
    run = Run()
    run.second(works=(0, 1, 2))
    run.say(0, state="cut off", error="Connection closed by peer")
    verdicts = [run.second(silent=(2,)) for _ in range(int(SUSPECTED) + 1)]
    assert verdicts[:-1] == [None] * int(SUSPECTED)
    assert verdicts[-1] is not None and [b.rank for b in verdicts[-1].lost] == [2]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_one_that_the_others_wait_for_is_lost(victim: int) -> None:
    """Oracle: who has begun one collective call less, though all advance as little."""
    run = Run()
    others = {0, 1, 2} - {victim}
    run.second(works=(0, 1, 2), calls=(0, 1, 2))
    verdicts = [run.second(calls=others)] + [run.second() for _ in range(11)]
    found = verdicts.pop()
    while verdicts[-1] is not None:
        found = verdicts.pop()
    assert found is not None and found.reason == "stuck"
    assert [beat.rank for beat in found.lost] == [victim] and found.seconds == 11


def test_who_waits_for_a_long_work_of_another_is_not_lost() -> None:
    """Oracle: process 0 works for a minute; the others have begun the call that waits for it."""
    run = Run()
    run.second(works=(0, 1, 2), calls=(1, 2))
    assert all(run.second(works=(0,)) is None for _ in range(60))


def test_a_growing_number_of_calls_is_progress() -> None:
    """Oracle: a forward pass of a minute, of which only the gathers of weights are seen."""
    run = Run()
    assert all(run.second(calls=(0, 1, 2)) is None for _ in range(60))


def test_a_thread_that_saves_does_not_hide_who_is_behind() -> None:
    """Oracle: calls in the background are compared only where those in training are equal."""
    run = Run(2)
    run.second(works=(0, 1))
    run.say(0, calls=(8, 5))
    run.say(1, calls=(7, 9))
    for _ in range(12):
        found = run.second()
    assert found is not None and [beat.rank for beat in found.lost] == [1]
    run = Run(2)
    run.second(works=(0, 1))
    run.say(0, calls=(7, 9))
    run.say(1, calls=(7, 8))
    for _ in range(12):
        found = run.second()
    assert found is not None and [beat.rank for beat in found.lost] == [1]


def test_the_first_step_has_more_time_to_advance_but_not_to_say_so() -> None:
    """Oracle: the second limit for who beats, the first for who does not."""
    run = Run(2)
    for rank in range(2):
        run.say(rank, first=True)
    verdicts = [run.second() for _ in range(102)]
    assert verdicts[:100] == [None] * 100
    assert verdicts[101] is not None and verdicts[101].reason == "together"
    run = Run(2)
    for rank in range(2):
        run.say(rank, first=True)
    run.second()
    verdicts = [run.second(silent=(1,)) for _ in range(11)]
    assert verdicts[10] is not None and [b.rank for b in verdicts[10].lost] == [1]


def test_where_nobody_is_behind_nobody_is_blamed() -> None:
    """Oracle: the sentence names a connection, not a host to leave out."""
    run = Run(2)
    run.second(works=(0, 1))
    found = [run.second() for _ in range(11)][-1]
    assert found is not None and found.reason == "together" and len(found.lost) == 2
    assert "none is behind the others" in found.sentence() and "--exclude" not in found.sentence()


def test_a_failed_process_is_named_to_those_that_go_on() -> None:
    """Oracle: its own words, once the others have had time to fail too; none where they did."""
    run = Run(2)
    run.say(
        1, state="failed", error="RuntimeError: CUDA error", gpu="1654", step=7, phase="forward"
    )
    verdicts = [run.second() for _ in range(int(GRACE) + 2)]
    assert verdicts[:5] == [None] * 5
    found = verdicts[-1]
    assert found is not None and found.reason == "failed" and found.speaker(2) == 0
    assert found.sentence().startswith(
        "rank 1 (host host1, process 101, GPU 1654): RuntimeError: CUDA error; last step 7, in "
        "phase forward"
    )
    assert found.sentence().endswith("--exclude=host1")
    run = Run(2)
    for rank in range(2):
        run.say(rank, state="failed", error="the disk is full")
    assert all(run.second() is None for _ in range(20))


def test_a_failed_process_is_named_at_once_to_who_was_cut_off() -> None:
    """Oracle: a connection that broke because its other end has failed."""
    run = Run(2)
    run.say(1, state="failed", error="MemoryError: ")
    run.say(0, state="cut off", error="Connection closed by peer")
    found = run.second()
    assert found is not None and found.reason == "failed" and found.lost[0].rank == 1


def test_a_connection_that_broke_between_living_processes_is_told() -> None:
    """Oracle: both beat; after some time their own words are the verdict."""
    run = Run(2)
    for rank in range(2):
        run.say(rank, state="cut off", error="Connection reset by peer")
    found = [run.second() for _ in range(int(2 * SUSPECTED) + 2)]
    assert found[: int(2 * SUSPECTED)] == [None] * int(2 * SUSPECTED)
    assert found[-1] is not None and found[-1].reason == "cut off"


def test_who_still_has_to_hear_is_busy() -> None:
    """Oracle: neither who failed nor who knows; a silent process is not waited for."""
    run = Run(4)
    run.say(1, state="failed")
    run.say(2, knows=True)
    run.second()
    assert run.judge.busy(None) == [0, 3]
    assert run.judge.busy(Verdict("silent", [run.beats[3]], 1.0)) == [0]
    assert run.judge.busy(Verdict("stuck", [run.beats[3]], 1.0)) == [0, 3]


def test_what_is_said_is_heard() -> None:
    """Oracle: the same values after the way through text."""
    beat = Beat(1, "h", 2, "s", 3, 4, (5, 6), 7, "data", "save", False, "failed", "é", True)
    verdict = Verdict("silent", [beat, beat], 2.5)
    assert Beat.of(beat.text()) == beat
    for given in (verdict, None):
        summary = Summary(beat, [1, 2], given)
        assert Summary.of(summary.text()) == summary
