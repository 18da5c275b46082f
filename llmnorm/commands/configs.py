"""`llmnorm configs`: the configurations that the package brings, shown or copied."""

import argparse

from llmnorm.commands.arguments import local
from llmnorm.part import InputError

HELP = "list the configurations that the package brings; copy one"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, and where it is copied to."""
    help = "show this one, or those of a directory"
    parser.add_argument("name", metavar="NAME", nargs="?", help=help)
    help = "write NAME into DIR, with the files of its `base`"
    parser.add_argument("--copy", type=local, metavar="DIR", help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Print the list or a file; or copy."""
    from llmnorm.config import shipped

    if parsed.copy is None:
        print(shipped.show(parsed.name) if parsed.name else shipped.listing())
        return
    if parsed.name is None:
        raise InputError("configs: name what to copy: llmnorm configs NAME --copy DIR")
    written = shipped.copy(parsed.name, parsed.copy)
    print("\n".join(map(str, written)))
    if shipped.describe(parsed.name).time:
        print(f"change it, then: llmnorm train {written[0]}")
    else:
        print(f"it is no whole run: name it as `base: {written[0]}` of a configuration")
