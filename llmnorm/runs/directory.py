"""The run directory: its files, and whether a configuration may train in it.

A run directory holds config.yaml (the resolved settings), metrics.jsonl, samples.jsonl,
checkpoints/, tokenizer/ and plots/; `RunDirectory` lists the others. One of the files DONE, PREEMPT
and DIVERGED says how the last process ended, because launchers turn every exit code into 1.

A run lives where its directory lies: no file in it remembers its path, so it can be copied, renamed
and moved.

This file does not import torch, so a configuration that contradicts the directory is refused within
half a second, by every process, before any of them writes.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.config.file import load
from llmnorm.config.manifest import steps_in
from llmnorm.config.saved import changeable, differences, portable, to_tree, to_yaml
from llmnorm.config.tree import CheckpointSettings, RunConfig
from llmnorm.machine.doctor import version
from llmnorm.machine.reading import open_file, read_text
from llmnorm.part import InputError
from llmnorm.runs.lines import read_lines

PATIENCE = "evaluation.patience"


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
    def repeated(self) -> Path:
        """JSON lines: those of metrics.jsonl whose steps were done twice, as they were."""
        return self.path / "metrics.repeated.jsonl"

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
    def ranks(self) -> Path:
        """What the threads of each process did when a lost process has ended the run."""
        return self.path / "ranks"

    @property
    def done(self) -> Path:
        """Exists when the run has reached its last step, or `evaluation.patience` has ended it
        before; holds the step's number, in the second case `evaluation.patience` below it."""
        return self.path / "DONE"

    @property
    def preempted(self) -> Path:
        """Exists when the last process was stopped; holds the step's number. One that holds no
        number is not llmnorm's: it asks the run to stop (`asks_to_stop`)."""
        return self.path / "PREEMPT"

    @property
    def restarts(self) -> Path:
        """What the next life of the run is to know, under a launcher that restarts it."""
        return self.path / "restarts.txt"

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
            Then length, intervals, logging, micro batch and sharding may differ from the run's,
            and of a run that freezes weights the place of its base, of one that learns from a
            teacher the place of that.

    Raises:
        InputError: the directory cannot be made, or holds other files or another run, whose
            differing keys are listed; its record cannot be read, or its checkpoints are gone.
    """
    assert isinstance(config.run_dir, Path)
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
        # A process that was ended in its first moments leaves only these.
        first = ("run.lock", "config.tmp", run.ranks.name, "run.remote")
        others = [p.name for p in run.path.iterdir() if p.name not in first]
        if run.checkpoints.name in others:
            raise InputError(
                f"run_dir: {run.path} has checkpoints, but no config.yaml; bring it back (each "
                f"checkpoint's MANIFEST.json holds its settings), or use {free(run.path)}"
            )
        if others:
            raise InputError(
                f"run_dir: {run.path} holds other files and no config.yaml; "
                f"a free directory is {free(run.path)}"
            )
        return run
    there = load(run.path).config
    changed = differences(to_tree(portable(there)), to_tree(portable(config)))
    if going_on:
        changed = {key: v for key, v in changed.items() if not changeable(key, config)}
    if changed:
        listed = ", ".join(
            f"{key} ({old} there, {new} here)"
            for key, (old, new) in _without_parts(changed).items()
        )
        what = (
            "an existing run cannot change this key; start another with"
            if going_on
            else "is another run; go on with the old settings, or start a new one with"
        )
        raise InputError(f"run_dir: {run.path}: {listed}: {what} run_dir={free(run.path)}")
    if not (run.done.exists() and _as_long(run, there, config)):
        for record in (run.metrics, run.samples):
            if record.exists():
                open_file(record).close()  # refuses a directory, or a file that cannot be read
        _check_checkpoints(run, there.checkpoint)
    return run


def _without_parts(changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Without keys that only one of two parts has, where another part was chosen by its name."""
    others = tuple(key.removesuffix("name") for key in changed if key.endswith(".name"))
    return {
        key: values
        for key, values in changed.items()
        if key.endswith(".name") or None not in values or not key.startswith(others)
    }


def finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether the run has ended by itself, and `config` asks for nothing more of it.

    A run that is told where its base or its teacher was moved to is not finished: it is compared
    first.
    """
    if not run.done.exists():
        return False
    there = load(run.path).config
    same_base = there.model.pretrained == config.model.pretrained
    same_teacher = there.objective.teacher_directory == config.objective.teacher_directory
    return same_base and same_teacher and _as_long(run, there, config)


def has_ended(run: RunDirectory) -> bool:
    """Whether the last process of the run has ended it, and was not stopped or killed."""
    return run.done.exists() or run.diverged.exists()


def ended_early(run: RunDirectory) -> bool:
    """Whether the run is DONE because `evaluation.patience` has ended it before its last step."""
    try:
        return read_text(run.done, limit=1000).split()[1:] == [PATIENCE]
    except InputError:
        return False


def _as_long(run: RunDirectory, there: RunConfig, here: RunConfig) -> bool:
    """Whether a run that is DONE is asked for the same length; if it ended early, also patience."""
    keys = ["training.steps", "training.tokens", "training.epochs"]
    keys += [PATIENCE] if ended_early(run) else []
    changed = differences(to_tree(there), to_tree(here))
    return not any(key in changed for key in keys)


def _check_checkpoints(run: RunDirectory, settings: CheckpointSettings) -> None:
    """Refuse to train again what was saved, where the checkpoints are gone.

    That they were there is known from DONE and PREEMPT, which are written after a save, and from
    metrics.jsonl, where a step past two intervals is not reached without one. A directory that is
    empty counts as gone: it may be where a disk was to be mounted.

    Raises:
        InputError: the newest checkpoint is not there.
    """
    steps = steps_in(run.checkpoints) if run.checkpoints.is_dir() else []
    newest = max(steps, default=0)
    signs = [sign for sign in (run.done, run.preempted) if sign.exists()]
    saved, knows = max(((step_in(s) or 0, s.name) for s in signs), default=(0, ""))
    if saved <= newest and not steps and settings.every:
        last = max((entry.step for entry in read_lines(run.metrics).entries), default=0)
        if last > 2 * settings.every:
            saved, knows = last - last % settings.every - settings.every, run.metrics.name
    if saved <= newest:
        return
    found = f"its newest is of step {newest}" if steps else "there is none"
    again = (
        f"to go on from step {newest}, remove {run.path / knows}"
        if steps
        else f"to train from step 1 again, use run_dir={free(run.path)}, or remove the files "
        f"{' and '.join(path.name for path in (*signs, run.metrics) if path.exists())} there"
    )
    raise InputError(
        f"{run.checkpoints}: a checkpoint of step {saved} was written ({knows}), but {found}: is a "
        f"disk not mounted, or a copy not complete? Bring it back; {again}"
    )


def asks_to_stop(run: RunDirectory) -> bool:
    """Whether somebody else has put a file PREEMPT into the run directory.

    A run's own has the number of a step in it. Any other, an empty one too, asks the run to save
    and stop, and keeps it from its first step until it is removed.
    """
    return run.preempted.exists() and step_in(run.preempted) is None


def step_in(sign: Path) -> int | None:
    """The step in DONE, PREEMPT or DIVERGED; None where there is no number in the first line."""
    try:
        text = read_text(sign, limit=1000).partition("\n")[0].strip()
    except InputError:
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


def next_commands(run: RunDirectory, config: RunConfig, *, early: bool = False) -> str:
    """What to type next, for a run that is finished; a few lines.

    Args:
        run: the run.
        config: its settings.
        early: it was `evaluation.patience` that has ended it.
    """
    longer = "training.steps=N"
    if early and config.evaluation.patience is not None:  # it may have been taken away since
        longer = f"{PATIENCE}={2 * config.evaluation.patience} (null: to its last step)"
    uses = config.objective.uses(str(run.path))
    if config.model.foreign:  # not every class of transformers can be served
        uses = f"use elsewhere: llmnorm export {run.path} DIR"
    return (
        f"everything lies in {run.path}: config.yaml, metrics.jsonl, checkpoints/, plots/\n"
        f"  {uses}\n"
        f"  train longer:  llmnorm train {run.path} {longer}"
    )


def stopped(run: RunDirectory, signal: str, step: int, steps: int) -> str:
    """What is said of a run that was stopped and that is saved; a line.

    Args:
        signal: the signal's name, or what else has asked.
        step: the step that it was stopped after.
        steps: the run's length.
    """
    rest = "" if step < steps else " (its evaluation is left)"
    return (
        f"stopped by {signal} at step {step} of {steps}, saved{rest}; "
        f"go on with: llmnorm train {run.path}"
    )


def begin(
    run: RunDirectory, config: RunConfig, tokenizer: Path, automatic: Sequence[str] = ()
) -> None:
    """Make the directory; write the resolved settings and the tokenizer; remove the old sign, but
    not one that asks to stop.

    config.yaml is renamed into place, so that a killed process does not leave half of it.

    Args:
        automatic: how the numbers for settings of `auto` were derived, if there are any.

    Raises:
        InputError: the directory cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _write_settings(run, config)
        if automatic:
            run.automatic.write_text("\n".join(automatic) + "\n", encoding="utf-8")
        run.plots.mkdir(exist_ok=True)
        shutil.copytree(tokenizer, run.tokenizer, dirs_exist_ok=True)
        for sign in (run.done, run.diverged):
            sign.unlink(missing_ok=True)
        if not asks_to_stop(run):
            run.preempted.unlink(missing_ok=True)
    except shutil.Error as error:  # of copytree: a list of (from, to, reason)
        raise InputError(
            f"run_dir: {run.tokenizer} cannot be written: {error.args[0][0][2]}"
        ) from None
    except OSError as error:
        raise InputError(f"run_dir: {run.path} cannot be written: {error.strerror}") from None


def rewrite_settings(run: RunDirectory, config: RunConfig) -> None:
    """Write the resolved settings of a run that is finished.

    Raises:
        InputError: the directory cannot be written.
    """
    try:
        _write_settings(run, config)
    except OSError as error:
        raise InputError(f"{run.config}: cannot be written: {error.strerror}") from None


def _write_settings(run: RunDirectory, config: RunConfig) -> None:
    temporary = run.config.with_suffix(".tmp")
    settings = to_yaml(portable(config))
    temporary.write_text(f"# llmnorm {version()}\n{settings}", encoding="utf-8")
    temporary.replace(run.config)


def end(sign: Path, step: int, *, early: bool = False) -> None:
    """Write the file that says how this process ended.

    Args:
        sign: `run.done`, `run.preempted` or `run.diverged`.
        step: the step that it ended after.
        early: `evaluation.patience` has ended it before its last step.

    Raises:
        InputError: the directory cannot be written.
    """
    temporary = sign.with_suffix(".tmp")
    try:
        temporary.write_text(
            f"{step}\n{PATIENCE if early else ''}".strip() + "\n", encoding="utf-8"
        )
        temporary.replace(sign)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{sign}: cannot be written: {error.strerror}") from None


def free(path: Path) -> Path:
    """A path beside `path` that does not exist yet: `path`-2, `path`-3, ..."""
    if path.name in ("", ".."):  # `.` has no name to which a number could be added
        path = path.resolve()
    number = 2
    while os.path.lexists(f"{path}-{number}"):
        number += 1
    return Path(f"{path}-{number}")
