"""The server around the application: its socket, its signals, its end.

    bound = bind(settings)                      before the model is loaded: a port may be taken
    ending = Ending()
    code = serve(bound, app, service, ending)   where ending.died is the service's `over`

SIGTERM and SIGINT drain: no new request is taken, those that run have `serving.shutdown_timeout`
seconds. A second signal ends at once. uvicorn's own handling of signals would close the listening
socket first, so that clients were refused by the system and not told to come back.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

from llmnorm.config.serving import ServingSettings
from llmnorm.part import InputError
from llmnorm.serving.edge import App
from llmnorm.serving.service import Service

DEAD_SECONDS = 5.0  # for which a server whose engine has died says so, before it ends
LINGER = 3  # seconds that uvicorn has to close what is open after the drain
STALLED = 60.0  # seconds in which a client takes no byte of what is sent, before it counts as gone


def bind(settings: ServingSettings) -> socket.socket:
    """A socket bound to the address of the settings, which takes no connections yet.

    Raises:
        InputError: the address cannot be had.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"serving.host: '{host}' is no address ({error.strerror})") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        milliseconds = int(1000 * STALLED)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"serving.port: {port} of {host} cannot be had ({error.strerror}); give another one, "
            "or 0 for any that is free"
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Ending:
    """How a server ends: by signals, or because its engine has died.

    Attributes:
        code: the exit code.
    """

    def __init__(self) -> None:
        self.code = 0
        self._server: Any = None
        self._service: Service | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, server: Any, service: Service) -> None:
        """What is ended."""
        self._server, self._service = server, service

    def signal(self, signum: int, frame: FrameType | None) -> None:
        """A signal has come; called in the main thread, between two steps of the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin)

    def died(self) -> None:
        """The engine has died; called in the event loop."""
        self.code = 1
        self._spawn(self._after(DEAD_SECONDS))

    def begin_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that the server runs in."""
        self._loop = loop

    def _begin(self) -> None:
        assert self._service is not None
        if self._service.draining:
            self._server.force_exit = True
        self._spawn(self._drained(self._service))

    async def _drained(self, service: Service) -> None:
        await service.drain()
        self._server.should_exit = True

    async def _after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._server.should_exit = True

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def serve(bound: socket.socket, app: App, service: Service, ending: Ending) -> int:
    """Serve until a signal or the engine ends it; returns the exit code."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            ending.begin_in(asyncio.get_running_loop())
            with super().capture_signals():
                yield

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            ending.signal(sig, frame)

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=LINGER,
    )
    server = Server(config)
    ending.of(server, service)
    server.run(sockets=[bound])
    service.stop()  # a second signal leaves the application's own end out
    return ending.code
