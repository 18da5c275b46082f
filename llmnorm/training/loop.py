"""The training loop: one straight function from a configuration to a trained run directory.

    prepare.py    processes, rows, model, optimizer, the newest checkpoint
    step.py       one step, and the rehearsal of it before the first
    keeping.py    metrics, evaluations, checkpoints, the end of a run that diverged

A checkpoint holds weights, optimizer state and counts, nothing else: everything else that a step
needs is a function of its number.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from llmnorm.config.tree import RunConfig
from llmnorm.parallel.check import check
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.runs import metrics as record
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.trackers import check as check_trackers
from llmnorm.training.keeping import (
    due,
    give_up,
    keep_evaluation,
    keep_line,
    open_metrics,
    open_profiler,
    save,
)
from llmnorm.training.prepare import Prepared, prepare
from llmnorm.training.signals import StopRequest
from llmnorm.training.step import rehearse, step


def train(
    config: RunConfig,
    run: RunDirectory,
    *,
    data_command: str,
    automatic: Sequence[str] = (),
    dry_run: bool = False,
    profile: str | None = None,
) -> int:
    """Train until the configured length or a signal.

    Args:
        config: resolved settings that agree with the run directory.
        run: where the run lives; it resumes from its newest whole checkpoint.
        data_command: what prepares the data, for the message where it is missing.
        automatic: how numbers took the place of `auto`, to be saved with the run.
        dry_run: stop after the checks that precede the first step.
        profile: "time" or "memory": what a few steps are profiled for.

    Returns:
        The exit code: 0, or 143 / 130 after SIGTERM / SIGINT.

    Raises:
        InputError: something that the user can mend, in one line; the run diverged.
    """
    check_trackers(config.logging)
    with ExitStack() as stack:
        prepared = prepare(config, run, stack, data_command=data_command, dry_run=dry_run)
        parallel, progress, steps = prepared.parallel, prepared.progress, prepared.steps
        if progress.step >= steps:
            return _already_finished(prepared, dry_run)
        parallel.say(prepared.describe())
        first = next(prepared.batches())
        check(parallel, prepared.model, torch.cat([batch.rows for batch in first]))
        rehearse(prepared, first)
        if dry_run:
            parallel.say("dry run: every check passed; nothing was trained, nothing written")
            return 0

        # Everything that could be refused has been looked at: only now is anything written.
        def begin() -> None:
            run_directory.begin(run, config, prepared.objective.data.tokenizer_directory, automatic)
            record.cut(run, progress.step)

        parallel.on_main(begin)
        stop = stack.enter_context(StopRequest())
        metrics = open_metrics(prepared, stack)
        profiler = open_profiler(prepared, profile, metrics, stack)
        if progress.skipped_in_a_row >= config.training.max_skipped_steps:
            progress.skipped_in_a_row = 0  # who resumes a run that has given up gives it new tries
        exit_code, batches = 0, prepared.batches()
        while progress.step < steps and not exit_code:
            micro_batches = next(batches)
            outcome = step(prepared, micro_batches, stop)
            exit_code = outcome.exit_code
            profiler.step()

            diverged = progress.skipped_in_a_row >= config.training.max_skipped_steps
            last = progress.step >= steps
            keep_line(prepared, metrics, outcome, micro_batches[0], ending=last or diverged)
            if diverged:
                raise give_up(prepared, metrics)
            figures = None
            if last or due(progress.step, config.evaluation.every):
                figures = keep_evaluation(prepared, metrics)
            # An interval's checkpoint is left out after a skipped step (keeping.py says why).
            at_interval = outcome.finite and due(progress.step, config.checkpoint.every)
            if last or exit_code or at_interval:
                save(prepared, metrics, figures)
        prepared.checkpoints.wait()
        finished = progress.step >= steps
        if parallel.is_main:
            run_directory.end(run.done if finished else run.preempted, progress.step)
        return 0 if finished else exit_code


def _already_finished(run: Prepared, dry_run: bool) -> int:
    """What is done with a run whose newest checkpoint is that of its last step.

    Raises:
        InputError: the run has given up in that step.
    """
    path, step = run.directory.path, run.progress.step
    if run.progress.skipped_in_a_row >= run.config.training.max_skipped_steps:
        raise InputError(
            f"{path}: its last {run.progress.skipped_in_a_row} steps, up to {step}, had a "
            "non-finite loss or gradient and were skipped; to go on with the rows that follow: "
            f"llmnorm train {path} training.steps=MORE"
        )
    if run.parallel.is_main and not dry_run:
        run_directory.end(run.directory.done, step)
    run.parallel.say(f"{path} is finished (step {step})")
    return 0
