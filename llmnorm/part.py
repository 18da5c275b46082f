"""The one mechanism behind every swappable part: a union of settings classes is the registry.

A room's `settings.py` states each part's settings as a `Settings` class with a literal `name` and a
`build` method, and ends with the union, annotated with `Part`:

    Norm = Annotated[LayerNormSettings | RMSNormSettings, Part(NormSettings, default="rms")]

That union is the registry, the validation, the documentation and the JSON schema. In YAML a part is
written `norm: rms`, `norm: {name: rms, eps: 1e-5}` or, for a class that lives outside the package,
`norm: my_pkg.my_norm:MyNormSettings`, which must be derived from the kind's base class, here
NormSettings.

What would surprise: settings are read before torch is imported, so this file and every
`settings.py` import only the standard library, pydantic and each other. A class outside the package
is imported only where the caller allows it (validation context `{"imports": ...}`, see `Imports`).
"""

import inspect
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

from llmnorm.config.imports import error_of, import_class, last_line
from llmnorm.config.mistakes import (
    Mistake,
    below,
    explain,
    key_path,
    nearest,
    one_line,
    shown,
)
from llmnorm.config.schema import field_docs, part_schema

__all__ = [
    "Imports",
    "InputError",
    "Mistake",
    "Part",
    "Settings",
    "explain",
    "key_path",
    "nearest",
    "one_line",
    "part_classes",
    "part_name",
    "part_of",
    "settings_in",
]


class InputError(ValueError):
    """A mistake that a user can make, in a configuration, in data, with a checkpoint or a request.

    The message has a line for each mistake: the key or file, what is wrong, and the nearest valid
    choice. The command line prints it without a traceback and exits with `exit_code`. Of several
    processes that have the same error the one of rank `speaker` prints it.
    """

    exit_code = 2
    speaker = 0


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
    def _no_silent_conversion(
        cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        result = handler(value)
        _refuse_conversion(value, result)
        if info.field_name != "seed":  # a seed has 64 bits without a sign
            _refuse_large(result)
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
            {"expected": expected, "given": shown(given)},
        )
    elif isinstance(given, str) and isinstance(got, int | float) and not isinstance(got, Enum):
        raise PydanticCustomError(
            "conversion", "expected a number, got the text '{given}'", {"given": shown(given)}
        )


def _refuse_large(value: Any) -> None:
    """Raise where a whole number does not fit into the 64 bits that torch and files have for it."""
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_large(item)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PydanticCustomError(
            "large", "must be less than {bound}, got {value}", {"bound": 2**63, "value": str(value)}
        )


@dataclass(frozen=True)
class Part:
    """Annotation that makes a union of settings classes a swappable part.

    Attributes:
        base: the kind's base class, from which a class given as an import path must be derived.
        default: the name of the part where a mapping gives none.
        many: whether a list of parts is accepted too, which then repeats over the layers.
    """

    base: type["Settings"]
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
            found: list[Any] = []
            mistakes: list[Mistake] = []
            for index, item in enumerate(value):
                try:
                    found.append(self._validated(classes, item, info.context))
                except PydanticCustomError as error:
                    own = Mistake((), error.message(), "part")
                    mistakes += below((index,), (error.context or {}).get("mistakes", [own]))
            if mistakes:
                raise _wrong(mistakes)
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
                "part", "expected a name or a mapping, got {value}", {"value": shown(value)}
            )
        name = value.get("name", self.default)
        if not isinstance(name, str):
            raise _wrong([Mistake(("name",), f"expected text, got {shown(name)}", "part")])
        keys = {key: item for key, item in value.items() if key != "name"}
        if name in classes:
            cls = classes[name]
        elif ":" not in name:
            hint = nearest(name, [*classes, "an import path module:Class"])
            raise PydanticCustomError(
                "part", "no part is called '{name}'; {hint}", {"name": shown(name), "hint": hint}
            )
        else:
            imports = (context or {}).get("imports", Imports.LOADED)
            if imports is Imports.OPAQUE:
                return value
            cls = import_class(
                name, self.base, classes.values(), allowed=imports is Imports.ALLOWED
            )
        try:
            return cls.model_validate(keys, context=context)
        except ValidationError as error:
            raise _wrong(explain(error, cls)) from None
        except Exception as error:
            if name in classes:
                raise
            raise error_of(f"'{name}' fails on its settings: {last_line(error)}") from None


def _wrong(mistakes: list[Mistake]) -> PydanticCustomError:
    """The error of a part; `explain` takes it apart again."""
    return PydanticCustomError("part", "{text}", {"text": one_line(mistakes), "mistakes": mistakes})


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


def settings_in(annotation: Any) -> list[type[Settings]]:
    """Every settings class in an annotation, those in unions and lists included."""
    if inspect.isclass(annotation) and not get_args(annotation):
        return [annotation] if issubclass(annotation, Settings) else []
    return [found for inner in get_args(annotation) for found in settings_in(inner)]
