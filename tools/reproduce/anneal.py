"""Three anneals of a stable run, and a run whose mixture changes at 80 %, with the quickstart.

usage: python tools/reproduce/anneal.py [--runs runs/anneal] [--seeds 3] [--plan] [key=value ...]

For each seed: configs/recipes/anneal/stable.yaml, the three files that anneal its last checkpoint,
and stages.yaml. A run that is finished is not made again, and one that was stopped goes on. Every
model is then evaluated on the validation text in rows of the recipe's length and of twice that. The
results are docs/results/anneal/result.json, table.md and anneal.png.

What is asked: by how much is each source's loss lower (better) after an anneal on another mixture
or on longer rows than after one on the mixture of before, over the paired seeds.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import mean_and_error

from llmnorm.analysis.compare.statistics import gap_interval
from llmnorm.config.file import load
from llmnorm.data.run_data import RunData
from llmnorm.data.stages import Course, course
from llmnorm.machine.files import write_whole
from llmnorm.part import InputError

ROOT = Path(__file__).resolve().parents[2]
RECIPES, RESULTS = ROOT / "configs/recipes/anneal", ROOT / "docs/results/anneal"
STABLE, ANNEALS, STAGES = "stable", ("same", "better", "longer"), "stages"


def words(arm: str, seed: int, runs: Path, settings: Sequence[str]) -> list[str]:
    """The command of one run."""
    found = [str(RECIPES / f"{arm}.yaml"), f"seed={seed}", f"run_dir={runs / f'{arm}-{seed}'}"]
    if arm in ANNEALS:
        stable = load(RECIPES / f"{STABLE}.yaml", []).config
        named = [word for word in settings if word.startswith("stable.training.steps=")]
        steps = int(named[-1].partition("=")[2]) if named else stable.training.steps
        point = runs / f"{STABLE}-{seed}" / "checkpoints" / f"step_{steps:08d}"
        found.append(f"training.branch_from={point}")
    for word in settings:
        owner, dot, rest = word.partition(".")
        if owner in (STABLE, *ANNEALS, STAGES) and dot:
            found += [rest] if owner == arm else []
        else:
            found.append(word)
    return ["train", *found]


def made(arm: str, seed: int, runs: Path, settings: Sequence[str]) -> None:
    """Make a run, or go on with it."""
    command = [sys.executable, "-m", "llmnorm", *words(arm, seed, runs, settings)]
    print(shlex.join(command[2:]), flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise InputError(f"{arm}, seed {seed}: the command above has failed")


def evaluated(run: Path, context: int) -> dict[str, float]:
    """The validation loss of each source at the run's last step, in rows of `context` tokens."""
    command = [sys.executable, "-m", "llmnorm", "eval", str(run), f"data.context_length={context}"]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise InputError(f"{run}: `{shlex.join(command[2:])}` has failed")
    newest = max((run / "eval").glob("step_*.json"), key=lambda file: file.stat().st_mtime)
    sources = json.loads(newest.read_text())["validation"]["sources"]
    return {name: figures["loss"] for name, figures in sources.items()}


def along(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run: step, tokens and each source's loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    return [
        {
            "step": line["step"],
            "tokens": line["tokens"],
            "sources": {n: f["loss"] for n, f in line["validation"]["sources"].items()},
        }
        for line in lines
        if "validation" in line
    ]


def asked_and_read(run: Path) -> list[dict[str, Any]]:
    """Of each stage of a run its first row, and the shares that were asked for and read."""
    config = load(run, []).config
    preparation = config.objective.preparation(config)
    data: RunData | None = None if preparation is None else preparation.find()
    assert data is not None, "the run has read it"
    whole: Course = course(config, data)
    order = data.in_stages(whole.stages).order(config.data_seed)
    found = []
    for number, stage in enumerate(whole.stages):
        later = whole.stages[number + 1 :]
        end = later[0].row if later else whole.rows
        source, _ = order.locate(stage.row, end - stage.row)
        counts = np.bincount(source, minlength=len(data.sources)).tolist()
        wanted = [(end - stage.row) * w / sum(stage.weights) for w in stage.weights]
        rows = {
            s.name: {"asked": asked, "read": read}
            for s, asked, read in zip(data.sources, wanted, counts, strict=True)
        }
        found.append({"row": stage.row, "step": whole.pace.step_of(stage.row), "rows": rows})
    return found


def measured(runs: Path, seeds: Sequence[int], contexts: Sequence[int]) -> dict[str, Any]:
    """All numbers: losses by context, arm, seed and source; the stages' course and rows."""
    return {
        "losses": {
            str(context): {
                arm: {str(seed): evaluated(runs / f"{arm}-{seed}", context) for seed in seeds}
                for arm in (STABLE, *ANNEALS)
            }
            for context in contexts
        },
        "stages": {str(seed): along(runs / f"{STAGES}-{seed}") for seed in seeds},
        "rows": asked_and_read(runs / f"{STAGES}-{seeds[0]}"),
    }


def difference(arms: dict[str, Any], arm: str, source: str) -> tuple[float, float, float]:
    """By how much the loss of a source is lower than after `same`: the mean and its interval."""
    pair = [np.array([found[source] for found in arms[a].values()]) for a in (ANNEALS[0], arm)]
    return tuple(gap_interval(*pair))  # type: ignore[return-value]


def table(found: dict[str, Any]) -> str:
    """The losses and differences in Markdown."""
    lines = []
    for context, arms in found["losses"].items():
        names = list(next(iter(arms[STABLE].values())))
        head = ["source", *arms, *(f"{arm} is lower by" for arm in ANNEALS[1:])]
        lines += [f"Rows of {context} tokens:", "", f"| {' | '.join(head)} |"]
        lines.append(f"|{' --- |' * len(head)}")
        for name in names:
            losses = [mean_and_error([s[name] for s in arms[arm].values()], 4) for arm in arms]
            gaps = [difference(arms, arm, name) for arm in ANNEALS[1:]]
            cells = [f"{gap:+.4f} [{low:+.4f}, {high:+.4f}]" for gap, low, high in gaps]
            lines.append(f"| {' | '.join([name, *losses, *cells])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(found: dict[str, Any], output: Path) -> None:
    """Each source's loss along the run in stages, with the boundary; the anneals' differences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    first = next(iter(found["stages"].values()))
    names = list(first[-1]["sources"])
    for number, name in enumerate(names):
        steps = [line["step"] for line in first]
        means = np.mean(
            [[line["sources"][name] for line in lines] for lines in found["stages"].values()],
            axis=0,
        )
        left.plot(steps, means, marker="o", markersize=3, label=name, color=f"C{number}")
    for stage in found["rows"][1:]:
        left.axvline(stage["step"], color="black", linestyle=":", linewidth=1)
    left.set(title="Loss of each source; the mixture changes at the line", xlabel="step")
    left.set_ylabel("validation loss, nats a token")
    left.legend(frameon=False)
    context, arms = next(iter(found["losses"].items()))
    for number, arm in enumerate(ANNEALS[1:]):
        gaps = np.array([difference(arms, arm, name) for name in names])
        places = np.arange(len(names)) + 0.2 * (2 * number - 1)
        errors = np.abs(gaps[:, 1:] - gaps[:, :1]).T
        right.errorbar(places, gaps[:, 0], yerr=errors, fmt="o", label=arm, capsize=3)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set_xticks(range(len(names)), names)
    right.set(title=f"Lower loss than after the same mixture, rows of {context} tokens")
    right.legend(frameon=False)
    figure.savefig(output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, evaluate, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/anneal")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="print the runs, make none")
    parser.add_argument(
        "settings", nargs="*", help="key=value of all runs, or ARM.key=value of one arm"
    )
    options = parser.parse_args(arguments)
    runs, seeds = options.runs.absolute(), range(1, options.seeds + 1)
    arms = [(arm, seed) for seed in seeds for arm in (STABLE, *ANNEALS, STAGES)]
    if options.plan:
        for arm, seed in arms:
            print(shlex.join(["llmnorm", *words(arm, seed, runs, options.settings)]))
        return 0
    try:
        for arm, seed in arms:
            made(arm, seed, runs, options.settings)
        context = load(runs / f"{STABLE}-1", []).config.data.context_length
        found = measured(runs, seeds, [context, 2 * context])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "result.json", json.dumps(found, indent=1) + "\n")
    text = table(found)
    write_whole(options.out / "table.md", text + "\n")
    draw(found, options.out / "anneal.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
