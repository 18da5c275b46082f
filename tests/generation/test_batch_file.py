"""Files of requests and of their answers."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.batch_file import Output, Totals, answer_all
from llmnorm.generation.contract import Event, Request
from llmnorm.generation.requests import Asked, asked_in
from llmnorm.machine.reading import json_lines
from llmnorm.part import InputError


class Letters:
    """Prompts whose tokens are their characters' numbers."""

    stops = frozenset({7})

    def text(self, text: str) -> list[int]:
        if not text:
            raise InputError("the prompt is empty")
        return [ord(letter) for letter in text]

    def messages(self, messages: Any) -> list[int]:
        return self.text("".join(m["content"] for m in messages))


class Echo:
    """Answers a request with its prompt, seed and row; rows go on in an order of chance."""

    def __init__(self, chance: int) -> None:
        self._chance = random.Random(chance)
        self._open: list[tuple[int, int, list[int]]] = []
        self._numbers = 0

    def add(self, request: Request) -> int:
        if len(request.prompt) > 9:
            raise InputError("the prompt is longer than the context")
        self._numbers += 1
        seed = request.sampling.seed
        for row in range(request.n):
            tokens = [*request.prompt, 0 if seed is None else seed + row]
            self._open.append((self._numbers, row, tokens))
        return self._numbers

    def step(self) -> list[Event]:
        chosen = self._chance.sample(self._open, self._chance.randint(1, len(self._open)))
        events = []
        for number, row, tokens in chosen:
            new = [tokens.pop(0)]
            finish = None if tokens else "stop"
            events.append(Event(number, row, new, f"{new[0]} ", 1, finish=finish, drafted=2))
        self._open = [found for found in self._open if found[2]]
        return events


def asked(path: Path, keys: dict[str, Any] | None = None, model: str = "m") -> Iterator[Asked]:
    own = GenerationSettings.model_validate(keys or {})
    return asked_in(json_lines(path), path.name, own, Letters(), model)


def answered(path: Path, out: Path, chance: int = 0, **keys: Any) -> Totals:
    """Answer the requests of a file, or what of them is left."""
    totals = Totals()
    with Output(out) as output:
        rest = output.resume(asked(path, **keys), totals)
        engine = Echo(chance)
        answer_all(engine, rest, output, ahead=4, totals=totals, shown=lambda: None)
    return totals


LINES = [
    '{"prompt": "ab"}',
    '{"prompt": "cde", "n": 3, "seed": 40, "id": "q7"}',
    "{broken",
    "",
    '{"messages": [{"role": "user", "content": "f"}], "seed": null}',
    '{"prompt": "much too long"}',
    '{"prompt": "g", "n": 2}',
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_stand_in_the_order_of_the_requests(prompts: Path, tmp_path: Path) -> None:
    """Oracle: the lines written out by hand, for every order in which the rows finish."""
    for chance in range(20):
        out = tmp_path / f"{chance}.jsonl"
        totals = answered(prompts, out, chance)
        found = lines_of(out)
        assert [(v["line"], v.get("row", 0)) for v in found] == [
            *((1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (5, 0), (6, 0), (7, 0), (7, 1))
        ]
        # `generation.seed` is 0, so line 1 has the seed 1; line 2 has its own, plus the row.
        assert [v.get("tokens", [])[-1:] for v in found] == [
            *([1], [40], [41], [42], [], [0], [], [7], [8])
        ]
        assert found[0]["text"] == "97 98 1 " and found[0]["finish"] == "stop"
        assert (found[0]["drafted"], found[0]["accepted"]) == (6, 3)
        assert [v.get("id") for v in found[:3]] == [None, "q7", "q7"]
        assert found[4]["error"].startswith("prompts.jsonl:3: ")
        assert found[6]["error"] == "prompts.jsonl:6: the prompt is longer than the context"
        assert totals.problems == [found[4]["error"], found[6]["error"]]
        assert (totals.requests, totals.tokens) == (6, sum(len(v.get("tokens", [])) for v in found))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_was_killed_at_any_byte_is_finished(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Oracle: the file of a process that nobody killed."""
    place = tmp_path_factory.mktemp("killed")
    path, whole, cut = (place / name for name in ("prompts.jsonl", "whole.jsonl", "cut.jsonl"))
    path.write_text("\n".join(LINES))  # the last line has no end
    expected = answered(path, whole)
    content = whole.read_bytes()
    written = data.draw(st.integers(0, len(content)))
    cut.write_bytes(content[:written])
    totals = answered(path, cut, data.draw(st.integers(0, 9)))
    assert cut.read_bytes() == content
    assert totals.found + totals.requests == expected.requests
    assert totals.problems == expected.problems


def test_settings_and_models_that_differ_are_told_by_line(prompts: Path, tmp_path: Path) -> None:
    """Oracle: the first line whose answer would be another one."""
    out = tmp_path / "out.jsonl"
    answered(prompts, out)
    content = out.read_bytes()
    for keys, line in (
        ({"keys": {"temperature": 0.5}}, 1),
        ({"keys": {"seed": 3}}, 1),
        ({"keys": {"n": 2}}, 1),
        ({"model": "other"}, 1),
    ):
        with pytest.raises(InputError, match=rf"out.jsonl:{line}: is not the answer to prompts"):
            answered(prompts, out, **keys)
    text = prompts.read_text()
    prompts.write_text(text.replace("cde", "cdf"))
    with pytest.raises(InputError, match="out.jsonl:2: is not the answer to prompts.jsonl:2 by"):
        answered(prompts, out)
    prompts.write_text("\n".join(LINES[:5]))
    with pytest.raises(InputError, match="more answers than there are requests"):
        answered(prompts, out)
    assert out.read_bytes() == content
    # How the text is made may change: it stays the same text.
    prompts.write_text(text)
    answered(prompts, out, keys={"slots": 3, "method": "ragged", "draft": "lookup"})
    assert out.read_bytes() == content


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    """Oracle: a second writer, and places that no file can have."""
    out = tmp_path / "out.jsonl"
    with (
        Output(out),
        pytest.raises(InputError, match="is being written by another process"),
        Output(out),
    ):
        pass
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"), Output(tmp_path):
        pass


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            '{"prompt": "a", "tmperature": 1}',
            "unknown key 'tmperature'; did you mean 'temperature'?",
        ),
        ('{"prompt": "a", "temperature": -1}', "temperature: "),
        ('{"prompt": "a", "temperature": "1"}', "temperature: expected a number"),
        ('{"prompt": "a", "slots": 1}', "unknown key 'slots'"),
        ('{"prompt": "a", "max_tokens": 1, "max_new_tokens": 1}', "are the same; give one"),
        ('{"prompt": "a", "messages": []}', "one of them; got prompt, messages"),
        ('{"promt": "a"}', "one of them; got promt"),
        ('{"prompt": 3}', "prompt: expected a text, got int"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": "a", "id": []}', "id: expected a text or a whole number"),
        ('["prompt"]', "it is a list"),
        ('{"prompt": "a"', "not JSON"),
    ],
)
def test_a_broken_line_is_told_by_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    """Oracle: the message, and the next line, which is answered."""
    path = tmp_path / "p.jsonl"
    path.write_text(f'{line}\n{{"prompt": "b", "max_tokens": 5, "top_k": 3}}\n')
    broken, good = asked(path)
    assert broken.request is None and broken.problem is not None
    assert broken.problem.startswith("p.jsonl:1: ") and complaint in broken.problem
    assert good.request is not None and good.request.prompt == (98,)
    assert (good.request.sampling.max_tokens, good.request.sampling.top_k) == (5, 3)
