"""`llmnorm serve` as a process: what it refuses before the model is loaded, and how it ends."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from llmnorm import cli
from tests.running import Child
from tests.serving.served import save_model, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serve") / "tiny", dtype="float32")


def key_file(directory: Path, mode: int, text: str = "sixteen-letters-1\n") -> Path:
    path = directory / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def taken_port(directory: Path) -> list[str]:
    return ["--port", "PORT"]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a port that is taken": (taken_port, "serving.port: "),
    "keys that others may read": (
        lambda d: [f"serving.api_key_file={key_file(d, 0o644)}"],
        "serving.api_key_file: {dir}/keys can be read by others; run: chmod 600 {dir}/keys",
    ),
    "no keys": (
        lambda d: [f"serving.api_key_file={key_file(d, 0o600, '# none')}"],
        "serving.api_key_file: {dir}/keys has no key; write one a line",
    ),
    "a short key": (
        lambda d: [f"serving.api_key_file={key_file(d, 0o600, 'abc')}"],
        "serving.api_key_file: {dir}/keys: a key has at least 8 characters of ASCII",
    ),
    "a method for files": (
        lambda d: ["generation.method=exspec", "generation.draft=lookup", "--draft", "lookup"],
        "generation.method 'exspec' drafts as many tokens in every round",
    ),
    "a section of training": (
        lambda d: ["training.steps=3"],
        "command line: training: only generation.* and serving.* are read here",
    ),
    "an origin that is none": (
        lambda d: ["serving.cors=[example.org]"],
        "command line: serving.cors: 'example.org' is no origin",
    ),
    "an address that is none": (
        lambda d: ["--host", "no.such.host.invalid"],
        "serving.host: 'no.such.host.invalid' is no address",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_before_the_model_is_loaded(
    name: str,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2 and one line; loading would raise here."""
    from llmnorm.exchange import served

    def load_target(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(served, "load_target", load_target)
    make, message = REFUSED[name]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = [port if word == "PORT" else word for word in make(tmp_path)]
        assert cli.main(["serve", str(model), *words]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert message.replace("{dir}", str(tmp_path)) in line


def test_a_server_answers_until_sigterm_and_exits_with_0(tmp_path: Path, model: Path) -> None:
    """Oracle: the lines that it begins with; an answer with the key; exit code 0."""
    keys = key_file(tmp_path, 0o600, "# the keys\nsixteen-letters-1\n")
    log = tmp_path / "log.txt"
    words = ["serve", str(model), "--port=0", "--name=small", "--draft=lookup"]
    settings = [f"serving.api_key_file={keys}", "generation.slots=2"]
    child = Child([*words, *settings], log)
    try:
        wait_for(lambda: log.exists() and "serving at " in log.read_text(), 240)
        said = log.read_text()
        for part in ("small: ", "2 rows of 256 tokens", "draft: lookup; ", "(1 key may ask)"):
            assert part in said
        url = said.split("serving at ")[1].split(" ")[0]
        header = {"Authorization": "Bearer sixteen-letters-1"}
        body = {"prompt": "2+2?", "max_tokens": 3, "model": "small"}
        wait_for(lambda: _answers(url.removesuffix("/v1")), 60)
        assert httpx.post(f"{url}/completions", json=body, timeout=60).status_code == 401
        told = httpx.post(f"{url}/completions", json=body, headers=header, timeout=60)
        assert told.json()["usage"]["completion_tokens"] == 3
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGTERM)
        assert child.finish(60) == 0
        assert '"status": 401' in log.read_text() and "Traceback" not in log.read_text()
    finally:
        child.process.kill()


def _answers(root: str) -> bool:
    try:
        return httpx.get(f"{root}/health").status_code == 200
    except httpx.TransportError:
        return False
