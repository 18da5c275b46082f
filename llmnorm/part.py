"""The one mechanism behind every swappable part: a union of settings classes is the registry.

A room's `settings.py` states each part's settings as a `Settings` class with a literal `name` and a
`build` method, and ends with the union, annotated with `Part`:

    Norm = Annotated[LayerNormSettings | RMSNormSettings, Part(default="rms")]

That union is the registry, the validation, the documentation and the JSON schema. In YAML a part is
written `norm: rms`, `norm: {name: rms, eps: 1e-5}` or, for a class that lives outside the package,
`norm: my_pkg.my_norm:MyNormSettings`.

What would surprise: settings are read before torch is imported, so this file and every
`settings.py` import only the standard library, pydantic and each other. A class outside the package
is imported only where the caller allows it (validation context `{"imports": ...}`, see `Imports`).
"""

import difflib
import importlib
import inspect
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from llmnorm.config.schema import field_docs, part_schema


class InputError(ValueError):
    """A mistake that a user can make, in a configuration, in data, with a checkpoint or a request.

    The message has a line for each mistake: the key or file, what is wrong, and the nearest valid
    choice. The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class Imports(Enum):
    """What validation does with a part that is given as an import path."""

    OPAQUE = "opaque"  # keeps its text, so that all other mistakes are found before code is run
    LOADED = "loaded"  # takes the class if its module is imported already (exported models)
    ALLOWED = "allowed"  # imports it (the configuration of a run, once all else is valid)


class Settings(BaseModel):
    """Base of all settings: unknown keys, nan, inf and bool/number/text mix-ups are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_silent_conversion(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        result = handler(value)
        _refuse_conversion(value, result)
        return result

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The fields' docstrings are their descriptions."""
        built = handler.resolve_ref_schema(handler(schema))
        for name, text in field_docs(cls).items():
            if name in cls.model_fields:
                key = cls.model_fields[name].alias or name
                built["properties"][key]["description"] = text
        return built


def _refuse_conversion(given: Any, got: Any) -> None:
    """Raise where pydantic changed the kind: `seed: true` would be 1 and `lr: "3"` would be 3.0."""
    if isinstance(given, list | tuple) and isinstance(got, list | tuple):
        for given_item, got_item in zip(given, got, strict=False):
            _refuse_conversion(given_item, got_item)
    elif isinstance(got, bool) != isinstance(given, bool) and isinstance(got, bool | int | float):
        expected = "true or false" if isinstance(got, bool) else "a number"
        raise PydanticCustomError(
            "conversion",
            "expected {expected}, got {given}",
            {"expected": expected, "given": str(given).lower()},
        )
    elif isinstance(given, str) and isinstance(got, int | float) and not isinstance(got, Enum):
        raise PydanticCustomError(
            "conversion", "expected a number, got the text '{given}'", {"given": given}
        )


@dataclass(frozen=True)
class Part:
    """Annotation that makes a union of settings classes a swappable part.

    Attributes:
        default: the name of the part where a mapping gives none.
        many: whether a list of parts is accepted too, which then repeats over the layers.
    """

    default: str
    many: bool = False

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Validate with the class that `name` chooses; write `name` first."""
        classes = part_classes(source)

        def validate(value: Any, info: ValidationInfo) -> Any:
            if not isinstance(value, list):
                return self._validated(classes, value, info.context)
            if not self.many:
                raise PydanticCustomError("part", "expected one part, got a list")
            if not value:
                raise PydanticCustomError("part", "the list of parts is empty")
            found, errors = [], []
            for index, item in enumerate(value):
                try:
                    found.append(self._validated(classes, item, info.context))
                except PydanticCustomError as error:
                    nested = (error.context or {}).get("errors")
                    errors += _below(index, nested or [{"loc": (), "msg": error.message()}])
            if errors:
                raise PydanticCustomError("part", one_line(errors), {"errors": errors})
            return found

        def serialise(value: Any, info: core_schema.SerializationInfo) -> Any:
            def dump(part: Any) -> Any:
                if not isinstance(part, Settings):
                    return part  # an import path, validated under Imports.OPAQUE
                keys = part.model_dump(mode=info.mode, context=info.context)
                return {"name": part_name(type(part)), **{k: keys[k] for k in keys if k != "name"}}

            return [dump(v) for v in value] if isinstance(value, list) else dump(value)

        return core_schema.with_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                serialise, info_arg=True
            ),
            metadata={
                "pydantic_js_functions": [
                    lambda *_: part_schema(classes, self.default, many=self.many)
                ]
            },
        )

    def _validated(self, classes: dict[str, type[Settings]], value: Any, context: Any) -> Any:
        """One part as its settings; an import path stays a mapping under `Imports.OPAQUE`."""
        if isinstance(value, Settings):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "part", "expected a name or a mapping, got {value}", {"value": repr(value)}
            )
        name = value.get("name", self.default)
        if not isinstance(name, str):
            raise PydanticCustomError("part", "'name' must be text, got {name}", {"name": name})
        keys = {key: item for key, item in value.items() if key != "name"}
        if ":" in name:
            imports = (context or {}).get("imports", Imports.LOADED)
            if imports is Imports.OPAQUE:
                return value
            cls = _import_part(name, imports)
        elif name in classes:
            cls = classes[name]
        else:
            raise PydanticCustomError(
                "part",
                "no part is called '{name}'; {hint}",
                {"name": name, "hint": nearest(name, [*classes, "an import path module:Class"])},
            )
        try:
            return cls.model_validate(keys, context=context)
        except ValidationError as error:
            errors = explain(error, cls)
            raise PydanticCustomError("part", one_line(errors), {"errors": errors}) from None


def part_classes(annotation: Any) -> dict[str, type[Settings]]:
    """The settings classes of a part's union, by name."""
    members = get_args(annotation) if get_origin(annotation) is not None else ()
    found = [m for m in (members or (annotation,)) if inspect.isclass(m) and not get_args(m)]
    return {part_name(cls): cls for cls in found if issubclass(cls, Settings)}


def part_of(field: FieldInfo | None) -> Part | None:
    """The part annotation of a settings field, if it has one."""
    return next((m for m in field.metadata if isinstance(m, Part)), None) if field else None


def part_name(cls: type[Settings]) -> str:
    """What a configuration writes for this class: its literal `name`, or its import path."""
    field = cls.model_fields.get("name")
    literal = get_args(field.annotation) if field is not None else ()
    if literal and cls.__module__.startswith("llmnorm."):
        return str(literal[0])
    return f"{cls.__module__}:{cls.__qualname__}"


def _import_part(path: str, imports: Imports) -> type[Settings]:
    module_name, _, class_name = path.partition(":")
    module = sys.modules.get(module_name)
    if module is None and imports is Imports.LOADED:
        raise PydanticCustomError(
            "part",
            "'{path}' is not imported; `import {module}` first (loading never imports code)",
            {"path": path, "module": module_name},
        )
    if module is None:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise PydanticCustomError(
                "part", "cannot import '{path}': {why}", {"path": path, "why": str(error)}
            ) from None
    cls = getattr(module, class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, Settings)):
        candidates = [
            n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Settings)
        ]
        raise PydanticCustomError(
            "part",
            "'{path}' is no Settings class; {hint}",
            {"path": path, "hint": nearest(class_name, [c for c in candidates if c != "Settings"])},
        )
    return cls


def nearest(word: str, choices: list[str]) -> str:
    """The end of a message: the valid choice nearest to `word`, or all choices if none is near."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(choices)}" if choices else "there is no valid choice"


def explain(error: ValidationError, cls: type[Settings]) -> list[dict[str, Any]]:
    """Pydantic's errors as mappings: "loc" (key path), "msg" (text for the user), "type".

    An error inside a part has the key path from `cls` down. The message of an unknown key names the
    nearest valid key.
    """
    found: list[dict[str, Any]] = []
    for item in error.errors(include_url=False):
        # Pydantic's path also names the branch of a union (`list[...]`, `literal['x']`): no key.
        loc = tuple(k for k in item["loc"] if isinstance(k, int) or not _is_branch(k))
        if item["type"] == "default_factory_not_called":
            continue  # another field is wrong, which has an error of its own
        if nested := item.get("ctx", {}).get("errors"):
            found += _below(loc, nested)
        elif item["type"] == "extra_forbidden":
            hint = nearest(str(loc[-1]), fields_at(cls, loc[:-1]))
            found.append({"loc": loc, "msg": f"unknown key; {hint}", "type": item["type"]})
        else:
            found.append({"loc": loc, "msg": _message(item), "type": item["type"]})
    # Every branch of a union has an error; the deepest shows what was meant. One error a key path.
    deepest = [e for e in found if not _has_deeper(e["loc"], found)]
    return list({e["loc"]: e for e in reversed(deepest)}.values())[::-1]


def _has_deeper(loc: tuple[Any, ...], errors: list[dict[str, Any]]) -> bool:
    return any(len(e["loc"]) > len(loc) and e["loc"][: len(loc)] == loc for e in errors)


def _is_branch(key: str) -> bool:
    return "[" in key or key in ("int", "str", "float", "bool", "none", "list", "dict", "tuple")


def _below(prefix: Any, errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    head = prefix if isinstance(prefix, tuple) else (prefix,)
    return [{**e, "loc": (*head, *e["loc"])} for e in errors]


_MESSAGES = {
    "missing": "is required",
    "int_from_float": "expected a whole number, got {input}",
    "int_parsing": "expected a whole number, got '{input}'",
    "int_type": "expected a whole number, got {input}",
    "float_parsing": "expected a number, got '{input}'",
    "float_type": "expected a number, got {input}",
    "bool_parsing": "expected true or false, got '{input}'",
    "bool_type": "expected true or false, got {input}",
    "string_type": "expected text, got {input}",
    "path_type": "expected a path, got {input}",
    "list_type": "expected a list, got {input}",
    "model_type": "expected a mapping, got {input}",
    "model_attributes_type": "expected a mapping, got {input}",
    "finite_number": "expected a finite number, got {input}",
    "greater_than": "must be greater than {gt}, got {input}",
    "greater_than_equal": "must be at least {ge}, got {input}",
    "less_than": "must be less than {lt}, got {input}",
    "less_than_equal": "must be at most {le}, got {input}",
}


def _message(item: Any) -> str:
    given, context = item["input"], item.get("ctx", {})
    if item["type"] == "literal_error":
        choices = [c.strip(" '") for c in context["expected"].replace(" or ", ",").split(",")]
        return f"'{given}' is not valid; {nearest(str(given), choices)}"
    template = _MESSAGES.get(item["type"])
    if template:
        return template.format(input=given, **context)
    return str(item["msg"]).removeprefix("Value error, ")


def one_line(errors: list[dict[str, Any]]) -> str:
    """The errors of `explain` as one line of text."""
    return "; ".join(f"{key_path(e['loc'])}: {e['msg']}" if e["loc"] else e["msg"] for e in errors)


def key_path(loc: tuple[Any, ...]) -> str:
    """`("model", "norm", 0)` -> `model.norm.0`."""
    return ".".join(str(key) for key in loc)


def fields_at(cls: type[Settings], loc: tuple[Any, ...]) -> list[str]:
    """The keys that are valid at a key path below `cls`, those of all classes of a union."""
    classes = [cls]
    for key in loc:
        if isinstance(key, str):
            fields = [c.model_fields[key] for c in classes if key in c.model_fields]
            classes = [found for field in fields for found in settings_in(field.annotation)]
    return list(dict.fromkeys(f.alias or n for c in classes for n, f in c.model_fields.items()))


def settings_in(annotation: Any) -> list[type[Settings]]:
    """Every settings class in an annotation, those in unions and lists included."""
    if inspect.isclass(annotation) and not get_args(annotation):
        return [annotation] if issubclass(annotation, Settings) else []
    return [found for inner in get_args(annotation) for found in settings_in(inner)]
