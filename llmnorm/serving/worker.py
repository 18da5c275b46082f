"""The thread that owns the engine: requests come in by a queue, what rows gain goes out by rounds.

    worker = Worker(engine, deliver, died)
    worker.start()
    worker.add(ticket, [request, ...])      from any thread; all rows of a ticket are its answers
    worker.abort(ticket)
    worker.stop()

`deliver` is called in this thread, once a round, with all that the round has brought. Requests of
one ticket are taken together. An exception of a round fails the rows that ran (the engine tells
them so in its next step) and the thread goes on; `DEAD` such rounds in a row end it.

What would surprise: text is made here, in the engine's rows, since a stop string ends a row at its
token. It costs 7 to 10 us a token (a byte-level tokenizer, with and without two stop strings), of
rounds that take tens of milliseconds.
"""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from llmnorm.generation.contract import Event, Request
from llmnorm.generation.engine import Engine
from llmnorm.part import InputError

PATIENCE = 10.0  # seconds
DEAD = 3  # rounds in a row that end in an exception


@dataclass
class Gained:
    """What a round has brought to one ticket.

    Attributes:
        events: each with the number of its answer, from 0 over all requests of the ticket.
        began: its first request has left the queue, in this round.
        refused: the engine does not take the requests; nothing else comes then.
    """

    events: list[tuple[int, Event]] = field(default_factory=list)
    began: bool = False
    refused: str | None = None


@dataclass
class Round:
    """What a round has brought.

    Attributes:
        at: `time.monotonic()` at its end.
        gained: by ticket.
    """

    at: float
    gained: dict[Hashable, Gained]


class Worker:
    """The engine's thread.

    Args:
        engine: which no other thread may step.
        deliver: takes what each round has brought.
        died: called at the end of the thread where it ends by itself; nothing is delivered after.

    Attributes:
        engine: its counters may be read from any thread.
    """

    def __init__(
        self, engine: Engine, deliver: Callable[[Round], None], died: Callable[[], None]
    ) -> None:
        self.engine = engine
        self._deliver, self._died = deliver, died
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, tuple[Hashable, int]] = {}  # request -> its ticket, first answer
        self._numbers: dict[Hashable, list[int]] = {}
        self._rows: dict[Hashable, int] = {}  # answers that are still to end
        self._queued: dict[Hashable, int] = {}  # tickets whose first request has not begun
        self._gained: dict[Hashable, Gained] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the round that it is in, and wait for that, `PATIENCE` at most."""
        self._commands.put(self._stop)
        self._thread.join(PATIENCE)

    def add(self, ticket: Hashable, requests: Sequence[Request]) -> None:
        """Queue requests, whose rows in their order are the ticket's answers."""
        self._commands.put(lambda: self._add(ticket, requests))

    def abort(self, ticket: Hashable) -> None:
        """End a ticket's rows; of one that has ended already nothing comes."""
        self._commands.put(lambda: self._abort(ticket))

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:  # a defect outside of the rounds; what the engine holds is not known
            traceback.print_exc(file=sys.stderr)
        if not self._stopped:
            self._died()

    def _work(self) -> None:
        failed = 0
        while True:
            self._obey(wait=self.engine.idle)
            if self._stopped:
                return
            if not self.engine.idle:
                rounds = self.engine.counters.rounds
                try:
                    events = self.engine.step()
                except Exception:
                    traceback.print_exc(file=sys.stderr)
                    failed += 1
                    if failed == DEAD:
                        return
                    continue
                if self.engine.counters.rounds > rounds:  # and not only told of the failed one
                    failed = 0
                self._note(events)
            if self._gained:
                gained, self._gained = self._gained, {}
                self._deliver(Round(time.monotonic(), gained))

    def _obey(self, *, wait: bool) -> None:
        """Run the commands that are there; with `wait`, at least one."""
        try:
            self._commands.get(block=wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _stop(self) -> None:
        self._stopped = True

    def _add(self, ticket: Hashable, requests: Sequence[Request]) -> None:
        numbers: list[int] = []
        first = 0
        try:
            for request in requests:
                number = self.engine.add(request)
                numbers.append(number)
                self._tickets[number] = (ticket, first)
                first += request.n
        except InputError as error:
            for number in numbers:
                self.engine.abort(number)
                del self._tickets[number]
            self._of(ticket).refused = str(error)
            return
        self._numbers[ticket], self._rows[ticket] = numbers, first
        self._queued[ticket] = numbers[0]

    def _abort(self, ticket: Hashable) -> None:
        for number in self._numbers.get(ticket, []):
            self._note(self.engine.abort(number))

    def _note(self, events: Sequence[Event]) -> None:
        """Put events to their tickets."""
        if self._queued:
            waiting = self.engine.queued
            for ticket, number in list(self._queued.items()):
                if number not in waiting:
                    del self._queued[ticket]
                    self._of(ticket).began = True
        for event in events:
            ticket, first = self._tickets[event.request]
            self._of(ticket).events.append((first + event.row, event))
            if event.finish is not None:
                self._rows[ticket] -= 1
                if not self._rows[ticket]:
                    self._forget(ticket)

    def _forget(self, ticket: Hashable) -> None:
        for number in self._numbers.pop(ticket):
            del self._tickets[number]
        del self._rows[ticket]
        self._queued.pop(ticket, None)

    def _of(self, ticket: Hashable) -> Gained:
        return self._gained.setdefault(ticket, Gained())
