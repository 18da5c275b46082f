"""JSON schemas of what is answered, for /openapi.json: OpenAI's objects as answers.py makes them.

    ANSWERS["Completion"]       by the name that the document refers to

Objects are closed where the client asked for nothing more, so that a field that the document does
not know is found by whoever holds answers to it (tests/serving/test_app.py).
"""

from typing import Any

from llmnorm.serving.refusals import TYPES

Schema = dict[str, Any]

TEXT, COUNT, NUMBER = (
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"type": "number"},
)


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _closed(optional: Schema | None = None, /, **required: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


_LOGPROB = {"token": TEXT, "logprob": NUMBER, "bytes": _list(COUNT)}
_IDS = {"token_ids": _list(COUNT), "prompt_token_ids": _list(COUNT)}
_FINISH = _or_null({"enum": ["stop", "length"]})
_CARD = _closed(
    id=TEXT,
    object={"const": "model"},
    created=COUNT,
    owned_by=TEXT,
    max_model_len=COUNT,
)


def _answer(kind: str, choice: Schema) -> Schema:
    return _closed(
        id=TEXT,
        object={"const": kind},
        created=COUNT,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=_list(choice),
        usage=_ref("Usage"),
    )


ANSWERS: dict[str, Schema] = {
    "Error": _closed(
        error=_closed(
            message=TEXT,
            type={"enum": sorted(set(TYPES.values()))},
            param=_or_null(TEXT),
            code=_or_null(TEXT),
        )
    ),
    "Usage": _closed(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=_closed(cached_tokens=COUNT),
        completion_tokens_details=_closed(accepted_prediction_tokens=COUNT),
    ),
    "Completion": _answer(
        "text_completion",
        _closed(
            _IDS,
            index=COUNT,
            text=TEXT,
            finish_reason=_FINISH,
            logprobs=_or_null(
                _closed(
                    tokens=_list(TEXT),
                    token_logprobs=_list(_or_null(NUMBER)),
                    top_logprobs=_list(
                        _or_null({"type": "object", "additionalProperties": NUMBER})
                    ),
                    text_offset=_list(COUNT),
                )
            ),
        ),
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        _closed(
            _IDS,
            index=COUNT,
            message=_closed(role={"const": "assistant"}, content=TEXT, refusal={"type": "null"}),
            finish_reason=_FINISH,
            logprobs=_or_null(
                _closed(
                    content=_list(_closed(**_LOGPROB, top_logprobs=_list(_closed(**_LOGPROB)))),
                    refusal={"type": "null"},
                )
            ),
        ),
    ),
    "Model": _CARD,
    "Models": _closed(object={"const": "list"}, data=_list(_ref("Model"))),
    "Tokens": _closed(
        {"token_strs": _list(TEXT)}, tokens=_list(COUNT), count=COUNT, max_model_len=COUNT
    ),
    "Text": _closed(prompt=TEXT),
    "TokenizerInfo": _closed(
        bos_token=_or_null(TEXT),
        eos_token=_or_null(TEXT),
        pad_token=_or_null(TEXT),
        unk_token=_or_null(TEXT),
        chat_template=_or_null(TEXT),
        vocab_size=COUNT,
        max_model_len=COUNT,
    ),
    "Status": _closed(status={"const": "ok"}),
    "Version": _closed(version=TEXT),
}
