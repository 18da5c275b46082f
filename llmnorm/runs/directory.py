"""The run directory: its files, and whether a configuration may train in it.

A run directory holds config.yaml (the resolved settings), metrics.jsonl, samples.jsonl,
checkpoints/, tokenizer/ and plots/; `RunDirectory` lists the others. One of the files DONE, PREEMPT
and DIVERGED says how the last process ended, because launchers turn every exit code into 1.

This file does not import torch, so a configuration that contradicts the directory is refused within
half a second, by every process, before any of them writes.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig, changeable, differences, to_tree, to_yaml
from llmnorm.machine.doctor import version
from llmnorm.part import InputError


class RunDirectory(NamedTuple):
    """The paths in a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def automatic(self) -> Path:
        """How the numbers for settings of `auto` were derived."""
        return self.path / "automatic.txt"

    @property
    def metrics(self) -> Path:
        """JSON lines: one for each logged step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """JSON lines: for each evaluation the prompts and their generated continuations."""
        return self.path / "samples.jsonl"

    @property
    def tracker(self) -> Path:
        """The trackers' ids of this run, by which a resumed run finds its charts."""
        return self.path / "tracker.json"

    @property
    def profile(self) -> Path:
        """Traces and memory snapshots."""
        return self.path / "profile"

    @property
    def evaluations(self) -> Path:
        """Results of `llmnorm eval`, one file for each checkpoint."""
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        """One directory for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, so that the run can be used without its data."""
        return self.path / "tokenizer"

    @property
    def plots(self) -> Path:
        """Pictures."""
        return self.path / "plots"

    @property
    def done(self) -> Path:
        """Exists when the run has reached its last step; holds the step's number."""
        return self.path / "DONE"

    @property
    def preempted(self) -> Path:
        """Exists when a signal has stopped the last process; holds the step's number."""
        return self.path / "PREEMPT"

    @property
    def diverged(self) -> Path:
        """Exists when the last process gave up because of non-finite losses; holds the step."""
        return self.path / "DIVERGED"


def existing(path: Path) -> RunDirectory:
    """The run at `path`, for the commands that read one.

    Raises:
        InputError: `path` is not a run directory.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise InputError(f"{path}: is no run directory (it has no config.yaml)")
    return run


def agree(config: RunConfig, *, going_on: bool) -> RunDirectory:
    """Check that `config` may train in its run directory. Writes nothing.

    Args:
        going_on: whether the user has named the run directory itself (`llmnorm train RUN key=...`).
            Then length, intervals, logging, micro batch and sharding may differ from the run's.

    Raises:
        InputError: the directory cannot be made, or holds other files or another run, whose
            differing keys are listed.
    """
    assert config.run_dir is not None
    run = RunDirectory(config.run_dir)
    if not run.path.exists():
        above = next(path for path in run.path.absolute().parents if path.exists())
        if not above.is_dir():
            raise InputError(f"run_dir: {run.path} cannot be made: {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"run_dir: {run.path} cannot be made: {above} is not writable")
        return run
    if not run.path.is_dir():
        raise InputError(f"run_dir: {run.path} is a file")
    if not run.config.exists():
        # A process that was killed in its first moments leaves only these two.
        if any(path.name not in ("run.lock", "config.tmp") for path in run.path.iterdir()):
            raise InputError(
                f"run_dir: {run.path} holds other files and no config.yaml; "
                f"a free directory is {free(run.path)}"
            )
        return run
    changed = differences(to_tree(load(run.path).config), to_tree(config))
    changed.pop("run_dir", None)
    if going_on:
        changed = {key: values for key, values in changed.items() if not changeable(key)}
    if changed:
        listed = ", ".join(
            f"{key} ({old} there, {new} here)" for key, (old, new) in changed.items()
        )
        what = (
            "an existing run cannot change this key; start another with"
            if going_on
            else "is another run; go on with the old settings, or start a new one with"
        )
        raise InputError(f"run_dir: {run.path}: {listed}: {what} run_dir={free(run.path)}")
    return run


def finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether the run has reached its last step and `config` asks for the same length."""
    if not run.done.exists():
        return False
    changed = differences(to_tree(load(run.path).config), to_tree(config))
    return not any(f"training.{key}" in changed for key in ("steps", "tokens", "epochs"))


def next_commands(run: RunDirectory, config: RunConfig) -> str:
    """What to type next, for a run that is finished or that a signal has stopped; a few lines."""
    if run.preempted.exists():
        step = run.preempted.read_text(encoding="utf-8").strip()
        length = f" of {config.training.steps}" if config.training.steps else ""
        return (
            f"{run.path} was stopped after step {step}{length}, which is saved in "
            f"{run.checkpoints}/step_{int(step):08d}\n"
            f"  go on from there:  llmnorm train {run.path}"
        )
    return (
        f"everything lies in {run.path}: config.yaml, metrics.jsonl, checkpoints/, plots/\n"
        f"  {config.objective.uses(str(run.path))}\n"
        f"  train longer:  llmnorm train {run.path} training.steps=N"
    )


def begin(
    run: RunDirectory, config: RunConfig, tokenizer: Path, automatic: Sequence[str] = ()
) -> None:
    """Make the directory; write the resolved settings and the tokenizer; remove the old sign.

    config.yaml is renamed into place, so that a killed process does not leave half of it.

    Args:
        automatic: how the numbers for settings of `auto` were derived, if there are any.

    Raises:
        InputError: the directory cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        temporary = run.config.with_suffix(".tmp")
        temporary.write_text(f"# llmnorm {version()}\n{to_yaml(config)}", encoding="utf-8")
        temporary.replace(run.config)
        if automatic:
            run.automatic.write_text("\n".join(automatic) + "\n", encoding="utf-8")
        run.plots.mkdir(exist_ok=True)
        shutil.copytree(tokenizer, run.tokenizer, dirs_exist_ok=True)
        for sign in (run.done, run.preempted, run.diverged):
            sign.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"run_dir: {run.path} cannot be written: {error.strerror}") from None


def end(sign: Path, step: int) -> None:
    """Write the file that says how this process ended.

    Args:
        sign: `run.done`, `run.preempted` or `run.diverged`.
        step: the step that it ended after.

    Raises:
        InputError: the directory cannot be written.
    """
    temporary = sign.with_suffix(".tmp")
    try:
        temporary.write_text(f"{step}\n", encoding="utf-8")
        temporary.replace(sign)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{sign}: cannot be written: {error.strerror}") from None


def free(path: Path) -> Path:
    """A path beside `path` that does not exist yet: `path`-2, `path`-3, ..."""
    number = 2
    while os.path.lexists(f"{path}-{number}"):
        number += 1
    return Path(f"{path}-{number}")
