"""What a checkpoint of a run holds, where a run starts from, and how it resumes.

A checkpoint holds weights (`model.<name>`), optimizer state (`optimizer.<name>.<field>`), the
weights' moving average where there is one (`ema.<name>`), what a selector remembers
(`selection.<name>`), and the counts of `Progress`. Rows,
learning rates and noise are functions of these counts, so they are not saved. Where some weights
are frozen, it holds those that are trained, and its meta names the base (`training/model.py`).
"""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoint, Checkpoints, Interval, State, own_rows
from llmnorm.checkpoints.format import as_interval, read_checkpoint
from llmnorm.checkpoints.store import Store
from llmnorm.config.manifest import meta_of_run
from llmnorm.config.pretrained import describe
from llmnorm.config.stock import Tokens, all_tokens
from llmnorm.config.tree import RunConfig
from llmnorm.data.run_data import RunData
from llmnorm.data.settings import TrainedOn
from llmnorm.data.stages import Course, Start
from llmnorm.models.convert import named_weights
from llmnorm.optim.fragments import Fragment, master
from llmnorm.optim.state import named_state
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.training.ema import EMA

SELECTION = "selection."  # what the names of a selector's tensors begin with


@dataclass
class Progress:
    """How far a run is; part of every checkpoint's meta."""

    step: int = 0
    row: int = 0
    """Number of the next row, counted from the run's first."""
    tokens: int = 0
    """Trained on so far, over all processes; an objective says which of its tokens count."""
    skipped_steps: int = 0
    """Steps without an update, since a number was not finite."""
    skipped_in_a_row: int = 0
    skipped_spikes: int = 0
    """Steps without an update, since a number was a spike (spike.py)."""
    spikes_in_a_row: int = 0
    """Of those, the ones since the last update."""
    window: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, where `training.spike` is given; oldest first."""
    best_loss: float | None = None
    """Lowest validation loss of the run; None before there is a finite one."""
    best_step: int = 0
    """The step that had it."""
    not_better: int = 0
    """Evaluations since then, none of which had a lower loss."""
    evaluated_step: int = 0
    """Step of the last evaluation that these three count."""
    seconds: float = 0.0
    """Training time, summed over all processes that continued the run."""

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Self:
        """The counts in a checkpoint's meta; an older version's lacks some."""
        start = asdict(cls())
        later = (
            *("best_loss", "best_step", "not_better", "evaluated_step"),
            *("skipped_spikes", "spikes_in_a_row", "window"),
        )
        return cls(**{k: meta.get(k, start[k]) if k in later else meta[k] for k in start})

    def count_evaluation(self, loss: float) -> None:
        """Count the evaluation of the present step, unless it is counted already.

        A step is saved before or after its evaluation, so a run that goes on from it cannot know.
        """
        if self.evaluated_step == self.step:
            return
        self.evaluated_step = self.step
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.not_better = loss, self.step, 0
        else:
            self.not_better += 1

    def forget_evaluations(self) -> None:
        """Count evaluations anew."""
        self.best_loss, self.best_step, self.not_better = None, 0, 0


def named_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, torch.Tensor | Interval]:
    """What this process holds of the run's state, by its name in a checkpoint.

    The tensors are the live ones, so that loading into them changes model and optimizer. Tied
    weights appear once; of a sharded tensor it is this process's rows. Frozen weights are left out,
    and so are the buffers of modules of which nothing is trained, unless all weights are trained.

    Raises:
        InputError: a tensor is laid out over the processes in a way that no checkpoint can hold.
    """
    masters = {name: master(p) for name, p in model.named_parameters()}
    fragments = {name: m for name, m in masters.items() if isinstance(m, Fragment)}
    modules = dict(model.named_modules())
    if any(not p.requires_grad for p in model.parameters()):
        kept = {n for n, m in modules.items() if any(p.requires_grad for p in _own(m))}
        modules = {n: m for n, m in modules.items() if n in kept}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    weights = {n: t for n, t in named_weights(modules).items() if n not in frozen}
    tensors = {
        **{f"model.{name}": fragments.get(name, t) for name, t in weights.items()},
        **{f"optimizer.{name}": t for name, t in named_state(optimizer, model).items()},
    }
    state = {name: own_rows(name, tensor) for name, tensor in tensors.items()}
    for name, average in (ema.average if ema else {}).items():
        state[f"ema.{name}"] = _like(state[f"model.{name}"], average)
    return state


def without_selection(
    state: dict[str, torch.Tensor | Interval], start: Checkpoint
) -> dict[str, torch.Tensor | Interval]:
    """`state` as a branch loads it from another run, which may have had another selection.

    What only one of the two has of a selector's history is left as it is, and read for nothing.
    """
    there = start.manifest["tensors"]
    kept = {n: t for n, t in state.items() if n in there or not n.startswith(SELECTION)}
    for name, entry in there.items():
        if name.startswith(SELECTION) and name not in kept:
            kept[name] = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    return kept


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _like(part: torch.Tensor | Interval, data: torch.Tensor) -> torch.Tensor | Interval:
    """The numbers `data`, as the same part of a whole tensor as `part`."""
    if isinstance(part, Fragment):
        return part.like(data)
    return as_interval(part)._replace(tensor=data)


def trained_on(run: RunDirectory, branch_from: Path | None) -> TrainedOn | None:
    """The data that a run's checkpoints name, or those of the run that it branches from.

    It is known before the data is opened; all checkpoints of a run name the same.
    """
    store = Store(run.checkpoints)
    paths = [store.path(step) for step in reversed(store.steps())]
    for path in [*paths, branch_from] if branch_from else paths:
        with suppress(InputError):  # `starting_point` says what is wrong with it
            identity = read_checkpoint(path).meta["data"]
            return TrainedOn(path, identity, branch=path not in paths)
    return None


def starting_point(
    checkpoints: Checkpoints, branch_from: Path | None, parallel: Parallel
) -> Checkpoint | None:
    """The checkpoint that the run starts from; None where it starts at its first step.

    That is its own newest whole one, else the one that `training.branch_from` names. All processes
    call this together and get the same answer.

    Raises:
        InputError: no checkpoint of the run is whole, or there is none to branch from.
    """
    newest = checkpoints.newest()
    if newest is not None or branch_from is None:
        return newest
    number = re.fullmatch(r"step_(\d+)", branch_from.name)
    if number is None:
        raise InputError(
            f"training.branch_from: {branch_from} is no checkpoint; {_nearby(branch_from)}"
        )
    parent = Checkpoints(branch_from.parent, rank=parallel.rank, world=parallel.world)
    try:
        return parent.find(int(number[1]))
    except InputError as error:
        raise InputError(f"training.branch_from: {error}") from None


def end_tokens(config: RunConfig, start: Checkpoint | None, own: Tokens) -> Tokens:
    """The tokens that end a text: the run's own, and all of the weights that it starts from.

    Args:
        config: names these weights (`model.pretrained`); where the run has another tokenizer than
            they have, the numbers of their tokens mean nothing and are left out.
        start: the checkpoint that the run goes on from. It holds them already, so that the run
            does not lose them with the weights that it began from.
        own: the end tokens of the run's data.

    Returns:
        A token's id, or the list of several; `own` stands first.
    """
    if start is not None:
        return all_tokens(own, meta_of_run(start.path, start.manifest)["model"].get("eos_token_id"))
    if config.model.pretrained is None:
        return own
    base = describe(config.model.pretrained, "model.pretrained", (), classes=config.model.classes)
    tokenizer = config.tokenizer.directory
    same = tokenizer and base.tokenizer and tokenizer.resolve() == base.tokenizer.resolve()
    return all_tokens(own, base.config.get("eos_token_id")) if same else own


def came_from(run: RunDirectory, start: Checkpoint | None, data: RunData) -> Start | None:
    """What the run's starting point says of its rows.

    Raises:
        InputError: it is the run's own and was trained on other data.
    """
    if start is None:
        return None
    meta = meta_of_run(start.path, start.manifest)
    own = start.path.parent == run.checkpoints
    if own and meta["data"] != data.identity:
        raise InputError(
            f"{start.path}: was trained on the data {meta['data']}, this run's data is now "
            f"{data.identity} ({data.directory}); restore the corpus or start a new run_dir"
        )
    return Start(start.path, meta, own)


def resume(
    checkpoints: Checkpoints,
    start: Checkpoint | None,
    state: State,
    course: Course,
    parallel: Parallel,
) -> tuple[Progress, str | None]:
    """Copy the starting point into `state`.

    Returns:
        The counts there (zeros without a starting point), with the row that the run goes on with;
        and a message for the user.

    Raises:
        InputError: the checkpoint holds other tensors.
    """
    if start is None:
        return Progress(), None
    path, meta = start.path, meta_of_run(start.path, start.manifest)
    checkpoints.load(start, state)
    here, there = environment(parallel), meta["environment"]
    changed = [f"{k} {there[k]} -> {here[k]}" for k in here if here[k] != there.get(k, here[k])]
    message = f"going on from {path}"
    if changed:
        message += f"; the last bits may differ from an uninterrupted run: {', '.join(changed)}"
    return Progress.of({**meta, "row": course.pace.row}), message


def environment(parallel: Parallel) -> dict[str, Any]:
    """What the last bits of a run depend on besides its configuration."""
    cuda = parallel.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "processes": parallel.world,
        "sharding": parallel.sharding,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(parallel.device) if cuda else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _nearby(path: Path) -> str:
    """The checkpoints that a path to no checkpoint may have meant, for a message."""
    near = path if path.name == "checkpoints" else path.parent
    if (path / "checkpoints").is_dir():
        near = path / "checkpoints"
    there = sorted(p.name for p in near.glob("step_*")) if near.is_dir() else []
    return f"{near} has {', '.join(there)}" if there else "name RUN/checkpoints/step_N"
