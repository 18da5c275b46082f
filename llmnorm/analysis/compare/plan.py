"""The protocol of a comparison: which runs it needs, given the losses of those that are finished.

Everything here is a pure function of the arms' settings and of those losses; nothing is run, read
or written. An arm is a configuration; all arms have the same length in tokens and the same data.

1. Tuning. Each arm trains at `lr_points` learning rates around its own, a factor 2 apart, with one
   seed, at full length and with its complete schedule. While the best rate is the lowest or the
   highest, the grid grows on that side (at most 4 rates), so that an arm's best rate has a worse
   neighbour on either side. `lr * weight_decay` stays what the arm wrote.
2. Paired seeds. All arms train at their best rate with the same further seeds, which set initial
   weights and data order.
3. Horizons. Runs of other lengths, by which a gap in loss is converted into a factor in length:

    horizons: baseline   the baselines also run for 1.25 and 1.5 of the length (few runs)
    horizons: arms       every other arm also runs for 0.6, 0.7, 0.8 and 0.9 of it
    horizons: none       no run of another length: gaps stay gaps

Source: "Fantastic Pretraining Optimizers and Where to Find Them", arXiv 2509.02046: tune every arm
alike and compare at the ends of schedules only; rankings flip during the decay.

What would surprise: `data.seed` is written into every run, so that an arm's settings cannot change
the order of rows; where the base file sets it, all seeds share that one order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmnorm.config.tree import RunConfig

Horizons = Literal["baseline", "arms", "none"]
HORIZONS = {"baseline": (1.0, 1.25, 1.5), "arms": (0.6, 0.7, 0.8, 0.9, 1.0), "none": (1.0,)}
MOST_ADDED = 4  # rates that a grid may grow by on one side: to 16 times its edge
LOGGED = 50  # lines of metrics that a run logs: its learning curve, and its speed as their median


@dataclass(frozen=True)
class Arm:
    """One of the configurations that are compared.

    Attributes:
        name: its name in tables and file names.
        path: its configuration file.
        overrides: `key=value`; those that all arms share come first.
    """

    name: str
    path: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run of an arm.

    Attributes:
        arm: the arm's name.
        lr: its learning rate; None: the one that the arm writes.
        seed: seed of the initial weights and, unless the base file sets `data.seed`, of the rows.
        horizon: its length, in units of the comparison's length.
    """

    arm: str
    lr: float | None
    seed: int
    horizon: float = 1.0

    @property
    def key(self) -> str:
        """The run's name, which is also its directory below the comparison's runs."""
        rate = f"lr{self.lr:.6g}-" if self.lr is not None else ""
        return f"{self.arm}/{rate}seed{self.seed}-x{self.horizon:g}"


# Final loss of every finished run by its key; infinite where the run diverged.
Losses = Mapping[str, float]


@dataclass(frozen=True)
class Protocol:
    """What is compared and how; made by `arms.read_protocol`.

    Attributes:
        arms: the arms by name, in the order of the tables.
        configs: each arm's resolved settings.
        steps: each arm's length in steps.
        row_tokens: the tokens of an average row of each arm.
        baselines: names of the arms that the others are compared with; the picture shows the first.
        untuned: names of the arms that keep the learning rate they write.
        seeds: the number of paired seeds.
        lr_points: learning rates that a grid begins with; 1: no arm is tuned.
        horizons: which arms also run at other lengths.
    """

    arms: dict[str, Arm]
    configs: dict[str, RunConfig]
    steps: dict[str, int]
    row_tokens: dict[str, float]
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
        """The seeds that all arms share; the tuning used none of them."""
        return [self.tuning_seed + 1 + k for k in range(self.seeds)]

    def tuned(self, arm: str) -> bool:
        """Whether this arm's learning rate is searched."""
        return arm not in self.untuned and self.lr_points > 1

    def centre(self, arm: str) -> float:
        """The learning rate that the arm writes."""
        return float(self.configs[arm].optimizer.lr)

    def horizons_of(self, arm: str) -> tuple[float, ...]:
        """The lengths at which this arm runs, in units of the comparison's length."""
        is_varied = {
            "baseline": arm in self.baselines,
            "arms": arm != self.baselines[0],
            "none": False,
        }
        return HORIZONS[self.horizons] if is_varied[self.horizons] else (1.0,)

    def grid(self, arm: str, losses: Losses) -> list[Run]:
        """The tuning runs of an arm, the lowest rate first, as far as `losses` decide them.

        The grid grows only once all of its runs are finished.
        """
        half = self.lr_points // 2
        low, high = -half, half
        while True:
            runs = [
                Run(arm, self.centre(arm) * 2.0**k, self.tuning_seed) for k in range(low, high + 1)
            ]
            if not all(run.key in losses for run in runs):
                return runs
            best = _with_lowest_loss(runs, losses)
            if best == runs[0] and low > -half - MOST_ADDED:
                low -= 1
            elif best == runs[-1] and high < half + MOST_ADDED:
                high += 1
            else:
                return runs

    def best_lr(self, arm: str, losses: Losses) -> float | None:
        """The learning rate of the arm's paired runs; None while its tuning is not finished.

        If every rate diverged, the lowest rate is returned.
        """
        runs = self.grid(arm, losses)
        finished = all(run.key in losses for run in runs)
        return _with_lowest_loss(runs, losses).lr if finished else None

    def at_edge(self, arm: str, losses: Losses) -> bool:
        """Whether the best rate is the lowest or highest even of the fully grown grid."""
        runs = self.grid(arm, losses)
        return self.best_lr(arm, losses) in (runs[0].lr, runs[-1].lr)

    def paired(self, arm: str, lr: float | None) -> list[Run]:
        """The runs of an arm with the paired seeds, ordered by seed, then by length."""
        return [
            Run(arm, lr, seed, horizon)
            for seed in self.paired_seeds
            for horizon in self.horizons_of(arm)
        ]

    def needed(self, losses: Losses, *, expected: bool = False) -> list[Run]:
        """The runs that the comparison is known to need, in the order in which they are made.

        Tuning starts at the centres of the grids and goes outwards; paired seeds come before other
        lengths, so that a table can be made early; and the arms take turns, so that whatever else
        slows the machine down slows all arms alike.

        Args:
            losses: final losses of the finished runs.
            expected: for an estimate of the time: also list the paired runs of arms that are still
                being tuned, at the centre of their grid.
        """
        runs: list[tuple[tuple[float, ...], Run]] = []
        for number, arm in enumerate(self.arms):
            lr: float | None = None
            if self.tuned(arm):
                grid, lr = self.grid(arm, losses), self.best_lr(arm, losses)
                middle = (len(grid) - 1) / 2
                runs += [((0, abs(i - middle), i, number), run) for i, run in enumerate(grid)]
                if lr is None and not expected:
                    continue
                lr = self.centre(arm) if lr is None else lr
            runs += [
                ((1 + (run.horizon != 1), abs(run.horizon - 1), run.seed, number), run)
                for run in self.paired(arm, lr)
            ]
        return [run for _, run in sorted(runs, key=lambda pair: pair[0])]

    def steps_of(self, run: Run) -> int:
        """A run's length in steps."""
        return max(1, round(run.horizon * self.steps[run.arm]))

    def tokens_of(self, run: Run) -> int:
        """A run's length in label positions, ignored ones included; of examples about that."""
        rows = self.steps_of(run) * self.configs[run.arm].training.rows
        return round(rows * self.row_tokens[run.arm])

    def weight_decay(self, run: Run) -> float | None:
        """The run's weight decay, by which lr * weight_decay is what the arm wrote.

        None where the optimizer has no weight decay.
        """
        decay = getattr(self.configs[run.arm].optimizer, "weight_decay", None)
        if decay is None or run.lr is None:
            return decay
        return float(f"{decay * self.centre(run.arm) / run.lr:.6g}")

    def train_arguments(self, run: Run, directory: Path) -> list[str]:
        """The arguments with which `llmnorm train` makes the run in this directory."""
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
            "evaluation.patience": "null",
            "evaluation.prompts": "[]",
            "evaluation.samples": 0,
            "checkpoint.every": min(every or steps, max(1, steps // 20)),
            "checkpoint.keep_every": "null",
            "checkpoint.keep_best": "false",
            "logging.every": max(1, steps // LOGGED),
        }
        return [str(arm.path), *arm.overrides, *(f"{k}={v}" for k, v in settings.items())]


def _with_lowest_loss(runs: Sequence[Run], losses: Losses) -> Run:
    return min(runs, key=lambda run: losses[run.key])
