"""What a run keeps of its steps: lines of metrics, evaluations, checkpoints, and how it ended.

A step is saved before it is evaluated, so that no evaluation can lose it. With
`evaluation.patience` an evaluation may ask for a checkpoint that was not due: of the lowest loss so
far, and of the step after which the run ends early.

What would surprise: a skipped step has left the weights as they were, so the checkpoint at a run's
end or at a signal is written after a skipped step too. A checkpoint that is due at an interval is
left out then, since the weights themselves may be what makes the losses non-finite.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.config.saved import portable, to_tree
from llmnorm.machine.failures import DIVERGED
from llmnorm.models.flops import flops_per_token
from llmnorm.models.foreign import Foreign
from llmnorm.objectives.contract import MicroBatch
from llmnorm.parallel.processes import Interrupted
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.runs import signs
from llmnorm.runs.account import Timekeeper
from llmnorm.runs.metrics import Metrics, keep_until
from llmnorm.runs.trackers import Trackers
from llmnorm.training.evaluation import evaluate
from llmnorm.training.health import health
from llmnorm.training.prepare import Prepared
from llmnorm.training.profiling import Profiler
from llmnorm.training.signals import StopRequest
from llmnorm.training.spike import Spike
from llmnorm.training.state import environment
from llmnorm.training.step import Outcome, rehearse


def open_metrics(run: Prepared, stack: ExitStack, timekeeper: Timekeeper, *, left: bool) -> Metrics:
    """The record of a run, with its progress bar and its trackers; `stack` closes them.

    Args:
        timekeeper: gives the lines their times.
        left: whether the evaluation of the present step is still to be made.
    """
    config, parallel, start = run.config, run.parallel, run.progress.step
    trackers = stack.enter_context(
        Trackers(config, run.directory, start=start, whole=start - left, enabled=parallel.is_main)
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
        timekeeper=timekeeper,
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
    if outcome.spike is not None:
        metrics.say(_spike_message(run, outcome.spike, updated=outcome.updated))
    line: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "lr": outcome.lr,
        "skipped_steps": progress.skipped_steps,
    }
    if isinstance(run.model, Foreign) and run.model.router_loss:
        line["router_loss"] = outcome.router_loss
    if run.config.training.spike is not None:
        line["skipped_spikes"] = progress.skipped_spikes
    if len(run.objective.data.all_stages) > 1:
        line["stage"] = run.objective.data.stage_at(progress.row - run.config.pool)
    if run.selecting is not None:
        run.selecting.step_ended()
    for note in run.stragglers.notes():
        metrics.say(f"llmnorm: note: {note}")
    if examined := due(progress.step, logging.health_every):
        with run.parallel.phases.during("health"), metrics.pause():
            line["health"] = health(run.model, first.inputs_on(run.parallel.device), run.parallel)
    if ending or examined or progress.step % logging.every == 0:
        if run.selecting is not None:
            line |= run.selecting.line()
        line |= run.stragglers.line()
        metrics.log_step(line)


def _spike_message(run: Prepared, spike: Spike, *, updated: bool) -> str:
    """What is said of a step that is a spike, in a line."""
    progress, training = run.progress, run.config.training
    assert training.spike is not None
    text = (
        f"step {progress.step}: {spike.name} {spike.value:.4g}, and {spike.limit:.4g} is "
        f"{training.spike.sigma:g} deviations above the mean of {spike.steps} steps before it: "
    )
    if updated:
        return (
            f"{text}the update was made all the same, after {training.max_skipped_steps} skipped "
            "steps (training.max_skipped_steps)"
        )
    return (
        f"{text}the step was skipped and the weights are as before it "
        f"({progress.spikes_in_a_row} since the last update)"
    )


def keep_evaluation(run: Prepared, metrics: Metrics, stop: StopRequest) -> int:
    """Evaluate the weights as they are now, and write it down.

    If the step has a checkpoint, it gets the validation loss. With `evaluation.patience` the step
    of the lowest loss gets one, and that with which the run ends.

    Returns:
        0, or the exit code if a process was asked to stop. Then nothing was written, and the run
        evaluates the step when it goes on.
    """
    progress, config, parallel = run.progress, run.config, run.parallel
    parallel.asked = lambda: stop.exit_code
    try:
        with parallel.phases.during("evaluation"), metrics.pause():
            figures = evaluate(
                run.model,
                run.objective,
                micro_batch=config.evaluation.micro_batch or run.micro_batch,
                parallel=parallel,
                ema=run.ema,
            )
            # Nothing can be sampled from logits that are not finite.
            sound = math.isfinite(figures["loss"])
            texts = run.objective.texts(run.model, parallel) if sound else []
            scored: dict[str, Any] = {}
            if run.tasks is not None and sound and run.tasks.due(progress.step):
                scored = run.tasks.scores(run.model, parallel, run.ema)
    except Interrupted as found:
        return stop.agree(found.asked)
    metrics.log_evaluation(progress.step, progress.tokens, figures, texts, scored)
    progress.count_evaluation(figures["loss"])
    if run.saved != progress.step and (_best_is_kept(run) or out_of_patience(run)):
        save(run, metrics)
    if sound and run.saved == progress.step:
        with parallel.phases.during("save"), metrics.pause():
            run.checkpoints.add_loss(progress.step, figures["loss"])
    return 0


def out_of_patience(run: Prepared) -> bool:
    """Whether the run ends early, since its validation loss is no longer getting lower."""
    patience = run.config.evaluation.patience
    return patience is not None and run.progress.not_better >= patience


def _best_is_kept(run: Prepared) -> bool:
    """Whether the present step has the lowest loss, and is to be saved for that."""
    kept = run.config.evaluation.patience is not None and run.config.checkpoint.keep_best
    return kept and run.progress.best_step == run.progress.step


def lost_patience(run: Prepared) -> str:
    """Why a run that is `out_of_patience` has ended, in a line."""
    progress, patience = run.progress, run.config.evaluation.patience
    lower = "a finite validation loss"
    if progress.best_loss is not None:
        lower = (
            f"a lower validation loss than {progress.best_loss:.4f} at step {progress.best_step}"
        )
    text = (
        f"ended early, at step {progress.step} of {run.steps}: {progress.not_better} evaluations "
        f"in a row without {lower} (evaluation.patience={patience})"
    )
    if progress.best_loss is not None and run.config.checkpoint.keep_best:
        text += "; its best checkpoint is kept (--checkpoint best)"
    return text


def save(run: Prepared, metrics: Metrics) -> None:
    """Write a checkpoint of the present step."""
    progress, data = run.progress, run.objective.data
    progress.seconds = metrics.seconds
    meta = {
        **asdict(progress),
        "data": data.identity,
        "environment": environment(run.parallel),
        "config": to_tree(portable(run.config)),
        "model": json.loads(_configuration(run.model).to_json_string()),
        "sources": data.sizes(),
        "stages": data.saved_stages(),
        "branches": run.branches,
        "llmnorm": run_directory.version(),
    }
    if run.base is not None:
        meta["base"] = {"path": str(run.base.path), "hash": run.base.hash}
        if new := run.base.new_tokens:
            meta["base"]["new_tokens"] = [new.start, new.stop]
    if run.teacher is not None:
        meta["teacher"] = {"path": str(run.teacher.path), "hash": run.teacher.hash}
    with run.parallel.phases.during("save"), metrics.pause():
        if run.elsewhere is not None:
            run.elsewhere.check()
        run.checkpoints.save(progress.step, run.state, meta)
    run.saved = progress.step


def _configuration(model: PreTrainedModel) -> PreTrainedConfig:
    """What a checkpoint says of the model: of a class of transformers what its directory said."""
    return model.saved_config if isinstance(model, Foreign) else model.config


def evaluation_at_start(run: Prepared) -> tuple[bool, float | None]:
    """What is to be done of the evaluation of the step that the run goes on from.

    A step is saved before it is evaluated, so a process that was stopped or killed in between has
    left a checkpoint without its evaluation, or metrics with a loss that the checkpoint lacks. An
    evaluation that was made is counted here. A branch counts its own alone, not its parent's.

    Returns:
        The same on every process: whether the step is still to be evaluated; and its finite loss in
        metrics.jsonl, which its checkpoint is to have, where there is one.

    Raises:
        InputError: metrics.jsonl or samples.jsonl cannot be read.
    """
    step = run.progress.step
    if run.saved is None:
        run.progress.forget_evaluations()
    is_due = step == run.steps or due(step, run.config.evaluation.every)
    if run.saved != step or not is_due:
        return False, None
    found = torch.zeros(2, dtype=torch.float64, device=run.parallel.device)

    def look() -> None:
        loss = keep_until(run.directory, step).validation_loss
        if loss is not None:
            found[0], found[1] = 1, loss

    run.parallel.on_main(look)
    evaluated, loss = run.parallel.reduce(found).tolist()
    if evaluated:
        run.progress.count_evaluation(loss)
    return not evaluated, loss if evaluated and math.isfinite(loss) else None


class Diverged(InputError):
    """A run that gave up, since too many steps in a row had a non-finite loss or gradient."""

    exit_code = DIVERGED


def give_up(run: Prepared, metrics: Metrics, stop: StopRequest) -> Diverged:
    """End a run of which `max_skipped_steps` steps in a row were skipped; returns its error.

    Its weights are those of before these steps. Either the skipped rows are to blame, or the last
    update has spoilt the weights. The rows of that update tell: their loss and gradient were finite
    before it. If they still are, the weights are saved; else an older checkpoint is what is left.
    Of a run with a selection the first rows of that update's pool tell.
    """
    progress, checkpoints = run.progress, run.checkpoints
    batch = run.config.pool
    first = progress.row - progress.skipped_in_a_row * batch  # of the skipped rows
    if first < batch:
        lost = "nothing was trained before them"
    elif not rehearse(run, run.unselected(first - batch)):
        lost = "the update before them has spoilt the weights, which are not saved"
    else:
        lost = ""
        save(run, metrics)
        keep_evaluation(run, metrics, stop)
    checkpoints.wait()
    newest = checkpoints.newest()
    kept = newest.path if newest else None
    if run.parallel.is_main:
        signs.end(run.directory.diverged, progress.step)

    path = run.directory.path
    text = (
        f"training: stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row "
        f"with a non-finite loss or gradient (rows {first}-{progress.row - 1}); "
    )
    if kept is None:
        return Diverged(f"{text}{lost}; no checkpoint; start again with a lower optimizer.lr")
    text += (
        f"{lost}; newest checkpoint: {kept}"
        if lost
        else f"they were skipped, and the weights of before them are saved in {kept}"
    )
    return Diverged(
        f"{text}; go on from it: llmnorm train {path} run_dir={run_directory.free(path)} "
        f"training.branch_from={kept} optimizer.lr=LOWER"
    )


def due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps (None: never) is done after `step`."""
    return every is not None and step % every == 0
