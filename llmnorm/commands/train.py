"""`llmnorm train`: train, or resume a run."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.commands.arguments import place
from llmnorm.commands.configured import load_config, note, resolve_auto
from llmnorm.machine.parent import let_speak
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig
    from llmnorm.runs.directory import RunDirectory
    from llmnorm.training.signals import StopRequest

HELP = "train, or resume a run"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, and what to do before or instead of training."""
    help = "YAML file, llmnorm:NAME, run directory, or its address (s3://...)"
    parser.add_argument("config", type=place, metavar="CONFIG", help=help)
    parser.add_argument(
        "--dry-run", action="store_true", help="stop after the checks before the first step"
    )
    parser.add_argument(
        "--print-groups",
        action="store_true",
        help="print which parameter gets which rule, then stop",
    )
    help = "print the bytes that a step needs, then stop; a base directory needs no weights for it"
    parser.add_argument("--print-memory", action="store_true", help=help)
    parser.add_argument(
        "--profile",
        nargs="?",
        const="time",
        choices=["time", "memory"],
        metavar="time|memory",
        help="write a profile of a few steps into the run directory",
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> int:
    """Train a configuration, or go on with a run."""
    bring_here(parsed, overrides)
    return start(parsed, overrides, load_config(parsed.config, overrides))


def bring_here(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Put the directory of this machine in the place of a run's address."""
    if isinstance(parsed.config, str):
        from llmnorm.runs.address import fetch_settings

        parsed.config = fetch_settings(parsed.config, overrides)


def start(
    parsed: argparse.Namespace, overrides: list[str], config: "RunConfig", command: str = "train"
) -> int:
    """Check the run directory and the machine, then train.

    Args:
        parsed: the command's arguments.
        overrides: the settings that were typed.
        config: what `parsed.config` and they give.
        command: what `llmnorm` was asked for, for the commands that messages hold.

    Returns:
        The exit code of the training loop (`training/loop.py`); 0 for a run that is finished.
    """
    from llmnorm.training.signals import StopRequest

    before = "before its first step, so there was nothing to save; the same command starts it again"
    with StopRequest(before) as stop:
        return _train(parsed, overrides, config, command, stop)


def _train(
    parsed: argparse.Namespace,
    overrides: list[str],
    config: "RunConfig",
    command: str,
    stop: "StopRequest",
) -> int:
    from llmnorm.machine.gpus import check_gpu, launch_hint
    from llmnorm.runs import directory, signs
    from llmnorm.runs.address import Remote, on_this_machine

    config, automatic = resolve_auto(config)
    if parsed.print_groups:
        from llmnorm.training.outline import groups_table

        print(groups_table(config))
        return 0
    if parsed.print_memory:
        from llmnorm.analysis.plan.report import memory_table

        print(memory_table(config))
        return 0
    config, address = on_this_machine(config)
    assert isinstance(config.run_dir, Path)
    is_own = parsed.config.is_dir() and parsed.config.resolve() == config.run_dir.resolve()
    run, remote = directory.RunDirectory(config.run_dir), None
    if address is not None:
        from llmnorm.remote.objects import open_store

        remote = Remote(address, going_on=is_own)
        store = open_store(address, "run_dir")  # its package may be missing
        if parsed.dry_run:
            store.names()
    if remote is None or parsed.dry_run:
        directory.agree(config, going_on=is_own)
    if remote is None and directory.finished(run, config):
        early = signs.ended_early(run)
        why = f"; {signs.PATIENCE} has ended it early" if early else ""
        print(f"{run.path} is finished (step {signs.step_in(run.done)}{why})")
        print(directory.next_commands(run, config, early=early))
        return 0
    if not parsed.dry_run and (leaves := _leaves_at_once(run)):
        code, why = leaves
        if os.environ.get("RANK", "0") == "0":
            print(f"llmnorm: {why}", file=sys.stderr)
        else:
            let_speak()
        return code
    _check_processes(config)
    check_gpu(config.training.device)
    words = [str(parsed.config), *overrides]
    if config.training.device != "cpu" and (hint := launch_hint(words, command)):
        note([hint])

    from llmnorm.training.loop import train

    return train(
        config,
        run,
        data_command=shlex.join(["llmnorm", "data", *words, *_for_data(config, command)]),
        automatic=automatic,
        dry_run=parsed.dry_run,
        profile=parsed.profile,
        stop=stop,
        remote=remote,
    )


def _leaves_at_once(run: "RunDirectory") -> tuple[int, str] | None:
    """Exit code and reason where the run does not take a step, though nothing is wrong with it."""
    from llmnorm.machine.failures import PREEMPTED
    from llmnorm.runs import restarts, signs

    if signs.asks_to_stop(run):
        return PREEMPTED, (
            f"stopped before its first step by the file {run.preempted}, which llmnorm has not "
            "written; remove it, and the same command starts the run"
        )
    return restarts.in_vain(run)


def _check_processes(config: "RunConfig") -> None:
    """Refuse, before torch is loaded, as many processes as an elastic launcher may have left.

    Raises:
        InputError: the rows of a step do not divide over them.
    """
    if not getattr(config.objective, "even_batches", True):
        return
    try:
        config.training.check_processes(int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise InputError(str(error)) from None


def _for_data(config: "RunConfig", command: str) -> list[str]:
    """What `llmnorm data` is told beside the words of a command whose defaults it does not read."""
    return [] if command == "train" else [f"objective={config.objective.name}"]
