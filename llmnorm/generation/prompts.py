"""Text as a prompt: a tokenizer that begins every text as the documents in training began.

    tokenizer = open_tokenizer(directory, first=bos)
    prompt_tokens(tokenizer, "The river")     -> [bos, 464, 7850]

When data is prepared, every document gets a first token (`data/tokenizer.py`), whether or not its
tokenizer adds one by itself: those of GPT-2, Qwen and OLMo do not. A model that has never seen a
text without this token must not be asked to continue one.

What would surprise: where the tokenizer does not begin texts with the token, a changed copy of its
files is opened in its place. An export holds this copy (`begin_with`), so that every tool that
opens it gets the token, once.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmnorm.config.stock import all_tokens
from llmnorm.data.settings import TOKENIZER_FILES
from llmnorm.machine import reading
from llmnorm.machine.files import write_whole
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZER, CONFIG = TOKENIZER_FILES[:2]


def open_tokenizer(directory: Path, *, first: int | None = None) -> "PreTrainedTokenizerBase":
    """A tokenizer directory as Hugging Face's object; no code that lies in it is run.

    Args:
        directory: holds tokenizer.json.
        first: the token that began every document in training; None: texts begin as the tokenizer
            itself begins them.

    Raises:
        InputError: it is no tokenizer, or has no token `first`.
    """
    tokenizer = _open(directory)
    if first is None or beginning(tokenizer) == [first]:
        return tokenizer
    with tempfile.TemporaryDirectory() as copy:
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, Path(copy) / name)
        begin_with(Path(copy), first, tokenizer, where=directory)
        return _open(Path(copy), shown=directory)


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """A text's tokens behind those with which the tokenizer begins one, and none at its end.

    Raises:
        InputError: that is no token at all.
    """
    begin, ids = beginning(tokenizer), list(tokenizer.encode(text, add_special_tokens=False))
    if begin and ids[: len(begin)] != begin:  # the text may spell the token out
        ids = [*begin, *ids]
    if not ids:
        alone = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        if not alone:
            raise InputError("the prompt is empty, and the tokenizer has no token to begin with")
        ids = alone
    return ids


def end_tokens(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end a text: the model's, or where it names none, the tokenizer's."""
    own = config.eos_token_id
    ends = all_tokens(tokenizer.eos_token_id if own is None else own)
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer puts before a text of its own accord."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def begin_with(
    directory: Path,
    first: int,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    where: Path | None = None,
) -> None:
    """Change a tokenizer's files so that it begins every text with the token `first`, once.

    Files that do so already are left as they are.

    Args:
        directory: the files.
        first: the token's id.
        tokenizer: what the directory holds, if it was opened before.
        where: what messages name; the directory if None.

    Raises:
        InputError: the directory holds no tokenizer, or it has no such token.
    """
    shown = where or directory
    tokenizer = tokenizer or _open(directory, shown=shown)
    if beginning(tokenizer) == [first]:
        return
    token = tokenizer.convert_ids_to_tokens(first) if 0 <= first < len(tokenizer) else None
    if token is None:
        raise InputError(f"{shown}: has no token of id {first}, which began documents in training")
    tree = reading.read_object(directory / TOKENIZER)
    tree["post_processor"] = _with_first(tree.get("post_processor"), str(token), first)
    write_whole(directory / TOKENIZER, json.dumps(tree) + "\n")
    config: dict[str, Any] = {}
    if (directory / CONFIG).is_file():
        config = reading.read_object(directory / CONFIG)
    if tokenizer.bos_token_id is None:
        config["bos_token"] = str(token)
    # Of this key, where it is given, transformers makes the post-processor anew; some classes need
    # it, with others the rest of the post-processor would be lost.
    given = "add_bos_token" in config or "add_eos_token" in config
    for anew in [True] if given else [False, True]:
        if anew:
            config["add_bos_token"] = True
        write_whole(directory / CONFIG, json.dumps(config, indent=1) + "\n")
        begins = beginning(_open(directory, shown=shown))
        if begins == [first]:
            return
    raise InputError(
        f"{shown}: begins texts with {begins}, and cannot be made to begin them with {first} "
        f"('{token}'), which began every document in training"
    )


def _with_first(found: Any, token: str, number: int) -> dict[str, Any]:
    """A post-processor of tokenizer.json that puts `token` first, and does the rest of `found`."""
    kind = found.get("type") if isinstance(found, dict) else None
    if kind == "Sequence":
        inner = [p for p in found["processors"] if p.get("type") == "ByteLevel"]
        rest = [p for p in found["processors"] if p not in inner]
        return {
            **found,
            "processors": [*inner, _with_first(rest[0] if rest else None, token, number)],
        }
    template = _template(token, number)
    if kind == "TemplateProcessing":  # its other tokens stay, those before the text excepted
        for name in ("single", "pair"):
            pieces = found[name]
            text = next(i for i, piece in enumerate(pieces) if "Sequence" in piece)
            found[name] = [template[name][0], *pieces[text:]]
        found["special_tokens"] = {**found["special_tokens"], **template["special_tokens"]}
        return dict(found)
    if kind == "ByteLevel":
        return {"type": "Sequence", "processors": [found, template]}
    return template


def _template(token: str, number: int) -> dict[str, Any]:
    def piece(kind: str, name: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": type_id}}

    single = [piece("SpecialToken", token, 0), piece("Sequence", "A", 0)]
    pair = [*single, piece("SpecialToken", token, 1), piece("Sequence", "B", 1)]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }


def _open(directory: Path, *, shown: Path | None = None) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    where = shown or directory
    if not (directory / TOKENIZER).exists():
        raise InputError(f"{where}: has no tokenizer (no {TOKENIZER})")
    reading.open_file(directory / TOKENIZER).close()  # transformers would wait for a named pipe
    for name in TOKENIZER_FILES[1:-1]:
        if (where / name).exists():
            reading.read_object(where / name)
    try:
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any kind: tokenizers' panics are no Exception
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            reason = "its auto_map names Python code, which is not run"
        raise InputError(f"{where}: no tokenizer can be read ({reason})") from None
