"""Answers as they come, in their order; a conversation, and what stops an answer."""

import os
import signal
from typing import Any

import pytest

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Request, Sampling
from llmnorm.generation.engine import Engine
from llmnorm.generation.streams import answers, converse
from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.decoding import Decoder
from llmnorm.part import InputError
from tests.generation.test_text import TOKENIZERS

BYTES = TOKENIZERS["byte level"]
CONTEXT = 96


@pytest.fixture(scope="module")
def model() -> LlmNormForCausalLM:
    config = LlmNormConfig(
        vocab_size=len(BYTES),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=CONTEXT,
    )
    return build_model(config, seed=1).double().eval()


def engine_of(model: LlmNormForCausalLM, **settings: Any) -> Engine:
    return Engine(Decoder(model, captured=False), BYTES, GenerationSettings(**settings))


def request(text: str, count: int = 12, n: int = 1) -> Request:
    sampling = Sampling(max_tokens=count, temperature=0.0 if n == 1 else 1.0)
    return Request(tuple(BYTES.encode(text)), sampling, n)


def test_answers_come_in_their_order_and_the_first_at_once(model: LlmNormForCausalLM) -> None:
    """Oracle: each request alone; the first one's pieces come before the second has ended."""
    asked = [request("a long one", 30), request("b", 3), request("c", 9, n=2)]
    alone = ["".join(p.event.text for p in answers(engine_of(model), [some])) for some in asked[:2]]
    pieces = list(answers(engine_of(model), asked))
    order = [(piece.request, piece.row) for piece in pieces]
    assert order == sorted(order) and set(order) == {(0, 0), (1, 0), (2, 0), (2, 1)}
    texts = [
        "".join(p.event.text for p in pieces if (p.request, p.row) == key)
        for key in sorted(set(order))
    ]
    assert texts[:2] == alone and texts[2] != texts[3]
    assert sum(piece.request == 0 for piece in pieces) > 20  # not one piece at the end
    assert [piece.event.finish for piece in pieces if piece.event.finish] == ["length"] * 4


class Talk:
    """A conversation, whose lines and answers are kept."""

    def __init__(self, model: LlmNormForCausalLM, count: int = 8) -> None:
        self.engine = engine_of(model, slots=1)
        self.written: list[str] = []
        self.said: list[str] = []
        self.turns: list[list[dict[str, str]]] = []
        self._count = count

    def ask(self, messages: list[dict[str, str]]) -> Request:
        self.turns.append(messages)
        if "refuse" in messages[-1]["content"]:
            raise InputError("no such message")
        said = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return request(f"{said}assistant:", self._count)

    def write(self, text: str) -> None:
        self.written.append(text)

    def run(self, lines: list[str]) -> list[str]:
        converse(self.engine, self.ask, lines, self.write, self.said.append)
        return "".join(self.written).split("\n\n")


def test_a_conversation_remembers_and_takes_its_rows_over(model: LlmNormForCausalLM) -> None:
    """Oracle: the messages of each turn, written out; the answer to the last as a request alone."""
    talk = Talk(model)
    talk.run(["one\n", "\n", "two\r\n", "/clear\n", "three", "/quit\n", "four\n"])
    first, second, third = talk.turns
    assert [m["content"] for m in first] == ["one"]
    assert [m["role"] for m in second] == ["user", "assistant", "user"]
    assert second[0] == first[0] and second[2]["content"] == "two"
    assert [m["content"] for m in third] == ["three"]
    # The second prompt begins with all that the first turn has left in the cache.
    counted = talk.engine.counters
    assert counted.cached_tokens >= len(BYTES.encode("user:one\nassistant:"))
    assert counted.prompt_tokens > counted.cached_tokens
    alone = Talk(model)
    text = "".join(p.event.text for p in answers(alone.engine, [talk.ask(second)]))
    written = "".join(talk.written)
    assert written.startswith(second[1]["content"] + "\n" + text + "\n")
    assert talk.said == []


def test_what_cannot_be_asked_is_told_and_left_out(model: LlmNormForCausalLM) -> None:
    """Oracle: the messages of the turns after it."""
    talk = Talk(model)
    talk.run(["refuse\n", "one\n", "refuse this\n", "x" * 2 * CONTEXT, "two\n"])
    assert talk.said[0] == "no such message; this message is left out"
    assert talk.said[1] == "no such message; this message is left out; /clear begins anew"
    assert f"the context is {CONTEXT} tokens" in talk.said[2] and len(talk.said) == 3
    contents = [m["content"] for m in talk.turns[-1] if m["role"] == "user"]
    assert contents == ["one", "two"]


def test_ctrl_c_stops_the_answer_and_not_the_session(model: LlmNormForCausalLM) -> None:
    """Oracle: a real signal to this process in the middle of an answer; the next turn is whole."""
    before = signal.getsignal(signal.SIGINT)
    talk = Talk(model, count=40)
    whole = Talk(model, count=40)
    whole.run(["one"])

    def write(text: str) -> None:
        talk.written.append(text)
        if len(talk.written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    converse(talk.engine, talk.ask, ["one", "two"], write, talk.said.append)
    stopped = talk.turns[1][1]["content"]
    assert stopped and "".join(whole.written).startswith(stopped)
    assert len(stopped) < len("".join(whole.written)) - 1
    assert talk.engine.idle and talk.said == []
    assert talk.engine.counters.finished == {"abort": 1, "length": 1}
    assert signal.getsignal(signal.SIGINT) is before


def test_two_interrupts_end_the_session(model: LlmNormForCausalLM) -> None:
    """Oracle: KeyboardInterrupt, should a round not come back to look."""
    talk = Talk(model, count=40)

    def write(_: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        converse(talk.engine, talk.ask, ["one"], write, talk.said.append)
