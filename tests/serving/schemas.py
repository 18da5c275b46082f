"""Twenty JSON schemas, none of whose answers may be as long as it likes."""

from typing import Any


def closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others, all of them required unless said."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}
AGE = {"type": "integer", "minimum": 0, "maximum": 120}
POINT = closed(x={"enum": [0, 0.5, -1]}, y={"type": "integer", "minimum": -9, "maximum": 9})
SCHEMAS: dict[str, Any] = {
    "an object": closed(name=SHORT, age=AGE),
    "a list": {
        "type": "array",
        "items": {"enum": ["red", "green", "été", 7, None]},
        "minItems": 2,
        "maxItems": 3,
    },
    "one of two": {"anyOf": [{"const": {"a": 1}}, {"type": "boolean"}]},
    "may be left out": closed(["b"], a=SHORT, b=AGE, c={"type": "null"}),
    "may all be left out": closed([], a={"type": "boolean"}, b={"const": "x"}),
    "an object within": closed(who=closed(name=SHORT, born=closed(year=AGE)), ok={"const": True}),
    "lists within": {
        "type": "array",
        "maxItems": 3,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}},
    },
    "objects in a list": {"type": "array", "minItems": 1, "maxItems": 3, "items": POINT},
    "a tuple": {
        "type": "array",
        "prefixItems": [AGE, SHORT, {"type": "boolean"}],
        "minItems": 3,
        "items": False,
    },
    "several types": {"type": ["boolean", "null", "string"], "maxLength": 4},
    "a pattern": closed(id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"}),
    "a long enough string": closed(word={"type": "string", "minLength": 3, "maxLength": 5}),
    "a date": closed(on={"type": "string", "format": "date"}),
    "a number of another base": closed(uuid={"type": "string", "format": "uuid"}),
    "definitions": {
        "$defs": {"point": POINT},
        **closed(begin={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "a tree of two floors": {
        "$defs": {"leaf": closed(v=AGE)},
        **closed(
            left={"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
            right={"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
        ),
    },
    "told apart by a word": {
        "oneOf": [
            closed(kind={"const": "circle"}, radius=AGE),
            closed(kind={"const": "line"}, points={"type": "array", "items": AGE, "maxItems": 2}),
        ]
    },
    "all of": {"allOf": [closed(["a"], a=AGE, b=AGE), {"required": ["b"]}]},
    "keys that must be spelled": closed(
        **{'a "b"': AGE, "é\n\\": {"type": "boolean"}, "日本": SHORT}
    ),
    "integers at the edges": closed(
        a={"type": "integer", "exclusiveMinimum": -11, "maximum": 1_000_000},
        b={"type": "integer", "minimum": 99, "exclusiveMaximum": 101},
    ),
}
