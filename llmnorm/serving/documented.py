"""What /openapi.json says of the routes: bodies by their fields, and every status that occurs.

@app.get("/health", **describe("Whether the engine lives", "Status", 503, key=False))
write_document(app, settings.root_path, keys=True)      behind the last route
"""

from typing import TYPE_CHECKING, Any

from llmnorm.serving.answer_schemas import ANSWERS
from llmnorm.serving.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    Fields,
    TokenizeFields,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

BODIES: tuple[type[Fields], ...] = (
    CompletionFields,
    ChatFields,
    TokenizeFields,
    DetokenizeFields,
)
REF = "#/components/schemas/{model}"
KEY = "key"  # name of the security scheme
JSON, PLAIN, STREAM = "application/json", "text/plain", "text/event-stream"
WORDS = {
    400: "The request is not valid, or asks for what is not served.",
    401: "The key is missing or wrong.",
    404: "There is no such route or model.",
    405: "The route does not take this method.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to ask again.",
    500: "The answer has failed.",
    503: "The server starts, ends, or its engine has failed.",
    504: "The request took too long.",
}
TEXT = {"schema": {"type": "string"}}
AGAIN = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
HEADERS = {
    401: {"WWW-Authenticate": {"description": "`Bearer`.", **TEXT}},
    405: {"Allow": {"description": "The methods that it takes.", **TEXT}},
    429: AGAIN,
    503: AGAIN,
}
ANY = (405, 500)  # of every route
WITH_BODY = (400, 404, 413)
ANSWERING = (429, 503, 504)
_ABOUT = {"title", "description", "default"}  # keys of a schema that allow and forbid nothing


def describe(
    summary: str,
    answer: str,
    *statuses: int,
    body: type[Fields] | None = None,
    kind: str = JSON,
    key: bool = True,
    stream: bool = False,
    parameter: str | None = None,
) -> dict[str, Any]:
    """Arguments of a FastAPI route.

    Args:
        answer: the name of its schema in `ANSWERS`; what it is, in words, where `kind` is no JSON.
        statuses: beside those of every route, and of every route with a body.
        body: the fields of its requests.
        kind: content type of its answer.
        key: whether a key is asked for, where the server has any.
        stream: whether the answer may be a stream.
        parameter: the name of the path's last part.
    """
    all_of = {*ANY, *statuses, *(WITH_BODY if body is not None else ()), *([401] if key else [])}
    error = {JSON: {"schema": {"$ref": REF.format(model="Error")}}}
    responses: dict[int, Any] = {
        status: {
            "description": WORDS[status],
            "content": error,
            "headers": HEADERS.get(status, {}),
        }
        for status in sorted(all_of)
    }
    content = {kind: {"schema": {"$ref": REF.format(model=answer)}} if kind == JSON else TEXT}
    about = summary if kind == JSON else answer
    if stream:
        content[STREAM] = {}
        about += "; with `stream`, events whose data are its pieces, and `[DONE]` behind the last"
    responses[200] = {"description": about, "content": content}
    extra: dict[str, Any] = {}
    if body is not None:
        fields = {JSON: {"schema": {"$ref": REF.format(model=body.__name__)}}}
        extra["requestBody"] = {"required": True, "content": fields}
    if parameter is not None:
        extra["parameters"] = [{"name": parameter, "in": "path", "required": True, **TEXT}]
    if key:
        extra["security"] = [{KEY: []}]
    return {
        "summary": summary,
        "response_model": None,
        "response_class": _class_of(kind),
        "openapi_extra": extra,
        "responses": responses,
    }


def _class_of(kind: str) -> Any:
    """The response class by which FastAPI knows a route's content type."""
    from starlette.responses import JSONResponse, PlainTextResponse

    return JSONResponse if kind == JSON else PlainTextResponse


def write_document(app: "FastAPI", root_path: str, *, keys: bool) -> None:
    """Make the application's document, once, and put the schemas into it.

    Args:
        keys: whether the server asks for a key.
    """
    document = app.openapi()
    document["servers"] = [{"url": root_path or "/"}]
    components = document.setdefault("components", {})
    if keys:
        components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    else:
        for methods in document["paths"].values():
            for operation in methods.values():
                operation.pop("security", None)
                operation["responses"].pop("401", None)
    schemas = components.setdefault("schemas", {})
    schemas |= ANSWERS
    for body in BODIES:
        schema = body.model_json_schema(ref_template=REF)
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = _with_null(schema)


def _with_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A body's schema in which null stands for a field that is left out, as it is read."""
    required = schema.get("required", [])
    for name, value in schema["properties"].items():
        kinds = value.get("anyOf", [])
        if name not in required and {"type": "null"} not in kinds and len(value.keys() - _ABOUT):
            about = {key: value.pop(key) for key in _ABOUT if key in value}
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}], **about}
    return schema
