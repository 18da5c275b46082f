"""Which class of transformers a stock directory is of, or why it is no causal language model.

    found = foreign_class(path)
    found.kind(found.config)

Only JSON is read, and no code runs that lies in the directory, unless `model.trust_remote_code`
says so. What is refused is told in one line, with what can be done about it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llmnorm.machine import reading
from llmnorm.part import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_AUTO = "AutoModelForCausalLM"


class ForeignClass(NamedTuple):
    """A causal language model of transformers.

    Attributes:
        config: what `kind` is made of, without `quantization_config`.
        kind: the class.
        quantization: how the directory's weights are quantised; None: they are not.
    """

    config: "PreTrainedConfig"
    kind: "type[PreTrainedModel]"
    quantization: dict[str, Any] | None


def foreign_class(
    path: Path, key: str | None = None, *, trust_remote_code: bool = False
) -> ForeignClass:
    """The class of a directory and its configuration.

    An image-text model's directory is that of its text model, where transformers has a class for it
    alone.

    Args:
        path: holds config.json.
        key: what named the directory, for messages.
        trust_remote_code: run the code that lies in the directory, where its config.json names it.

    Raises:
        InputError: transformers has no such class, the class is no causal language model, or the
            values do not fit it.
    """
    file = path / "config.json"
    where = reading.named(file, key)

    def refuse(why: str) -> NoReturn:
        raise InputError(f"{where}: {why}")

    values = reading.read_object(file, key)
    name, code = values.get("model_type"), values.get("auto_map") or {}
    remote = trust_remote_code and _AUTO in code
    if name not in CONFIG_MAPPING_NAMES and not remote:
        refuse(_unknown(str(name), code, values.get("transformers_version")))
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=remote
        )
        kind = _of_directory(code[_AUTO], path) if remote else None
    except Exception as error:  # of any kind: it checks its own keys
        refuse(" ".join(str(error).split())[:300])
    kind = kind or transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    named = (values.get("architectures") or [name])[0]
    if config.is_encoder_decoder:
        refuse(f"{named} has an encoder beside its decoder; a decoder alone is trained and served")
    pictures = named in _FROM_PICTURES
    if kind is None or not _predicts(kind, named, pictures):
        if pictures:
            refuse(
                f"{named} reads pictures beside text, and transformers has no class of its text "
                "model alone for this type; save the text model by itself"
            )
        refuse(
            f"{named} is no causal language model, which predicts the next token from those before "
            "it"
        )
    quantization = getattr(config, "quantization_config", None)
    text = config.sub_configs.get("text_config")
    if text is not None and kind.config_class is text:
        config = config.get_text_config()
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(each, "quantization_config"):
            del each.quantization_config  # the weights are read as plain ones
    return ForeignClass(config, kind, dict(quantization) if quantization else None)


# Classes that read pictures and text; several types share some of them.
_FROM_PICTURES = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())


def _predicts(kind: "type[PreTrainedModel]", named: str, pictures: bool) -> bool:
    """Whether a directory that names the class `named` holds a causal language model of `kind`."""
    if pictures:
        return kind.__name__.endswith("ForCausalLM")
    return kind.__name__ not in _FROM_PICTURES and (
        named == kind.__name__ or named == getattr(kind.config_class, "model_type", None)
    )


def _of_directory(reference: str, path: Path) -> "type[PreTrainedModel]":
    """A class that is defined by a file in a directory, `module.Class`."""
    if "--" in reference:
        raise InputError(
            f"auto_map: its code lies in another repository ({reference.split('--')[0]}); copy it "
            "into the directory"
        )
    kind: type[PreTrainedModel] = get_class_from_dynamic_module(
        reference, str(path), local_files_only=True
    )
    kind.register_for_auto_class(_AUTO)  # so that what is saved names its code too
    return kind


def _unknown(name: str, code: dict[str, Any], written_by: Any) -> str:
    """Why a type of model is refused that this transformers does not know."""
    here = transformers.__version__
    why = f"model_type: transformers {here} has no '{name}'"
    if _AUTO in code:
        return (
            f"{why}; code that lies beside it (auto_map) is not run unless "
            "model.trust_remote_code=true says so"
        )
    if code:
        return f"{why}; code that lies beside it (auto_map) is not run"
    if isinstance(written_by, str) and _release(written_by) > _release(here):
        return (
            f"{why}; its file was written by transformers {written_by}: "
            f'pip install "transformers>={written_by}"'
        )
    return f"{why}; {nearest(name, list(CONFIG_MAPPING_NAMES))}"


def _release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version; `5.23.0.dev0` counts as 5.23.0."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
