"""What is refused: bodies that are no JSON, fields that cannot be served, keys, sizes, routes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.served import NAME, Served, save_model, serving, wait_for
from tests.stock import CONTEXT

KEY, OTHER = "a-key-of-sixteen", "another-key-of-ours"
LIMIT = 40_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("refusals")
    limits: dict[str, Any] = {"body_limit": LIMIT, "root_path": "/llm", "cors": ["https://a.org"]}
    with serving(
        save_model(directory / "model", template=False),
        keys=[OTHER, KEY],
        log=directory / "access.jsonl",
        serving=limits,
    ) as found:
        yield found


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.root, headers=headers, timeout=60) as client:
        yield client


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error object of an answer, whose shape is checked."""
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    assert len(error["message"]) <= 500 and error["message"]
    found: dict[str, Any] = error
    return found


HOSTILE = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"17",
    "10,000 brackets": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "100 brackets": b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}",
    "5,000 digits": b'{"prompt": "a", "n": ' + b"9" * 5_000 + b"}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "half a pair": b'{"prompt": "a\\ud800"}',
    "the other half": b'{"prompt": "\\udc00a"}',
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "a key twice, deep": b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
    "Latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", ["/v1/completions", "/tokenize"])
def test_a_body_that_is_no_json_is_refused(
    served: Served, http: httpx.Client, name: str, route: str
) -> None:
    """Oracle: 400 with one line, and no round of the engine."""
    rounds = served.engine.counters.rounds
    refused(http.post(route, content=HOSTILE[name]), 400, "invalid_json")
    assert served.engine.counters.rounds == rounds


def test_300_spoiled_bodies_do_no_harm(served: Served, http: httpx.Client) -> None:
    """Oracle: a body with bytes cut, doubled or changed is refused or answered, never 5xx."""
    import random

    chance = random.Random(0)
    asked = {"prompt": "It is", "max_tokens": 2, "stop": ["a", "b"], "logit_bias": {"5": -1}}
    whole = json.dumps(asked).encode()
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            if chance.random() < 0.5:
                raw[at] = chance.randrange(256)
            else:
                raw[at : at + chance.randint(1, 9)] = b""
        answer = http.post("/v1/completions", content=bytes(raw))
        assert answer.status_code in (200, 400, 404), (raw, answer.text)
    assert http.get("/health").status_code == 200


BAD = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": 5}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [10**6]}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 200}, "prompt", "invalid_value"),
    ({"prompt": "a", "n": "5"}, "n", "invalid_value"),
    ({"prompt": "a", "n": 10**9}, "n", "invalid_value"),
    ({"prompt": "a", "n": 5}, "n", "invalid_value"),
    ({"prompt": "a", "n": 1.5}, "n", "invalid_value"),
    ({"prompt": "a", "temperature": 3}, "temperature", "invalid_value"),
    ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
    ({"prompt": "a", "seed": 2**70}, "seed", "invalid_value"),
    ({"prompt": "a", "stop": [""]}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": "x" * 20_000}, "stop", "invalid_value"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "logprobs": 50}, "logprobs", "invalid_value"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"prompt": "a", "max_tokens": 500}, "max_tokens", "context_length_exceeded"),
    ({"prompt": [7] * (CONTEXT + 1)}, None, "context_length_exceeded"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
    ({"prompt": "a", "best_of": 3}, "best_of", "unsupported_parameter"),
    ({"prompt": "a", "stream_options": {}}, "stream_options", "invalid_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD)
def test_a_field_that_cannot_be_served_is_named(
    http: httpx.Client, body: dict[str, Any], param: str | None, code: str
) -> None:
    """Oracle: the field and the code of OpenAI's error object."""
    assert refused(http.post("/v1/completions", json=body), 400, code)["param"] == param


CHAT: Any = {"messages": [{"role": "user", "content": "a"}]}
BAD_CHAT = [
    ({"messages": []}, "messages", "invalid_value"),
    (CHAT | {"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    (CHAT | {"functions": [{}]}, "functions", "unsupported_parameter"),
    (CHAT | {"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    (CHAT | {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    (CHAT, "messages", "chat_template_missing"),
    (CHAT | {"tools": [], "tool_choice": "none"}, "messages", "chat_template_missing"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD_CHAT)
def test_a_chat_that_cannot_be_served_is_refused(
    http: httpx.Client, body: dict[str, Any], param: str, code: str
) -> None:
    """Oracle: as above; this model has no chat template."""
    error = refused(http.post("/v1/chat/completions", json=body), 400, code)
    assert error["param"] == param
    if code == "chat_template_missing":
        assert "serving.chat_template" in error["message"]


def test_routes_methods_models_and_sizes(http: httpx.Client) -> None:
    """Oracle: the statuses and codes of OpenAI's API."""
    assert refused(http.get("/nothing"), 404, "not_found")["type"] == "not_found_error"
    answer = http.get("/v1/completions")
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    body = {"prompt": "a", "model": "gpt-x"}
    refused(http.post("/v1/completions", json=body), 404, "model_not_found")
    refused(http.get("/v1/models/none/such"), 404, "model_not_found")
    refused(http.post("/v1/completions", content=b" " * 10**7), 413, "request_too_large")
    pieces = (b" " * 10**4 for _ in range(50))  # no Content-Length
    refused(http.post("/v1/completions", content=pieces), 413, "request_too_large")
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404


def test_a_key_is_asked_for(served: Served) -> None:
    """Oracle: 401 without a key or with another one; what a monitor asks needs none."""
    with httpx.Client(base_url=served.root) as http:
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {KEY}"}):
            answer = http.get("/v1/models", headers=header)
            assert refused(answer, 401, "invalid_api_key")["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.post("/v1/completions", content=b"{").status_code == 401
        for route in ("/health", "/ready", "/metrics", "/version"):
            assert http.get(route).status_code == 200
        for key in (KEY, OTHER):
            header = {"Authorization": f"Bearer {key}"}
            assert http.get("/v1/models", headers=header).status_code == 200


def test_a_proxys_prefix_and_other_origins(served: Served, http: httpx.Client) -> None:
    """Oracle: the same route with and without `serving.root_path`; the CORS headers."""
    assert http.get("/llm/v1/models").json() == http.get("/v1/models").json()
    asked = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
    with httpx.Client(base_url=served.root) as bare:  # a preflight has no key
        answer = bare.options("/v1/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://a.org"


def test_the_access_log_and_the_request_id(served: Served, http: httpx.Client) -> None:
    """Oracle: the line's fields; no text of prompt or answer, nor the key, is in the file."""
    secret = "It is 4 and nobody else's business"
    body = {
        "prompt": secret,
        "max_tokens": 5,
        "temperature": 0,
        "colour": "vermilion",
        "model": NAME,
    }
    answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    assert int(answer.headers["openai-processing-ms"]) >= 0

    def lines() -> list[str]:
        whole = Path(str(served.log)).read_text().split("\n")[:-1]
        return [raw for raw in whole if '"mine-7"' in raw]

    wait_for(lines)  # it is written behind the answer
    line, log = json.loads(lines()[0]), Path(str(served.log)).read_text()
    usage = answer.json()["usage"]
    assert line["prompt_tokens"] == usage["prompt_tokens"] and line["tokens"] == 5
    assert (line["status"], line["key"], line["route"]) == (200, 2, "/v1/completions")
    assert line["ignored"] == ["colour"] and line["finished"] is True
    assert "business" not in log and KEY not in log and "vermilion" not in log
    answer = http.get("/health", headers={"X-Request-Id": "bad id"})
    assert answer.headers["x-request-id"] not in ("", "bad id")


def test_metrics_are_prometheus_text(served: Served, http: httpx.Client) -> None:
    """Oracle: prometheus-client's own parser, and the engine's counters."""
    from prometheus_client.parser import text_string_to_metric_families

    served.idle()
    text = http.get("/metrics").text
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    counters = served.engine.counters
    assert all(name[0].startswith("llmnorm_") for name in found)
    assert found["llmnorm_generation_tokens_total",] == counters.tokens > 0
    assert found["llmnorm_prompt_tokens_total",] == counters.prompt_tokens
    assert found["llmnorm_spec_decode_num_draft_tokens_total",] == sum(counters.drafted)
    assert found["llmnorm_requests_running",] == found["llmnorm_requests_waiting",] == 0
    assert found["llmnorm_time_to_first_token_seconds_count",] > 0
    routes = {dict(key[1:])["route"] for key in found if key[0] == "llmnorm_http_requests_total"}
    assert "/v1/completions" in routes and "other" in routes
    assert not any("nothing" in route for route in routes)  # what a client invents is no label


def test_the_document_names_every_route_and_status(http: httpx.Client) -> None:
    """Oracle: the routes of the application; every reference leads somewhere."""
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"),
        *("/tokenize", "/detokenize", "/tokenizer_info", "/health", "/ready", "/version"),
        "/metrics",
    }
    statuses = document["paths"]["/v1/completions"]["post"]["responses"]
    wanted = {"200", "400", "401", "404", "405", "413", "429", "500", "503", "504"}
    assert set(statuses) == wanted
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
