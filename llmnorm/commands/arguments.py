"""What the commands share: the parser with one-line errors, and the arguments that several take.

A command is a file of this room with the four names of `Command`. Its `run` imports what it calls,
so that help and every mistake are answered before torch is loaded.
"""

import argparse
import os
import re
from pathlib import Path
from typing import NoReturn, Protocol

from llmnorm.part import InputError, nearest

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


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
    """argparse with one-line errors that name the nearest choice."""

    def error(self, message: str) -> NoReturn:
        """Raise an `InputError` where argparse would print its usage and leave the process."""
        match = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if match:
            choices = re.findall(r"[\w-]+", match[3])
            what = "a command" if match[1] == "COMMAND" else f"valid for {match[1]}"
            message = f"'{match[2]}' is not {what}; {nearest(match[2], choices)}"
        elif match := re.match(r"unrecognized arguments: (-\S+)", message):
            hint = nearest(match[1], sorted(self._options()))
            message = f"there is no option {match[1]}; {hint}"
        elif message.startswith("unrecognized arguments: "):
            message += "; a setting is written key.sub=value"
        raise InputError(f"{message} (`{self.prog} --help` shows the usage)")

    def _options(self) -> set[str]:
        """The options of every command, since a parser does not know which command was typed."""
        below = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for choices in below for parser in choices.values())]
        return {o for p in parsers for o in p._option_string_actions if o.startswith("--")}


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The settings `key=value`, and all other words. Settings of an arm stay with the other words.

    argparse cannot take positional words both before and after options, so settings are found by
    their shape before it sees them. What follows `--arm NAME` belongs to that arm.
    """
    overrides, others, arm, arms = [], [], False, False
    for word in words:
        if word.startswith("-"):
            arm = word == "--arm"
            arms = arms or arm
        if arm or not _OVERRIDE.match(word):
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
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


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
    parser.add_argument("config", type=Path, metavar="CONFIG", help=help)


def add_model(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR: the model that the command reads."""
    help = "run directory, or directory of a model"
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR", help=help)


def add_written(parser: argparse.ArgumentParser) -> None:
    """DIR: the directory that the command writes."""
    help = "directory to write, new or empty"
    parser.add_argument("directory", type=Path, metavar="DIR", help=help)


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
    if text not in ("latest", "best") and not text.isdecimal():
        hint = nearest(text, ["latest", "best", "a step"])
        raise argparse.ArgumentTypeError(f"'{text}' is no checkpoint; {hint}")
    return text
