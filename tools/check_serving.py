"""Check the files of launch/serving with the programs that read them, around a server that runs.

usage: python tools/check_serving.py RUN_OR_DIR [--keep]

`llmnorm serve RUN_OR_DIR` runs behind a real nginx with launch/serving/nginx.conf, of which
ports, host and certificate alone are replaced (`openssl` makes one), and is asked through it: the
prefix, TLS, a stream whose pieces come one by one, a body of 10 MB, request ids, and what a client
gets while the server ends and while it is away. Then the metrics that it has are held to those that
alerts and dashboard read, and `systemd-analyze`, `promtool` and `docker build` check their files
where they are installed; a line says which were not. The exit code is 1 if something is wrong.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FILES = ROOT / "launch" / "serving"
SECONDS = 120  # that a server has to start
HOST = "llm.example.org"
SITE = """daemon off;
pid {place}/pid;
error_log {place}/error.log;
{user}
events {{}}
http {{
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    include {place}/site.conf;
}}
"""
METRIC = re.compile(r"\bllmnorm_[a-z0-9_]+")


class Got(NamedTuple):
    """An answer: status, headers in lower case, body, and when each piece of it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    times: list[float]

    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression of Prometheus reads; of a histogram, its own name."""
    names = METRIC.findall(expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def metrics_read() -> set[str]:
    """The metrics that alerts and dashboard read."""
    board = json.loads((FILES / "grafana.json").read_text())
    found = metrics_of((FILES / "alerts.yml").read_text())
    return found.union(*(metrics_of(t["expr"]) for p in board["panels"] for t in p["targets"]))


def metrics_told(text: str) -> set[str]:
    """The metrics that a server tells; a counter's name ends in _total."""
    kinds = re.findall(r"^# TYPE (\S+) (\S+)", text, re.M)
    return {name for name, _ in kinds}


class Behind:
    """A server behind nginx.

    Args:
        path: what is served.
        place: an empty directory.
    """

    def __init__(self, path: Path, place: Path) -> None:
        self._path, self._place = path, place
        self._server_port, self._plain, self._secure = free_port(), free_port(), free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self._key, self._cert = place / "key.pem", place / "cert.pem"
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        words += ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
        words += ["-keyout", str(self._key), "-out", str(self._cert)]
        subprocess.run(words, check=True, capture_output=True)
        (place / "site.conf").write_text(self._site())
        user = "user root;" if os.geteuid() == 0 else ""
        conf = place / "nginx.conf"
        conf.write_text(SITE.format(place=place, user=user))
        nginx = ["nginx", "-p", str(place), "-c", str(conf), "-e", str(place / "error.log")]
        subprocess.run([*nginx, "-t", "-q"], check=True)
        self._tls = ssl.create_default_context(cafile=str(self._cert))
        self._nginx = subprocess.Popen(nginx)
        until = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._secure)).close()
                return
            except OSError:
                if self._nginx.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("nginx did not start") from None
                time.sleep(0.02)

    def _site(self) -> str:
        text = (FILES / "nginx.conf").read_text()
        swaps = {
            "127.0.0.1:8000": f"127.0.0.1:{self._server_port}",
            "listen 80;": f"listen 127.0.0.1:{self._plain};",
            "listen 443 ssl;": f"listen 127.0.0.1:{self._secure} ssl;",
            "/etc/ssl/llmnorm/cert.pem": str(self._cert),
            "/etc/ssl/llmnorm/key.pem": str(self._key),
            "/var/log/nginx/llmnorm.log": str(self._place / "access.log"),
        }
        for there, here in swaps.items():
            assert text.count(there) == 1, f"nginx.conf: {there} stands there {text.count(there)}x"
            text = text.replace(there, here)
        return re.sub(r"^ *listen \[::\].*\n", "", text, flags=re.M)

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        words = [sys.executable, "-m", "llmnorm", "serve", str(self._path.resolve())]
        words += ["--config", str(FILES / "serve.yaml"), "--port", str(self._server_port)]
        words += ["serving.api_key_file=null", "serving.shutdown_timeout=10"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self._place / "server.log").open("ab") as log:
            self.server = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        until = time.monotonic() + SECONDS
        while True:
            if self.server.poll() is not None or time.monotonic() > until:
                said = (self._place / "server.log").read_text()[-2000:]
                raise RuntimeError(f"the server did not start:\n{said}")
            try:
                if self.direct("/ready").status == 200:
                    return
            except OSError:
                time.sleep(0.1)

    def direct(self, path: str) -> Got:
        """GET at the server itself."""
        client = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=SECONDS)
        return _ask(client, "GET", path, None, {})

    def plain(self, path: str) -> Got:
        """GET at nginx without TLS."""
        client = http.client.HTTPConnection("127.0.0.1", self._plain, timeout=SECONDS)
        return _ask(client, "GET", path, None, {"Host": HOST})

    def ask(
        self,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        on_first: Callable[[], None] | None = None,
        **headers: str,
    ) -> Got:
        """GET, or POST of a body, at nginx with TLS, its certificate checked."""
        raw = socket.create_connection(("127.0.0.1", self._secure), timeout=SECONDS)
        client = http.client.HTTPSConnection(HOST, self._secure, timeout=SECONDS)
        client.sock = self._tls.wrap_socket(raw, server_hostname=HOST)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"Host": HOST, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return _ask(client, "GET" if data is None else "POST", path, data, sent, on_first)

    def end(self) -> int:
        """End the server, by SIGTERM; its exit code."""
        assert self.server is not None
        self.server.terminate()
        return self.server.wait(timeout=SECONDS)

    def close(self) -> None:
        """End what runs."""
        for process in (self.server, self._nginx):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(timeout=SECONDS)


def _ask(
    client: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    on_first: Callable[[], None] | None = None,
) -> Got:
    """One request; `on_first` is called when the first piece of the body is there."""
    client.request(method, path, body, headers)
    response = client.getresponse()
    found = {name.lower(): value for name, value in response.getheaders()}
    pieces, times = [], []
    while piece := response.read1(2**16):
        pieces.append(piece)
        times.append(time.monotonic())
        if on_first is not None and len(pieces) == 1:
            on_first()
    client.close()
    return Got(response.status, found, b"".join(pieces), times)


def check_site(behind: Behind) -> list[str]:
    """What is wrong with the server as nginx shows it."""
    wrong: list[str] = []

    def check(true: bool, complaint: str) -> None:
        print(f"{'ok' if true else 'WRONG':6}{complaint}")
        if not true:
            wrong.append(complaint)

    got = behind.plain("/llm/health?x=1")
    where = got.headers.get("location")
    check((got.status, where) == (308, f"https://{HOST}/llm/health?x=1"), "without TLS: redirected")
    check(behind.ask("/llm").headers.get("location", "").endswith("/llm/"), "/llm leads to /llm/")
    page = behind.ask("/llm/")
    names = re.findall(r'(?:href|src)="([^"]+)"', page.body.decode())
    shown = [behind.ask(f"/llm/{name}").status for name in names]
    check(page.status == 200 and set(shown) == {200}, f"the page and its {len(names)} files")
    check("content-security-policy" in page.headers, "the page's policy passes")
    check(behind.ask("/llm/v1/models").status == 200, "the API below the prefix")
    check(behind.ask("/llm/metrics").status == 404, "metrics are not shown")
    check(behind.ask("/llm/nowhere").json()["error"]["code"] == "not_found", "404 is the server's")

    asked = {"prompt": "The river", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    whole = behind.ask("/llm/v1/completions", asked, X_Request_Id="of-the-client")
    check(whole.status == 200, "an answer that is not streamed")
    check(
        whole.headers.get("x-request-id") == "of-the-client", "the client's request id comes back"
    )
    got = behind.ask("/llm/v1/completions", asked | {"stream": True})
    given = got.headers.get("x-request-id", "")
    check(re.fullmatch("[0-9a-f]{32}", given) is not None, "nginx gives a request id")
    events = [e.removeprefix(b"data: ") for e in got.body.split(b"\n\n") if e]
    text = "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1])
    check(events[-1] == b"[DONE]" and text == whole.json()["choices"][0]["text"], "a stream")
    check(len(got.times) > len(events) / 3, f"{len(events)} events came in {len(got.times)} pieces")

    got = behind.ask("/llm/v1/completions", b" " * 10_000_000)
    told = got.json() or {"error": {}}
    check((got.status, told["error"].get("code")) == (413, "request_too_large"), "a body of 10 MB")

    assert behind.server is not None
    server = behind.server
    got = behind.ask(
        "/llm/v1/completions", asked | {"stream": True}, lambda: server.send_signal(signal.SIGTERM)
    )
    check(got.body.endswith(b"data: [DONE]\n\n"), "a stream goes to its end while the server ends")
    check(server.wait(timeout=SECONDS) == 0, "the server's exit code is 0")
    got = behind.ask("/llm/v1/models")
    told = got.json() or {"error": {}}
    check((got.status, told["error"].get("code")) == (503, "loading"), "no server: 503")
    check(got.headers.get("retry-after") == "5", "no server: when to come back")
    behind.start()
    check(behind.ask("/llm/v1/models").status == 200, "nginx finds the server that is there again")

    told_text = behind.direct("/metrics").body.decode()
    missing = sorted(metrics_read() - metrics_told(told_text))
    check(missing == [], f"alerts and dashboard read what there is {' '.join(missing)}")
    return wrong


def check_files(place: Path) -> list[str]:
    """What programs say that read the other files, where they are installed."""
    wrong: list[str] = []

    def check(name: str, *words: str) -> None:
        if shutil.which(words[0]) is None:
            print(f"      {name}: not checked, there is no {words[0]}")
            return
        done = subprocess.run(words, capture_output=True, text=True)
        print(f"{'WRONG' if done.returncode else 'ok':6}{name}: {' '.join(words[:2])}")
        if done.returncode:
            wrong.append(f"{name}: {done.stdout}{done.stderr}")

    # The package that the unit starts is not there; everything else is as it is written.
    unit = (FILES / "llmnorm.service").read_text()
    unit = unit.replace("/opt/llmnorm/bin/llmnorm", shutil.which("true") or "/bin/true")
    (place / "llmnorm.service").write_text(re.sub("^(User|Group)=.*", r"\1=root", unit, flags=re.M))
    check("llmnorm.service", "systemd-analyze", "verify", str(place / "llmnorm.service"))
    security = ["security", "--offline=true", "--threshold=30", str(place / "llmnorm.service")]
    check("llmnorm.service", "systemd-analyze", *security)
    check("alerts.yml", "promtool", "check", "rules", str(FILES / "alerts.yml"))
    check("prometheus.yml", "promtool", "check", "config", str(FILES / "prometheus.yml"))
    if (
        shutil.which("docker")
        and not subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        file = str(ROOT / "launch" / "Dockerfile")
        check("Dockerfile", "docker", "build", "-f", file, "--target", "serve", str(ROOT))
    else:
        print(
            "      Dockerfile: not built, there is no docker that runs; tests/test_container.py "
            "carries out its instructions"
        )
    return wrong


def main() -> int:
    """Check; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR")
    parser.add_argument("--keep", action="store_true", help="leave logs and certificate")
    parsed = parser.parse_args()
    for program in ("nginx", "openssl"):
        if shutil.which(program) is None:
            print(f"there is no {program}; apt-get install nginx openssl has it")
            return 2
    place = Path(tempfile.mkdtemp())
    wrong = check_files(place)
    behind = Behind(parsed.path, place)
    try:
        behind.start()
        wrong += check_site(behind)
    finally:
        behind.close()
        if parsed.keep:
            print(f"logs: {place}")
        else:
            shutil.rmtree(place)
    for complaint in wrong:
        print(complaint)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
