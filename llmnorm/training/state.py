"""The state of a run: what a checkpoint holds, and how a run resumes from one.

A checkpoint holds weights (`model.<name>`), optimizer state (`optimizer.<name>.<field>`), the
weights' moving average where there is one (`ema.<name>`), and the counts of `Progress`. Rows,
learning rates and noise are functions of these counts, so nothing else is saved.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoints, Interval, State, held, read_meta
from llmnorm.checkpoints.format import as_interval
from llmnorm.data.examples import Examples
from llmnorm.data.packed import PackedData
from llmnorm.models.convert import named_weights
from llmnorm.optim.fragments import Fragment, master
from llmnorm.optim.state import named_state
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.training.ema import EMA


@dataclass
class Progress:
    """How far a run is; saved in every checkpoint's meta."""

    step: int = 0
    row: int = 0
    """Number of the next row, counted from 0 at the run's first row."""
    tokens: int = 0
    """Trained on so far, over all processes. A language model counts labels, an encoder tokens."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Training time, that of earlier processes included."""

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Self:
        """The counts in a checkpoint's meta."""
        return cls(**{key: meta[key] for key in asdict(cls())})


def named_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, torch.Tensor | Interval]:
    """This process's part of a checkpoint, by name.

    These are the tensors themselves, not copies; tied ones appear once. Of a sharded tensor it is
    the rows that this process has.
    """
    masters = {name: master(p) for name, p in model.named_parameters()}
    fragments = {name: m for name, m in masters.items() if isinstance(m, Fragment)}
    weights = {name: held(fragments.get(name, t)) for name, t in named_weights(model).items()}
    average = ema.average if ema else {}
    return {
        **{f"model.{name}": part for name, part in weights.items()},
        **{f"optimizer.{name}": held(t) for name, t in named_state(optimizer, model).items()},
        **{f"ema.{name}": _in_the_place_of(weights[name], t) for name, t in average.items()},
    }


def _in_the_place_of(part: torch.Tensor | Interval, data: torch.Tensor) -> torch.Tensor | Interval:
    """`data` at the same rows (or elements) of the whole tensor as `part`."""
    return (
        part.like(data) if isinstance(part, Fragment) else as_interval(part)._replace(tensor=data)
    )


def go_on(
    checkpoints: Checkpoints,
    state: State,
    data: PackedData | Examples,
    parallel: Parallel,
    branch_from: Path | None,
) -> tuple[Progress, str | None]:
    """Copy the newest whole checkpoint into `state`, else the one that the run branches from.

    Returns:
        The counts there (zeros at the start of a run), and what to tell the user.

    Raises:
        InputError: the checkpoint was trained on other data, or holds other tensors.
    """
    if checkpoints.steps():
        path = checkpoints.find("latest")
    elif branch_from is not None:
        path = _branch_point(branch_from, parallel)
    else:
        return Progress(), None
    meta = read_meta(path)
    if meta["data"] != data.identity:
        raise InputError(
            f"{path}: was trained on the data {meta['data']}, this run's data is now "
            f"{data.identity} ({data.directory}); restore the corpus or start a new run_dir"
        )
    here, there = environment(parallel), meta["environment"]
    changed = [f"{k} {there[k]} -> {here[k]}" for k in here if here[k] != there.get(k, here[k])]
    checkpoints.load(path, state)
    said = f"going on from {path}"
    if changed:
        said += f"; the last bits may differ from an uninterrupted run: {', '.join(changed)}"
    return Progress.of(meta), said


def environment(parallel: Parallel) -> dict[str, Any]:
    """What the last bits of a run's numbers depend on besides its configuration."""
    cuda = parallel.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "processes": parallel.world,
        "sharding": parallel.sharding,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(parallel.device) if cuda else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _branch_point(path: Path, parallel: Parallel) -> Path:
    """The verified checkpoint that `training.branch_from` names."""
    number = re.fullmatch(r"step_(\d+)", path.name)
    if number is None or not path.is_dir():
        near = path if path.name == "checkpoints" else path.parent
        if (path / "checkpoints").is_dir():
            near = path / "checkpoints"
        there = sorted(p.name for p in near.glob("step_*")) if near.is_dir() else []
        raise InputError(
            f"training.branch_from: {path} is no checkpoint; "
            + (f"{near} has {', '.join(there)}" if there else "name RUN/checkpoints/step_N")
        )
    parent = Checkpoints(path.parent, rank=parallel.rank, world=parallel.world)
    return parent.find(int(number[1]))
