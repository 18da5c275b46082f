"""`llmnorm config`: the resolved settings, or the JSON schema of all settings."""

import argparse

from llmnorm.commands.arguments import local
from llmnorm.commands.configured import load_config
from llmnorm.part import InputError

HELP = "print the resolved settings"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, or --schema."""
    parser.add_argument(
        "config", type=local, metavar="CONFIG", nargs="?", help="YAML file, llmnorm:NAME or run"
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema for editors")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print YAML or JSON."""
    if parsed.schema:
        if parsed.config is not None or overrides:
            raise InputError(
                "config: --schema takes no CONFIG and no settings; the schema is always the same"
            )
        import json

        from llmnorm.config.docs import json_schema

        print(json.dumps(json_schema(), indent=2))
        return
    if parsed.config is None:
        raise InputError("config: give a configuration file or a run directory, or --schema")
    from llmnorm.config.saved import to_yaml

    print(to_yaml(load_config(parsed.config, overrides)), end="")
