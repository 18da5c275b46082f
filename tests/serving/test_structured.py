"""Answers of a given form, with and without drafts."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.serving.served import Served, save_model, serving

# Every one ends: nothing in them may be as long as it likes.
SCHEMAS: dict[str, Any] = {
    "an object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "a list": {
        "type": "array",
        "items": {"enum": ["red", "green", "été", 7, None]},
        "minItems": 2,
        "maxItems": 3,
    },
    "one of two": {"anyOf": [{"const": {"a": 1}}, {"type": "boolean"}]},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = save_model(tmp_path_factory.mktemp("structured") / "model")
    with serving(directory, draft_tokens=4) as found:
        yield found


def ask(served: Served, status: int = 200, **more: Any) -> Any:
    body = {"prompt": '{"a": 1} {"a": 1}', "max_tokens": 200, **more}
    answer = httpx.post(f"{served.url}/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_fit_their_schema_and_drafts_change_nothing(served: Served, name: str) -> None:
    """Oracle: jsonschema; the same seed without speculation."""
    schema = SCHEMAS[name]
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    for how in ({"seed": 1, "temperature": 1.5}, {"temperature": 0}, {"temperature": 1}):
        told = ask(served, response_format=form, n=2, **how)["choices"]
        for choice in told:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["text"]), schema)
        if how != {"temperature": 1}:
            plain = ask(served, structured_outputs={"json": schema}, n=2, speculative=False, **how)
            assert [c["text"] for c in plain["choices"]] == [c["text"] for c in told]


def test_patterns_choices_and_grammars(served: Served) -> None:
    """Oracle: `re`, and the choices themselves."""
    for seed in range(3):
        regex = ask(served, structured_outputs={"regex": "[a-f]{3}-[0-9]{2}"}, seed=seed)
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", regex["choices"][0]["text"])
        chosen = ask(served, structured_outputs={"choice": ['a "b"', "été"]}, seed=seed)
        assert chosen["choices"][0]["text"] in ('a "b"', "été")
        grammar = 'start: "x" item+ "y"\nitem: "1" | "22"\n'
        made = ask(served, structured_outputs={"grammar": grammar}, seed=seed, max_tokens=8)
        assert re.match("x(1|2)", made["choices"][0]["text"])
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "seed": 0}
    body["structured_outputs"] = {"regex": "[0-9]{4}"}
    chat = httpx.post(f"{served.url}/chat/completions", json=body, timeout=60).json()
    assert re.fullmatch("[0-9]{4}", chat["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "nothing"}},
        {"json": "{"},
        {"regex": "(" * 50},
        {"grammar": "start: nobody"},
        {"regex": "a" * 70_000},
        {"json": {}, "regex": "a"},
    ],
)
def test_a_form_that_does_not_compile_is_refused(served: Served, form: dict[str, Any]) -> None:
    """Oracle: 400 that names the field, and no round of the engine."""
    served.idle()
    rounds = served.engine.counters.rounds
    error = ask(served, 400, structured_outputs=form)["error"]
    assert error["param"] == "structured_outputs" and error["message"]
    assert served.engine.counters.rounds == rounds


def test_without_the_extra_the_line_that_installs_it_is_told(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 400 with the extra's name."""
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = ask(served, 400, response_format={"type": "json_object"})["error"]
    assert "structured" in error["message"] and error["code"] == "unsupported_parameter"
