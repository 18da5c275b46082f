"""What a run keeps of its steps: lines of metrics, evaluations, checkpoints, and how it ended.

What would surprise: a skipped step has left the weights as they were, so the checkpoint at a run's
end or at a signal is written after a skipped step too. A checkpoint that is due at an interval is
left out then, since the weights themselves may be what makes the losses non-finite.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from llmnorm.config.tree import to_tree
from llmnorm.models.flops import flops_per_token
from llmnorm.objectives.contract import MicroBatch
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.runs.metrics import Metrics
from llmnorm.runs.trackers import Trackers
from llmnorm.training.evaluation import evaluate
from llmnorm.training.health import health
from llmnorm.training.prepare import Prepared
from llmnorm.training.profiling import Profiler
from llmnorm.training.state import environment
from llmnorm.training.step import Outcome, rehearse


def open_metrics(run: Prepared, stack: ExitStack) -> Metrics:
    """The record of a run, with its progress bar and its trackers; `stack` closes them."""
    config, parallel, start = run.config, run.parallel, run.progress.step
    trackers = stack.enter_context(
        Trackers(config, run.directory, start=start, enabled=parallel.is_main)
    )
    flops = flops_per_token(
        run.model, config.data.context_length, head_share=run.objective.head_share
    )
    metrics = Metrics(
        run.directory,
        trackers,
        steps=run.steps,
        start=start,
        flops_per_token=flops,
        device=parallel.device,
        world=parallel.world,
        enabled=parallel.is_main,
        seconds=run.progress.seconds,
    )
    return stack.enter_context(metrics)


def open_profiler(run: Prepared, kind: str | None, metrics: Metrics, stack: ExitStack) -> Profiler:
    """What `train --profile KIND` records with, on the main process alone; `stack` closes it."""
    profiler = Profiler(
        kind if run.parallel.is_main else None,
        run.directory.profile,
        device=run.parallel.device,
        start=run.progress.step,
        steps=run.steps,
        say=metrics.say,
    )
    return stack.enter_context(profiler)


def keep_line(
    run: Prepared, metrics: Metrics, outcome: Outcome, first: MicroBatch, *, ending: bool
) -> None:
    """Write the step's line where `logging` wants one, or the run ends.

    Args:
        first: the micro-batch on which the mixers' health is measured.
    """
    progress, logging = run.progress, run.config.logging
    metrics.count(outcome.tokens, outcome.loss)
    if not outcome.finite:
        metrics.say(
            f"step {progress.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}: not "
            "finite, so the step was skipped and the weights are as before it "
            f"({progress.skipped_in_a_row} in a row; the run gives up at "
            f"{run.config.training.max_skipped_steps})"
        )
    line: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "lr": outcome.lr,
        "skipped_steps": progress.skipped_steps,
    }
    if examined := due(progress.step, logging.health_every):
        with metrics.pause():
            line["health"] = health(run.model, first.inputs_on(run.parallel.device), run.parallel)
    if ending or examined or progress.step % logging.every == 0:
        metrics.log_step(line)


def keep_evaluation(run: Prepared, metrics: Metrics) -> dict[str, Any]:
    """Evaluate the weights as they are now, and write it down; returns the figures."""
    progress, config = run.progress, run.config
    with metrics.pause():
        figures = evaluate(
            run.model,
            run.objective,
            micro_batch=config.evaluation.micro_batch or run.micro_batch,
            parallel=run.parallel,
            ema=run.ema,
        )
        # Nothing can be sampled from logits that are not finite.
        sound = math.isfinite(figures["loss"])
        texts = run.objective.texts(run.model, run.parallel) if sound else []
    metrics.log_evaluation(progress.step, progress.tokens, figures)
    metrics.log_samples(progress.step, progress.tokens, texts)
    return figures


def save(run: Prepared, metrics: Metrics, figures: dict[str, Any] | None) -> None:
    """Write a checkpoint of the present step.

    Args:
        figures: the evaluation of these weights, if they were evaluated.
    """
    progress, data = run.progress, run.objective.data
    progress.seconds = metrics.seconds
    meta = {
        **asdict(progress),
        "data": data.identity,
        "environment": environment(run.parallel),
        "config": to_tree(run.config),
        "model": json.loads(run.model.config.to_json_string()),
        "sources": data.sizes(),
        "llmnorm": run_directory.version(),
    }
    loss = figures["loss"] if figures else None
    with metrics.pause():
        run.checkpoints.save(
            progress.step,
            run.state,
            meta,
            validation_loss=loss if loss is None or math.isfinite(loss) else None,
        )


def give_up(run: Prepared, metrics: Metrics) -> InputError:
    """End a run of which `max_skipped_steps` steps in a row were skipped; returns its error.

    Its weights are those of before these steps. Either the skipped rows are to blame, or the last
    update has spoilt the weights. The rows of that update tell: their loss and gradient were finite
    before it. If they still are, the weights are saved; else an older checkpoint is what is left.
    """
    progress, checkpoints = run.progress, run.checkpoints
    batch = run.config.training.rows
    first = progress.row - progress.skipped_in_a_row * batch  # of the skipped rows
    if first < batch:
        lost = "nothing was trained before them"
    elif not rehearse(run, next(run.batches(first - batch))):
        lost = "the update before them has spoilt the weights, which are not saved"
    else:
        lost = ""
        save(run, metrics, keep_evaluation(run, metrics))
    checkpoints.wait()
    newest = checkpoints.newest()
    kept = newest.path if newest else None
    if run.parallel.is_main:
        run_directory.end(run.directory.diverged, progress.step)

    path = run.directory.path
    text = (
        f"training: stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row "
        f"with a non-finite loss or gradient (rows {first}-{progress.row - 1}); "
    )
    if kept is None:
        return InputError(f"{text}{lost}; no checkpoint; start again with a lower optimizer.lr")
    text += (
        f"{lost}; newest checkpoint: {kept}"
        if lost
        else f"they were skipped, and the weights of before them are saved in {kept}"
    )
    return InputError(
        f"{text}; go on from it: llmnorm train {path} run_dir={run_directory.free(path)} "
        f"training.branch_from={kept} optimizer.lr=LOWER"
    )


def due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps (None: never) is done after `step`."""
    return every is not None and step % every == 0
