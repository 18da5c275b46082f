"""Fields beside OpenAI's, chat templates, and the page: what they add to the answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnorm.serving import page
from tests.serving.served import NAME, Served, save_model, serving

TALK = [{"role": "user", "content": "2+2?"}]
PAGE = {"index.html": "<!doctype html><title>page</title>", "page.js": "1", "note.txt": "no"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("extensions")
    for name, text in PAGE.items():
        (directory / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "add_page", lambda app, _=page.add_page: _(app, directory))
        patch.setattr("llmnorm.serving.app.add_page", page.add_page)
        with serving(save_model(directory / "model"), draft_tokens=4) as found:
            yield found


def ask(served: Served, route: str, status: int = 200, **body: Any) -> httpx.Response:
    answer = httpx.post(f"{served.url}/{route}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer


def chat(served: Served, messages: Any, **body: Any) -> Any:
    body = {"temperature": 0, "max_tokens": 6, "return_token_ids": True, **body}
    told = ask(served, "chat/completions", messages=messages, **body).json()
    return told["choices"][0]


def test_token_ids_and_special_tokens(served: Served) -> None:
    """Oracle: the offline engine's tokens; their text with special tokens spelled out."""
    bias = {"4": 100}  # <|im_end|>, which ends no text that is continued
    body = {"prompt": "It", "max_tokens": 4, "temperature": 0, "logit_bias": bias}
    ids = served.model.asker.text("It")
    _, tokens, _ = served.offline(ids, temperature=0, max_tokens=4, logit_bias={4: 100.0})
    (told,) = ask(served, "completions", return_token_ids=True, **body).json()["choices"]
    assert told["token_ids"] == tokens == [4] * 4
    assert told["prompt_token_ids"] == ids
    assert told["text"] == ""
    (spelled,) = ask(served, "completions", skip_special_tokens=False, **body).json()["choices"]
    assert spelled["text"] == "<|im_end|>" * 4


def test_marks_tell_what_was_drafted(served: Served) -> None:
    """Oracle: their sum is the usage's; without drafts there are none."""
    bias = {str(served.model.asker.text("a")[-1]): 100}  # a text that lookup can foresee
    for speculative in (True, False):
        body = {"prompt": "a", "max_tokens": 20, "temperature": 0, "logit_bias": bias}
        more = {"accepted_marks": True, "stream_options": {"include_usage": True}}
        answer = ask(served, "completions", stream=True, speculative=speculative, **body, **more)
        events = [json.loads(e[6:]) for e in answer.text.split("\n\n") if e[6:7] == "{"]
        choices = [choice for event in events for choice in event["choices"]]
        assert sum(choice["tokens"] for choice in choices) == 20
        accepted = sum(choice["accepted"] for choice in choices)
        details = events[-1]["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == accepted
        assert (accepted > 10) if speculative else (accepted == 0)


def test_messages_go_to_the_template_as_in_training(served: Served) -> None:
    """Oracle: the template's own tokens, for a tool's answer, parts of text, an answer that goes
    on, and without the generation prompt."""
    template = served.model.chat
    parts = [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]
    plain = chat(served, TALK)["prompt_token_ids"]
    assert chat(served, parts)["prompt_token_ids"] == plain == template.tokens(TALK, {})
    assert chat(served, TALK, tools=[], tool_choice="none")["prompt_token_ids"] == plain
    bare = chat(served, TALK, add_generation_prompt=False)["prompt_token_ids"]
    assert plain[: len(bare)] == bare and len(bare) < len(plain)
    begun = [*TALK, {"role": "assistant", "content": "It is"}]
    told = chat(served, begun, continue_final_message=True)
    assert told["prompt_token_ids"][: len(plain)] == plain
    assert served.model.decode(told["prompt_token_ids"]).endswith("It is")
    tool = [*TALK, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "4"}]
    assert served.model.decode(chat(served, tool)["prompt_token_ids"]).count("4") == 1
    kwargs = {"bos_token": ""}
    other = chat(served, TALK, chat_template_kwargs=kwargs)["prompt_token_ids"]
    assert other == plain[1:]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "nobody", "content": "a"}], "role"),
        ([*TALK, *TALK], "out of order"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ([{"role": "assistant", "content": "a"}], "out of order"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(
    served: Served, messages: Any, says: str
) -> None:
    """Oracle: 400 with the reason."""
    error = ask(served, "chat/completions", 400, messages=messages).json()["error"]
    assert says in error["message"]


def test_a_template_of_the_operator_and_plain_lines(tmp_path: Path) -> None:
    """Oracle: the texts that they render; what a template raises is its client's 400."""
    model = save_model(tmp_path / "model", template=False)
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    with serving(model, serving={"chat_template": file}, slots=1) as served:
        ids = chat(served, TALK)["prompt_token_ids"]
        assert served.model.decode(ids) == "[user] 2+2?\n"
        no = [{"role": "user", "content": "no"}]
        error = ask(served, "chat/completions", 400, messages=no).json()["error"]
        assert "not that" in error["message"]
    with serving(model, serving={"chat_template": "fallback"}, slots=1) as served:
        talk = [*TALK, {"role": "assistant", "content": "4"}, {"role": "user", "content": "ok"}]
        ids = chat(served, talk)["prompt_token_ids"]
        assert ids[0] == served.model.asker.text("a")[0]  # as documents began
        assert served.model.decode(ids) == "User: 2+2?\nAssistant: 4\nUser: ok\nAssistant:"
        assert (
            ask(
                served, "chat/completions", 400, messages=TALK, chat_template_kwargs={"a": 1}
            ).json()["error"]["param"]
            == "chat_template_kwargs"
        )


def test_the_page_and_its_policy(served: Served) -> None:
    """Oracle: the files of the directory that are a page's, and no others."""
    answer = httpx.get(f"{served.root}/")
    assert answer.text == PAGE["index.html"]
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
    script = httpx.get(f"{served.root}/static/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{served.root}/static/note.txt").status_code == 404
    assert httpx.get(f"{served.root}/static/../served.py").status_code == 404


def test_what_lm_eval_asks(served: Served) -> None:
    """Oracle: the tokenizer's special tokens; token ids without and with those of a beginning."""
    info = httpx.get(f"{served.root}/tokenizer_info").json()
    tokenizer = served.model.tokenizer
    assert (info["bos_token"], info["eos_token"]) == (tokenizer.bos_token, tokenizer.eos_token)
    assert info["chat_template"] == tokenizer.chat_template
    for special in (True, False):
        body = {"prompt": "It is", "add_special_tokens": special, "model": NAME}
        told = httpx.post(f"{served.root}/tokenize", json=body).json()
        start = 0 if special else 1
        assert told["tokens"] == served.model.asker.text("It is")[start:]
        assert told["count"] == len(told["tokens"])
