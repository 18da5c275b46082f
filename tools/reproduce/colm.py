"""CoLM and its controls at equal steps, with paired seeds.

usage: python tools/reproduce/colm.py pretraining|finetuning [--pilot] [--plan] [--seeds 5]
           [--parallel 2] [--arms NAME ...] [--base runs/quickstart] [--set key=value ...]

    pretraining   configs/recipes/colm/pretraining.yaml on the default corpus
    finetuning    configs/finetune/skills.yaml with LoRA, from the run `--base`, on what
                  `python tools/make_skills.py data/skills` writes

With b the rows of a plain step (the file's `training.global_batch`), the arms are

    plain                   b rows
    plain_2b, plain_4b      2 b and 4 b rows
    reweighted              b rows of the mixture that `stratified` trains on, by `data.weights`
    random                  b uniform rows of 2 b: plain training on other rows, on two seeds
    stratified, loss        b rows of 2 b, by the controls of these names
    colm                    b rows of 2 b by CoLM with one probe, as in the paper
    gradient                b rows of 2 b by CoLM with exact gradients on 64 directions

`--pilot` makes the runs of `plain` and `random` alone, which the whole needs anyway, and prints how
much seeds differ: the runs must be long enough for differences that are asked about.

Each finished run is a line of docs/results/colm_TASK/runs.jsonl, which is committed; such a run is
not made again. Run directories are in runs/reproduce. Afterwards the directory of the results holds
result.json with all numbers, table.md, and comparison.png.

Source: Nguyen et al. 2024 (CoLM), arXiv 2407.19580. Read the differences in the order in which they
stand: what choosing inside the sources adds (colm - stratified), what choosing adds to the mixture
(stratified - reweighted), what the mixture alone does (reweighted - plain), and each arm against
plain_2b, which reads as many rows as the selections and costs about as much.

What would surprise:
- Arms train for equally many steps, not for equally many tokens. So this is no `llmnorm compare`,
  whose factors in length mean equal tokens.
- plain_2b and plain_4b train at the recipe's learning rate or at this rate times the root of 2 or
  of 4, whichever is better on a seed that is not used again.
- The loss of the mixture weights the sources as the plain arm draws their rows, in every arm.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from arms import parser
from colm_figures import draw, measured, mixture_of, spread, table

from llmnorm.analysis.compare.arms import check_same_arms, read_protocol, save_arms
from llmnorm.analysis.compare.command import json_value
from llmnorm.analysis.compare.estimate import Estimate, duration
from llmnorm.analysis.compare.launch import Launch, launch, slots
from llmnorm.analysis.compare.ledger import Ledger
from llmnorm.analysis.compare.plan import Arm, Losses, Protocol, Run
from llmnorm.analysis.compare.runs import execute
from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.machine.files import write_whole
from llmnorm.objectives.contract import Objective
from llmnorm.part import InputError
from llmnorm.runs.lock import RunLock
from llmnorm.selection.settings import StratifiedSettings

RESULTS = Path("docs/results")
RUNS = Path("runs/reproduce")
BASE = Path("runs/quickstart")
RANDOM_SEEDS = 2


class Task(NamedTuple):
    """A configuration that all arms start from, and what is set beside it."""

    path: Path
    shared: tuple[str, ...] = ()


TASKS = {
    "pretraining": Task(Path("configs/recipes/colm/pretraining.yaml")),
    "finetuning": Task(
        Path("configs/finetune/skills.yaml"),
        (
            "adapter=lora",
            "training.epochs=null",
            "training.steps=200",
            "training.global_batch=32",
        ),
    ),
}
WIDER = {"plain_2b": 2, "plain_4b": 4}  # times the rows of a plain step
SELECTIONS = {
    "random": ("selection=random",),
    "stratified": ("selection=stratified",),
    "loss": ("selection=loss",),
    "colm": ("selection=colm",),
    "gradient": ("selection=colm", "selection.feature=gradient", "selection.sketch=64"),
}
ARMS = ("plain", *WIDER, "reweighted", *SELECTIONS)
PILOT = ("plain", "random")


class EqualSteps(Protocol):
    """Arms that train for equally many steps; those with more rows choose between two rates."""

    def tuned(self, arm: str) -> bool:
        """Whether this arm's learning rate is searched."""
        return arm in WIDER

    def grid(self, arm: str, losses: Losses) -> list[Run]:
        """The runs among which an arm's learning rate is chosen: as written, and by the root."""
        rates = [self.centre(arm), self.centre(arm) * math.sqrt(WIDER[arm])]
        return [Run(arm, rate, self.tuning_seed) for rate in rates]

    def paired(self, arm: str, lr: float | None) -> list[Run]:
        """The runs of an arm with the paired seeds."""
        runs = super().paired(arm, lr)
        return runs[:RANDOM_SEEDS] if arm == "random" else runs


class Experiment(NamedTuple):
    """A task's arms.

    Attributes:
        protocol: their runs.
        objective: the rows of the plain arm.
    """

    protocol: EqualSteps
    objective: Objective


def read(task: Task, chosen: Sequence[str], seeds: int, shared: Sequence[str]) -> Experiment:
    """The experiment; data that are not prepared yet are prepared.

    Args:
        task: where the arms start from.
        chosen: names of arms; `plain` is added.
        seeds: paired seeds.
        shared: overrides of all arms.
    """
    words = (*task.shared, *shared)
    plain = load(task.path, words).config
    objective = plain.objective.build(plain, alone=True, command="llmnorm data")
    rows = plain.training.rows
    own: dict[str, tuple[str, ...]] = {"plain": ()}
    own |= {name: (f"training.global_batch={k * rows}",) for name, k in WIDER.items()}
    own["reweighted"] = (f"data.weights={_weights(plain, objective)}",)
    own |= {name: (*arm, f"selection.pool={2 * rows}") for name, arm in SELECTIONS.items()}
    arms = [
        Arm(name, task.path, (*words, *own[name]))
        for name in ARMS
        if name in chosen or name == "plain"
    ]
    # One by one: a comparison's own reading wants all of its arms to train equally many tokens.
    parts = [read_protocol([arm], seeds=seeds, lr_points=1, horizons="none") for arm in arms]
    merged = {
        key: {arm: value for part in parts for arm, value in vars(part)[key].items()}
        for key in ("arms", "configs", "steps", "row_tokens")
    }
    return Experiment(EqualSteps(**(vars(parts[0]) | merged)), objective)


def _weights(plain: RunConfig, objective: Objective) -> str:
    """The mixture that `stratified` trains on, as `data.weights`."""
    sources, rows = objective.data.sources, plain.training.rows
    names, sizes = [s.name for s in sources], [s.rows for s in sources]
    settings = StratifiedSettings(pool=2 * rows)
    mixture = [*mixture_of(objective).values()]
    shares = settings.kept(names, sizes, plain.seed).shares(mixture, 2 * rows, rows)
    # As the first lines of a run with a selection print them.
    found = {n: max(1, round(1000 * share)) for n, share in zip(names, shares, strict=True)}
    return "{" + ", ".join(f"{name}: {weight}" for name, weight in found.items()) + "}"


def make(
    experiment: Experiment,
    results: Path,
    runs: Path,
    options: argparse.Namespace,
    start: Launch = launch,
) -> tuple[int, Ledger]:
    """Make the runs that are missing, or print them with --plan; the exit code and the runs."""
    protocol = experiment.protocol
    places = slots(
        options.parallel, protocol.configs["plain"].training.device, options.runs_per_gpu
    )
    check_same_arms(protocol, results)
    ledger = Ledger(results / "runs.jsonl")
    estimate = Estimate(protocol, ledger, places)
    if options.plan:
        expected = protocol.needed(ledger.losses, expected=True)
        left = [(run, 1.0) for run in expected if run.key not in ledger.records]
        for run in expected:
            print(f"{run.key:40} {'finished' if run.key in ledger.records else 'to make'}")
        print(f"{len(left)} of {len(expected)} runs to make, {places.describe()}: ", end="")
        print(f"{duration(estimate.seconds(left) / places.count)} ({estimate.source})")
        return 0, ledger
    results.mkdir(parents=True, exist_ok=True)
    with RunLock(results):
        save_arms(protocol, results)
        return execute(protocol, ledger, runs, places, estimate.seconds, start=start), ledger


def main(arguments: list[str] | None = None, start: Launch = launch) -> int:
    """Make the runs that are missing, then the numbers, the tables and the picture."""
    words = parser(__doc__, ARMS, ARMS)
    words.set_defaults(parallel=2, seeds=5)
    words.add_argument("task", choices=TASKS)
    words.add_argument("--pilot", action="store_true", help="print how much seeds differ")
    words.add_argument("--base", type=Path, default=BASE, help="the run that is fine-tuned")
    words.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all arms")
    options = words.parse_args(arguments)
    name = f"colm_{options.task}"
    results = RESULTS / name
    shared = [*options.set]
    if options.task == "finetuning":
        shared.insert(0, f"model.pretrained={options.base}")
    try:
        chosen = PILOT if options.pilot else options.arms
        experiment = read(TASKS[options.task], chosen, options.seeds, shared)
        code, ledger = make(experiment, results, RUNS / name, options, start)
        if code or options.plan:
            return code
        found = measured(experiment.protocol, experiment.objective, ledger.records)
        if options.pilot:
            print(spread(found))
            return 0
        draw(found, results / "comparison.png", name)
        text = json.dumps(json_value(found), indent=1, allow_nan=False)
        write_whole(results / "result.json", text + "\n")
        write_whole(results / "table.md", table(found) + "\n")
        print(table(found))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
