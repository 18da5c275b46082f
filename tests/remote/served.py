"""A real S3 server (moto's) in a process of its own, and a line to it that can be disturbed."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BUCKET = "bucket"
PATIENCE = 300  # seconds that the server has to start, on a busy machine


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that has an empty bucket."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                put = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
                urllib.request.urlopen(put, timeout=PATIENCE).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, "the server did not start"
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


class Line:
    """A port of this machine that leads to the server, and can be disturbed.

    Attributes:
        port: where it listens.
        mode: "open"; "closed": every connection ends at once; "slow": a piece needs `delay`;
            "cut": connections end after `after` bytes to the server, once, and then it is "closed".
        sent, received: bytes that went to the server, and came from it.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self.mode, self.delay, self.after = "open", 0.002, 0
        self.sent = self.received = 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                if self.mode == "closed":
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._server))
                for one, other, up in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(one, other, up), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if self.mode == "slow":
                    time.sleep(self.delay)
                if self.mode == "cut" and up and self.sent + len(data) > self.after:
                    other.sendall(data[: max(0, self.after - self.sent)])
                    self.mode = "closed"
                if self.mode == "closed":
                    break
                other.sendall(data)
                if up:
                    self.sent += len(data)
                else:
                    self.received += len(data)
        for ended in (one, other):
            with suppress(OSError):
                ended.shutdown(socket.SHUT_RDWR)
            ended.close()


def environment(port: int) -> dict[str, str]:
    """What an S3 client is told by: where the server is, and credentials that it takes."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
