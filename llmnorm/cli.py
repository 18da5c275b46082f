"""The command line: runs the command that the words name and returns its exit code.

A mistake of the user is printed in one line, without a traceback. Torch is imported only by the
commands that compute, and only once the configuration is valid, so that help and every mistake are
answered at once.
"""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from llmnorm.commands import (
    compare,
    config,
    configs,
    convert,
    data,
    doctor,
    eval,
    export,
    finetune,
    generate,
    inspect,
    parts,
    plan,
    plot,
    runs,
    serve,
    train,
)
from llmnorm.commands.arguments import Command, Parser, split_overrides
from llmnorm.machine.failures import failure, of_interrupt, too_little_memory
from llmnorm.machine.parent import let_speak, stop_with_parent
from llmnorm.part import InputError

WITHOUT_TORCH = ("config", "configs", "parts", "runs")
COMMANDS: dict[str, Command] = {
    "train": train,
    "finetune": finetune,
    "data": data,
    "config": config,
    "configs": configs,
    "parts": parts,
    "generate": generate,
    "serve": serve,
    "export": export,
    "convert": convert,
    "eval": eval,
    "plan": plan,
    "plot": plot,
    "inspect": inspect,
    "runs": runs,
    "compare": compare,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `llmnorm`; None: those of this process.

    Returns:
        The exit code: 0 done, 2 a mistake of the user, 3 diverged, 70 a defect of llmnorm, 74
        another process was lost, or what the command returns (75, 130 and 143: stopped by a
        signal, saved).
    """
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 gets escapes
            stream.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed launcher leaves no process behind
        stop_with_parent()
    parsed = None
    try:
        parser = _parser()
        overrides, others = split_overrides(words, parser)
        parsed = parser.parse_args(others)
        if parsed.command is None:
            parser.print_help()
            return 0
        parsed.words = words
        command = COMMANDS[parsed.command]
        if overrides and not command.TAKES_SETTINGS:
            raise InputError(f"{parsed.command}: takes no settings, got '{overrides[0]}'")
        if parsed.command not in WITHOUT_TORCH and (found := too_little_memory()):
            _print_error(found.line)
            return found.exit_code
        return command.run(parsed, overrides) or 0
    except InputError as error:
        if os.environ.get("RANK", "0") == str(error.speaker):
            _print_error(str(error))
        else:
            let_speak()
        return error.exit_code
    except BrokenPipeError:  # `llmnorm parts | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # outside the training loop, which saves and returns 130 itself
        if (found := of_interrupt()) is not None:
            _print_error(found.line)
            return found.exit_code
        print("llmnorm: interrupted; the same command starts it again", file=sys.stderr)
        return 130
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of the tokenizers, which are Rust
        if not (isinstance(error, Exception) or panic):
            raise
        named = getattr(parsed, "path", None) or getattr(parsed, "config", None)
        found = failure(error, words, named if isinstance(named, Path) and named.is_dir() else None)
        _print_error(found.line)
        return found.exit_code


def _print_error(text: str) -> None:
    for line in text.split("\n"):
        print(f"llmnorm: error: {line}", file=sys.stderr)


class _Version(argparse.Action):
    def __call__(self, *_: object, **__: object) -> NoReturn:
        from llmnorm.machine.doctor import versions

        print(versions())
        raise SystemExit(0)


class _Completion(argparse.Action):
    def __call__(self, _: object, __: object, shell: object, ___: object = None) -> NoReturn:
        from llmnorm.commands.completion import script

        print(script(str(shell), _parser()))
        raise SystemExit(0)


def _parser() -> Parser:
    parser = Parser(
        prog="llmnorm",
        description="Pretrain transformers whose parts are swapped in one line of YAML.",
        epilog="CONFIG is a YAML file, llmnorm:NAME (see `llmnorm configs`) or a run directory; "
        "key.sub=value overrides a setting.",
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="of llmnorm, torch and CUDA")
    help = "print a completion script"
    parser.add_argument("--completion", choices=["bash", "zsh"], action=_Completion, help=help)
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        below = parsers.add_parser(name, help=command.HELP, description=command.HELP)
        if command.TAKES_SETTINGS:
            below.settings = getattr(command, "SECTION", "")
        below.after_help = getattr(command, "after_help", None)
        command.arguments(below)
    return parser
