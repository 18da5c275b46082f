"""The training loop: one straight function from a configuration to a trained run directory.

A step takes the next `global_batch` rows, sums the loss over all real labels, divides by their
global number, clips, and updates. So neither accumulation nor the number of processes changes what
a step computes. Everything a step needs is a function of its number: rows, learning rate, noise;
a checkpoint holds weights, optimizer state and counts, nothing else.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.config.tree import RunConfig, to_tree
from llmnorm.exchange.loading import open_source
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import named_weights
from llmnorm.models.flops import flops_per_token
from llmnorm.models.initialization import initialize
from llmnorm.models.modeling import LlmNormForCausalLM, class_of, empty_model
from llmnorm.nn.norms.running import RunningStatistics
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.optim.fragments import master, whole_shape
from llmnorm.optim.groups import split
from llmnorm.parallel.check import check, describe
from llmnorm.parallel.processes import Fill, Parallel, local
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.runs import metrics as record
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lock import RunLock
from llmnorm.runs.metrics import Metrics
from llmnorm.runs.trackers import Trackers
from llmnorm.runs.trackers import check as check_trackers
from llmnorm.training.ema import EMA
from llmnorm.training.evaluation import evaluate
from llmnorm.training.health import health
from llmnorm.training.profiling import Profiler
from llmnorm.training.signals import StopRequest
from llmnorm.training.state import (
    Progress,
    environment,
    named_tensors,
    resume,
    starting_point,
)


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
        run: where the run lives; its newest whole checkpoint is gone on from.
        data_command: what prepares the data, for the message where it is missing.
        automatic: how numbers took the place of `auto`, to be saved with the run.
        dry_run: stop after the checks that precede the first step.
        profile: "time" or "memory": what a few steps are profiled for.

    Returns:
        The exit code: 0, or 143 / 130 after SIGTERM / SIGINT.

    Raises:
        InputError: something that the user can mend, in one line.
    """
    check_trackers(config.logging)
    with ExitStack() as stack:
        parallel = Parallel(config.parallel, config.training)
        stack.callback(parallel.close)
        objective = config.objective.build(config, alone=parallel.world == 1, command=data_command)
        data = objective.data
        global_batch = config.training.rows
        micro_batch = _micro_batch(config, parallel)
        steps = config.training.total_steps(data.rows, data.context_length)

        # The run directory, and the checkpoint to start from.
        def lock() -> None:
            stack.enter_context(RunLock(run.path))

        if not dry_run:
            parallel.on_main(lock)
        checkpoints = Checkpoints(
            run.checkpoints,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            keep_best=config.checkpoint.keep_best,
            asynchronous=config.checkpoint.asynchronous,
            rank=parallel.rank,
            world=parallel.world,
        )
        stack.callback(checkpoints.wait)  # on the way out of an error too, while the lock is held
        if not dry_run:
            checkpoints.clean()
        start = starting_point(checkpoints, config.training.branch_from, parallel)

        # Model, layout, optimizer, schedule.
        model, fill = _model(config, objective, parallel, begun=start is not None)
        replica = parallel.prepare(model, fill)
        statistics = RunningStatistics(model, parallel.reduce)
        groups = split(model)
        parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
        optimizer = config.optimizer.build(groups, parallel.exchange())
        multipliers = config.optimizer.multipliers(config.schedule.build(steps), steps)
        ema = None
        if config.training.ema:
            held = {name: local(master(p).detach()) for name, p in model.named_parameters()}
            ema = EMA(held, config.training.ema, parallel.publish)

        state = named_tensors(model, optimizer, ema)
        written = checkpoints.without_copies(state)
        progress, message = resume(checkpoints, start, state, data, parallel)
        parallel.publish()
        if message:
            _say(parallel, message)
        if progress.step >= steps:
            if parallel.is_main and not dry_run:
                run_directory.end(run.done, progress.step)
            _say(parallel, f"{run.path} is finished (step {progress.step})")
            return 0

        rows = partial(
            objective.batches,
            progress.row,
            global_batch=global_batch,
            rank=parallel.rank,
            world=parallel.world,
            micro_batch=micro_batch,
        )
        first = next(rows())
        _say(
            parallel,
            f"{describe(parallel, model, optimizer)}; {_size(model, groups)}; {steps} steps",
        )
        check(parallel, model, torch.cat([batch.rows for batch in first]))
        _dry_step(replica, parameters, first, micro_batch, parallel)
        statistics.discard()
        if dry_run:
            _say(parallel, "dry run: every check passed, nothing was trained")
            return 0

        # Everything that could be refused has been looked at: only now is anything written.
        def begin() -> None:
            run_directory.begin(run, config, data.tokenizer_directory, automatic)
            record.cut(run, progress.step)

        parallel.on_main(begin)

        # The steps.
        stop = stack.enter_context(StopRequest())
        trackers = stack.enter_context(
            Trackers(config, run, start=progress.step, enabled=parallel.is_main)
        )
        metrics = stack.enter_context(
            Metrics(
                run,
                trackers,
                steps=steps,
                start=progress.step,
                flops_per_token=flops_per_token(
                    model, config.data.context_length, head_share=objective.head_share
                ),
                device=parallel.device,
                world=parallel.world,
                enabled=parallel.is_main,
                seconds=progress.seconds,
            )
        )
        profiler = stack.enter_context(
            Profiler(
                profile if parallel.is_main else None,
                run.profile,
                device=parallel.device,
                start=progress.step,
                steps=steps,
                say=metrics.say,
            )
        )
        exit_code, batches = 0, rows()
        while progress.step < steps and not exit_code:
            micro_batches = next(batches)
            _seed(config.seed, progress.step, parallel.rank)
            labels, tokens = _count(micro_batches, parallel)
            loss = _forward_backward(replica, micro_batches, labels, parallel)
            norm = float(parallel.clip(parameters, config.training.max_grad_norm))

            # One reduction serves the loss and the agreement to stop.
            reduced = torch.stack([loss, loss.new_tensor(stop.exit_code)])
            mean_loss, stopping = parallel.reduce(reduced).tolist()
            exit_code = round(stopping) and (stop.exit_code or 143)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * multipliers[group["kind"]](progress.step)
            if math.isfinite(mean_loss) and math.isfinite(norm):
                optimizer.step()
                statistics.commit()
                progress.skipped_in_a_row = 0
            else:
                statistics.discard()
                progress.skipped_steps += 1
                progress.skipped_in_a_row += 1
                metrics.say(
                    f"step {progress.step + 1}: loss {mean_loss}, gradient norm {norm}: skipped"
                )
            optimizer.zero_grad(set_to_none=True)
            parallel.end_step()
            if ema:
                ema.update(progress.step)
            progress.step += 1
            progress.row += global_batch
            progress.tokens += tokens
            metrics.count(tokens, mean_loss)
            profiler.step()

            last = progress.step >= steps
            if progress.skipped_in_a_row >= (1 if last else config.training.max_skipped_steps):
                checkpoints.wait()
                if parallel.is_main:
                    run_directory.end(run.diverged, progress.step)
                raise InputError(_diverged(progress, global_batch, checkpoints))
            line: dict[str, Any] = {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": mean_loss,
                "grad_norm": norm,
                "lr": optimizer.param_groups[0]["lr"],
                "skipped_steps": progress.skipped_steps,
            }
            if examined := _due(progress.step, config.logging.health_every):
                with metrics.pause():
                    line["health"] = health(model, micro_batches[0].inputs, parallel)
            if last or examined or progress.step % config.logging.every == 0:
                metrics.log_step(line)
            figures: dict[str, Any] | None = None
            if last or _due(progress.step, config.evaluation.every):
                with metrics.pause():
                    figures = evaluate(
                        model,
                        objective,
                        micro_batch=config.evaluation.micro_batch or micro_batch,
                        parallel=parallel,
                        ema=ema,
                    )
                    texts = objective.texts(model, parallel)
                metrics.log_evaluation(progress.step, progress.tokens, figures)
                metrics.log_samples(progress.step, progress.tokens, texts)
            # Weights whose loss is not finite are not worth a checkpoint, whatever the interval.
            due = last or exit_code or _due(progress.step, config.checkpoint.every)
            if due and progress.skipped_in_a_row == 0:
                progress.seconds = metrics.seconds
                meta = {
                    **asdict(progress),
                    "data": data.identity,
                    "environment": environment(parallel),
                    "config": to_tree(config),
                    "model": json.loads(model.config.to_json_string()),
                    "sources": data.sizes(),
                    "llmnorm": run_directory.version(),
                }
                with metrics.pause():
                    checkpoints.save(
                        progress.step,
                        written,
                        meta,
                        validation_loss=figures["loss"] if figures else None,
                    )
        checkpoints.wait()
        if parallel.is_main:
            run_directory.end(run.done if progress.step >= steps else run.preempted, progress.step)
        return 0 if progress.step >= steps else exit_code


def _model(
    config: RunConfig, objective: Objective, parallel: Parallel, *, begun: bool
) -> tuple[LlmNormForCausalLM, Fill]:
    """The run's model, still without values, and what gives it its first weights.

    They are the same numbers on every process and device. What is loaded is all of it, or all but
    the head where that is another objective's.

    Args:
        begun: a checkpoint will replace these weights, so `model.pretrained` is not read.
    """
    rows, pretrained, data = config.model.vocab_size, config.model.pretrained, objective.data
    if rows != "auto" and rows < data.vocab_size:
        if pretrained is not None:
            raise InputError(
                f"model.pretrained: {pretrained} has {rows} embedding rows, the tokenizer "
                f"{data.vocab_size} tokens; leave the tokenizer section out to use its own"
            )
        raise InputError(
            f"model.vocab_size: {rows} is less than the tokenizer's {data.vocab_size}; "
            "leave it out, or give at least that"
        )
    settings = LlmNormConfig.from_settings(
        config.model,
        vocab_size=data.vocab_size if rows == "auto" else rows,
        bos_token_id=data.bos,
        eos_token_id=data.eos,
        pad_token_id=data.pad,
        architectures=[config.objective.architecture],
        **objective.model_keys(),
    )
    model = empty_model(settings, device="meta").train()
    if pretrained is None or begun:
        return model, lambda modules: initialize(model, seed=config.seed, modules=modules)
    source = open_source(
        pretrained, key="model.pretrained", rank=parallel.rank, world=parallel.world
    )
    if config.objective.keeps_head and class_of(source.config) is class_of(settings):
        _say(parallel, f"weights from {pretrained}")
        return model, lambda modules: source.read_into(named_weights(modules))
    prefix = f"{model.base_model_prefix}."

    def fill(modules: Mapping[str, nn.Module]) -> None:
        initialize(model, seed=config.seed, modules=modules)
        named = named_weights(modules)
        source.read_into({n: t for n, t in named.items() if n.startswith(prefix)})

    _say(parallel, f"weights from {pretrained}, its head left out")
    return model, fill


def _micro_batch(config: RunConfig, parallel: Parallel) -> int:
    """Rows that one process runs at once; the batch must divide evenly."""
    total, world = config.training.rows, parallel.world
    if total % world:
        raise InputError(
            f"training.global_batch: {total} rows do not divide over {world} processes; "
            f"the nearest that does is {max(1, round(total / world)) * world}"
        )
    share = total // world
    micro_batch = config.training.micro_batch or share
    if share % micro_batch:
        nearest = min(
            (d for d in range(1, share + 1) if share % d == 0), key=lambda d: abs(d - micro_batch)
        )
        raise InputError(
            f"training.micro_batch: {micro_batch} does not divide the {share} rows of a process "
            f"(training.global_batch {total} over {world}); the nearest that does is {nearest}"
        )
    return micro_batch


def _forward_backward(
    replica: nn.Module, micro_batches: list[MicroBatch], labels: int, parallel: Parallel
) -> torch.Tensor:
    """Gradients of the global mean loss over this process's micro-batches.

    Returns:
        This process's share of the loss, 0-dim float32.
    """
    total = torch.zeros((), device=parallel.device)
    for number, batch in enumerate(micro_batches):
        with parallel.accumulate(last=number == len(micro_batches) - 1):
            inputs = {
                name: tensor.to(parallel.device, non_blocking=True)
                for name, tensor in batch.inputs.items()
            }
            loss = replica(**inputs, num_items_in_batch=max(labels, 1)).loss
        parallel.backward(loss)
        total += loss.detach()
    return total


def _count(micro_batches: list[MicroBatch], parallel: Parallel) -> tuple[int, int]:
    """Labels and tokens of the step over all processes."""
    counts = [sum(b.labels for b in micro_batches), sum(b.tokens for b in micro_batches)]
    labels, tokens = parallel.reduce(torch.tensor(counts, device=parallel.device)).tolist()
    return labels, tokens


def _dry_step(
    replica: nn.Module,
    parameters: list[nn.Parameter],
    micro_batches: list[MicroBatch],
    micro_batch: int,
    parallel: Parallel,
) -> None:
    """Run a step's forward and backward pass without an update.

    Finds what would end the run at its first step: memory, compilation, a weight without gradient.
    Weights, statistics, random states and optimizer state are as before afterwards.
    """
    buffers = {name: buffer.clone() for name, buffer in replica.named_buffers()}
    devices = [parallel.device] if parallel.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            labels, _ = _count(micro_batches, parallel)
            _forward_backward(replica, micro_batches, labels, parallel)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"training.micro_batch: {micro_batch} rows do not fit into the memory of "
            f"{parallel.device}; try training.micro_batch={max(1, micro_batch // 2)} or "
            f"parallel.activation_checkpointing=true ({str(error).splitlines()[0]})"
        ) from None
    parallel.clip(parameters, 0.0)
    trained = [(n, master(p)) for n, p in replica.named_parameters() if p.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    assert not without, f"trainable, but without a gradient: {without}"
    for name, buffer in replica.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in parameters:
        parameter.grad = None
    parallel.end_step()


def _seed(seed: int, step: int, rank: int) -> None:
    """Noise of a step is a function of (seed, step, rank), so that no generator is ever saved."""
    generator = torch.Generator().manual_seed(seed)
    mixed = int(torch.randint(2**31, (), generator=generator)) * 1_000_003 + step * 65_537 + rank
    torch.manual_seed(mixed)


def _diverged(progress: Progress, global_batch: int, checkpoints: Checkpoints) -> str:
    skipped = progress.skipped_in_a_row
    rows = f"{progress.row - skipped * global_batch}-{progress.row - 1}"
    newest = checkpoints.newest()
    kept = newest.path if newest else "none"
    return (
        f"training: stopped at step {progress.step}: {skipped} steps in a row with a non-finite "
        f"loss or gradient (rows {rows}); last good checkpoint: {kept}; try a lower optimizer.lr"
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _size(model: nn.Module, groups: Any) -> str:
    total = sum(whole_shape(master(p)).numel() for p in model.parameters())
    hidden = sum(whole_shape(p).numel() for p in groups.matrices.values())
    return f"{total / 1e6:.2f}M parameters ({hidden / 1e6:.2f}M in hidden matrices)"


def _say(parallel: Parallel, text: str) -> None:
    if parallel.is_main:
        print(text, file=sys.stderr, flush=True)
