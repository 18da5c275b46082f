"""The plan of a run's time as lines and as JSON, with the Step Law's numbers beside the run's."""

from typing import Any

from llmnorm.analysis.compare.estimate import duration
from llmnorm.analysis.plan.calibration import Calibration
from llmnorm.analysis.plan.search import Candidate
from llmnorm.analysis.plan.time import RunTime, StepTime, preparation_seconds
from llmnorm.analysis.plan.trace import Trace
from llmnorm.config.tree import RunConfig
from llmnorm.optim import step_law
from llmnorm.training.automatic import advice
from llmnorm.training.outline import parameters_outside_the_embedding

DAY = 86_400.0
SHOWN = 12  # layouts of a search


def describe_time(step: StepTime, run: RunTime, calibration: Calibration | None) -> str:
    """What `llmnorm plan` prints of time and cost."""
    source = "stated; --calibrate RUN measures it"
    if calibration is not None:
        source = (
            f"measured: {calibration.run}, {calibration.seconds:.3g} s a step, the median of "
            f"{calibration.lines} lines"
        )
    rows = [
        ("forward and backward passes", step.computing),
        *([("the host's starts, if longer", step.starting)] if step.starting else []),
        ("waiting for other processes", step.waiting),
        ("update", step.updating),
        ("a step", step.seconds),
    ]
    flops = step.flops
    cost = "" if run.cost is None else f", costs {run.cost:,.2f}"
    return "\n".join(
        [
            f"time (efficiency {step.efficiency:.2f}, {source}):",
            *(f"{name:28}  {seconds:10.4g} s" for name, seconds in rows),
            f"operations a token: {flops.products:.3g} of products, {flops.attention:.3g} of "
            f"attention, {flops.recurrences:.3g} of recurrences",
            *(
                f"sends {t.what:22}  {t.sent / 1e9:10.4g} GB in {t.calls:,.0f} calls "
                f"({t.how} among {t.group.size}{' on several nodes' if t.group.across else ''}, "
                f"{t.seconds(step.layout.gpu):.3g} s)"
                for t in step.transfers
                if t.group.size > 1
            ),
            f"{step.tokens_per_second:,.0f} tokens/s, {step.tokens_per_second * DAY / 1e9:.3g} "
            f"billion a day, MFU {step.mfu:.1%}",
            f"the run: {run.steps:,} steps, {run.tokens:,} tokens, {_days(run.seconds)}{cost}",
            f"data: so many tokens, each read once, are prepared in about "
            f"{_days(preparation_seconds(run.tokens))} on this machine",
        ]
    )


def describe_law(config: RunConfig, tokens: float) -> str:
    """The Step Law's batch and learning rate beside those of the run."""
    parameters = parameters_outside_the_embedding(config)
    batch = config.training.rows * config.data.context_length
    own = f"learning rate {config.optimizer.lr:g}, batch {batch:,} tokens"
    if parameters < step_law.SMALLEST:
        return f"{own}; the Step Law says nothing of models below 10 million parameters"
    found = advice(config, parameters, tokens)
    outside = "" if found.fitted else ", outside of the 0.2 to 1.1 billion it was fitted to"
    return (
        f"{own}; the Step Law (arXiv 2503.04715): {found.lr:.3g} at this batch, "
        f"{found.batch:,.0f} tokens ({parameters / 1e6:.1f}M parameters outside the "
        f"embedding{outside})"
    )


def describe_fits(candidates: list[Candidate]) -> str:
    """The table of `--fit`."""
    lines = [
        f"{'sharding':8}  {'replicas':>8}  {'micro batch':>11}  {'recomputed':>10}  {'GiB':>7}  "
        f"{'s a step':>9}  {'tokens/s':>12}"
    ]
    for layout, needed, step in candidates[:SHOWN]:
        lines.append(
            f"{layout.sharding:8}  {layout.replicas if layout.sharding == 'hsdp' else 1:>8}  "
            f"{layout.micro_batch:>11}  {'yes' if layout.recompute else 'no':>10}  "
            f"{needed / 2**30:>7.1f}  {step.seconds:>9.4f}  {step.tokens_per_second:>12,.0f}"
        )
    if len(candidates) > SHOWN:
        lines.append(f"and {len(candidates) - SHOWN} slower ones")
    return "\n".join(lines)


def describe_trace(found: Trace) -> str:
    """What `--trace` prints."""
    layout = found.layout
    batches = f"{layout.accumulation} micro-batch{'es' if layout.accumulation > 1 else ''}"
    lines = [
        f"trace: process {found.rank} of {layout.world} took a step of {batches} on shapes alone "
        f"in {found.seconds:.0f} s; every parameter is cut as it should be and has a gradient"
    ]
    for row in found.collectives:
        planned = "" if row.planned is None else f", planned {row.planned / 1e9:.4g}"
        lines.append(
            f"  {row.how:15} among {row.group:5}  {row.calls:6} calls  "
            f"{row.sent / 1e9:10.4g} GB sent{planned}"
        )
    if found.empty:
        lines.append(
            f"  it holds no row of {len(found.empty)} parameters ({found.empty[0]}, ...), which "
            f"{layout.shards} processes share; parallel.replicas makes these groups smaller"
        )
    if found.matrices is not None:
        lines.append(
            f"  it owns {found.matrices} matrices; the busiest owner has {found.balance:.2f} times "
            "the mean work"
        )
    return "\n".join(lines)


def time_json(step: StepTime, run: RunTime, calibration: Calibration | None) -> dict[str, Any]:
    """The same as plain values: seconds, bytes and operations."""
    return {
        "efficiency": step.efficiency,
        "calibrated_by": None if calibration is None else str(calibration.run),
        "flops_per_token": step.flops._asdict(),
        "computing": step.computing,
        "starting": step.starting,
        "waiting": step.waiting,
        "updating": step.updating,
        "step": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "transfers": [
            {
                "what": t.what,
                "how": t.how,
                "processes": t.group.size,
                "calls": t.calls,
                "bytes": t.sent,
                "seconds": t.seconds(step.layout.gpu),
            }
            for t in step.transfers
        ],
        "steps": run.steps,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "cost": run.cost,
        "preparation_seconds": preparation_seconds(run.tokens),
    }


def _days(seconds: float) -> str:
    return f"{seconds / DAY:.1f} days" if seconds >= 2 * DAY else duration(seconds)
