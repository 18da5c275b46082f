"""A run that goes on for another length than it began with: its schedule is stretched or shortened.

A schedule is a function of the step and of the run's length, so another length moves the rate at
once. A run whose rate had decayed jumps back up, which undoes much of the decay.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.checkpoints.store import Store
from llmnorm.config.tree import RunConfig, TrainingSettings
from llmnorm.optim.schedule import HyperparameterSchedule, WSDSettings
from llmnorm.runs.directory import RunDirectory, free

if TYPE_CHECKING:
    import torch

    from llmnorm.checkpoints.checkpoints import Checkpoint

JUMP = 0.02  # of the peak rate; a schedule moves less from one step to the next


def former_steps(checkpoint: "Checkpoint", rows: int, context_length: int) -> int | None:
    """The length of the run when it wrote a checkpoint; None where its settings cannot be read."""
    try:
        tree = checkpoint.meta["config"]
        training = TrainingSettings.model_validate(tree["training"])
        return training.total_steps(rows, context_length, tree.get("selection", {}).get("pool"))
    except (AssertionError, KeyError, TypeError, ValueError):  # of another version
        return None


def stretched(
    config: RunConfig,
    checkpoint: "Checkpoint",
    steps: int,
    before: int | None,
    optimizer: "torch.optim.Optimizer",
) -> str | None:
    """What the run's new length does to its learning rate; None where it does nothing.

    Args:
        config: the run's settings.
        checkpoint: where it goes on from.
        steps: its new length.
        before: its length when it wrote the checkpoint.
        optimizer: its peak rate is that of the metrics.
    """
    done = checkpoint.meta["step"]
    if before is None or before == steps or done >= steps or not done:
        return None

    def rate(length: int, step: int) -> float:
        schedule: HyperparameterSchedule = config.optimizer.hyperparameters(
            config.schedule.build(length), length
        )
        group = optimizer.param_groups[0]
        return float(group["peak_lr"] * schedule.lr[group["kind"]](step))

    last, following = rate(before, done - 1), rate(steps, done)
    usual = rate(before, done)  # what the old length would have gone on with
    peak = optimizer.param_groups[0]["peak_lr"]
    if math.isclose(following, usual, rel_tol=0, abs_tol=JUMP * peak):
        return None
    what = "stretched" if steps > before else "shortened"
    text = (
        f"the schedule is {what} from {before} to {steps} steps: the learning rate goes from "
        f"{last:.3g} at step {done} to {following:.3g} at step {done + 1}"
    )
    return text if following <= last else f"{text}; {_instead(config, before, steps)}"


def _instead(config: RunConfig, before: int, steps: int) -> str:
    """What is better than to raise a rate again that had decayed."""
    assert isinstance(config.run_dir, Path)
    run = RunDirectory(config.run_dir)
    new = f"llmnorm train {run.path} run_dir={free(run.path)} training.steps={steps}"
    stable = 0  # the last step at the peak, where the decay comes at the end
    if isinstance(config.schedule, WSDSettings):
        decay = config.schedule.decay_steps(before)
        stable = max(config.schedule.warmup_steps(before), before - 1 - decay) + 1
    store = Store(run.checkpoints)
    kept = [step for step in store.steps() if step <= stable]
    if kept:
        branch = f"{new} training.branch_from={store.path(kept[-1])}"
        return f"a decayed run is better continued from a checkpoint before its decay: {branch}"
    why = "none is kept (checkpoint.keep_every=N keeps some)"
    if not stable:
        why = f"schedule={getattr(config.schedule, 'name', 'this')} decays from the start"
    return (
        "a decayed run is better continued from a checkpoint before its decay "
        f"(training.branch_from), but {why}; to train all of it with the longer schedule: {new}"
    )
