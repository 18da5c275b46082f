"""What `llmnorm plan` does: a layout is planned, printed, and written where that is asked for."""

import json
from pathlib import Path

from llmnorm.analysis.plan.cache import cache_line
from llmnorm.analysis.plan.calibration import calibrate
from llmnorm.analysis.plan.gpus import Gpu
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.memory import memory
from llmnorm.analysis.plan.optimizer import owned
from llmnorm.analysis.plan.recording import record, refuse_uncounted
from llmnorm.analysis.plan.report import (
    as_json,
    describe,
    refuse_what_does_not_fit,
    what_helps_most,
)
from llmnorm.analysis.plan.search import fitting
from llmnorm.analysis.plan.time import (
    EFFICIENCY,
    length_of,
    refuse_untimed,
    run_time,
    step_time,
    step_work,
)
from llmnorm.analysis.plan.time_report import (
    describe_fits,
    describe_law,
    describe_time,
    describe_trace,
    time_json,
)
from llmnorm.analysis.plan.trace import refuse_untraced, shortened, trace
from llmnorm.analysis.plan.traffic import transfers
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError


def plan(
    config: RunConfig,
    gpu: Gpu,
    gpus: int,
    *,
    sharding: str | None,
    output: Path | None,
    calibrated_by: Path | None = None,
    price: float | None = None,
    traced: int | None = None,
) -> None:
    """Print what a run needs in memory and time; write plan.json and memory.png into a directory.

    Args:
        config: settings without `auto`.
        gpu: what each process computes on.
        gpus: how many.
        sharding: in the place of `parallel.sharding`.
        output: the directory; None: nothing is written.
        calibrated_by: a run of the same machine, whose speed takes the place of the stated one.
        price: of one GPU for an hour.
        traced: the number of a process whose step is tried out; -1 is the last; None: none is.

    Raises:
        InputError: the layout is impossible, the run has no known length, the process that is
            tried out cannot take its step, or the layout does not fit; the plan is printed before
            the last two.
    """
    refuse_uncounted(config, "plan")
    refuse_untimed(config)
    layout = layout_of(config, gpu, gpus, sharding=sharding)
    if traced is not None:
        refuse_untraced(layout)
    steps = length_of(config)
    calibration = None if calibrated_by is None else calibrate(calibrated_by, config, gpu)
    recording = record(layout.config, layout.micro_batch, layout.device)
    needed = memory(layout, recording)
    best = what_helps_most(layout, needed, recording)
    print(describe(layout, needed, recording, best))
    print(cache_line(config), flush=True)
    efficiency = EFFICIENCY if calibration is None else calibration.efficiency
    step = step_time(step_work(layout, recording), efficiency)
    run = run_time(step, steps, price)
    print(f"\n{describe_time(step, run, calibration)}")
    print(describe_law(config, run.tokens), flush=True)
    if output is not None:
        from llmnorm.analysis.plan.picture import draw

        found = as_json(layout, needed, recording, best)
        found["time"] = time_json(step, run, calibration)
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "plan.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out: {output} cannot be written: {error}") from None
        draw(layout, recording, output / "memory.png")
        print(f"written: {output / 'plan.json'}, {output / 'memory.png'}")
    if traced is not None:
        short = shortened(layout)
        own = owned(layout, recording)
        rank = traced if traced >= 0 else layout.world - 1
        print(f"\n{describe_trace(trace(short, rank, transfers(short, recording, own)))}")
    refuse_what_does_not_fit(layout, needed, best)


def fit(config: RunConfig, gpu: Gpu, gpus: int, calibrated_by: Path | None = None) -> None:
    """Print the layouts of a run that fit, the fastest first.

    Args:
        config, gpu, gpus, calibrated_by: as in `plan`.

    Raises:
        InputError: nothing fits.
    """
    refuse_uncounted(config, "plan")
    refuse_untimed(config)
    calibration = None if calibrated_by is None else calibrate(calibrated_by, config, gpu)
    efficiency = EFFICIENCY if calibration is None else calibration.efficiency
    print(describe_fits(fitting(config, gpu, gpus, efficiency)))
