"""One training step, and the rehearsal of it before the first.

A step sums the loss over all labels of its rows, divides by their number over all processes, clips
the gradient's global norm, and updates. So neither accumulation nor the number of processes
changes what it computes. Rows, learning rates and noise are functions of the step's number.

The device is waited for once a step, where `step` reads loss, gradient norm, stop request and
counts together. (With tests/training/test_step.py, which counts the reads.)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.machine.phases import DEVICE, LOOP
from llmnorm.models.foreign import Foreign
from llmnorm.models.router_loss import Balanced
from llmnorm.objectives.contract import MicroBatch
from llmnorm.optim.fragments import master
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.training.foreign import refuse_unused
from llmnorm.training.prepare import Prepared
from llmnorm.training.signals import StopRequest
from llmnorm.training.spike import Spike, look


class Outcome(NamedTuple):
    """What a step has found, the same on every process.

    Attributes:
        loss: mean over the step's labels, nats; of a mixture of experts without its balancing loss.
        router_loss: that balancing loss before its coefficient, the mean over the step's rows
            weighted by their labels; 0 where none is trained.
        grad_norm: global norm of the gradients before clipping.
        lr: learning rate of the first parameter group.
        tokens: trained on in this step, over all processes.
        exit_code: 0, or what the process exits with because some process was asked to stop.
        spike: what leapt out of the step, if `training.spike` is given.
        updated: whether the weights were updated.
    """

    loss: float
    router_loss: float
    grad_norm: float
    lr: float
    tokens: int
    exit_code: int
    spike: Spike | None
    updated: bool

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite; else the step is skipped."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def step(run: Prepared, micro_batches: list[MicroBatch], stop: StopRequest) -> Outcome:
    """Take the next step of `run`; every process calls it with its own micro-batches.

    A step whose loss or gradient norm is not finite, or a spike (spike.py), leaves weights,
    optimizer state and running statistics as they were; it still advances the rows, the schedule
    and the moving average.
    """
    parallel, optimizer, progress = run.parallel, run.optimizer, run.progress
    phases = parallel.phases
    torch.manual_seed(run.noise_seed + progress.step * 65_537 + parallel.rank)
    counts = count(micro_batches, parallel)
    balance = torch.zeros((), device=parallel.device)
    loss = forward_backward(run.replica, micro_batches, counts[0], parallel, balance)
    phases.enter("exchange")
    norm = parallel.clip(run.parameters, run.config.training.max_grad_norm)
    run.hyperparameters.set(optimizer.param_groups, progress.step)

    # One reduction serves the losses, the agreement to stop and the processes' times; one read all.
    # All processes get the norm that process 0 has computed, so that they judge the same number.
    theirs = norm.to(loss.dtype) if parallel.is_main else torch.zeros_like(loss)
    mine = torch.stack([loss, balance, loss.new_full((), stop.exit_code), theirs])
    reduced = parallel.reduce(torch.cat([mine, run.stragglers.slots(loss)]))
    read = torch.cat([reduced.double(), counts.double()])
    with phases.waiting(DEVICE):
        mean_loss, router_loss, stopping, grad_norm, *seconds, _, tokens = read.tolist()
    run.stragglers.hear(seconds, progress.step + 1)
    exit_code = stop.agree(round(stopping))
    lr = optimizer.param_groups[0]["lr"]
    spike, updated = _judge(run, mean_loss, grad_norm)
    tokens = round(tokens)
    outcome = Outcome(mean_loss, router_loss, grad_norm, lr, tokens, exit_code, spike, updated)

    if updated:
        optimizer.step()
        run.statistics.commit()  # norms with running statistics count optimizer steps
    else:
        run.statistics.discard()  # what these norms have summed over the step's micro-batches
    optimizer.zero_grad(set_to_none=True)
    parallel.end_step()  # ZeRO's master weights become the model's, its gradients are dropped
    if run.ema:
        run.ema.update(progress.step)
    progress.step += 1
    progress.row += run.config.pool
    progress.tokens += outcome.tokens
    phases.enter(LOOP)
    phases.end_step(progress.step)
    return outcome


def _judge(run: Prepared, loss: float, grad_norm: float) -> tuple[Spike | None, bool]:
    """What leaps out of a step, and whether it is updated with; counts the steps that are not."""
    progress, training = run.progress, run.config.training
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        return None, False
    progress.skipped_in_a_row = 0
    if run.begins_a_stage():
        progress.window.clear()  # what is usual in it is not known yet
    spike = None if training.spike is None else look(progress, training.spike, loss, grad_norm)
    if spike is not None and progress.spikes_in_a_row < training.max_skipped_steps:
        progress.skipped_spikes += 1
        progress.spikes_in_a_row += 1
        return spike, False
    progress.spikes_in_a_row = 0
    return spike, True


def count(micro_batches: list[MicroBatch], parallel: Parallel) -> Tensor:
    """(labels, tokens) of the step over all processes: (2,) int64 on the device, not waited for."""
    counts = [sum(b.labels for b in micro_batches), sum(b.tokens for b in micro_batches)]
    return parallel.reduce(torch.tensor(counts).to(parallel.device, non_blocking=True))


def forward_backward(
    replica: nn.Module,
    micro_batches: list[MicroBatch],
    labels: Tensor,
    parallel: Parallel,
    balance: Tensor | None = None,
) -> Tensor:
    """Gradients of the global mean loss over this process's micro-batches.

    Args:
        replica: what `Parallel.prepare` has returned.
        labels: 0-dim, on the device: what the summed loss is divided by, at least 1.
        balance: 0-dim, on the device: this process's share of the balancing loss is added to it,
            where one is trained (models/router_loss.py).

    Returns:
        This process's share of the loss, 0-dim float32 on the device, without the balancing loss.
    """
    items = labels.clamp(min=1)
    total = torch.zeros((), device=parallel.device)
    for number, batch in enumerate(micro_batches):
        parallel.phases.enter("forward")
        with parallel.accumulate(last=number == len(micro_batches) - 1):
            inputs = batch.inputs_on(parallel.device)
            output = replica(**inputs, num_items_in_batch=items)
        parallel.phases.enter("backward")
        parallel.backward(output.loss)
        if isinstance(output, Balanced):
            assert output.cross_entropy is not None and output.balance is not None
            total += output.cross_entropy
            if balance is not None:
                balance += output.balance
        else:
            total += output.loss.detach()
    parallel.collect_gradients()
    return total


def rehearse(run: Prepared, micro_batches: list[MicroBatch]) -> bool:
    """Run a step's forward and backward pass without an update; every process must call it.

    Finds what would end the run at its first step: memory, compilation, a weight without gradient.
    Weights, statistics, random states and optimizer state are as before afterwards.

    Returns:
        Whether loss and gradient norm are finite.

    Raises:
        InputError: the micro-batch does not fit into the GPU's memory, or a class of transformers
            leaves what is trained without a gradient.
    """
    parallel, replica = run.parallel, run.replica
    buffers = {name: buffer.clone() for name, buffer in replica.named_buffers()}
    devices = [parallel.device] if parallel.device.type == "cuda" else []
    try:
        with parallel.phases.during("rehearsal"), torch.random.fork_rng(devices=devices):
            labels, _ = count(micro_batches, parallel)
            loss = parallel.reduce(forward_backward(replica, micro_batches, labels, parallel))
            finite = bool((loss + parallel.clip(run.parameters, 0.0)).isfinite())
    except torch.OutOfMemoryError as error:
        rows = run.micro_batch
        raise InputError(
            f"training.micro_batch: {rows} rows do not fit into the memory of {parallel.device}; "
            f"try training.micro_batch={max(1, rows // 2)} or "
            f"parallel.activation_checkpointing=true ({str(error).splitlines()[0]})"
        ) from None
    trained = [(n, master(p)) for n, p in replica.named_parameters() if p.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    if isinstance(run.model, Foreign):
        refuse_unused(without, trained, parallel)
    assert not without, f"trainable, but without a gradient: {without}"
    for name, buffer in replica.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in run.parameters:
        parameter.grad = None
    run.statistics.discard()  # the rehearsal is no step: norms forget what they have summed
    parallel.end_step()  # ZeRO drops the gradients too
    return finite
