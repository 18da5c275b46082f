"""Look at the server's page in a real browser: pictures of it, and what it must not do.

usage: python tools/check_page.py [DIRECTORY] [--server URL] [--browser chromium]

A headless Chromium asks a server that answers from a script: a stream with accepted drafts and with
markup in its text, a busy server, a connection that is cut. `--server` looks at a real one instead,
whose answers are not known, and leaves out what needs the script. Pictures go to DIRECTORY
(page-pictures). The exit code is 1 if the page asked another host, broke its own policy, made
markup of a model's text, or showed something else than it should.

The browser is driven by Chrome's DevTools protocol over two pipes (`--remote-debugging-pipe`:
messages of JSON, each ended by a zero byte), which needs no package.
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llmnorm.serving.page import DIRECTORY, HEADERS, INDEX, TYPES

MARKUP = " <img src=x onerror=alert(1)> <script>alert(2)</script> "
# A piece of a stream: text, how many of its characters were drafted, accepted tokens, tokens.
PIECES = [
    ("The river", 0, 0, 1),
    (" goes to the sea, and the sea", 25, 5, 6),
    (" is", 0, 0, 1),
    (" wide. \U0001f30a Many boats", 16, 4, 5),
    # Markup that begins an element of the page, and markup that is added to one.
    (MARKUP, len(MARKUP), 8, 8),
    (MARKUP, len(MARKUP), 8, 9),
    *[(f" They sail by day {day},", 14, 3, 4) for day in range(12)],
    (" and rest.", 4, 1, 3),
]
KEY = "open-sesame"
LATE = "the request took longer than 600 seconds (serving.request_timeout)"
SECONDS = 20  # that something may take to appear


class Script(BaseHTTPRequestHandler):
    """Answers as the server does: the page, one model, and streams."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The page's files, and the models."""
        path = self.path.partition("?")[0].removeprefix("/static/").lstrip("/") or INDEX
        file = DIRECTORY / path
        if path == "v1/models":
            card = {"id": "river-26M", "object": "model", "max_model_len": 1024}
            self._send(200, {"data": [card]})
        elif file.is_file():
            self._send(200, file.read_bytes(), {**HEADERS, "Content-Type": TYPES[file.suffix]})
        else:
            self._send(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:
        """A stream, whole or cut, or a refusal; the last word of the prompt says which."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = "messages" in body
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if text.endswith("busy"):
            message = "8 answers run or wait, and 8 slots and a queue of 0 hold no more 1"
            self._send(429, {"error": {"message": message}}, {"Retry-After": "1"})
            return
        if text.endswith("key") and self.headers["Authorization"] != f"Bearer {KEY}":
            message = "the key is missing: send the header Authorization"
            self._send(401, {"error": {"message": message}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the page was stopped
            self._stream(text, chat)

    def _stream(self, text: str, chat: bool) -> None:
        for number, (piece, characters, accepted, tokens) in enumerate(PIECES):
            if text.endswith("cut") and number == 3:
                self.close_connection = True
                return
            if text.endswith("late") and number == 3:
                self._event(json.dumps({"error": {"message": LATE}}))
                self.wfile.write(b"0\r\n\r\n")
                return
            choice: dict[str, Any] = {"index": 0, "finish_reason": None, "accepted": accepted}
            choice |= {"tokens": tokens, "accepted_characters": characters, "drafted": tokens - 1}
            choice |= {"delta": {"content": piece}} if chat else {"text": piece}
            if number == len(PIECES) - 1:
                choice["finish_reason"] = "stop"
            self._event(json.dumps({"choices": [choice], "usage": None}))
            time.sleep(0.05)
        self._event(json.dumps({"choices": [], "usage": {"completion_tokens": 1}}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Browser:
    """One page of a headless browser.

    Attributes:
        asked: addresses that it has requested.
        complaints: what it said of policies that were broken and scripts that failed.
    """

    def __init__(self, binary: str, profile: str) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # The browser reads at 3 and writes at 4; bash puts them there, whatever numbers they have.
        words = [binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--disable-background-networking", "--disable-component-update"]
        words += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        moved = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *words]
        self._process = subprocess.Popen(
            moved, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._held, self._number, self._session = b"", 0, None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attach = {"targetId": page["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What a method of the protocol returns; what is reported meanwhile is noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                found: dict[str, Any] = got["result"]
                return found
            self._note(got)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            data = os.read(self._read, 2**16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._held += data
        line, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def _note(self, got: dict[str, Any]) -> None:
        params = got.get("params", {})
        if got["method"] == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif got["method"] == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif got["method"] == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.complaints.append(params["entry"]["text"])

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['text']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + SECONDS
        while not self.value(expression):
            if time.monotonic() > until:
                raise RuntimeError(f"it never came true: {expression}")
            time.sleep(0.02)

    def open(self, url: str, width: int = 1100, height: int = 820) -> None:
        """Show an address, and wait until the page can be used."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **metrics, mobile=width < 600)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.title !== 'llmnorm'")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, control: bool = False) -> None:
        """Press a key, with or without Control."""
        names = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        names |= {"modifiers": 2 if control else 0}
        # With a text the browser does what the key does by itself, such as sending a form.
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **names, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def picture(self, path: Path) -> None:
        """Save what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser; one that does not end by itself is killed."""
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(timeout=SECONDS)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


TEXT = "document.getElementById('output').textContent"
ERROR = "document.getElementById('error').textContent"
ENDED = "document.getElementById('stop').disabled"
TINTED = "[...document.querySelectorAll('#output .accepted')].map(s => s.textContent).join('')"
LOADED = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


def look(browser: Browser, root: str, place: Path) -> list[str]:
    """Take the pictures at a server of the script; returns what is wrong."""
    wrong = []

    def check(true: bool, complaint: str) -> None:
        if not true:
            wrong.append(complaint)

    browser.open(f"{root}/#mode=text&temperature=0&seed=7")
    took = browser.value(LOADED)
    print(f"the page is interactive after {took:.0f} ms")
    check(took < 1000, f"the page is interactive after {took:.0f} ms, and 1000 are allowed")
    check(browser.value("field('seed').value") == "7", "the address does not set the seed")
    browser.type("Where does")
    browser.press("Enter", 13, control=True)
    browser.wait(f"{TEXT}.includes('boats')")
    browser.picture(place / "streaming.png")
    check(not browser.value(ENDED), "the stop button does not work while an answer comes")
    browser.wait(ENDED)
    whole = "".join(piece for piece, *_ in PIECES)
    drafted = "".join(piece[:characters] for piece, characters, *_ in PIECES)
    check(browser.value(TEXT) == "Where does" + whole, "the text is another one")
    check(browser.value(TINTED) == drafted, "other characters are tinted than were drafted")
    made = browser.value("document.querySelectorAll('#output img, #output script').length")
    check(made == 0, "markup of a model's text became elements")
    browser.picture(place / "finished.png")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", features=dark)
    browser.value("byId('settings').open = true")
    browser.picture(place / "dark.png")
    browser.call("Emulation.setEmulatedMedia", features=[])

    browser.open(f"{root}/#mode=chat", 390, 844)
    browser.type("Where does the river go?")
    browser.press("Enter", 13)
    browser.wait(f"{TEXT}.includes('boats')")
    browser.picture(place / "phone.png")
    browser.press("Escape", 27)
    browser.wait(ENDED)
    said = browser.value("document.getElementById('status').textContent")
    check(said.startswith("Stopped."), f"a stopped answer says '{said}'")
    wide = browser.value("document.documentElement.scrollWidth")
    check(wide <= 390, f"the page is {wide} wide on a phone of 390")

    for word, words in (("busy", "busy"), ("late", LATE), ("cut", "connection was cut")):
        browser.open(f"{root}/?{word}#mode=text")
        browser.type(f"This one is {word}")
        browser.press("Enter", 13, control=True)
        browser.wait(f"{ERROR} !== ''")
        said = browser.value(ERROR)
        check(words in said, f"instead of '{words}' it says '{said}'")
        browser.picture(place / f"{word}.png")
    check("river" in browser.value(TEXT), "what had come before the cut is gone")

    browser.open(f"{root}/?key#mode=text")
    browser.type("This one needs a key")
    browser.press("Enter", 13, control=True)
    browser.wait(f"{ERROR}.includes('asks for a key') && byId('access').open")
    browser.value("byId('key').focus()")
    browser.type(KEY)
    browser.press("Enter", 13)
    browser.wait(f"{TEXT}.endsWith('rest.')")
    check(KEY not in browser.value("location.href"), "the key is in the address")
    return wrong


def look_at_real(browser: Browser, root: str, place: Path) -> list[str]:
    """The same at a real server, whose texts are not known."""
    browser.open(f"{root}/#mode=text&temperature=0&max_tokens=60")
    browser.type("The river")
    browser.press("Enter", 13, control=True)
    browser.wait(f"{ENDED} && document.getElementById('status').textContent !== ''")
    browser.picture(place / "real.png")
    said = browser.value(ERROR)
    return [f"it says '{said}'"] if said else []


def main() -> int:
    """Look at the page; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", nargs="?", type=Path, default=Path("page-pictures"))
    parser.add_argument("--server", metavar="URL")
    parser.add_argument("--browser", default="chromium")
    parsed = parser.parse_args()
    if shutil.which(parsed.browser) is None:
        print(f"--browser: there is no {parsed.browser}; apt-get install chromium has one")
        return 2
    parsed.place.mkdir(parents=True, exist_ok=True)
    script = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    threading.Thread(target=script.serve_forever, daemon=True).start()
    root = (parsed.server or f"http://127.0.0.1:{script.server_port}").rstrip("/")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(parsed.browser, profile)
        try:
            wrong = (look_at_real if parsed.server else look)(browser, root, parsed.place)
            browser.value("1")  # what was reported until now is noted
        finally:
            browser.close()
    elsewhere = [url for url in browser.asked if not url.startswith((root, "about:"))]
    wrong += [f"it asked {url}" for url in elsewhere] + browser.complaints
    for complaint in dict.fromkeys(wrong):
        print(complaint)
    print(f"{len(browser.asked)} requests; pictures in {parsed.place}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
