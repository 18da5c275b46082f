"""The speed of a machine, measured by a run: `llmnorm plan CONFIG --calibrate RUN`.

    found = calibrate(Path("runs/small"), config, gpu)
    found.efficiency        takes the place of the stated one (time.py)

The run may be of another size, length and batch, and of other numbers of processes. It must be of
the same parts: another mixer or precision runs other kernels, whose efficiency says nothing.

What would surprise: the run's step is a median over its lines, the first left out, where blocks are
compiled and caches are cold. Evaluations and saves are not in it (runs/metrics.py).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llmnorm.analysis.plan.gpus import Gpu
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.time import StepWork, step_time, step_work
from llmnorm.checkpoints.store import Store
from llmnorm.config.file import load
from llmnorm.config.saved import differences, to_tree
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError
from llmnorm.runs.directory import existing
from llmnorm.runs.record import read_metrics

FEWEST = 3  # lines behind the first, for a median
# What may differ between two sizes of a model.
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    *("initializer_range", "embedding_std", "initialization", "export_as", "pretrained"),
)


@dataclass(frozen=True)
class Calibration:
    """What a run has measured.

    Attributes:
        run: its directory.
        seconds: of its median step.
        lines: how many the median is over.
        efficiency: share of the roofline that it reached.
    """

    run: Path
    seconds: float
    lines: int
    efficiency: float


def calibrate(path: Path, config: RunConfig, gpu: Gpu) -> Calibration:
    """The efficiency at which the run's own step is planned as long as it was.

    Args:
        path: a run directory.
        config: the run that is planned.
        gpu: what it is planned for, and what the run at `path` was computed on.

    Raises:
        InputError: the run is of another model or machine, has too few lines, or took no longer
            than its host and the other processes need by themselves.
    """
    existing(path)
    run = load(path).config
    refuse_another(run, config, path)
    environment = _environment(path)
    if ("cpu" if environment["device"] == "cpu" else "cuda") != gpu.device:
        raise InputError(
            f"--calibrate: {path} was computed on {environment['device']}, and the plan is for "
            f"{gpu.name}; give a run of the same machine"
        )
    measured, lines = step_seconds(path)
    kind = environment["sharding"]
    own = layout_of(
        run,
        gpu,
        environment["processes"],
        sharding=kind,
        replicas=run.parallel.replicas if kind == "hsdp" else 1,
    )
    work = step_work(own, record(own.config, own.micro_batch, own.device))
    return Calibration(path, measured, lines, _solved(work, measured, path))


def refuse_another(run: RunConfig, planned: RunConfig, path: Path) -> None:
    """Refuse a run whose kernels are others than those of what is planned.

    Raises:
        InputError: names the first setting in which they differ.
    """
    for key, (theirs, ours) in differences(_kernels(run), _kernels(planned)).items():
        raise InputError(
            f"--calibrate: {path} is of another model: {key} is {_shown(theirs)} there and "
            f"{_shown(ours)} here; give a run of the same parts, in any size"
        )


def _kernels(config: RunConfig) -> dict[str, Any]:
    """The settings that decide which kernels run."""
    model = {key: value for key, value in to_tree(config.model).items() if key not in SIZES}
    return {
        "model": model,
        "objective": {"name": getattr(config.objective, "name", type(config.objective).__name__)},
        "adapter": {"name": getattr(config.adapter, "name", type(config.adapter).__name__)},
        "training": {"precision": config.training.precision},
        "parallel": {"compile": config.parallel.compile},
    }


def step_seconds(path: Path) -> tuple[float, int]:
    """Seconds of a run's median step, and over how many lines of metrics.jsonl it is taken.

    Raises:
        InputError: there are too few.
    """
    record = read_metrics(existing(path).metrics).training
    rows = [*zip(record["step"], record["tokens"], record["tokens_per_second"], strict=True)]
    found = []
    for (before, tokens_before, _), (step, tokens, rate) in zip(rows, rows[1:], strict=False):
        if step > before and rate > 0:
            found.append((tokens - tokens_before) / rate / (step - before))
    if len(found) < FEWEST:
        raise InputError(
            f"--calibrate: {path} has {len(found)} lines of metrics behind the first, too few for "
            f"a median; train {FEWEST} steps or more with logging.every=1"
        )
    return median(found), len(found)


def _environment(path: Path) -> dict[str, Any]:
    """On how many processes and on what the run's newest checkpoint was written.

    Raises:
        InputError: there is none.
    """
    found = Store(existing(path).checkpoints).find("latest")
    if found is None:
        raise InputError(
            f"--calibrate: {path} has no checkpoint, which says on how many processes it ran; let "
            "it end, or stop it"
        )
    environment: dict[str, Any] = found[0].meta["environment"]
    return environment


def _solved(work: StepWork, measured: float, path: Path) -> float:
    """The efficiency at which a step takes the seconds that were measured."""
    low, high = 1e-6, 1e3  # a step's time falls as it grows
    least = step_time(work, high).seconds
    if measured <= least:
        raise InputError(
            f"--calibrate: a step of {path} took {measured:.3g} s, no longer than its host and its "
            f"other processes need by themselves here ({least:.3g} s); give a run of a larger model"
        )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if step_time(work, middle).seconds > measured:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _shown(value: Any) -> str:
    return "not there" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
