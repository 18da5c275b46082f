"""The fields of the requests that are served, as OpenAI's and vLLM's clients send them.

    fields = read_fields(CompletionFields, tree)    -> the fields, or Refusal 400
    fields.unknown                                  -> names that nothing is known of

A field that is null counts as left out, as clients send it. A field that is known and cannot be
served is refused by name; one that is not known is ignored, and named in the access log. Types are
exact: "5" is no number, and 1.0 no whole one.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from llmnorm.data.messages import ROLES
from llmnorm.serving.refusals import Refusal

STOPS, STOP_LENGTH = 4, 1_000  # texts that may end an answer, and characters of one
MOST_N = 4_096
SHOWN = 80  # characters of a field's name in a message

Id = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
_STOP = {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
Stops = Annotated[
    list[Stop],
    Field(max_length=STOPS),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": STOPS}]}),
]
# What a message may hold is `data.messages`'s to say; this is for the document.
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "role": {"enum": list(ROLES)},
                "content": {
                    "anyOf": [
                        {"type": "string"},
                        {"type": "array", "items": _PART},
                        {"type": "null"},
                    ]
                },
            },
            "required": ["role"],
        }
    ),
]


def _given(name: str) -> dict[str, Any]:
    """A JSON schema: the field is there, and not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


class Fields(BaseModel):
    """What all bodies have in common: the model's name, and fields that are not known."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="The model's name; left out, the one served.")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, tree: Any) -> Any:
        return {k: v for k, v in tree.items() if v is not None} if isinstance(tree, dict) else tree

    @property
    def unknown(self) -> list[str]:
        """Names of fields that are ignored."""
        return [name[:SHOWN] for name in self.model_extra or {}]


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class JsonSchema(BaseModel):
    """OpenAI's name for a schema."""

    model_config = ConfigDict(strict=True)

    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's form of an answer."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's form of an answer: one of them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1_000)] | None = None
    json_: str | dict[str, Any] | bool | None = Field(None, alias="json")
    grammar: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of regex, choice, json, grammar")
        return self


class AnswerFields(Fields):
    """How an answer is chosen and told."""

    n: Annotated[int, Field(ge=1, le=MOST_N)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1_000)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = []
    stop_token_ids: list[Id] = Field([], max_length=1_000)
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    speculative: bool = Field(True, description="false: no drafts for this request.")
    accepted_marks: bool = Field(
        False,
        description="true: each piece of a stream tells how many tokens were drafted, how many of "
        "them are accepted, and how many of the piece's first characters these are.",
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_stream(self) -> "AnswerFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: goes with stream: true")
        form = None if self.response_format is None else self.response_format.type
        if form not in (None, "text") and self.structured_outputs is not None:
            raise ValueError("structured_outputs: give it or response_format, not both")
        return self


class CompletionFields(AnswerFields):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "CompletionFields":
        if self.suffix:
            raise ValueError("suffix: text is continued, and not filled in")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of: is {self.best_of}; answers are not ranked, give n alone")
        if self.echo and (self.structured_outputs or self.response_format) and self.logprobs:
            raise ValueError("echo: with logprobs it cannot be put beside a form of the answer")
        return self


class ChatFields(AnswerFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] = []
    tool_choice: Any = None
    functions: list[Any] = []
    function_call: Any = None
    modalities: list[str] = ["text"]
    audio: Any = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ChatFields":
        if self.tools or self.functions:
            name = "tools" if self.tools else "functions"
            raise ValueError(f"{name}: calls of functions are not read from answers; leave it out")
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: calls of functions are not read from answers")
        if self.function_call not in (None, "none", "auto"):
            raise ValueError("function_call: calls of functions are not read from answers")
        if self.modalities != ["text"] or self.audio is not None:
            raise ValueError("modalities: answers are text")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: goes with logprobs: true")
        if self.continue_final_message and self.messages[-1].get("role") != "assistant":
            raise ValueError("continue_final_message: the last message is not the assistant's")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens: is another name of max_completion_tokens; give one")
        return self


class TokenizeFields(Fields):
    """POST /tokenize: a text, or messages by the chat template."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("prompt"), _given("messages")]})

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> "TokenizeFields":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give it or messages, one of them")
        return self


class DetokenizeFields(Fields):
    """POST /detokenize."""

    tokens: list[Id]


_F = TypeVar("_F", bound=Fields)
UNSUPPORTED = {
    *("suffix", "best_of", "tools", "tool_choice", "functions", "function_call", "modalities"),
}


def read_fields(cls: type[_F], tree: dict[str, Any]) -> _F:
    """The fields of a body.

    Raises:
        Refusal: one is missing, wrong, or cannot be served; the first one is told.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(include_url=False, include_input=False), key=_of_the_union)
    message = first["msg"].removeprefix("Value error, ")
    names = [str(part) for part in first["loc"]]
    if not names:  # of a check over several fields, whose message begins with the field
        param = message.partition(":")[0]
        code = "unsupported_parameter" if param in UNSUPPORTED else "invalid_value"
        raise Refusal(400, message, code, param=param if param.isidentifier() else None)
    param = names[0]
    where = ".".join(names)[:SHOWN]
    if param == "prompt" and len(names) > 1:
        where, message = param, "expected a text, token ids, or a list of one of these"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    raise Refusal(400, f"{where}: {message}", code, param=param)


def _of_the_union(error: Any) -> int:
    """Of a value that fits none of several types, the complaint that says most comes first."""
    return error["type"] in ("string_type", "bool_type", "dict_type")
