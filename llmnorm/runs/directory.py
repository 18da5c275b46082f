"""The run directory: what it belongs to, whether this configuration may go on with it.

A run directory holds config.yaml (the resolved settings), metrics.jsonl, samples.jsonl,
checkpoints/, tokenizer/, plots/, what trackers and commands keep there (see RunDirectory), and a
file DONE, PREEMPT or DIVERGED that says how the last process ended (launchers turn every exit code
into 1).
Nothing here imports torch: a configuration that contradicts the directory is answered at once, and
by every process alike, before any of them writes.
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
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def automatic(self) -> Path:
        """How the numbers came about that took the place of `auto`."""
        return self.path / "automatic.txt"

    @property
    def metrics(self) -> Path:
        """A line a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """A line an evaluation: prompts and what the model put after them."""
        return self.path / "samples.jsonl"

    @property
    def tracker(self) -> Path:
        """By which ids the trackers know the run."""
        return self.path / "tracker.json"

    @property
    def profile(self) -> Path:
        """Traces and memory snapshots."""
        return self.path / "profile"

    @property
    def evaluations(self) -> Path:
        """What `llmnorm eval` found, a file a checkpoint."""
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        """One directory a checkpoint."""
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
        """There when the run has reached its last step; holds the step."""
        return self.path / "DONE"

    @property
    def preempted(self) -> Path:
        """There when the last process was stopped by a signal; holds the step."""
        return self.path / "PREEMPT"

    @property
    def diverged(self) -> Path:
        """There when the last process gave up, its loss not finite any more; holds the step."""
        return self.path / "DIVERGED"


def existing(path: Path) -> RunDirectory:
    """The run at `path`, for the commands that read one.

    Raises:
        InputError: it is no run directory.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise InputError(f"{path}: is no run directory (it has no config.yaml)")
    return run


def agree(config: RunConfig, *, going_on: bool) -> RunDirectory:
    """Check that `config` may use its run directory; nothing is written.

    Args:
        going_on: the user named the run directory itself, so that length, intervals, logging,
            micro batch and layout may change.

    Raises:
        InputError: the directory holds something else; the differing keys are listed.
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
        # The two that a process killed at its very start leaves.
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
    """Whether the run has reached its end, and `config` asks for no other length."""
    if not run.done.exists():
        return False
    changed = differences(to_tree(load(run.path).config), to_tree(config))
    return not any(f"training.{key}" in changed for key in ("steps", "tokens", "epochs"))


def next_commands(run: RunDirectory, config: RunConfig) -> str:
    """What one does next with a run that has reached its length, or that a signal has stopped."""
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
    """Make the directory; write the resolved settings, whole or not at all, and the tokenizer.

    Args:
        automatic: how numbers took the place of `auto`, where some did.

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
    """Say how this process ended, by one of the run's signs: done, preempted, diverged.

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
