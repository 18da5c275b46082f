"""`llmnorm doctor`: what this machine can run, for a bug report."""

import argparse

HELP = "report what this machine can run, for a bug report"
TAKES_SETTINGS = False


def arguments(_: argparse.ArgumentParser) -> None:
    """None."""


def run(_: argparse.Namespace, __: list[str]) -> None:
    """Print the report."""
    from llmnorm.machine.doctor import report

    print(report())
