"""What /openapi.json says of the routes: bodies by their fields, and every status that occurs."""

from typing import TYPE_CHECKING, Any

from llmnorm.serving.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    Fields,
    TokenizeFields,
)
from llmnorm.serving.refusals import TYPES

if TYPE_CHECKING:
    from fastapi import FastAPI

BODIES: tuple[type[Fields], ...] = (
    CompletionFields,
    ChatFields,
    TokenizeFields,
    DetokenizeFields,
)
REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": sorted(set(TYPES.values()))},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
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


def describe(summary: str, *, name: bool = False) -> dict[str, Any]:
    """Arguments of a FastAPI route without a body; with `name`, its path ends in one."""
    content = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    statuses = [401, 404, 500, 503]
    extra: dict[str, Any] = {}
    if name:
        schema = {"type": "string"}
        extra["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    return {
        "summary": summary,
        "response_model": None,
        "openapi_extra": extra,
        "responses": {s: {"description": WORDS[s], "content": content} for s in statuses},
    }


def route_extra(summary: str, body: type[Fields]) -> dict[str, Any]:
    """The same of a route with a body."""
    found = describe(summary)
    content = {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}
    found["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    error = found["responses"][500]["content"]
    found["responses"] = {s: {"description": w, "content": error} for s, w in WORDS.items()}
    return found


def write_document(app: "FastAPI", root_path: str) -> None:
    """Make the application's document, once, and put the schemas of bodies into it."""
    document = app.openapi()
    document["servers"] = [{"url": root_path or "/"}]
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = ERROR
    for body in BODIES:
        schema = body.model_json_schema(ref_template=REF)
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
