"""Answers of a given form, with and without drafts."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.serving.forms import CONTEXT, LONGEST, ask_all
from tests.serving.schemas import SCHEMAS
from tests.serving.served import Served, save_model, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = save_model(tmp_path_factory.mktemp("structured") / "model", context=CONTEXT)
    with serving(directory, draft_tokens=4) as found:
        yield found


def ask(served: Served, status: int = 200, **more: Any) -> Any:
    body = {"prompt": '{"a": 1} {"a": 1}', "max_tokens": 200, **more}
    answer = httpx.post(f"{served.url}/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("name", ["an object", "a list", "told apart by a word"])
def test_answers_fit_their_schema_and_drafts_change_nothing(served: Served, name: str) -> None:
    """Oracle: jsonschema; the same without speculation, greedily and with a seed. Without a seed
    drafts are verified by rejection, and the answer fits too. tools/campaigns/structured.py asks
    for a thousand answers of twenty schemas."""
    outcome = ask_all(served, name, 8, seed=1)
    assert outcome.wrong == [] and outcome.answers == 8
    assert outcome.tokens > 20 and outcome.drafted > 0
    told = ask(served, structured_outputs={"json": SCHEMAS[name]}, max_tokens=LONGEST, n=2)
    for choice in told["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), SCHEMAS[name])


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
