"""A run's processes watch each other: one that is dead, stopped or hung ends the run.

Twice a second each process writes a beat (beats.py) into the store by which the launcher has
brought the processes together. Process 0 reads all beats, judges, and writes a summary, which is
all that the others read. No collective call is made, and nothing waits for the device.

Two threads beside the main one:
    talk     uses the store; a call may block for ever, where the store's process is stopped
    watch    never blocks: it reads the clock, and ends this process where a verdict has fallen,
             where process 0 is silent, or where the store is

What would surprise:
- A process is ended by `os._exit` in the middle of anything, since its main thread may hang in C.
  What was saved is whole: a checkpoint appears in one rename. Before that the stacks of its threads
  are written to `<run>/ranks/`.
- Where the main thread holds Python's lock and does not give it back, neither thread runs. So a
  clock of faulthandler's is wound up at every beat. It needs no lock; where it runs down, the
  stacks go to stderr and the process exits with code 1.
- A store that does not answer counts as process 0 gone: it lives in that process or beside it.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from llmnorm.config.tree import ParallelSettings
from llmnorm.machine.failures import LOST_PROCESS, connection_lost, last_line
from llmnorm.machine.phases import END, Phases
from llmnorm.parallel.beats import GRACE, SUSPECTED, Beat, Judge, State, Summary, Verdict
from llmnorm.part import InputError

BEAT = 0.5  # seconds between two beats
FAREWELL = 2 * GRACE  # seconds that a process which ends gives the others to hear why
COMPILED = ("evaluation", "health")  # phases whose first pass compiles blocks once more
SUMMARY = "llmnorm/heartbeat/summary"


class Lost(InputError):
    """Another process of the run was lost."""

    exit_code = LOST_PROCESS


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def get(self, key: str, /) -> bytes:
        """Read a value."""

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        """Read several values."""

    def wait(self, keys: list[str], /) -> None:
        """Until all of these have a value."""


class Heartbeat:
    """The watch over a run's processes, from when they all make this object until `close`.

    Args:
        rank, world: this process and how many there are, at least two.
        store: shared by all processes; nobody else uses this object of it.
        calls: how many collective calls this process has begun, in training and in the background.
        phases: of this process.
        settings: their `timeout`, `timeout_first`, and whether blocks are compiled.
        directory: `<run>/ranks`; it is made when there is something to write.
        gpu: the serial number of this process's GPU; it may take seconds.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        store: Store,
        calls: Callable[[], tuple[int, int]],
        phases: Phases,
        settings: ParallelSettings,
        directory: Path,
        gpu: Callable[[], str],
    ) -> None:
        self._rank, self._store = rank, store
        self._calls, self._phases, self._compiled = calls, phases, settings.compile
        self._timeout, self._directory = settings.timeout, directory
        self._state: State = "running"
        self._error = self._serial = ""
        self._number = 0
        self._verdict: Verdict | None = None
        self._stop, self._wake, self._decided = (threading.Event() for _ in range(3))

        self._keys = [f"llmnorm/heartbeat/{r}" for r in range(world)]
        store.set(self._keys[rank], self._beat().text())
        store.wait(self._keys)
        beats = [Beat.of(text) for text in store.multi_get(self._keys)]
        self._judge = Judge(beats, settings.timeout, settings.timeout_first)
        self._summary = Summary(beats[0], [*range(world)], None)
        if rank == 0:
            store.set(SUMMARY, self._summary.text())
        store.wait([SUMMARY])
        self._answered = self._main_heard = time.monotonic()

        def identify() -> None:
            self._serial = gpu()

        targets = {"talk": self._talk, "watch": self._watch, "identify": identify}
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat {name}", daemon=True)
            for name, target in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the watch, when all processes are ready to leave or this one has said why it does."""
        self._stop.set()
        self._wake.set()
        for thread in self._threads[:2]:
            thread.join(2 * BEAT)  # not for ever: a call of the store may block
        faulthandler.cancel_dump_traceback_later()

    def leave(self, error: BaseException) -> Verdict | None:
        """Tell the others of the error with which this process ends, and wait until they know.

        An `InputError` that no other process has is printed by this one: its `speaker` is set.

        Returns:
            The verdict, where the error says that the connection to another process broke; None
            where it is an error of this process.
        """
        cut = connection_lost(error)
        self._error, self._state = last_line(error), "cut off" if cut else "failed"
        self._wake.set()
        if cut:
            self._decided.wait(self._timeout + FAREWELL)
        until = time.monotonic() + FAREWELL
        while self._summary.busy and time.monotonic() < until and not (cut and self._rank):
            time.sleep(BEAT / 10)
            if self._rank and time.monotonic() - self._answered > 4 * BEAT:
                break  # process 0 is gone, and its store
        if isinstance(error, InputError) and self._summary.verdict is not None:
            error.speaker = self._rank
        return self._verdict if cut else None

    def lost(self, verdict: Verdict) -> Lost:
        """What this process raises, or prints, where others are lost."""
        run = self._directory.parent
        found = Lost(
            f"{verdict.sentence()}; all processes were ended, their stacks are in "
            f"{self._directory}; go on from the newest checkpoint: llmnorm train {run}"
        )
        found.speaker = verdict.speaker(len(self._keys))
        return found

    def name_of(self, rank: int) -> str:
        """Rank, host, process and GPU, by the beats that this process has heard."""
        return self._judge.beats[rank].name

    def _beat(self) -> Beat:
        """What this process says now."""
        phases = self._phases
        self._number += 1
        compiles = self._compiled and phases.phase in COMPILED and phases.is_new
        # At the end trackers may send what they have kept until then.
        return Beat(
            rank=self._rank,
            host=socket.gethostname(),
            process=os.getpid(),
            gpu=self._serial,
            number=self._number,
            progress=phases.progress,
            calls=self._calls(),
            step=phases.step,
            phase=phases.phase,
            finished=phases.finished,
            first=phases.own_steps == 0 or compiles or phases.phase == END,
            state=self._state,
            error=self._error,
            knows=self._verdict is not None,
        )

    def _talk(self) -> None:
        """The thread that uses the store."""
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._exchange()
                self._answered = time.monotonic()
                # Of many processes the main one reads less often, to leave the time to training.
                pause = min(max(BEAT, 1000 * (self._answered - began)), 4 * BEAT)
            except RuntimeError:  # `_watch` counts the time; torch prints its own traceback
                pause = max(BEAT, self._timeout / 10)
            self._wake.wait(pause)
            self._wake.clear()

    def _exchange(self) -> None:
        """Say one beat and hear the others."""
        if self._rank == 0:
            others = [Beat.of(text) for text in self._store.multi_get(self._keys[1:])]
            me = self._beat()
            self._judge.hear([me, *others])
            summary = Summary(me, self._judge.busy(self._verdict), self._verdict)
            self._store.set(SUMMARY, summary.text())
            self._summary = summary
            return
        self._store.set(self._keys[self._rank], self._beat().text())
        summary = Summary.of(self._store.get(SUMMARY))
        if summary.main.number != self._summary.main.number:
            self._main_heard = time.monotonic()
        self._summary = summary

    def _watch(self) -> None:
        """The thread that reads the clock and ends the process."""
        verdict = None
        while verdict is None:
            if self._stop.wait(BEAT):
                return
            faulthandler.dump_traceback_later(self._timeout + GRACE / 2, exit=True)
            verdict = self._found()
        self._verdict = verdict
        self._wake.set()  # the others hear of it, or process 0 hears that this one knows
        self._decided.set()
        if self._state == "running":
            self._write_stacks(verdict)
        self._stop.wait(2 * BEAT)  # in which the others, or process 0, hear of it
        until = time.monotonic() + GRACE / 2
        while not self._rank and self._summary.busy and time.monotonic() < until:
            time.sleep(BEAT / 10)
        if self._state != "running":  # the main thread is in `leave`, and says what is to be said
            if self._stop.wait(2 * FAREWELL):
                return
        else:
            found = self.lost(verdict)
            if found.speaker == self._rank:
                line = f"\nllmnorm: error: {found}\n"
                os.write(2, line.encode(errors="backslashreplace"))
        os._exit(LOST_PROCESS)

    def _found(self) -> Verdict | None:
        """The verdict, where there is one."""
        now = time.monotonic()
        if self._rank == 0:
            if (silent := now - self._answered) > self._timeout:
                return Verdict("no answer", [self._summary.main], silent)
            return self._judge.verdict()
        if self._summary.verdict is not None:
            return self._summary.verdict
        silent = now - min(self._main_heard, self._answered)
        if silent > (SUSPECTED if self._state == "cut off" else self._timeout):
            main = self._summary.main._replace(step=self._phases.step)
            return Verdict("silent", [main], silent)
        return None

    def _write_stacks(self, verdict: Verdict) -> None:
        """Write what every thread of this process is doing; a hung disk is not waited for."""

        def write() -> None:
            with suppress(OSError):
                self._directory.mkdir(parents=True, exist_ok=True)
                file = self._directory / f"rank_{self._rank:05d}.txt"
                with file.open("w", encoding="utf-8") as stream:
                    me = self._beat()
                    stream.write(f"{me.name}: {me.where}\n{verdict.sentence()}\n\n")
                    stream.flush()
                    faulthandler.dump_traceback(stream, all_threads=True)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(GRACE / 4)
