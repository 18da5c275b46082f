"""What settings classes document about themselves: JSON schema and the docstrings of fields.

`llmnorm/part.py` hands both to pydantic, which asks for them when a schema is made. Validation pays
for neither.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaValue


def part_schema(
    classes: Mapping[str, type[BaseModel]], default: str, *, many: bool
) -> JsonSchemaValue:
    """The JSON schema of a part: a name, an import path, or a mapping with the part's settings.

    Args:
        classes: the part's settings classes by name.
        default: the name that a mapping may leave out.
        many: whether a list of parts is accepted too.
    """
    mappings = []
    for name, cls in classes.items():
        # A reference to a definition could not say that only the default part may leave out
        # `name`, so each class gets an inline schema.
        schema = _inlined(cls.model_json_schema())
        schema["properties"] = {
            "name": {"const": name, "type": "string"},
            **{k: v for k, v in schema["properties"].items() if k != "name"},
        }
        if name != default:
            schema["required"] = ["name"]
        mappings.append(schema)
    path = {"type": "string", "pattern": "^[\\w.]+:[\\w.]+$"}
    foreign = {"type": "object", "required": ["name"], "properties": {"name": path}}
    single: list[Any] = [{"enum": list(classes)}, path, *mappings, foreign]
    if not many:
        return {"anyOf": single}
    return {"anyOf": [*single, {"type": "array", "items": {"anyOf": single}}]}


def _inlined(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The schema with each reference replaced by the definition that it names."""
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = {**definitions[node["$ref"].rpartition("/")[2]], **node}
            del node["$ref"]
        return {key: inline(value) for key, value in node.items()}

    return inline(schema)


@cache
def field_docs(cls: type[BaseModel]) -> dict[str, str]:
    """The docstring under every field of a class and its bases, read from their source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs
