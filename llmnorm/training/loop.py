"""The training loop: one straight function from a configuration to a trained run directory.

    prepare.py    processes, rows, model, optimizer, the newest checkpoint
    step.py       one step, and the rehearsal of it before the first
    keeping.py    metrics, evaluations, checkpoints, the end of a run that diverged

A checkpoint holds weights, optimizer state and counts, nothing else: everything else that a step
needs is a function of its number.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from llmnorm.config.tree import RunConfig
from llmnorm.machine.phases import END, LOOP
from llmnorm.models.foreign import Foreign
from llmnorm.parallel.check import check
from llmnorm.runs import directory as run_directory
from llmnorm.runs import signs
from llmnorm.runs.account import Account, Timekeeper, read_account
from llmnorm.runs.address import Remote
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.metrics import keep_until
from llmnorm.runs.restarts import Restarts
from llmnorm.runs.trackers import check as check_trackers
from llmnorm.training.foreign import say_first_step
from llmnorm.training.keeping import (
    Diverged,
    due,
    evaluation_at_start,
    give_up,
    keep_evaluation,
    keep_line,
    lost_patience,
    open_metrics,
    open_profiler,
    out_of_patience,
    save,
)
from llmnorm.training.prepare import Prepared, prepare
from llmnorm.training.signals import StopRequest, Watch
from llmnorm.training.step import rehearse, step


def train(
    config: RunConfig,
    run: RunDirectory,
    *,
    data_command: str,
    automatic: Sequence[str] = (),
    dry_run: bool = False,
    profile: str | None = None,
    stop: StopRequest | None = None,
    remote: Remote | None = None,
) -> int:
    """Train until the configured length or a request to stop; what is to be typed then is printed.

    Args:
        config: resolved settings that agree with the run directory.
        run: where the run lives; it resumes from its newest whole checkpoint.
        data_command: what prepares the data, for the message where it is missing.
        automatic: how numbers took the place of `auto`, to be saved with the run.
        dry_run: stop after the checks that precede the first step.
        profile: "time" or "memory": what a few steps are profiled for.
        stop: notes signals already; from the first step on it only notes them.
        remote: what the run directory is copied up to, where it is an address; whether the two
            agree is then checked here.

    Returns:
        The exit code: 0, or that of a signal (`signals.EXIT_CODES`), after which all is saved.

    Raises:
        InputError: something that the user can mend, in one line.
        Diverged: the run gave up.
    """
    check_trackers(config.logging)
    with ExitStack() as stack:
        prepared = prepare(
            config,
            run,
            stack,
            data_command=data_command,
            dry_run=dry_run,
            remote=remote,
            seconds_left=lambda: stop.seconds_left(config.checkpoint.grace) if stop else math.inf,
        )
        parallel, progress, steps = prepared.parallel, prepared.progress, prepared.steps
        phases = parallel.phases
        left = _evaluation_left(prepared, dry_run)
        if left is None:
            return _already_finished(prepared, dry_run)
        parallel.say(prepared.describe())
        if progress.step < steps:
            _try_out(prepared)
        if dry_run:
            parallel.say("dry run: every check passed; nothing was trained, nothing written")
            return 0
        if stop is None:
            stop = stack.enter_context(StopRequest())
        stop.at_once = None

        stack.enter_context(Watch(stop, run, config.checkpoint.grace, looks=parallel.is_main))
        restarts = stack.enter_context(Restarts(run, enabled=parallel.is_main))

        # Everything that could be refused has been looked at: only now is anything written.
        timekeeper = _begin(prepared, restarts, automatic)
        metrics = open_metrics(prepared, stack, timekeeper, left=left)
        profiler = open_profiler(prepared, profile, metrics, stack)
        if _gave_up(prepared):
            progress.skipped_in_a_row = 0  # who resumes a run that has given up gives it new tries
        exit_code = keep_evaluation(prepared, metrics, stop) if left else 0
        batches = prepared.batches()
        phases.enter(LOOP)
        while progress.step < steps and not exit_code and not out_of_patience(prepared):
            phases.enter("data")
            restarts.at(progress.step + 1)
            micro_batches = next(batches)
            outcome = step(prepared, micro_batches, stop)
            exit_code = outcome.exit_code
            profiler.step()

            last, diverged = progress.step >= steps, _gave_up(prepared)
            keep_line(prepared, metrics, outcome, micro_batches[0], ending=last or diverged)
            if diverged:
                raise give_up(prepared, metrics, stop)
            # An interval's checkpoint is left out after a skipped step (keeping.py says why).
            at_interval = outcome.finite and due(progress.step, config.checkpoint.every)
            if last or exit_code or at_interval:
                save(prepared, metrics)
            if not exit_code and (last or due(progress.step, config.evaluation.every)):
                exit_code = keep_evaluation(prepared, metrics, stop)
                if exit_code and prepared.saved != progress.step:
                    save(prepared, metrics)
        with phases.during("save"):
            prepared.checkpoints.wait()
        phases.enter(END)
        if parallel.is_main:
            early = not exit_code and progress.step < steps
            signs.end(run.preempted if exit_code else run.done, progress.step, early=early)
            if exit_code and not stop.from_another:
                restarts.stopped(progress.step)
    if parallel.is_main:
        print(
            run_directory.stopped(run, stop.name, progress.step, steps)
            if exit_code
            else _ended(prepared)
        )
    return exit_code


def _evaluation_left(run: Prepared, dry_run: bool) -> bool | None:
    """Whether the evaluation of the last step is left to be made; None: the run has no step left.

    A length or patience that was changed lets a run go on whose patience had ended it.
    """
    progress = run.progress
    left, recorded = evaluation_at_start(run)
    if recorded is not None and not dry_run:
        run.checkpoints.add_loss(progress.step, recorded)
    if out_of_patience(run) and run.former_steps not in (None, run.steps):
        progress.not_better = 0
    finished = progress.step >= run.steps
    impatient = out_of_patience(run) and not _gave_up(run)
    if (finished and (not left or _gave_up(run))) or (impatient and not left):
        return None
    return left


def _try_out(run: Prepared) -> None:
    """Find what would end the run at its next step, before anything is written."""
    first = run.unselected()
    check(run.parallel, run.model, torch.cat([batch.rows for batch in first]))
    finite = rehearse(run, first)
    if isinstance(run.model, Foreign):
        say_first_step(run.config, run.model, first, finite, run.parallel)


def _begin(run: Prepared, restarts: Restarts, automatic: Sequence[str]) -> Timekeeper:
    """Write the run's settings, and take back the lines behind its checkpoint; on process 0."""
    parallel, progress, directory = run.parallel, run.progress, run.directory
    timekeeper = Timekeeper(Account(), parallel.phases)  # of processes that write no lines

    def begin() -> None:
        nonlocal timekeeper
        there = keep_until(directory, progress.step)
        for note in there.notes():
            parallel.say(f"llmnorm: note: {note}")
        there.apply()
        resumed = not signs.has_ended(directory)
        timekeeper = Timekeeper(read_account(directory), parallel.phases, resumed=resumed)
        if again := restarts.begin(progress.step, progress.row, run.config.pool):
            parallel.say(f"llmnorm: note: {again}")
        tokenizer = run.objective.data.tokenizer_directory
        run_directory.begin(directory, run.config, tokenizer, automatic)

    parallel.on_main(begin)
    return timekeeper


def _gave_up(run: Prepared) -> bool:
    return run.progress.skipped_in_a_row >= run.config.training.max_skipped_steps


def _ended(run: Prepared) -> str:
    """What is said of a run that has ended by itself: why, if early, and what to type next."""
    early = run.progress.step < run.steps
    commands = run_directory.next_commands(run.directory, run.config, early=early)
    return f"{lost_patience(run)}\n{commands}" if early else commands


def _already_finished(run: Prepared, dry_run: bool) -> int:
    """What is done with a run that has nothing left to do.

    Its newest checkpoint is that of its last step, or of one after which `evaluation.patience` has
    ended it.

    Raises:
        Diverged: the run has given up in that step.
    """
    path, step = run.directory.path, run.progress.step
    if _gave_up(run):
        raise Diverged(
            f"{path}: its last {run.progress.skipped_in_a_row} steps, up to {step}, had a "
            "non-finite loss or gradient and were skipped; to go on with the rows that follow: "
            f"llmnorm train {path} training.steps=MORE"
        )
    run.parallel.say(f"{path} is finished (step {step})")
    if run.parallel.is_main and not dry_run:
        if run.base or run.teacher:  # a new place, where the same base or teacher was found
            run_directory.rewrite_settings(run.directory, run.config)
        signs.end(run.directory.done, step, early=step < run.steps)
        print(_ended(run))
    return 0
