"""What a run is made of before its first step: processes, rows, model, optimizer, checkpoint.

`prepare` refuses what can be refused, and writes nothing into the run directory but its lock.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoints, State
from llmnorm.checkpoints.store import Keep
from llmnorm.config.tree import RunConfig
from llmnorm.data.report import stages_table
from llmnorm.data.stages import Course, course
from llmnorm.models import nf4
from llmnorm.models.adapters import rate_factors
from llmnorm.models.foreign import Foreign
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.norms.running import RunningStatistics
from llmnorm.objectives.apart import as_asked
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.optim.build import raise_rates
from llmnorm.optim.fragments import master, whole_shape
from llmnorm.optim.groups import split
from llmnorm.optim.schedule import HyperparameterSchedule
from llmnorm.parallel.check import describe
from llmnorm.parallel.processes import Parallel, local
from llmnorm.part import InputError
from llmnorm.runs.address import Remote
from llmnorm.runs.directory import RunDirectory, agree
from llmnorm.runs.lock import RunLock
from llmnorm.runs.remote_run import RemoteRun
from llmnorm.selection.settings import SelectionSettings
from llmnorm.training.branch import ancestors, check_branch, where_a_branch_reads
from llmnorm.training.ema import EMA
from llmnorm.training.foreign import foreign_model, looked_at
from llmnorm.training.model import Base, run_model
from llmnorm.training.selecting import Selecting
from llmnorm.training.state import (
    Progress,
    came_from,
    end_tokens,
    named_tensors,
    resume,
    starting_point,
    trained_on,
    without_selection,
)
from llmnorm.training.stragglers import Stragglers
from llmnorm.training.stretch import former_steps, stretched
from llmnorm.training.tasks import RunTasks
from llmnorm.training.teacher import NamedTeacher, give_teacher


@dataclass
class Prepared:
    """A run that can take its next step.

    Attributes:
        config: resolved settings.
        directory: the run directory.
        objective: its rows, and what the model is asked about them.
        model: this process's part of the model.
        base: the weights that are not trained, if there are any; a checkpoint names them.
        teacher: the model that is learned from, if there is one; a checkpoint names it.
        replica: what is called for a forward pass in training; `model`, wrapped or not.
        parameters: what is trained, as the optimizer sees it.
        hyperparameters: what a step's learning rates and momentum are.
        state: what this process writes of a checkpoint, by name.
        progress: how far the run is.
        course: what it reads, from where it has started.
        branches: the checkpoints that it and its parents have branched from, as checkpoints keep
            them, the oldest first.
        steps: the run's length, its parent's steps included.
        former_steps: its length when it wrote the checkpoint that it goes on from; None where there
            is no checkpoint of its own, or where that cannot be told.
        saved: the step of the run's own newest checkpoint; None before there is one.
        micro_batch: rows that one process runs at once.
        noise_seed: step and rank are added to it, so that no random state is ever saved.
        selecting: chooses the rows of a step, where the run has a selection.
        elsewhere: copies the run directory up, where it is an address.
        stragglers: which processes hold the others up.
        tasks: lm-eval's, that evaluations score, where there are any.
    """

    config: RunConfig
    directory: RunDirectory
    parallel: Parallel
    objective: Objective
    model: LlmNormForCausalLM | Foreign
    base: Base | None
    teacher: NamedTeacher | None
    replica: nn.Module
    statistics: RunningStatistics
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    hyperparameters: HyperparameterSchedule
    ema: EMA | None
    checkpoints: Checkpoints
    state: State
    progress: Progress
    course: Course
    branches: list[dict[str, Any]]
    steps: int
    former_steps: int | None
    saved: int | None
    micro_batch: int
    noise_seed: int
    selecting: Selecting | None
    elsewhere: RemoteRun | None
    stragglers: Stragglers
    tasks: RunTasks | None

    def batches(self) -> Iterator[list[MicroBatch]]:
        """Yield, without end, this process's micro-batches of each step from the run's next on.

        Those of a run with a selection are chosen when they are asked for.
        """
        if self.selecting is not None:
            return self.selecting.steps(self.progress)
        return self._in_order(self.progress.row)

    def unselected(self, first_row: int | None = None) -> list[MicroBatch]:
        """This process's micro-batches of a step of the rows from `first_row` on, as they come.

        Args:
            first_row: the run's next row if None.
        """
        return next(self._in_order(self.progress.row if first_row is None else first_row))

    def begins_a_stage(self) -> bool:
        """Whether a stage of the data begins with a row of the run's next step."""
        stage_at, row = self.objective.data.stage_at, self.progress.row
        return stage_at(row - 1) != stage_at(row + self.config.pool - 1)

    def _in_order(self, first_row: int) -> Iterator[list[MicroBatch]]:
        steps = self.objective.batches(
            first_row,
            global_batch=self.config.training.rows,
            rank=self.parallel.rank,
            world=self.parallel.world,
            micro_batch=self.micro_batch,
        )
        return (as_asked(self.model, step, self.parallel) for step in steps)

    def describe(self) -> str:
        """What the run reads, a line a source; its processes, its size and its length."""
        weights = sum(whole_shape(master(p)).numel() for p in self.model.parameters())
        weights += sum(layer.shape.numel() for layer in nf4.layers(self.model).values())
        hidden = sum(whole_shape(p).numel() for p in split(self.model).matrices.values())
        trained = f"{hidden / 1e6:.2f}M in hidden matrices"
        if self.base is not None:
            numbers = sum(whole_shape(p).numel() for p in self.parameters)
            trained = f"{numbers / 1e6:.2f}M of them trained, {trained}"
        selection = "" if self.selecting is None else f"\n{self.selecting.describe()}"
        stages = stages_table(self.objective.data, self.course)
        reads = f"{self.objective.describe(self.course.rows)}\n{stages}".rstrip("\n")
        return (
            f"{reads}\n"
            f"{describe(self.parallel, self.model, self.optimizer)}; {weights / 1e6:.2f}M "
            f"parameters ({trained}); {self.steps} steps{selection}"
        )


def prepare(
    config: RunConfig,
    run: RunDirectory,
    stack: ExitStack,
    *,
    data_command: str,
    dry_run: bool,
    remote: Remote | None = None,
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> Prepared:
    """Join the processes, open the data, build the model, and load the newest checkpoint.

    Args:
        config: resolved settings that agree with the run directory.
        run: where the run lives.
        stack: gets what must be closed at the end: process group, lock, the last save.
        data_command: prepares the data; quoted where it is missing.
        dry_run: neither lock the directory nor tidy its checkpoints.
        remote: what the run directory is copied up to, where it is an address. The directory is
            then checked here, after it was brought up to the store.
        seconds_left: until a process that was asked to stop must end; infinite before that.

    Raises:
        InputError: something that the user can mend.
    """
    parallel = Parallel(config.parallel, config.training)
    stack.callback(parallel.close)
    parallel.watch(run.ranks)

    def lock() -> None:
        stack.enter_context(RunLock(run.path))

    keep = Keep(config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best)
    elsewhere = None
    if remote is not None and not dry_run:
        parallel.on_main(lock)
        elsewhere = RemoteRun(remote.address, run, keep, parallel, seconds_left)
        stack.enter_context(elsewhere)
        agree(config, going_on=remote.going_on)
        elsewhere.begin()
    objective = config.objective.build(
        config,
        alone=parallel.world == 1,
        command=data_command,
        trained_on=trained_on(run, config.training.branch_from),
    )
    data = objective.data

    # The run directory, and the checkpoint to start from.
    if remote is None and not dry_run:
        parallel.on_main(lock)
    checkpoints = Checkpoints(
        run.checkpoints,
        keep=keep.newest,
        keep_every=keep.every,
        keep_best=keep.best,
        asynchronous=config.checkpoint.asynchronous,
        phases=parallel.phases,
        rank=parallel.rank,
        world=parallel.world,
        needed=None if elsewhere is None else elsewhere.needs,
    )
    parallel.calls.background = checkpoints.group
    stack.callback(checkpoints.wait)  # on the way out of an error too, while the lock is held
    if not dry_run:
        checkpoints.clean()
    start = starting_point(checkpoints, config.training.branch_from, parallel)
    from_there = came_from(run, start, data)
    own = from_there is not None and from_there.own
    if from_there is not None and not own:
        check_branch(config, data, from_there)
    reads = course(config, data, from_there)
    objective.read_in(reads.stages)
    micro_batch, steps = _micro_batch(config, objective, parallel), reads.steps
    tasks = RunTasks(config, data, steps) if config.evaluation.tasks else None

    # Model, layout, optimizer, schedule. A branch may learn from another teacher than its parent.
    teacher = give_teacher(config, objective, parallel, start.meta if start and own else {})
    ends = end_tokens(config, start, objective.ends)
    make = foreign_model if config.model.foreign else run_model
    model, fill, base = make(config, objective, parallel, start, ends)
    replica = parallel.prepare(model, fill)
    statistics = RunningStatistics(model, parallel.reduce)
    groups = split(model)
    optimizer = config.optimizer.build(groups, parallel.exchange())
    raise_rates(optimizer, groups, rate_factors(model, config.adapter))
    hyperparameters = config.optimizer.hyperparameters(config.schedule.build(steps), steps)
    ema = None
    if config.training.ema:
        weights = {
            name: local(master(p).detach())
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        ema = EMA(weights, config.training.ema, parallel.weights_changed)

    selecting = None
    if isinstance(config.selection, SelectionSettings):
        selecting = Selecting(config, objective, model, parallel, statistics, micro_batch)
    state = named_tensors(model, optimizer, ema)
    if selecting is not None:
        state |= selecting.state
    written = checkpoints.without_copies(state)
    if start is not None and not own:
        state = without_selection(state, start)
    progress, message = resume(checkpoints, start, state, reads, parallel)
    if not own:
        progress.window, progress.spikes_in_a_row = [], 0  # what is usual in a branch is not known
    if message and from_there is not None and not own:
        message += where_a_branch_reads(reads, from_there, data)
    parallel.phases.step = progress.step
    parallel.weights_changed()  # what was loaded reaches the model under ZeRO too
    if message:
        parallel.say(message)
    if isinstance(model, Foreign):
        looked_at(config, model, parallel)
    before = None
    if start is not None and own:
        before = former_steps(start, data.rows, data.context_length)
        if note := stretched(config, start, steps, before, optimizer):
            parallel.say(f"llmnorm: note: {note}")
    return Prepared(
        config=config,
        directory=run,
        parallel=parallel,
        objective=objective,
        model=model,
        base=base,
        teacher=teacher,
        replica=replica,
        statistics=statistics,
        parameters=[*groups.matrices.values(), *groups.auxiliary.values()],
        optimizer=optimizer,
        hyperparameters=hyperparameters,
        ema=ema,
        checkpoints=checkpoints,
        state=written,
        progress=progress,
        course=reads,
        branches=ancestors(reads, from_there),
        steps=steps,
        former_steps=before,
        saved=progress.step if own else None,
        micro_batch=micro_batch,
        noise_seed=_noise_seed(config.seed),
        selecting=selecting,
        elsewhere=elsewhere,
        stragglers=Stragglers(parallel),
        tasks=tasks,
    )


def _micro_batch(config: RunConfig, objective: Objective, parallel: Parallel) -> int:
    """How many rows one process runs at once.

    Raises:
        InputError: the global batch does not divide over the processes, or a process's share of it
            not into micro-batches; or there are fewer rows than processes.
    """
    total, world = config.training.rows, parallel.world
    micro_batch = objective.rows_at_once(config.training, world)
    if not config.objective.even_batches:
        if total < world:
            raise InputError(
                f"training.global_batch: {total} rows are too few for {world} processes; "
                f"give at least {world}, or start fewer processes"
            )
        return micro_batch
    try:
        config.training.check_processes(world)
    except ValueError as error:
        raise InputError(str(error)) from None
    share = total // world
    if share % micro_batch:
        nearest = min(
            (d for d in range(1, share + 1) if share % d == 0), key=lambda d: abs(d - micro_batch)
        )
        raise InputError(
            f"training.micro_batch: {micro_batch} does not divide the {share} rows of a process "
            f"(training.global_batch {total} over {world}); the nearest that does is {nearest}"
        )
    return micro_batch


def _noise_seed(seed: int) -> int:
    """What the noise of all steps is derived from; seeds that are close give no close numbers."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**31, (), generator=generator)) * 1_000_003
