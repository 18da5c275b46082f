"""A server in this process, on a port of its own, and the offline engine that it is held to."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmnorm.config.generation import GenerationSettings
from llmnorm.config.serving import ServingSettings
from llmnorm.exchange.served import Target, load_target
from llmnorm.generation.contract import Request, Sampling
from llmnorm.generation.engine import Engine
from llmnorm.serving.access import AccessLog
from llmnorm.serving.app import make_app
from llmnorm.serving.keys import Keys
from llmnorm.serving.loading import model_of_target
from llmnorm.serving.metrics import Metrics
from llmnorm.serving.server import Ending, address_of, bind, serve
from llmnorm.serving.service import Service
from tests.stock import CONTEXT, stock_llama
from tests.test_data.chats import save_tokenizer

NAME = "tiny"


def save_model(
    directory: Path, *, template: bool = True, dtype: str = "float64", context: int = CONTEXT
) -> Path:
    """A stock Llama with a tokenizer, and with a chat template or without one."""
    save_tokenizer(directory)
    stock_llama(directory, context).to(getattr(torch, dtype)).save_pretrained(directory)
    if not template:
        (directory / "chat_template.jinja").unlink()
    return directory


class Gate:
    """A `Step` that waits while it is held, and whose passes may be spoiled.

    Attributes:
        opened: cleared, no pass goes through.
        pause: seconds that each pass takes longer.
        spoil: is given each pass's ids and logits, and may raise, or write into the logits.
    """

    def __init__(self, step: Any) -> None:
        self._step = step
        self.opened = threading.Event()
        self.opened.set()
        self.pause = 0.0
        self.spoil: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def step(self, ids: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        assert self.opened.wait(60)
        time.sleep(self.pause)
        logits = self._step.step(ids, *arguments, **more)
        if self.spoil is not None:
            self.spoil(ids, logits)
        return logits


class Served:
    """What runs, and its parts.

    Attributes:
        url: with /v1.
        bound: the socket that it listens at.
        log: the file of the access log.
        gate: before every pass of the model.
        ending: takes signals.
        code: what it has ended with.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keys: Sequence[str] = (),
        log: Path | None = None,
        serving: dict[str, Any] | None = None,
        **generation: Any,
    ) -> None:
        self.settings = GenerationSettings(**{"slots": 4, "draft": "lookup"} | generation)
        self.serving = ServingSettings(**{"access_log": log or "none", "port": 0} | (serving or {}))
        self.target: Target = load_target(directory, self.settings)
        self.metrics = Metrics()
        self.model, self.engine, self.says = model_of_target(
            self.target, self.settings, self.serving, NAME
        )
        self.gate = Gate(self.engine._slots.step)
        self.engine._slots.step = self.gate
        self.ending = Ending()
        self.service = Service(
            self.engine, self.serving, self.settings.slots, self.metrics, self.ending.died
        )
        self.log = log
        lines = AccessLog(self.serving.access_log, self.metrics.lost_lines.inc)
        self._app = make_app(
            self.model, self.service, self.serving, self.metrics, lines, Keys(keys)
        )
        self.bound = bind(self.serving)
        self.root = address_of(self.bound)
        self.url = f"{self.root}/v1"
        self.port = self.bound.getsockname()[1]
        self.code: int | None = None
        self._offline: Engine | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self.bound:
            self.code = serve(self.bound, self._app, self.service, self.ending)

    def start(self) -> None:
        self._thread.start()
        wait_for(self._listens)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def signal(self) -> None:
        """What a signal does."""
        self.ending.signal(signal.SIGTERM, None)

    def stop(self) -> None:
        """End it, if it has not ended, and wait until it has."""
        self.gate.opened.set()
        if self.code is None:
            self.signal()
        self.join()

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join(60)
        assert self.code is not None, "the server has not ended"

    def idle(self) -> None:
        """Wait until the engine has nothing to do."""
        wait_for(lambda: self.engine.idle and not self.service.open_tickets)

    def offline(self, prompt: Sequence[int], **sampling: Any) -> tuple[str, list[int], str]:
        """The text, tokens and finish of an engine of its own, without a draft.

        It waits for the server: torch traces steps in one thread at a time. Log-probabilities of
        the prompt are asked for because such a prompt is run from its beginning, whatever the
        engine's cache still holds.
        """
        self.idle()
        if self._offline is None:
            settings = self.settings.model_copy(update={"draft": "none", "slots": 1})
            engine = self.target.build(settings).engine
            assert isinstance(engine, Engine)
            self._offline = engine
        alone = Sampling(**sampling, prompt_logprobs=0)
        text, tokens, finish = "", [], ""
        for event in self._offline.generate([Request(tuple(prompt), alone)]):
            assert not event.cached
            text, tokens = text + event.text, tokens + event.tokens
            finish = event.finish or finish
        return text, tokens, finish


def wait_for(true: Any, seconds: float = 60) -> None:
    """Wait until something is true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)


@contextmanager
def serving(directory: Path, **more: Any) -> Iterator[Served]:
    """A server that runs."""
    served = Served(directory, **more)
    served.start()
    try:
        yield served
    finally:
        served.stop()
