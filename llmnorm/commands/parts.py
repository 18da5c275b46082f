"""`llmnorm parts`: the swappable parts with their settings, defaults and sources."""

import argparse

HELP = "list the swappable parts with their settings"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """NAME of a part, or a key."""
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="only this part, or the parts of this key"
    )


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Print the list."""
    from llmnorm.config.docs import describe_parts

    print(describe_parts(parsed.name))
