"""The HTTP side of the engine's thread: who is being answered, who may ask, how it all ends.

    service = Service(engine, settings, metrics)
    service.start()                                     in the event loop
    with service.open(requests) as ticket:
        async for answer, event in ticket.events(): ...     until every answer has its finish
    await service.drain()

A `Ticket` is one HTTP request with its answers. Closing it, in whatever way its request ends, ends
its rows in the engine. All of this is touched by the event loop's thread alone; the engine's thread
hands its rounds over by `call_soon_threadsafe`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Protocol

from llmnorm.config.serving import ServingSettings
from llmnorm.generation.contract import Event, Request
from llmnorm.generation.engine import Engine
from llmnorm.generation.sampling import NO_TOKEN
from llmnorm.part import InputError
from llmnorm.serving.refusals import Refusal
from llmnorm.serving.worker import Gained, Round, Worker

AGAIN = 1  # seconds after which a client that found the queue full may ask again
DEAD = "the engine has failed; the server ends"
DRAINED = 5  # the same while the server ends: another one is there by then


class Watcher(Protocol):
    """What is told about answers (metrics.py)."""

    def began(self, seconds: float) -> None:
        """A ticket has waited so long for a slot."""
        ...

    def first(self, seconds: float) -> None:
        """A ticket's first tokens came so long after its request."""
        ...

    def between(self, seconds: float, tokens: int) -> None:
        """An answer's next tokens came so long after those before."""
        ...

    def finished(self, reason: str, seconds: float) -> None:
        """An answer has ended, so long after its request."""
        ...


class Ticket:
    """One HTTP request's answers.

    Args:
        service: whose it is.
        answers: how many.

    Attributes:
        tokens, accepted, cached: counted over its answers, for the access line; the prompt's tokens
            that were saved are those of its first answer.
        waited, first: seconds to the engine's first work on it, and to its first tokens.
        running: answers that the engine has not ended.
        timer: gives it up.
        task: writes its stream; it is cancelled where the client does not read a stream's error.
    """

    def __init__(self, service: "Service", answers: int) -> None:
        self.tokens = self.accepted = self.cached = 0
        self.waited: float | None = None
        self.first: float | None = None
        self._service, self._opened = service, time.monotonic()
        self._last: list[float | None] = [None] * answers
        self.running, self._unread = answers, answers
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[object] | None = None
        self._queue: asyncio.Queue[Gained | Refusal] = asyncio.Queue()

    @property
    def finished(self) -> bool:
        """Whether all answers were read to their end."""
        return not self._unread

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what has not ended."""
        self._service.closed(self)

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield what each round has brought: the numbers of answers, and events.

        Raises:
            Refusal: the engine does not take the request or an answer has failed, the time is over,
                the server ends.
        """
        while self._unread:
            gained = await self._queue.get()
            if isinstance(gained, Refusal):
                raise gained
            if gained.refused is not None:
                raise of_input(gained.refused)
            for _, event in gained.events:
                self._unread -= event.finish is not None
                if event.finish == "error":
                    raise _of_fault(event.message or "")
            if gained.events:
                yield gained.events

    def take(self, at: float, gained: Gained) -> None:
        """What a round, which ended at `at`, has brought."""
        watcher = self._service.watcher
        if gained.began and self.waited is None:
            self.waited = at - self._opened
            watcher.began(self.waited)
        for answer, event in gained.events:
            self.accepted += event.accepted
            self.tokens += len(event.tokens)
            if not answer:
                self.cached = event.cached
            if event.tokens:
                last = self._last[answer]
                if last is not None:
                    watcher.between(at - last, len(event.tokens))
                self._last[answer] = at
                if self.first is None:
                    self.first = at - self._opened
                    watcher.first(self.first)
            if event.finish is not None:
                self.running -= 1
                watcher.finished(event.finish, at - self._opened)
        self._queue.put_nowait(gained)

    def fail(self, refusal: Refusal) -> None:
        """End it with an error, which its client has `DRAINED` seconds to read; no row runs on."""
        self._queue.put_nowait(refusal)
        self._service.abort(self)
        if self.timer is not None:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(DRAINED, self._cut)

    def _cut(self) -> None:
        if self.task is not None:
            self.task.cancel()


class Service:
    """What the routes ask.

    Args:
        engine: which the service's own thread steps from `start` on.
        settings: queue and times are read here.
        slots: rows that the engine runs at once.
        watcher: is told about answers.
        over: called when the engine has died.

    Attributes:
        draining: no new request is taken.
        dead: the engine has died.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServingSettings,
        slots: int,
        watcher: Watcher,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.watcher, self.slots = engine, watcher, slots
        self.draining = self.dead = False
        self._until = 0.0  # when what still runs is failed, once the service drains
        self._settings, self._over = settings, over
        self._tickets: set[Ticket] = set()
        self._worker = Worker(engine, self._hand_over, self._die)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def open_tickets(self) -> int:
        """Requests that are being answered."""
        return len(self._tickets)

    def start(self) -> None:
        """Start the engine's thread; called in the event loop that the routes run in."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    def stop(self) -> None:
        """End the engine's thread, after its round."""
        if not self.dead:
            self._worker.stop()

    def check_open(self) -> None:
        """Refuse where nothing is answered any more.

        Raises:
            Refusal: 503.
        """
        if self.dead:
            raise Refusal(503, DEAD, "engine_dead", wait=DRAINED)
        if self.draining:
            raise Refusal(503, "the server ends, and takes no more", "draining", wait=DRAINED)

    def open(self, requests: Sequence[Request]) -> Ticket:
        """Ask the engine; the ticket must be closed.

        Args:
            requests: whose rows in their order are the answers.

        Raises:
            Refusal: nothing more is taken now, or a request asks for what cannot be.
        """
        self.check_open()
        answers = sum(request.n for request in requests)
        taken, room = sum(t.running for t in self._tickets), self.slots + self._settings.queue
        if answers > room:
            message = f"the request has {answers} answers, and {room} run and wait at most"
            raise Refusal(400, f"{message} (serving.queue)", "invalid_value", param="prompt")
        if taken + answers > room:
            message = f"{taken} answers run or wait, {room} can, and the request has {answers}"
            raise Refusal(429, f"{message} (serving.queue)", "queue_full", wait=AGAIN)
        for request in requests:
            try:
                self.engine.check(request)
            except InputError as error:
                raise of_input(str(error)) from None
        ticket = Ticket(self, answers)
        timeout = self._settings.request_timeout
        if timeout is not None:
            message = f"the request took longer than {timeout:g} seconds (serving.request_timeout)"
            refusal = Refusal(504, message, "timeout")
            loop = asyncio.get_running_loop()
            ticket.timer = loop.call_later(timeout, ticket.fail, refusal)
        self._tickets.add(ticket)
        self._worker.add(ticket, requests)
        return ticket

    def closed(self, ticket: Ticket) -> None:
        """A ticket is not read any more."""
        if ticket in self._tickets:
            self._tickets.discard(ticket)
            if ticket.timer is not None:
                ticket.timer.cancel()
            self.abort(ticket)

    def abort(self, ticket: Ticket) -> None:
        """End a ticket's rows that run or wait."""
        if ticket.running:
            self._worker.abort(ticket)

    async def drain(self) -> None:
        """Take no more requests; wait until those that run have ended, or fail them.

        They have `shutdown_timeout` seconds. A second call makes the first one end at once.
        """
        if self.draining:
            self._until = time.monotonic()
            return
        self.draining = True
        self._until = time.monotonic() + self._settings.shutdown_timeout
        while self._tickets and time.monotonic() < self._until:
            await asyncio.sleep(0.02)
        message = "the server ends, and the answer is not finished"
        for ticket in list(self._tickets):
            ticket.fail(Refusal(503, message, "draining", wait=DRAINED))
        while self._tickets:  # until each has told its client
            await asyncio.sleep(0.02)
            if time.monotonic() > self._until + DRAINED:
                return

    def _hand_over(self, brought: Round) -> None:
        """In the engine's thread."""
        self._call(lambda: self._take(brought))

    def _die(self) -> None:
        """In the engine's thread."""
        self.dead = True
        self._call(self._fail_all)

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: nobody is there any more
            return

    def _take(self, brought: Round) -> None:
        for ticket, gained in brought.gained.items():
            assert isinstance(ticket, Ticket)
            ticket.take(brought.at, gained)

    def _fail_all(self) -> None:
        for ticket in self._tickets:
            ticket.fail(Refusal(503, DEAD, "engine_dead", wait=DRAINED))
        self._over()


def of_input(message: str) -> Refusal:
    """The refusal of a request that the engine does not take."""
    param = message.partition(":")[0]
    known = param.isidentifier()
    code = "context_length_exceeded" if "the context is" in message else "invalid_value"
    return Refusal(400, message, code, param=param if known else None)


def _of_fault(message: str) -> Refusal:
    if message == NO_TOKEN:
        return Refusal(400, f"the answer cannot go on: {message}", "no_token_left")
    return Refusal(500, f"the answer has failed: {message}", "generation_failed")
