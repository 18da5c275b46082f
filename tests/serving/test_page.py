"""The page, as the real server sends it, and what it reads: marks, metrics, the docs' own lines."""

import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from llmnorm.serving.page import DIRECTORY
from tests.running import ROOT
from tests.serving.served import Served, save_model, serving
from tools.check_serving import metrics_read, metrics_told

OUTSIDE = re.compile(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]")
LINES = re.findall(r"^curl .*$", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = save_model(tmp_path_factory.mktemp("page") / "model")
    # The model drafts for itself, so that nearly all that is drafted is accepted.
    drafted = {"draft": str(directory), "draft_tokens": 3}
    with serving(directory, serving={"root_path": "/llm"}, **drafted) as found:
        yield found


def ask(served: Served, path: str, body: Any = None) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    client = http.client.HTTPConnection("127.0.0.1", served.port)
    data = None if body is None else json.dumps(body)
    client.request("GET" if data is None else "POST", path, data)
    response = client.getresponse()
    text = response.read().decode()
    client.close()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, text


class Page(HTMLParser):
    """What a page loads, and what its policy would not run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inline: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        for name, value in attrs:
            if name in ("src", "href", "action", "srcset", "data"):
                self.loads.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(name)

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style") and data.strip():
            self.inline.append(data)


def test_the_page_loads_its_own_files_and_has_no_inline_code(served: Served) -> None:
    """Oracle: the page's elements, and the files that lie beside it."""
    status, headers, text = ask(served, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = Page(text)
    assert page.inline == []
    names = {f"static/{file.name}" for file in DIRECTORY.iterdir()} - {"static/index.html"}
    assert set(page.loads) == names  # relative, so that they are found below a proxy's prefix
    for name in names:
        status, _, sent = ask(served, f"/{name}")
        assert (status, sent) == (200, (DIRECTORY.parent / name).read_text(encoding="utf-8"))
        assert OUTSIDE.findall(sent) == [] and "@import" not in sent
    assert OUTSIDE.findall(text) == []


def test_an_outside_asset_and_inline_code_would_be_found() -> None:
    """Oracle: planted ones."""
    assert OUTSIDE.findall('a {background: url("//cdn.example.org/x.png")}')
    assert OUTSIDE.findall('fetch("https://example.org")')
    assert Page("<p style='color: red' onclick='f()'>").inline == ["style", "onclick"]
    assert Page("<script>f()</script>").inline == ["f()"]


def test_the_policy_has_no_exception(served: Served) -> None:
    """Oracle: the directives of CSP level 3 that would let something else in."""
    for path in ("/", "/static/page.js"):
        policy = ask(served, path)[1]["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules.pop("default-src") == "'none'"
        assert {"base-uri", "form-action", "frame-ancestors"} <= rules.keys()
        assert set(rules.values()) == {"'self'", "'none'"}


def test_a_models_text_is_only_ever_text() -> None:
    """Oracle: the ways in which a script can make markup or code of a string."""
    script = (DIRECTORY / "page.js").read_text(encoding="utf-8")
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\("
    assert re.findall(ways + r"|setHTML|srcdoc|javascript:|createContextualFragment", script) == []


@pytest.mark.parametrize("chat", [False, True])
def test_marks_tell_the_drafted_characters(served: Served, chat: bool) -> None:
    """Oracle: the tokenizer, on the tokens of each piece."""
    asked: dict[str, Any] = {"stream": True, "accepted_marks": True, "return_token_ids": True}
    asked |= {"temperature": 0, "max_tokens": 150, "ignore_eos": True}
    asked |= {"messages": [{"role": "user", "content": "2+2?"}]} if chat else {"prompt": "2+2? It"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    pieces = [line[6:] for line in ask(served, path, asked)[2].split("\n\n") if line][:-1]
    choices = [json.loads(piece)["choices"][0] for piece in pieces]
    marked = [choice for choice in choices if "accepted" in choice]
    texts = [c["delta"].get("content", "") if chat else c["text"] for c in marked]
    assert sum(choice["tokens"] for choice in marked) == 150
    assert sum(choice["accepted"] for choice in marked) > 5, "nothing was drafted"
    known = 0
    decode = served.model.decode
    for choice, text in zip(marked, texts, strict=True):
        assert choice["tokens"] == len(choice["token_ids"])
        assert choice["accepted"] <= choice["drafted"] <= 3
        assert 0 <= choice["accepted_characters"] <= len(text)
        whole = decode(choice["token_ids"])
        if whole == text and "\ufffd" not in whole:  # its characters lie in no other piece
            drafted = decode(choice["token_ids"][: choice["accepted"]])
            # A character that the bonus token has made whole is not a drafted one.
            assert choice["accepted_characters"] == len(drafted.rstrip("\ufffd"))
            known += choice["accepted"]
    assert known > 5
    asked = {**asked, "accepted_marks": False}
    assert "accepted" not in ask(served, path, asked)[2]


def test_alerts_and_dashboard_read_metrics_that_there_are(served: Served) -> None:
    """Oracle: what a server tells at /metrics."""
    told, read = metrics_told(ask(served, "/metrics")[2]), metrics_read()
    assert len(read) > 15 and "llmnorm_time_to_first_token_seconds" in read
    assert sorted(read - told) == []


@pytest.mark.parametrize("line", LINES)
def test_the_lines_of_the_page_in_the_docs_run(served: Served, line: str) -> None:
    """Oracle: curl's exit code, which `-f` makes an error's."""
    command = line.replace("http://127.0.0.1:8000", served.root)
    assert command != line
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("[DONE]" in done.stdout) == ('"stream": true' in line)
