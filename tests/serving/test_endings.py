"""How requests end that do not end by themselves: full queues, clients that leave, deadlines,
faults of the model, a server that drains."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llmnorm.serving.access import AccessLog
from llmnorm.serving.refusals import Refusal
from tests.serving.served import Served, save_model, serving, wait_for

ASK: dict[str, Any] = {"prompt": "It is 4.", "temperature": 0, "max_tokens": 30}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("endings") / "model")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(model, slots=2, serving={"queue": 1}) as found:
        yield found


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def post(served: Served, **more: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/completions", json={**ASK, **more}, timeout=60)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, `[DONE]` as it is."""
    found = []
    for block in response.text.split("\n\n"):
        if block:
            assert block.startswith("data: ")
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def text_of(stream: list[Any]) -> str:
    return "".join(e["choices"][0]["text"] for e in stream if "choices" in e and e["choices"])


def expected(served: Served, **more: Any) -> str:
    asked = {**ASK, **more}
    prompt = served.model.asker.text(asked.pop("prompt"))
    return served.offline(prompt, **asked)[0]


def test_a_full_queue_refuses_and_the_others_are_answered(
    served: Served, pool: ThreadPoolExecutor
) -> None:
    """Oracle: two slots and a queue of one: the fourth gets 429 with Retry-After."""
    served.gate.opened.clear()
    running = [pool.submit(post, served, seed=i, temperature=1) for i in range(3)]
    wait_for(lambda: sum(t.running for t in served.service._tickets) == 3)
    answer = post(served)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    served.gate.opened.set()
    told = [future.result().json()["choices"][0]["text"] for future in running]
    assert told == [expected(served, seed=seed, temperature=1) for seed in range(3)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(
    served: Served, pool: ThreadPoolExecutor, stream: bool
) -> None:
    """Oracle: two passes at most have its row after it has left; the stream beside it is the
    offline engine's."""
    served.idle()
    aborted = served.engine.counters.finished.get("abort", 0)
    rows: list[int] = []
    served.gate.spoil = lambda ids, logits: rows.append(len(ids))
    served.gate.pause = 0.02
    long = {"max_tokens": 120, "ignore_eos": True}
    other: Future[httpx.Response] = pool.submit(post, served, stream=True, **long)
    body = json.dumps({**ASK, **long, "seed": 4, "temperature": 1, "stream": stream})
    with socket.create_connection(("127.0.0.1", served.port)) as gone:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        gone.sendall((head + body).encode())
        wait_for(lambda: rows.count(2) > 3)
        if stream:
            assert b"data: " in gone.recv(2**16)
        served.gate.opened.clear()
    wait_for(lambda: served.service.open_tickets == 1)
    before = rows.count(2)
    served.gate.opened.set()
    text = text_of(events(other.result()))
    served.idle()
    served.gate.pause, served.gate.spoil = 0.0, None
    assert rows.count(2) <= before + 2 and rows.count(1) > 10
    assert served.engine.counters.finished["abort"] == aborted + 1
    assert (
        text
        == served.offline(
            served.model.asker.text(ASK["prompt"]), temperature=0, max_tokens=120, ignore_end=True
        )[0]
    )


def test_a_slow_reader_holds_nobody_up(served: Served) -> None:
    """Oracle: the answer beside it comes while it has read nothing; then it reads its own."""
    served.idle()
    body = json.dumps({**ASK, "stream": True, "seed": 2, "temperature": 1})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())
        wait_for(lambda: served.service.open_tickets == 1)
        assert post(served).json()["choices"][0]["text"] == expected(served)
        read = b"".join(iter(lambda: slow.recv(2**12), b"")).decode()
    told = [line[6:] for line in read.splitlines() if line.startswith("data: ")]
    assert told[-1] == "[DONE]"
    text = text_of([json.loads(event) for event in told[:-1]])
    assert text == expected(served, seed=2, temperature=1)


def reads_nothing(served: Served) -> socket.socket:
    """A client that asks for a stream, larger than all buffers between them, and never reads."""
    served.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    asked = {"stream": True, "max_tokens": 100, "ignore_eos": True, "n": 2}
    told = {"echo": True, "logprobs": 20, "prompt": list(range(20, 160))}  # 100 KB at once
    body = json.dumps({**ASK, **asked, **told})
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", served.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall((head + body).encode())
    wait_for(lambda: served.service.open_tickets == 1)
    return client


def test_a_client_that_reads_nothing_holds_no_row(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: its rows end while it has read nothing and their events wait, one a round at most;
    the streams beside it are the offline engine's; when it leaves, nothing is left of it."""
    monkeypatch.setattr("llmnorm.serving.server.STALLED", 3600)  # a slow machine takes a minute
    with serving(model, slots=4, serving={"request_timeout": None}) as served:
        wanted = [expected(served, seed=seed, temperature=1) for seed in range(3)]
        with reads_nothing(served):
            (ticket,) = served.service._tickets
            for seed, text in enumerate(wanted):
                told = events(post(served, stream=True, seed=seed, temperature=1))
                assert text_of(told) == text
            wait_for(lambda: served.engine.idle and not ticket.running)
            wait_for(lambda: served.service.open_tickets == 1)  # the others' are closed behind them
            assert not ticket.finished
            assert 10 < ticket._queue.qsize() <= 100
        wait_for(lambda: not served.service.open_tickets)


@pytest.mark.parametrize("patience", [3600, 0.2])
def test_a_deadline_frees_the_rows_of_a_client_that_reads_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Oracle: its rows are aborted at the deadline, which comes when it has filled all buffers; its
    ticket is closed when it has left, or has not read the error for so many seconds."""
    monkeypatch.setattr("llmnorm.serving.service.DRAINED", patience)
    monkeypatch.setattr("llmnorm.serving.server.STALLED", 3600)
    with serving(model, serving={"request_timeout": 3600}) as served:
        served.gate.pause = 0.05
        with reads_nothing(served):
            (ticket,) = served.service._tickets
            wait_for(lambda: ticket.tokens > 6)
            late = Refusal(504, "the request took too long", "timeout")
            assert served.service._loop is not None
            served.service._loop.call_soon_threadsafe(ticket.fail, late)
            wait_for(lambda: served.engine.counters.finished.get("abort") == 2)
            wait_for(lambda: not served.engine.running)
            if patience < 1:
                wait_for(lambda: not served.service.open_tickets)
            else:
                assert served.service.open_tickets == 1
        wait_for(lambda: not served.service.open_tickets)
        served.gate.pause = 0.0
        assert post(served).json()["choices"][0]["text"] == expected(served)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone has this limit")
def test_a_client_that_takes_no_byte_counts_as_gone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: without a deadline its ticket is closed, and the system has cut the connection."""
    monkeypatch.setattr("llmnorm.serving.server.STALLED", 0.3)
    with (
        serving(model, serving={"request_timeout": None}) as served,
        reads_nothing(served) as client,
    ):
        wait_for(lambda: not served.service.open_tickets)
        with pytest.raises(ConnectionResetError):
            while client.recv(2**16):
                pass


def test_a_defect_of_ours_is_500_and_no_trace(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: OpenAI's error object with the request's id; the trace on stderr; then an answer."""

    def broken(*_: object) -> None:
        raise KeyError("a secret of ours")

    with monkeypatch.context() as patch:
        patch.setattr(served.service, "open", broken)
        answer = post(served)
    assert answer.status_code == 500 and "secret" not in answer.text
    error = answer.json()["error"]
    assert error["code"] == "internal_error"
    assert answer.headers["x-request-id"] in error["message"]
    said: list[str] = []  # the trace comes after the answer
    wait_for(lambda: said.append(capfd.readouterr().err) or "a secret of ours" in "".join(said))
    assert post(served).json()["choices"][0]["text"] == expected(served)


def test_logits_that_are_nan_end_their_row_alone(served: Served, pool: ThreadPoolExecutor) -> None:
    """Oracle: 500 for it; the row beside it, and the next one in its slot, are the offline
    engine's."""
    served.idle()
    poison = served.model.asker.text("3+3?")[-1]

    def spoil(ids: torch.Tensor, logits: torch.Tensor) -> None:
        for row in range(ids.shape[0]):
            if int(ids[row, 0]) == poison:
                logits[row] = float("nan")

    served.gate.opened.clear()
    served.gate.spoil = spoil
    good = pool.submit(post, served)
    bad = pool.submit(post, served, prompt="3+3?")
    wait_for(lambda: sum(t.running for t in served.service._tickets) == 2)
    served.gate.opened.set()
    refused = bad.result()
    assert refused.status_code == 500, refused.text
    assert "not finite" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert good.result().json()["choices"][0]["text"] == expected(served)
    served.gate.spoil = None
    assert post(served).json()["choices"][0]["text"] == expected(served)


def test_a_round_that_raises_fails_its_rows_and_the_next_ones_are_answered(
    served: Served, pool: ThreadPoolExecutor
) -> None:
    """Oracle: a stream gets an error event and no [DONE]; then the offline engine's text."""
    served.idle()
    raised = threading.Event()

    def spoil(ids: torch.Tensor, logits: torch.Tensor) -> None:
        if not raised.is_set():
            raised.set()
            raise RuntimeError("a kernel of ours is broken")

    served.gate.spoil = spoil
    told = events(post(served, stream=True))
    served.gate.spoil = None
    assert raised.is_set()
    assert told[-1]["error"]["type"] == "internal_error" and "[DONE]" not in told
    assert not any(e["choices"][0]["finish_reason"] for e in told[:-1])
    assert httpx.get(f"{served.root}/health").status_code == 200
    assert post(served).json()["choices"][0]["text"] == expected(served)


def test_three_rounds_that_raise_end_the_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 503 with engine_dead for who waits, at /health and /ready; exit code 1 soon after."""
    monkeypatch.setattr("llmnorm.serving.server.DEAD_SECONDS", 2.0)
    with serving(model) as served:

        def spoil(ids: torch.Tensor, logits: torch.Tensor) -> None:
            raise RuntimeError("broken for good")

        served.gate.spoil = spoil
        codes = [post(served).json()["error"]["code"] for _ in range(3)]
        assert codes[:2] == ["generation_failed"] * 2 and codes[2] == "engine_dead"
        for route in ("/health", "/ready"):
            answer = httpx.get(served.root + route)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_dead"
        assert post(served).status_code == 503
        served.join()
        assert served.code == 1


def test_a_deadline_is_an_error_and_no_finish(model: Path, pool: ThreadPoolExecutor) -> None:
    """Oracle: 504, or an error event behind the pieces that came; no row runs on."""
    with serving(model, serving={"request_timeout": 0.5}) as served:
        served.gate.opened.clear()
        whole = pool.submit(post, served)
        stream = pool.submit(post, served, stream=True)
        assert whole.result().status_code == 504
        assert whole.result().json()["error"]["code"] == "timeout"
        told = events(stream.result())
        assert told[-1]["error"]["code"] == "timeout"
        served.gate.opened.set()
        served.idle()


def test_a_server_that_drains(model: Path, pool: ThreadPoolExecutor) -> None:
    """Oracle: /ready and new requests get 503 with Retry-After, /health 200; who runs is answered
    in full."""
    with serving(model) as served:
        served.gate.opened.clear()
        running = pool.submit(post, served, stream=True)
        wait_for(lambda: served.service.open_tickets == 1)
        served.signal()
        wait_for(lambda: served.service.draining)
        assert httpx.get(f"{served.root}/ready").status_code == 503
        assert httpx.get(f"{served.root}/health").status_code == 200
        refused = post(served)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "draining"
        served.gate.opened.set()
        told = events(running.result())
        served.join()
        assert served.code == 0
        assert told[-1] == "[DONE]" and text_of(told) == expected(served)


@contextmanager
def cut_by_a_drain(model: Path, pool: ThreadPoolExecutor, seconds: float) -> Iterator[Served]:
    """A server that was told to end while a stream waits; behind it, what the stream was told (an
    error event, and no [DONE]), and the exit code."""
    with serving(model, serving={"shutdown_timeout": seconds}) as served:
        served.gate.opened.clear()
        running = pool.submit(post, served, stream=True)
        wait_for(lambda: served.service.open_tickets == 1)
        served.signal()
        yield served
        told = events(running.result())
        assert told[-1]["error"]["code"] == "draining"
        served.gate.opened.set()
        served.join()
        assert served.code == 0


def test_a_drain_that_takes_too_long_tells_its_streams(
    model: Path, pool: ThreadPoolExecutor
) -> None:
    """Oracle: an error event, and no [DONE], after `shutdown_timeout`."""
    with cut_by_a_drain(model, pool, 0.2):
        pass


def test_a_second_signal_ends_at_once(model: Path, pool: ThreadPoolExecutor) -> None:
    """Oracle: the server ends although `shutdown_timeout` is an hour; exit code 0."""
    with cut_by_a_drain(model, pool, 3600) as served:
        wait_for(lambda: served.service.draining)
        served.signal()


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(model: Path) -> None:
    """Oracle: /dev/full; the count of lost lines."""
    with serving(model, log=Path("/dev/full")) as served:
        assert post(served).json()["choices"][0]["text"] == expected(served)
        text = httpx.get(f"{served.root}/metrics").text
        assert "llmnorm_access_log_errors_total 1.0" in text


def test_a_line_that_a_disk_took_in_part_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a disk with room for 20 bytes, and then room again; the other lines are JSON."""
    lost: list[int] = []
    log, write = AccessLog(tmp_path / "log", lambda: lost.append(1)), os.write
    for number, room in enumerate((1000, 20, 1000, 1000)):
        monkeypatch.setattr(os, "write", lambda file, raw, room=room: write(file, raw[:room]))
        log.write({"number": number})
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(lines[n])["number"] for n in (0, 2, 3)] == [0, 2, 3]
    assert len(lines) == 4 and len(lines[1]) == 20 and len(lost) == 1
