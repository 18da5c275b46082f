"""What a process says of itself at each beat, and what follows from the beats of all.

    Beat      a process's own words: where it is, how far it got
    Judge     hears the beats of all processes and gives a verdict where one is lost
    Verdict   which processes are lost, why, and the sentence that says so

A process is lost if it is silent (killed, stopped, its host is gone), if it has failed by itself
while others go on, or if nothing in it has advanced for too long. All others stand still as well
then, since they wait for it. The one to blame has begun the fewest collective calls: the others
have begun the call in which they wait for it. (So does PyTorch's flight recorder find it.)

Nothing here knows threads, sockets or process groups; the clock is the caller's.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

# Seconds after which a process that says nothing is lost, once connections to somebody broke.
SUSPECTED = 4.0
# Seconds that the others have to fail too, or to hear of it, after one process has failed.
GRACE = 5.0

State = Literal["running", "failed", "cut off"]
Reason = Literal["silent", "stuck", "together", "failed", "cut off", "no answer"]


class Beat(NamedTuple):
    """What a process says of itself.

    Attributes:
        rank, host, process, gpu: who it is; `gpu` is a serial number, empty on a CPU.
        number: grows with each beat.
        progress: grows with all that it finishes (machine/phases.py).
        calls: collective calls that it has begun: in training, and in the background.
        step, phase, finished: of `Phases`.
        first: it has more time, since its first step is not finished or its last one is.
        state: "failed" after an error of its own, "cut off" after a broken connection.
        error: the last line of its traceback.
        knows: it has heard the verdict.
    """

    rank: int
    host: str
    process: int
    gpu: str = ""
    number: int = 0
    progress: int = 0
    calls: tuple[int, int] = (0, 0)
    step: int = 0
    phase: str = ""
    finished: str = ""
    first: bool = True
    state: State = "running"
    error: str = ""
    knows: bool = False

    def text(self) -> str:
        """As JSON, which is short: process 0 reads one of each process at every beat."""
        return json.dumps(self)

    @classmethod
    def of(cls, text: str | bytes) -> "Beat":
        """The beat that `text` has given."""
        values = json.loads(text)
        values[_CALLS] = tuple(values[_CALLS])
        return cls(*values)

    @property
    def name(self) -> str:
        """Rank, host, process and GPU, for messages."""
        gpu = f", GPU {self.gpu}" if self.gpu else ""
        return f"rank {self.rank} (host {self.host}, process {self.process}{gpu})"

    @property
    def where(self) -> str:
        """How far it is, for messages."""
        after = f", last finished phase {self.finished}" if self.finished else ""
        return f"last step {self.step}, in phase {self.phase}{after}"


_CALLS = Beat._fields.index("calls")


class Verdict(NamedTuple):
    """Which processes are lost.

    Attributes:
        reason: "silent"; "stuck": nothing in it advances; "together": in none, and none is behind
            the others; "failed": it has raised an error; "cut off": connections broke, and all
            processes are alive; "no answer": process 0 cannot reach the store.
        lost: the last beats of the lost processes; their step is the run's, which a silent one may
            not have told any more.
        seconds: since when.
    """

    reason: Reason
    lost: list[Beat]
    seconds: float

    def text(self) -> str:
        """As JSON."""
        return json.dumps([self.reason, [beat.text() for beat in self.lost], self.seconds])

    @classmethod
    def of(cls, text: str) -> "Verdict":
        """The verdict that `text` has given."""
        reason, lost, seconds = json.loads(text)
        return cls(reason, [Beat.of(beat) for beat in lost], seconds)

    def speaker(self, world: int) -> int:
        """The rank that prints the verdict: the first that is not lost."""
        lost = {beat.rank for beat in self.lost}
        return min(set(range(world)) - lost, default=0)

    def sentence(self) -> str:
        """What happened, to whom, and how a scheduler leaves its host out; one line."""
        each = "; ".join(f"{beat.name}: {self._what(beat)}; {beat.where}" for beat in self.lost)
        if self.reason == "together":
            return (
                f"nothing has advanced for {self.seconds:.0f} s on any process, and none is behind "
                f"the others: a connection between them is gone, or a GPU hangs; {each}"
            )
        hosts = ",".join(dict.fromkeys(beat.host for beat in self.lost))
        return f"{each}; to leave its host out: --exclude={hosts}"

    def _what(self, beat: Beat) -> str:
        seconds = f"{self.seconds:.0f} s"
        match self.reason:
            case "silent":
                return f"not heard of for {seconds}: it was killed or stopped, or its host is gone"
            case "stuck":
                return f"nothing has advanced there for {seconds}"
            case "together":
                return "waits"
            case "no answer":
                return f"the store by which the processes meet has not answered it for {seconds}"
            case "failed" | "cut off":
                return beat.error


class Judge:
    """Hears all processes and says which are lost.

    Args:
        first: the beat of each process with which it has begun.
        timeout: seconds without a beat or without progress after which a process is lost.
        timeout_first: seconds without progress until its first step is finished.
        clock: seconds of a clock that is never set back.
    """

    def __init__(
        self,
        first: Sequence[Beat],
        timeout: float,
        timeout_first: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout, self._timeout_first, self._clock = timeout, timeout_first, clock
        now = clock()
        self.beats = list(first)
        self._heard = [now] * len(first)
        self._advanced = [now] * len(first)
        self._changed = [now] * len(first)  # of the state

    def hear(self, beats: Iterable[Beat]) -> None:
        """Take in what processes say now; a beat may be one that was heard before."""
        now = self._clock()
        for beat in beats:
            before = self.beats[beat.rank]
            if beat.number != before.number:
                self._heard[beat.rank] = now
            if (beat.progress, beat.calls) != (before.progress, before.calls):
                self._advanced[beat.rank] = now
            if beat.state != before.state:
                self._changed[beat.rank] = now
            self.beats[beat.rank] = beat

    def busy(self, verdict: Verdict | None) -> list[int]:
        """The ranks that have neither failed nor heard of the verdict; silent ones cannot."""
        silent = verdict.lost if verdict is not None and verdict.reason == "silent" else []
        deaf = {beat.rank for beat in silent}
        return [
            b.rank for b in self.beats if not (b.state == "failed" or b.knows or b.rank in deaf)
        ]

    def verdict(self) -> Verdict | None:
        """The processes that are lost now; None where all is well."""
        now = self._clock()
        failed = [b for b in self.beats if b.state == "failed"]
        cut = [b for b in self.beats if b.state == "cut off"]
        running = [b for b in self.beats if b.state == "running"]
        if failed:
            since = now - min(self._changed[b.rank] for b in failed)
            late = (running and since > GRACE) or cut
            return Verdict("failed", failed, since) if late else None

        longest = SUSPECTED if cut else self._timeout
        silent = [b for b in running + cut if now - self._heard[b.rank] > longest]
        if silent:
            seconds = max(now - self._heard[b.rank] for b in silent)
            step = max(b.step for b in self.beats)
            return Verdict("silent", [b._replace(step=step) for b in silent], seconds)
        if cut:
            since = now - min(self._changed[b.rank] for b in cut)
            return Verdict("cut off", cut, since) if since > 2 * SUSPECTED else None

        if not running:
            return None
        fewest = min(b.calls for b in running)
        behind = [b for b in running if b.calls == fewest]
        waited = [now - self._advanced[b.rank] for b in behind]
        limits = [self._timeout_first if b.first else self._timeout for b in behind]
        if any(passed <= limit for passed, limit in zip(waited, limits, strict=True)):
            return None
        reason: Reason = "together" if len(behind) == len(running) > 1 else "stuck"
        return Verdict(reason, behind, min(waited))


class Summary(NamedTuple):
    """What the main process, which is the judge, tells the others.

    Attributes:
        main: its own beat.
        busy: of `Judge.busy`.
        verdict: once there is one.
    """

    main: Beat
    busy: list[int]
    verdict: Verdict | None

    def text(self) -> str:
        """As JSON."""
        verdict = self.verdict and self.verdict.text()
        return json.dumps([self.main.text(), self.busy, verdict])

    @classmethod
    def of(cls, text: str | bytes) -> "Summary":
        """The summary that `text` has given."""
        main, busy, verdict = json.loads(text)
        return cls(Beat.of(main), busy, Verdict.of(verdict) if verdict else None)
