"""What the commands share: the parser with one-line errors, and the arguments that several take.

A command is a file of this room with the four names of `Command`. Its `run` imports what it calls,
so that help and every mistake are answered before torch is loaded.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from llmnorm.config.mistakes import shown
from llmnorm.machine.reading import check_address, is_address, local_path
from llmnorm.part import InputError, nearest

_OVERRIDE = re.compile(r"[^\W\d][^=/]*=")  # no path, and no option: its key may be misspelt


class Command(Protocol):
    """One command: a module of this room.

    Attributes:
        HELP: what `llmnorm --help` says of it, in a line.
        TAKES_SETTINGS: whether settings `key.sub=value` may be given.
    """

    HELP: str
    TAKES_SETTINGS: bool

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser."""

    def run(self, parsed: argparse.Namespace, overrides: list[str]) -> int | None:
        """Run the command; returns its exit code, None for 0.

        Args:
            parsed: its arguments, and `words`, all that was typed after `llmnorm`.
            overrides: the settings `key.sub=value`, in the order in which they were typed.
        """


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest choice.

    Attributes:
        after_help: gives the text that the help ends with; made only where help is asked for.
        settings: the sections that the command reads (`generation`), all of them for "", and None
            for a command without settings; for the hint at an option that is a setting.
    """

    after_help: Callable[[], str] | None = None
    settings: str | None = None
    _words: Sequence[str] = ()

    def format_help(self) -> str:
        """As argparse's, with the text of `after_help`."""
        return super().format_help() + (self.after_help() if self.after_help else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but the parser of a command refuses an unknown option itself."""
        self._words = list(args or ())
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raise an `InputError` where argparse would print its usage and leave the process."""
        if match := re.match(r"argument (--[\w-]+): expected one argument", message):
            message += f"; a value that begins with - is written {match[1]}=VALUE"
        if "arguments are required" in message and (unknown := self._unknown_option()):
            message = f"unrecognized arguments: {unknown}"  # says more than what is missing too
        match = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if match:
            choices = re.findall(r"[\w-]+", match[3])
            what = "a command" if match[1] == "COMMAND" else f"valid for {match[1]}"
            message = f"'{match[2]}' is not {what}; {nearest(match[2], choices)}"
        elif match := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            message = f"there is no option {shown(match[1])}; {self._hint(match[1])}"
        elif message.startswith("unrecognized arguments: "):
            message += "; a setting is written key.sub=value"
        raise InputError(f"{message} (`{self.prog} --help` shows the usage)")

    def _unknown_option(self) -> str | None:
        """The first word that looks like an option and is none, nor the beginning of one."""
        options = [word.partition("=")[0] for word in self._words if re.match("--[a-z]", word)]
        known = self._option_string_actions
        return next((o for o in options if not any(k.startswith(o) for k in known)), None)

    def _hint(self, option: str) -> str:
        """The setting of that name (`--temperature`), or the nearest option of the command."""
        if self.settings is not None:
            from llmnorm.config.docs import key_paths

            name = option.lstrip("-").replace("-", "_")
            keys = [key for key in key_paths() if key.startswith(self.settings)]
            if same := [key for key in keys if key.rpartition(".")[2] == name]:
                shortest = min(same, key=lambda key: key.count("."))
                return f"a setting is written {shortest}=VALUE"
        return nearest(option, sorted(o for o in self._option_string_actions if o[:2] == "--"))

    def of_command(self, words: Sequence[str]) -> "Parser":
        """The parser of the first of `words` that is a command; this one where none is."""
        below = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = {name: parser for choices in below for name, parser in choices.items()}
        return next((parsers[word] for word in words if word in parsers), self)

    def option(self, word: str) -> argparse.Action | None:
        """The option that a word is, by its whole name or a beginning that no other option has.

        Args:
            word: a word of the command line; of `--prompt=TEXT` the name counts.
        """
        name = word.partition("=")[0]
        options = self._option_string_actions
        if name in options:
            return options[name]
        long = [option for option in options if name[:2] == "--" and option.startswith(name)]
        return options[long[0]] if len(long) == 1 else None


def split_overrides(words: list[str], parser: Parser) -> tuple[list[str], list[str]]:
    """The settings `key=value`, and all other words. Settings of an arm stay with the other words.

    argparse cannot take positional words both before and after options, so settings are found by
    their shape before it sees them. An option of the command tells what follows it: the word after
    one with a value (`--prompt E=mc2`) is that value, and what follows `--arm NAME` belongs to that
    arm, up to the next option.

    Args:
        words: what was typed after `llmnorm`.
        parser: of all commands.

    Raises:
        InputError: a setting stands behind the arms and belongs to none of them.
    """
    own = parser.of_command(words)
    overrides, others, arms = [], [], False
    follows = None  # what the words after an option are: its "value", or its "arm"
    for word in words:
        if follows == "value":
            others.append(word)
            follows = None
            continue
        if word.startswith("-"):
            option, follows = own.option(word), None
            if option is not None and option.nargs == "+":
                arms, follows = True, "arm"
            elif option is not None and option.nargs is None:
                follows = "value"
            if "=" in word:  # `--prompt=TEXT` holds it already
                follows = None
        if follows == "arm" or not _OVERRIDE.match(word):
            others.append(word)
        elif arms:
            raise InputError(
                f"'{word}': settings of all arms stand before the first --arm, an arm's own right "
                "after --arm NAME"
            )
        else:
            overrides.append(word)
    return overrides, others


def count(text: str) -> int:
    """A whole number of at least 1 and less than a thousand million."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, got '{shown(text)}'"
        )
    return int(text)


def local(text: str) -> Path:
    """A path of this machine, or `llmnorm:NAME`; `~` is the home directory."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def place(text: str) -> Path | str:
    """As `local`, or an address of a store (`s3://bucket/run`), which stays text."""
    if not is_address(text):
        return local(text)
    try:
        return check_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text(typed: str) -> str:
    """Text that was typed as UTF-8, whatever encoding the terminal has."""
    try:
        typed.encode()
        return typed
    except UnicodeEncodeError:  # bytes that are none of the terminal's encoding
        try:
            return os.fsencode(typed).decode("utf-8")
        except UnicodeDecodeError:
            raise argparse.ArgumentTypeError("is not UTF-8 text") from None


def names(text: str) -> list[str]:
    """Names or paths, separated by commas."""
    found = [name for name in text.split(",") if name]
    if not found:
        raise argparse.ArgumentTypeError("expected names or paths, separated by commas")
    return found


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG: a YAML file, llmnorm:NAME, or a run directory."""
    help = "YAML file, llmnorm:NAME or run directory"
    parser.add_argument("config", type=local, metavar="CONFIG", help=help)


def add_model(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR: the model that the command reads."""
    help = "run directory, or directory of a model"
    parser.add_argument("path", type=local, metavar="RUN_OR_DIR", help=help)


def add_written(parser: argparse.ArgumentParser) -> None:
    """DIR: the directory that the command writes."""
    help = "directory to write, new or empty"
    parser.add_argument("directory", type=local, metavar="DIR", help=help)


def add_checkpoint(parser: argparse.ArgumentParser, *, average: bool = True) -> None:
    """--checkpoint and, where the command can read the moving average, --ema."""
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        metavar="latest|best|STEP",
        help="which checkpoint of a run",
        default="latest",
    )
    if average:
        help = "the moving average of the weights"
        parser.add_argument("--ema", action="store_true", help=help)


def add_import(parser: argparse.ArgumentParser) -> None:
    """--import, for models whose settings name classes outside the package."""
    help = "import this module of yours first; may be given several times"
    parser.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE", help=help
    )


def _checkpoint(text: str) -> str:
    if text not in ("latest", "best") and not re.fullmatch("[0-9]{1,15}", text):
        hint = nearest(text, ["latest", "best", "a step"])
        raise argparse.ArgumentTypeError(f"'{shown(text)}' is no checkpoint; {hint}")
    return text
