"""`llmnorm compare BASE --arm NAME key=value ...`: is this part better here?

    llmnorm compare base.yaml --arm layer model.norm=layer          against base.yaml as it is
    llmnorm compare base.yaml --arm rms model.norm=rms --arm layer model.norm=layer --parallel 2

The protocol (which runs, and why) is in compare_plan.py, the runs in compare_runs.py, what is made
of them in compare_statistics.py and compare_results.py. The directory holds afterwards

    report.md, comparison.png    the page and its picture
    result.json, table.csv       the numbers
    runs.jsonl                   a line a finished run: all that the others are made from
    runs/                        run directories and their logs (may be deleted)

The same command goes on where it was stopped; with more seeds, arms or points it adds the runs that
are missing.
"""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llmnorm.analysis.compare import plan as compare_plan
from llmnorm.analysis.compare import report as compare_report
from llmnorm.analysis.compare.plan import Arm, Protocol, Run
from llmnorm.analysis.compare.results import results
from llmnorm.analysis.compare.runs import Launch, Ledger, Slots, duration, execute, launch, slots
from llmnorm.config.tree import RunConfig
from llmnorm.data import packing
from llmnorm.machine.files import write_whole
from llmnorm.machine.gpus import check_gpu
from llmnorm.part import InputError
from llmnorm.runs.lock import RunLock, is_locked

START_SECONDS = 5.0  # of a run: imports, checks, evaluation


def compare(
    protocol: Protocol,
    directory: Path,
    *,
    command: str,
    runs: Path | None = None,
    parallel: int = 1,
    per_gpu: int = 1,
    plan: bool = False,
    keep_checkpoints: bool = False,
    start: Launch = launch,
) -> int:
    """Make the runs that are missing, then tables, picture and report; or print the plan.

    Args:
        directory: where the results go, and what was run before lies.
        command: what the report says made it.
        runs: where run directories are made; left out, `directory / "runs"`.
        parallel: runs at a time.
        per_gpu: runs that share a GPU; 1: each has one of its own.
        plan: print every run that would be made with an estimate, make none.
        keep_checkpoints: keep those of finished runs.
        start: how a run is started.

    Returns:
        The exit code: 0, or 143 / 130 after SIGTERM / SIGINT.

    Raises:
        InputError: something that the user can mend, in one line.
    """
    device = protocol.configs[protocol.baselines[0]].training.device
    places = slots(parallel, device, per_gpu)
    compare_plan.agree(protocol, directory)
    ledger = Ledger(directory / "runs.jsonl")
    estimate = Estimate(protocol, ledger, places)
    runs = directory / "runs" if runs is None else runs
    if plan:
        print(describe(protocol, ledger, runs, places, estimate))
        return 0
    check_gpu(device)
    if is_locked(directory):
        raise InputError(f"--out {directory}: another comparison is running in this directory")
    with RunLock(directory):
        compare_plan.save(protocol, directory)
        config = protocol.configs[protocol.baselines[0]]
        packed = packing.prepare(config.data, config.tokenizer)  # all arms read the same tokens
        code = execute(
            protocol,
            ledger,
            runs,
            places,
            estimate.seconds,
            keep_checkpoints=keep_checkpoints,
            start=start,
        )
        if code:
            return code
        tokens = sum(source.validation_tokens for source in packed.sources)
        found = results(protocol, ledger.records, tokens)
        write(found, directory, command)
    for baseline in protocol.baselines:
        print(compare_report.text_table(found, baseline))
    print(f"report: {directory / 'report.md'}")
    return 0


def write(found: Mapping[str, Any], directory: Path, command: str) -> None:
    """The files that results are read from."""
    from llmnorm.analysis.compare.plot import draw

    draw(found, directory / "comparison.png", directory.name)
    page = compare_report.page(found, directory.name, command, "comparison.png")
    kept = {**found, "arms": {n: _without_curves(arm) for n, arm in found["arms"].items()}}
    for name, text in (
        ("report.md", page),
        ("table.csv", compare_report.csv_table(found)),
        ("result.json", json.dumps(_plain(kept), indent=1, allow_nan=False) + "\n"),
    ):
        write_whole(directory / name, text)


def describe(
    protocol: Protocol, ledger: Ledger, runs: Path, places: Slots, estimate: "Estimate"
) -> str:
    """Every run that would be made, its command and how long it may take."""
    lines, left = [], []
    expected = protocol.needed(ledger.losses, expected=True)
    for run in expected:
        if run.key in ledger.records:
            lines.append(f"{run.key}: finished")
            continue
        left.append((run, 1.0))
        seconds = estimate.seconds([(run, 1.0)])
        lines.append(
            f"{run.key}: {protocol.steps_of(run)} steps, {protocol.tokens_of(run):,} tokens, "
            f"{duration(seconds)}\n"
            f"  {shlex.join(['llmnorm', 'train', *protocol.words(run, runs / run.key)])}"
        )
    total = estimate.seconds(left) / places.count
    lines.append(
        f"{len(left)} of {len(expected)} runs to make, {places.describe()}, about "
        f"{duration(total)} ({estimate.source})"
    )
    if any(protocol.tuned(name) for name in protocol.arms):
        lines.append(
            "A grid grows while its best learning rate is at an edge; then there are more."
        )
        lines.append("Learning rates of the paired seeds are known after the tuning.")
    return "\n".join(lines)


class Estimate:
    """How long runs take: by those that are finished, else by counting operations."""

    def __init__(self, protocol: Protocol, ledger: Ledger, places: Slots) -> None:
        """Nothing is measured before it is asked for."""
        self._protocol, self._ledger, self._places = protocol, ledger, places
        self._flops: dict[str, float] = {}
        self._rate: float | None = None

    @property
    def source(self) -> str:
        """Where the estimate comes from."""
        if any(r.tokens_per_second for r in self._ledger.records.values()):
            return "by the runs that are finished"
        return "counted: model operations at the rate of this machine's matrix products"

    def seconds(self, runs: Iterable[tuple[Run, float]]) -> float:
        """What the given shares of runs take one after the other."""
        measured: dict[str, list[float]] = {}
        for record in self._ledger.records.values():
            if record.tokens_per_second:
                arm = record.run.partition("/")[0]
                measured.setdefault(arm, []).append(record.tokens_per_second)
        total = 0.0
        for run, share in runs:
            if run.arm in measured:
                rate = median(measured[run.arm])
            elif measured:  # another arm's is nearer to it than a count
                rate = median([median(rates) for rates in measured.values()])
            else:
                rate = self._counted(run.arm)
            total += START_SECONDS + share * self._protocol.tokens_of(run) / rate
        return total

    def _counted(self, arm: str) -> float:
        """Tokens a second, if every operation ran as fast as the model's largest products."""
        from llmnorm.models.configuration import LlmNormConfig
        from llmnorm.models.flops import flops_per_token

        config = self._protocol.configs[arm]
        if arm not in self._flops:
            model = LlmNormConfig.from_settings(
                config.model,
                vocab_size=_vocabulary(config),
                architectures=[config.objective.architecture],
            )
            self._flops[arm] = flops_per_token(model, config.data.context_length)
        if self._rate is None:
            rows = config.training.micro_batch or config.training.rows
            self._rate = _product_rate(
                min(rows * config.data.context_length, 8192),
                config.model.hidden_size,
                config.model.intermediate_size,
                self._places,
            )
        return self._rate / self._flops[arm]


def _vocabulary(config: RunConfig) -> int:
    if config.model.vocab_size != "auto":
        return int(config.model.vocab_size)
    packed = packing.find(config.data, config.tokenizer)
    return packed.vocab_size if packed else config.tokenizer.vocab_size


def _product_rate(rows: int, width: int, inner: int, places: Slots) -> float:
    """Operations a second of (rows, width) @ (width, inner), the best of a few."""
    import time

    import torch

    device = torch.device("cuda" if places.gpus and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(places.threads)
    left, right = torch.randn(rows, width, device=device), torch.randn(width, inner, device=device)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * width * inner / best


def read_arms(base: Path, shared: Sequence[str], given: Sequence[Sequence[str]]) -> list[Arm]:
    """The arms of the command line.

    Args:
        base: the configuration that arms start from.
        shared: overrides of all arms.
        given: for each `--arm` its words: a name, a configuration of its own (or none), overrides.

    Raises:
        InputError: a word is none of these.
    """
    arms = []
    for name, *words in given:
        if "=" in name or "/" in name or name.startswith("."):
            raise InputError(f"--arm {name}: begins with the arm's name: --arm NAME key=value ...")
        path = base
        if words and "=" not in words[0]:
            path, words = Path(words[0]), words[1:]
        if wrong := [word for word in words if "=" not in word]:
            raise InputError(f"--arm {name}: '{wrong[0]}' is not an override; write key.sub=value")
        arms.append(Arm(name, path, (*shared, *words)))
    if len(arms) == 1:  # against the configuration as it is
        if arms[0].name == "base":
            raise InputError("--arm base: the other arm has this name: the configuration as it is")
        arms.insert(0, Arm("base", base, tuple(shared)))
    if not arms:
        raise InputError("give at least one --arm NAME key=value ...")
    return arms


def _without_curves(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if key != "curves"}


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: null, and text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' * (value < 0)}infinity"
    return value
