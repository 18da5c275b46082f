"""The protocol of a comparison: which runs it needs, as a pure function of those that are finished.

Each arm is a configuration of the same length in tokens on the same data. First its learning rate
is tuned: a grid of `lr_points` rates around the arm's own, a factor 2 apart, one seed, full length
and complete schedule; while the best is at an edge the grid grows there, so every arm's best rate
has a worse neighbour on either side. `lr * weight_decay` stays what the arm wrote. Then all arms
train with the same `seeds` (others than the tuning's), which set initial weights and data order.
Last come the horizons, by which a gap in loss is converted into a factor in length:

    horizons: baseline   the baselines also run for 1.25 and 1.5 of the length (cheap)
    horizons: arms       every other arm also runs for 0.6, 0.7, 0.8 and 0.9 of it
    horizons: none       no run of another length: gaps stay gaps

Source: "Fantastic Pretraining Optimizers and Where to Find Them", arXiv 2509.02046: tune every arm
alike and compare at the ends of schedules only; rankings flip during the decay.

What would surprise: `data.seed` is written into every run, so that nothing an arm does moves a row;
where the base file sets it, all seeds share that one order.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig, changeable, differences, to_tree
from llmnorm.data.packing import find
from llmnorm.machine.files import write_whole
from llmnorm.part import InputError, nearest

Horizons = Literal["baseline", "arms", "none"]
HORIZONS = {"baseline": (1.0, 1.25, 1.5), "arms": (0.6, 0.7, 0.8, 0.9, 1.0), "none": (1.0,)}
MOST_STEPS = 4  # by which a grid grows to one side: a factor 16 beyond its edge
LENGTHS = ("training.steps", "training.tokens", "training.epochs")
LINES = 50  # of metrics that a run logs: its learning curve, and its rate as their median

# What a comparison sets itself, in every run.
OWN = (
    "run_dir",
    "seed",
    "data.seed",
    "evaluation.every",
    "evaluation.prompts",
    "evaluation.samples",
    "checkpoint",
    "logging.every",
)


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: what it is called in tables and file names.
        path: its configuration file.
        overrides: `key=value`, those of all arms first.
    """

    name: str
    path: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run: an arm at a learning rate (None: as it is written), length and seed."""

    arm: str
    lr: float | None
    seed: int
    horizon: float = 1.0

    @property
    def key(self) -> str:
        """Its name, and its directory below the comparison's runs."""
        rate = f"lr{self.lr:.6g}-" if self.lr is not None else ""
        return f"{self.arm}/{rate}seed{self.seed}-x{self.horizon:g}"


# Loss of every finished run by its key, infinite where it diverged.
Losses = Mapping[str, float]


@dataclass(frozen=True)
class Protocol:
    """What is compared and how; made by `read`.

    Attributes:
        arms: by name, in the order of the tables.
        configs: their resolved settings.
        steps: their length in global batches.
        baselines: names of the arms that the others are held against; the first is drawn.
        untuned: names of the arms that run as they are written.
        seeds: how many paired seeds.
        lr_points: learning rates a grid begins with; 1: none is tuned.
        horizons: whose length is varied.
    """

    arms: dict[str, Arm]
    configs: dict[str, RunConfig]
    steps: dict[str, int]
    baselines: tuple[str, ...]
    untuned: tuple[str, ...]
    seeds: int
    lr_points: int
    horizons: Horizons

    @property
    def tuning_seed(self) -> int:
        """The seed of the tuning runs: the first baseline's own."""
        return self.configs[self.baselines[0]].seed

    @property
    def paired_seeds(self) -> list[int]:
        """The seeds that all arms share; none of them chose a learning rate."""
        return [self.tuning_seed + 1 + k for k in range(self.seeds)]

    def tuned(self, arm: str) -> bool:
        """Whether this arm's learning rate is searched."""
        return arm not in self.untuned and self.lr_points > 1

    def centre(self, arm: str) -> float:
        """The learning rate that the arm writes."""
        return float(self.configs[arm].optimizer.lr)

    def horizons_of(self, arm: str) -> tuple[float, ...]:
        """The lengths at which this arm is run, in units of the comparison's."""
        among = self.baselines if self.horizons == "baseline" else self.baselines[:1]
        varied = (arm in among) == (self.horizons == "baseline")
        return HORIZONS[self.horizons] if varied else (1.0,)

    def grid(self, arm: str, losses: Losses) -> list[Run]:
        """The tuning runs of an arm that are known to be needed, the lowest rate first."""
        half = self.lr_points // 2
        low, high = -half, half
        while True:
            runs = [
                Run(arm, self.centre(arm) * 2.0**k, self.tuning_seed) for k in range(low, high + 1)
            ]
            if not all(run.key in losses for run in runs):
                return runs
            best = _best(runs, losses)
            if best == runs[0] and low > -half - MOST_STEPS:
                low -= 1
            elif best == runs[-1] and high < half + MOST_STEPS:
                high += 1
            else:
                return runs

    def best_lr(self, arm: str, losses: Losses) -> float | None:
        """The learning rate of the arm's paired runs, None while it is being searched.

        Where no rate has a finite loss it is the lowest.
        """
        runs = self.grid(arm, losses)
        return _best(runs, losses).lr if all(run.key in losses for run in runs) else None

    def at_edge(self, arm: str, losses: Losses) -> bool:
        """Whether even the grown grid has its best rate at an edge."""
        runs = self.grid(arm, losses)
        return self.best_lr(arm, losses) in (runs[0].lr, runs[-1].lr)

    def paired(self, arm: str, lr: float | None) -> list[Run]:
        """The runs of an arm with the paired seeds: by seed, and within it by length."""
        return [
            Run(arm, lr, seed, horizon)
            for seed in self.paired_seeds
            for horizon in self.horizons_of(arm)
        ]

    def needed(self, losses: Losses, *, expected: bool = False) -> list[Run]:
        """Every run that the comparison is known to need, in the order in which they are made.

        Tuning goes from the centres outwards, seeds before horizons, arms by turns: so that a table
        can be had early, and whatever else slows the machine down meets all arms alike.

        Args:
            losses: those of the runs that are finished.
            expected: also the paired runs of arms whose rate is still being searched, at the centre
                of their grid: what an estimate of the remaining time counts.
        """
        runs: list[tuple[tuple[float, ...], Run]] = []
        for place, arm in enumerate(self.arms):
            lr: float | None = None
            if self.tuned(arm):
                grid, lr = self.grid(arm, losses), self.best_lr(arm, losses)
                middle = (len(grid) - 1) / 2
                runs += [((0, abs(i - middle), i, place), run) for i, run in enumerate(grid)]
                if lr is None and not expected:
                    continue
                lr = self.centre(arm) if lr is None else lr
            runs += [
                ((1 + (run.horizon != 1), abs(run.horizon - 1), run.seed, place), run)
                for run in self.paired(arm, lr)
            ]
        return [run for _, run in sorted(runs, key=lambda pair: pair[0])]

    def steps_of(self, run: Run) -> int:
        """A run's length in global batches."""
        return max(1, round(run.horizon * self.steps[run.arm]))

    def tokens_of(self, run: Run) -> int:
        """A run's length in tokens (labels, the ignored ones counted)."""
        config = self.configs[run.arm]
        return self.steps_of(run) * config.training.rows * config.data.context_length

    def weight_decay(self, run: Run) -> float | None:
        """The run's weight decay: lr * weight_decay is what the arm wrote; None: it has none."""
        decay = getattr(self.configs[run.arm].optimizer, "weight_decay", None)
        if decay is None or run.lr is None:
            return decay
        return float(f"{decay * self.centre(run.arm) / run.lr:.6g}")

    def words(self, run: Run, directory: Path) -> list[str]:
        """What follows `llmnorm train` to make the run in this directory."""
        arm, config, steps = self.arms[run.arm], self.configs[run.arm], self.steps_of(run)
        settings: dict[str, Any] = {"run_dir": directory, "seed": run.seed}
        if config.data.seed is None:
            settings["data.seed"] = run.seed
        if run.lr is not None:
            settings["optimizer.lr"] = repr(run.lr)
            if decay := self.weight_decay(run):
                settings["optimizer.weight_decay"] = decay
        for length in ("tokens", "epochs"):
            if getattr(config.training, length) is not None:
                settings[f"training.{length}"] = "null"
        every = config.checkpoint.every
        settings |= {
            "training.steps": steps,
            "evaluation.every": "null",
            "evaluation.prompts": "[]",
            "evaluation.samples": 0,
            "checkpoint.every": min(every or steps, max(1, steps // 20)),
            "checkpoint.keep_every": "null",
            "checkpoint.keep_best": "false",
            "logging.every": max(1, steps // LINES),
        }
        return [str(arm.path), *arm.overrides, *(f"{k}={v}" for k, v in settings.items())]


def _best(runs: Sequence[Run], losses: Losses) -> Run:
    return min(runs, key=lambda run: losses[run.key])


def read(
    arms: Sequence[Arm],
    *,
    baselines: Sequence[str] = (),
    untuned: Sequence[str] = (),
    seeds: int = 3,
    lr_points: int = 5,
    horizons: Horizons = "baseline",
) -> Protocol:
    """Load every arm and check that they can be compared; nothing is run or written.

    Args:
        arms: at least two.
        baselines: which of them the others are held against; left out, the first.
        untuned: which of them run as they are written.

    Raises:
        InputError: an arm's setting is not valid, or what it changes makes losses incomparable; one
            line that names the arm and the key.
    """
    if lr_points % 2 == 0:
        raise InputError(
            f"--lr-points {lr_points}: give an odd number, so that the grid has a centre"
        )
    names = [arm.name for arm in arms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--arm {twice[0]}: two arms have this name")
    for option, wanted in (("--baseline", baselines), ("--untuned", untuned)):
        for name in wanted:
            if name not in names:
                raise InputError(f"{option} {name}: there is no such arm; {nearest(name, names)}")
    chosen = tuple(dict.fromkeys(baselines)) or (names[0],)
    configs = {arm.name: _load(arm) for arm in arms}
    for name, config in configs.items():
        if not config.objective.packs:
            raise InputError(f"--arm {name}: objective: a comparison is of losses on packed text")
        if automatic := config.automatic():
            raise InputError(
                f"--arm {name}: {automatic[0]} is auto; give a number, from which the comparison "
                "tunes learning rates"
            )
    trees = {name: _tree(config) for name, config in configs.items()}
    for place, name in enumerate(names):
        for other in names[:place]:
            if trees[name] == trees[other]:
                raise InputError(f"--arm {name}: resolves to the same settings as arm {other}")
    reference = chosen[0]
    for name in names:
        _check_comparable(name, trees[name], reference, trees[reference])
    steps = {name: _steps(name, configs[name]) for name in names}
    protocol = Protocol(
        {arm.name: arm for arm in arms},
        configs,
        steps,
        chosen,
        tuple(untuned),
        seeds,
        lr_points,
        horizons,
    )
    _check_lengths(protocol)
    for name in names:
        if protocol.tuned(name):
            _check_rate(name, configs[name])
    for run in protocol.needed({}, expected=True):  # a warm-up may not fit the shortest horizon
        _load(protocol.arms[run.arm], protocol.words(run, Path("run"))[1:])
    return protocol


def agree(protocol: Protocol, directory: Path) -> None:
    """Check that what was run in a comparison's directory belongs to these arms.

    Seeds, points, horizons and arms may have been added.

    Raises:
        InputError: an arm means something else there.
    """
    file = directory / "comparison.json"
    if not file.is_file():
        return
    there = json.loads(file.read_text(encoding="utf-8"))["arms"]
    for name, config in protocol.configs.items():
        if name not in there:
            continue
        changed = differences(_today(there[name]), _tree(config))
        listed = ", ".join(
            f"{key} ({old} there, {new} here)"
            for key, (old, new) in changed.items()
            if not changeable(key) or key in LENGTHS
        )
        if listed:
            raise InputError(
                f"--out {directory}: arm {name} was another there: {listed}; "
                "give the arm another name, or another --out"
            )


def save(protocol: Protocol, directory: Path) -> None:
    """Write down which settings the arms of this directory have, for `agree`."""
    file = directory / "comparison.json"
    arms = json.loads(file.read_text(encoding="utf-8"))["arms"] if file.is_file() else {}
    arms |= {name: _tree(config) for name, config in protocol.configs.items()}
    write_whole(file, json.dumps({"arms": arms}, indent=1) + "\n")


def _load(arm: Arm, overrides: Sequence[str] | None = None) -> RunConfig:
    try:
        return load(arm.path, arm.overrides if overrides is None else overrides).config
    except InputError as error:
        raise InputError(
            "\n".join(f"--arm {arm.name}: {line}" for line in str(error).splitlines())
        ) from None


def _tree(config: RunConfig) -> dict[str, Any]:
    """What an arm is: its settings without where things lie."""
    tree = to_tree(config.model_copy(update={"run_dir": None}))
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "dir"}
    return tree


def _today(tree: dict[str, Any]) -> dict[str, Any]:
    """An arm that was saved, with the defaults of keys that are newer than it."""
    try:
        return _tree(RunConfig.model_validate(tree))
    except ValidationError:  # a key that is no longer there is a difference
        return tree


def _check_comparable(
    name: str, tree: Mapping[str, Any], reference: str, other: Mapping[str, Any]
) -> None:
    """Refuse what a comparison sets itself, and what changes the text that losses are taken on."""
    for key, (theirs, own) in differences(other, tree).items():
        if any(key == k or key.startswith(f"{k}.") for k in OWN):
            why = "a comparison sets it for all arms alike"
        elif key in ("objective.name", "objective.evaluation_mask_share"):
            why = "losses of other objectives cannot be compared"
        elif key.startswith("tokenizer.") or (
            key.startswith("data.") and not key.endswith(".weight")
        ):
            why = "losses on other tokens cannot be compared"
        else:
            continue
        raise InputError(
            f"--arm {name}: {key} is {own}, that of arm {reference} {theirs}: {why}; "
            "set it before the first --arm"
        )


def _check_rate(name: str, config: RunConfig) -> None:
    rate = getattr(config.optimizer, "lr", None)
    if not isinstance(rate, float | int) or rate <= 0:
        raise InputError(
            f"--arm {name}: optimizer.lr {rate} is no centre of a grid; give a number above 0, "
            f"--lr-points 1 or --untuned {name}"
        )


def _steps(name: str, config: RunConfig) -> int:
    rows = 0
    if config.training.epochs is not None:
        packed = find(config.data, config.tokenizer)
        if packed is None:
            raise InputError(
                f"--arm {name}: training.epochs: the data is not prepared yet, so an epoch has no "
                "length; run `llmnorm data` once, or give training.tokens"
            )
        rows = sum(source.rows for source in packed.sources)
    return config.training.total_steps(rows, config.data.context_length)


def _check_lengths(protocol: Protocol) -> None:
    reference = protocol.baselines[0]
    expected = protocol.tokens_of(Run(reference, None, 0))
    for name, config in protocol.configs.items():
        tokens = protocol.tokens_of(Run(name, None, 0))
        batch = config.training.rows * config.data.context_length
        theirs = protocol.configs[reference]
        other = theirs.training.rows * theirs.data.context_length
        if abs(tokens - expected) >= max(batch, other) and not math.isclose(tokens, expected):
            raise InputError(
                f"--arm {name}: trains {tokens} tokens, arm {reference} {expected}; "
                "give all arms the same training.tokens"
            )
