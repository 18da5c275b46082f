"""Score a model that is already loaded on lm-eval's tasks (extra `eval`).

    tasks = find(["hellaswag", "my/task.yaml", "my/tasks"])
    run(tasks, model, tokenizer, parallel, batch_size=8)

A task is a name that lm-eval knows, a YAML file of a task, or a directory of such files. lm-eval's
HFLM wraps the model object itself, so an adapter or a moving average in it is scored too.

What would surprise: HFLM does not spread a model object over processes by itself. `run` sets its
rank and world, and then lm-eval splits the requests and gathers the figures on the main process.
"""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmnorm.machine.doctor import missing_extra
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Tasks(NamedTuple):
    """lm-eval's index of tasks, and the names in it that were asked for."""

    manager: Any
    names: list[str]


def find(tasks: list[str]) -> Tasks:
    """Look the tasks up.

    Raises:
        InputError: lm-eval is missing, or there is no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise missing_extra("lm_eval") from None

    directories = [task for task in tasks if Path(task).is_dir()]
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    named = [task for task in tasks if task not in directories and task not in files]
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"--tasks: there is no file {file}")
    try:
        # The index of what lm-eval brings takes seconds to read.
        manager = TaskManager(include_path=directories, include_defaults=bool(named))
        below = [TaskManager(include_path=d, include_defaults=False) for d in directories]
    except Exception as error:  # lm-eval raises many kinds for a YAML file that is wrong
        raise InputError(f"--tasks: {_line(error)}") from None
    for directory, found in zip(directories, below, strict=True):
        if not found.all_subtasks:
            raise InputError(f"--tasks: {directory} holds no task (a .yaml file with a `task` key)")
    for name in named:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""  # too many to list: 14,000
            raise InputError(f"--tasks: '{name}' is no task of lm-eval and no path{hint}")
    inside = [name for found in below for name in found.all_subtasks]
    return Tasks(manager, [*named, *files, *inside])


def run(
    tasks: Tasks,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    parallel: Parallel,
    *,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Any] | None:
    """lm-eval's results on the main process, None on the others.

    Args:
        batch_size: requests at once.
        limit: examples of every task at most.

    Raises:
        InputError: a task's data cannot be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        mixed_precision_dtype=torch.bfloat16 if parallel.precision == "bf16" else None,
    )
    if parallel.world > 1:
        wrapped._rank, wrapped._world_size = parallel.rank, parallel.world
        wrapped.accelerator = parallel.accelerator
    try:
        return simple_evaluate(
            model=wrapped,
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
        )
    except OSError as error:  # its data set: no network, no such file
        raise InputError(f"--tasks: {_line(error)}") from None


def table(results: dict[str, Any]) -> str:
    """lm-eval's results as text, one line for each metric of each task."""
    rows = [("task", "metric", "value", "standard error")]
    for task, found in (results["results"] | results.get("groups", {})).items():
        for key, value in found.items():
            metric, comma, answers = key.partition(",")  # "acc,none": which answers were scored
            if comma and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{answers}")
                name = metric if answers == "none" else f"{metric} ({answers})"
                rows.append((task, name, _number(value), _number(error)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{task:{widths[0]}}  {metric:{widths[1]}}{value:>10}{error:>16}"
        for task, metric, value, error in rows
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """The entries of lm-eval's results that are written to the file."""
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return {key: results[key] for key in kept if results.get(key)}


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str("" if value is None else value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
