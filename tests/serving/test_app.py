"""The server, by OpenAI's own client over real HTTP."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.served import NAME, Served, save_model, serving
from tests.stock import CONTEXT

MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(save_model(tmp_path_factory.mktemp("served") / "model")) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="any", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 3, "temperature": 1.5, "top_p": 0.9}])
def test_a_text_is_the_offline_engines(
    served: Served, client: openai.OpenAI, stream: bool, how: dict[str, Any]
) -> None:
    """Oracle: an engine without a draft and without a server."""
    prompt = "It is 4. 2+2?"
    text, tokens, finish = served.offline(served.model.asker.text(prompt), max_tokens=40, **how)
    assert len(text) > 20
    asked: Any = {"model": NAME, "prompt": prompt, "max_tokens": 40, **how}
    if stream:
        chunks = list(
            client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(c.choices[0].text for c in chunks if c.choices) == text
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == finish
        assert all(c.usage is None for c in chunks[:-1]) and chunks[-1].choices == []
        usage = chunks[-1].usage
        assert len({c.id for c in chunks}) == 1
    else:
        answer = client.completions.create(**asked)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, finish)
        assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
        usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == len(tokens)
    assert usage.prompt_tokens == len(served.model.asker.text(prompt))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_chat_is_the_template_and_the_offline_engine(
    served: Served, client: openai.OpenAI
) -> None:
    """Oracle: the template's tokens, continued offline; a stream's pieces joined are the answer."""
    ids = served.model.asker.messages(MESSAGES)
    stops = served.target.asker.stops
    text, tokens, _ = served.offline(ids, temperature=0, max_tokens=30, stop_tokens=stops)
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_completion_tokens=30
    )
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_tokens=30, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert chunks[0].object == "chat.completion.chunk"
    assert [c.choices[0].finish_reason for c in chunks][:-1] == [None] * (len(chunks) - 1)


def test_n_answers_have_the_seeds_in_their_order(served: Served, client: openai.OpenAI) -> None:
    """Oracle: the offline engine with seed + i; two prompts, whose answers stand together."""
    prompts = ["It is", "2+2?"]
    answer = client.completions.create(
        model=NAME, prompt=prompts, n=2, seed=5, max_tokens=12, temperature=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    wanted = [
        served.offline(served.model.asker.text(p), seed=5 + i, max_tokens=12, temperature=1)[0]
        for p in prompts
        for i in (0, 1)
    ]
    assert [choice.text for choice in answer.choices] == wanted


def test_a_stop_ends_an_answer_before_it(served: Served, client: openai.OpenAI) -> None:
    """Oracle: the free answer, cut before the text."""
    free, _, _ = served.offline(served.model.asker.text("It is"), temperature=0, max_tokens=40)
    stop = free[15:18]
    answer = client.completions.create(
        model=NAME, prompt="It is", temperature=0, max_tokens=40, stop=[stop]
    )
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_echo_and_logprobs_are_a_teacher_forced_pass(served: Served, client: openai.OpenAI) -> None:
    """Oracle: one full pass of the model over prompt and answer, in float64."""
    import torch

    prompt = served.model.asker.text("2+2? It is 4. 3+3?")
    answer = client.completions.create(
        model=NAME, prompt=prompt, temperature=0, max_tokens=1, logprobs=2, echo=True
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.token_logprobs is not None and told.top_logprobs is not None
    assert len(told.tokens or []) == len(prompt) + 1
    ids = torch.tensor([prompt])
    with torch.no_grad():
        laws = served.target.model(ids).logits[0].log_softmax(-1)
    following = [*prompt[1:], int(laws[-1].argmax())]
    wanted = [float(laws[i, token]) for i, token in enumerate(following)]
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(wanted, abs=1e-9)
    for number, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert top is not None and number in top.values()  # the same float
    scored = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=0, logprobs=1, echo=True
    )
    only = scored.choices[0].logprobs
    assert only is not None and only.token_logprobs == told.token_logprobs[:-1]
    assert scored.usage is not None and scored.usage.completion_tokens == 0


def test_lm_evals_requests_are_scored_as_by_a_full_pass(served: Served) -> None:
    """Oracle: lm-eval's own payload and parser; log_softmax of one pass, in float64. The second
    continuation is the greedy one, and its token that is generated beyond it is an end token."""
    import torch
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    start = served.model.asker.text("2+2?")
    _, greedy, _ = served.offline(start, temperature=0, max_tokens=5)
    asked = [[*start, *served.model.asker.text("It is 4.")[1:]], [*start, *greedy]]
    payload = LocalCompletionsAPI._create_payload(SimpleNamespace(model=NAME), asked)  # type: ignore[arg-type]
    payload["logit_bias"] = {str(end): 100 for end in served.target.ends}
    told = httpx.post(f"{served.url}/completions", json=payload, timeout=60).json()
    lengths = [len(start)] * 2
    found = LocalCompletionsAPI.parse_logprobs(told, tokens=asked, ctxlens=lengths)
    for (score, is_greedy), ids, expected in zip(found, asked, (False, True), strict=True):
        with torch.no_grad():
            laws = served.target.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = sum(float(laws[i - 1, ids[i]]) for i in range(len(start), len(ids)))
        assert score == pytest.approx(wanted, abs=1e-9)
        assert is_greedy == expected
    for choice in told["choices"]:
        assert choice["logprobs"]["tokens"][-1] == served.model.tokenizer.eos_token
        assert choice["finish_reason"] == "stop"


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_a_streams_pieces_joined_are_the_whole(
    served: Served, client: openai.OpenAI, data: st.DataObject
) -> None:
    """Oracle: the answer that is not streamed, with random ids, stops, echo and n; most of the
    bytes are no UTF-8."""
    ids = data.draw(st.lists(st.integers(0, served.model.vocabulary - 1), min_size=1, max_size=20))
    asked: Any = {
        "model": NAME,
        "prompt": ids,
        "seed": data.draw(st.integers(0, 99)),
        "temperature": 2,
        "max_tokens": data.draw(st.integers(0, 16)),
        "n": data.draw(st.integers(1, 3)),
        "echo": data.draw(st.booleans()),
        "logprobs": data.draw(st.sampled_from([None, 0, 2])),
        "stop": data.draw(st.lists(st.sampled_from(["a", "e", " ", "\ufffd"]), max_size=2)),
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    whole = client.completions.create(**asked).choices
    streamed: list[Any] = [{"text": "", "ids": [], "numbers": [], "offsets": []} for _ in whole]
    for chunk in client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        got = streamed[choice.index]
        got["text"] += choice.text
        got["ids"] += choice.model_extra["token_ids"]  # type: ignore[index]
        if choice.logprobs is not None:
            got["numbers"] += choice.logprobs.token_logprobs or []
            got["offsets"] += choice.logprobs.text_offset or []
        got["finish"] = choice.finish_reason
    for got, choice in zip(streamed, whole, strict=True):
        assert got["text"] == choice.text and got["finish"] == choice.finish_reason
        assert got["ids"] == choice.model_extra["token_ids"]  # type: ignore[index]
        if choice.logprobs is not None:
            assert got["offsets"] == choice.logprobs.text_offset
            # Of another company in the batch: rounding of the last bits.
            for one, other in zip(got["numbers"], choice.logprobs.token_logprobs, strict=True):  # type: ignore[arg-type]
                assert one == other or one == pytest.approx(other, abs=1e-9)


def test_errors_are_the_clients_classes(client: openai.OpenAI) -> None:
    """Oracle: the classes of OpenAI's client, and what they say."""
    asked: Any = {"model": NAME, "prompt": "a", "max_tokens": 2}
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(**asked | {"temperature": 9})
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(**asked | {"model": "gpt-x"})
    assert missing.value.code == "model_not_found"


def test_logprobs_of_a_chat_tell_bytes_and_alternatives(
    served: Served, client: openai.OpenAI
) -> None:
    """Oracle: bytes of the tokens joined are the answer's UTF-8 where it is whole."""
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    joined = bytes(b for entry in told.content for b in entry.bytes or [])
    text = answer.choices[0].message.content
    assert joined.decode("utf-8", "replace").startswith((text or "")[:3])
    assert all(len(entry.top_logprobs) == 3 for entry in told.content)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in told.content)


def test_the_second_turn_of_a_chat_reuses_the_first_ones_row(
    served: Served, client: openai.OpenAI
) -> None:
    """Oracle: `cached_tokens` of the usage, and the same answer as without reuse."""
    first = [{"role": "user", "content": "It is 4. " * 12}]
    answer = client.chat.completions.create(
        model=NAME,
        messages=first,
        temperature=0,
        max_tokens=8,  # type: ignore[arg-type]
    )
    served.idle()
    turn: Any = [
        *first,
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "3+3?"},
    ]
    second = client.chat.completions.create(model=NAME, messages=turn, temperature=0, max_tokens=8)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens > 30  # type: ignore[operator]
    ids = served.model.chat.tokens(turn, {})
    stops = served.target.asker.stops
    text, _, _ = served.offline(ids, temperature=0, max_tokens=8, stop_tokens=stops)
    assert second.choices[0].message.content == text


def test_the_model_and_its_tokens(served: Served, client: openai.OpenAI) -> None:
    """Oracle: the tokenizer's own ids, and back."""
    (card,) = client.models.list().data
    assert card.id == NAME and client.models.retrieve(NAME).model_dump()["max_model_len"] == CONTEXT
    text = "It is 4. 2+2?"
    ids = client.post("/../tokenize", body={"prompt": text}, cast_to=object)["tokens"]  # type: ignore[index]
    assert ids == served.model.asker.text(text)
    back = client.post("/../detokenize", body={"tokens": ids[1:]}, cast_to=object)
    assert back == {"prompt": text}


TOLD = {"max_tokens": 3, "n": 2, "return_token_ids": True}
EVERY: list[tuple[str, str, int, Any]] = [
    (
        "POST",
        "/v1/completions",
        200,
        {"prompt": ["2+2?", "It"], "echo": True, "logprobs": 2, **TOLD},
    ),
    ("POST", "/v1/completions", 200, {"prompt": "2+2?", "max_tokens": 0}),
    ("POST", "/v1/completions", 400, {"prompt": "2+2?", "temperature": 9}),
    ("POST", "/v1/completions", 404, {"prompt": "2+2?", "model": "gpt-x"}),
    ("POST", "/v1/completions", 413, {"prompt": "a" * 2**23}),
    (
        *("POST", "/v1/chat/completions", 200),
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **TOLD},
    ),
    ("POST", "/v1/chat/completions", 200, {"messages": MESSAGES, "max_tokens": 2}),
    ("POST", "/tokenize", 200, {"prompt": "a", "return_token_strs": True}),
    ("POST", "/tokenize", 400, {}),
    ("POST", "/detokenize", 200, {"tokens": [20]}),
    ("PUT", "/detokenize", 405, {"tokens": [20]}),
    *[("GET", path, 200, None) for path in ("/health", "/ready", "/version", "/tokenizer_info")],
    ("GET", "/v1/models", 200, None),
    ("GET", f"/v1/models/{NAME}", 200, None),
    ("GET", "/v1/models/gpt-x", 404, None),
]


@pytest.mark.parametrize(("method", "path", "status", "body"), EVERY)
def test_an_answer_is_what_the_document_says(
    served: Served, method: str, path: str, status: int, body: Any
) -> None:
    """Oracle: jsonschema, by the document's schema of the route and status."""
    document = httpx.get(f"{served.root}/openapi.json").json()
    answer = httpx.request(method, f"{served.root}{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    about = document["paths"][path.replace(NAME, "{name}").replace("gpt-x", "{name}")]
    declared = next(iter(about.values()))["responses"][str(status)]
    schema = declared["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**document, **schema}).validate(answer.json())
    assert all(name in answer.headers for name in declared.get("headers", {}))
