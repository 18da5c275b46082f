"""The chat template among a tokenizer's files: read, or written as the configuration says.

A template is a Jinja text that makes one text of messages, as Hugging Face's tokenizers keep it:
in `chat_template.jinja`, in older directories in tokenizer_config.json.

What would surprise: `tokenizer.template_arguments` are written into the template as its defaults,
in front of it. So every tool that opens the directory, or an export of it, renders as in training,
and can still be told another value.

A configured template may need special tokens that the tokenizer does not have. They get the ids
behind its last token: a tokenizer that is copied gets them added, one that is trained is trained
with them. The ids may be those of rows that the embedding of a base has beyond its tokenizer
(Qwen's has); what becomes of these rows is said in models/new_rows.py.
"""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from llmnorm.config.shipped import locate
from llmnorm.data.files import MissingInput, looked_in, write_file
from llmnorm.data.settings import CHAT_TEMPLATE, TOKENIZER_FILES, TokenizerSettings
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.machine.reading import read_object, read_text
from llmnorm.part import InputError

CONFIG = TOKENIZER_FILES[1]
# ChatML as OpenAI described it, behind the token with which the base's documents begin.
CHATML = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)
# How special tokens are usually spelled: <|im_end|>, and DeepSeek's bars of full width.
_LOOKS_SPECIAL = re.compile(r"<[|｜][^\s|｜<>'\"{}]{1,40}[|｜]>")


def read_template(
    directory: Path, key: str, *, tools: bool = False, called: str | None = None
) -> tuple[str, Path]:
    """A tokenizer directory's chat template, and the file that it stands in.

    Args:
        directory: of the tokenizer.
        key: the configuration key for messages.
        tools: prefer the template for tools where a directory has several.
        called: what the user calls the directory; left out, its path.

    Raises:
        InputError: there is none, or a file cannot be read.
    """
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        return read_text(path, key), path
    path = directory / CONFIG
    found = read_object(path, key).get("chat_template") if path.is_file() else None
    if isinstance(found, list):  # several, by name
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = (named.get("tool_use") if tools else None) or named.get("default")
    if isinstance(found, str):
        return found, path
    raise InputError(
        f"{key}: {called or directory} has no chat template; set tokenizer.chat_template to "
        "chatml, or to a file that holds one"
    )


def template_file(settings: TokenizerSettings) -> Path | None:
    """The file that `tokenizer.chat_template` names; None for `chatml`, or where it is left out.

    Raises:
        MissingInput: there is no such file.
    """
    named = settings.chat_template
    if named is None or str(named) == "chatml":
        return None
    path = locate(named, "tokenizer.chat_template")
    if not path.is_file():
        raise MissingInput(
            f"tokenizer.chat_template: there is no file {named}{looked_in(path)}; name a file that "
            "holds a Jinja template, or write chatml"
        )
    return path


def configured_template(directory: Path | None, settings: TokenizerSettings) -> str | None:
    """The template that the settings give a tokenizer; None where it keeps its own.

    Args:
        directory: the tokenizer's own files; None for one that is trained.
        settings: of the tokenizer.

    Raises:
        InputError: the template cannot be read, or there is none for the arguments.
    """
    if settings.chat_template is None and not settings.template_arguments:
        return None
    text = _named(settings)
    if text is None and directory is not None:
        text = read_template(directory, "tokenizer.template_arguments")[0]
    elif text is None:
        raise InputError(
            "tokenizer.template_arguments: the tokenizer that is trained has no chat template; set "
            "tokenizer.chat_template"
        )
    default = "{{%- if {0} is not defined %}}{{%- set {0} = {1} %}}{{%- endif %}}\n"
    given = settings.template_arguments.items()
    defaults = "".join(default.format(name, json.dumps(value)) for name, value in given)
    return text if text.startswith(defaults) else defaults + text  # a run's copy has them already


def write_template(directory: Path, settings: TokenizerSettings) -> None:
    """Give a copied or trained tokenizer the configured template, if there is one.

    Args:
        directory: of the tokenizer; its files are changed.
        settings: of the tokenizer.

    Raises:
        InputError: as `configured_template`; or the vocabulary cannot take the special tokens of
            the template.
    """
    text = configured_template(directory, settings)
    if text is None:
        return
    if missing := missing_tokens(directory, settings):
        _add_special_tokens(directory, missing)
    write_file(directory / CHAT_TEMPLATE, text.encode())
    config = directory / CONFIG
    tree = read_object(config) if config.is_file() else {}
    if tree.pop("chat_template", None) is not None:  # the file says it now
        write_file(config, json.dumps(tree, indent=1).encode())


def template_tokens(settings: TokenizerSettings) -> list[str]:
    """What the configured template spells as special tokens are spelled; none without one.

    Raises:
        InputError: the template cannot be read.
    """
    return list(dict.fromkeys(_LOOKS_SPECIAL.findall(_named(settings) or "")))


def missing_tokens(directory: Path, settings: TokenizerSettings) -> list[str]:
    """The special tokens of the configured template that a tokenizer directory does not have.

    Raises:
        InputError: template or tokenizer cannot be read.
    """
    wanted = template_tokens(settings)
    there = TextEncoder(directory).spellings if wanted else {}
    return [token for token in wanted if token not in there]


def _add_special_tokens(directory: Path, tokens: list[str]) -> None:
    """Give a copied tokenizer more special tokens, with the ids behind its last one.

    Args:
        directory: of the tokenizer; its files are changed.
        tokens: their spellings, none of which the tokenizer has.

    Raises:
        InputError: a file cannot be read, or the ids of the tokenizer have gaps, so that the next
            ids are not those behind the last.
    """
    first, path = TextEncoder(directory).vocab_size, directory / "tokenizer.json"
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {first + n: {"content": token, **plain} for n, token in enumerate(tokens)}
    tree = read_object(path, "tokenizer.path")
    tree["added_tokens"] = [
        *(tree.get("added_tokens") or []),
        *({"id": number, **token, "special": True} for number, token in added.items()),
    ]
    text = json.dumps(tree, ensure_ascii=False)
    found = Tokenizer.from_str(text)
    if [found.token_to_id(token) for token in tokens] != [*added]:
        raise InputError(
            f"tokenizer.chat_template: {path}: the ids of its tokens have gaps, so that "
            f"{', '.join(tokens)} cannot be added; name a template that is written with the "
            "tokenizer's own tokens"
        )
    write_file(path, text.encode())
    config = directory / CONFIG
    settings = read_object(config) if config.is_file() else {}
    if isinstance(settings.get("added_tokens_decoder"), dict):  # transformers 4 writes them here
        for number, token in added.items():
            settings["added_tokens_decoder"][str(number)] = {**token, "special": True}
        write_file(config, json.dumps(settings, indent=1).encode())


def _named(settings: TokenizerSettings) -> str | None:
    """The text of `tokenizer.chat_template`; None where the key is left out."""
    path = template_file(settings)
    if path is not None:
        return read_text(path, "tokenizer.chat_template")
    return None if settings.chat_template is None else CHATML
