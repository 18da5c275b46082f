"""Score a model that is already loaded on lm-eval's tasks (extra `eval`).

    tasks = find(["hellaswag", "my/task.yaml", "my/tasks"])
    run(tasks, model, tokenizer, parallel, batch_size=8)

A task is a name that lm-eval knows, a YAML file of a task, or a directory of such files. lm-eval's
HFLM wraps the model object itself, so an adapter or a moving average in it is scored too.

What would surprise:
- Of several processes each answers a part of the requests (a prompt with one of its answers, or a
  text to go on with) and gets the answers of the others, so that each has all scores. lm-eval
  itself takes every process for the only one.
- Requests are of unequal lengths, and a forward pass over shards needs all processes. So before
  every pass the processes agree on whether one has a pass to make (lockstep.py).
"""

import difflib
import json
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from llmnorm.machine.doctor import missing_extra
from llmnorm.objectives.lockstep import Lockstep
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 8  # requests, where nothing else is said
SEED = 1234  # lm-eval's own


class Tasks(NamedTuple):
    """lm-eval's index of tasks, and the names in it that were asked for.

    Attributes:
        key: of the settings, or the option, that has asked; for messages.
        loaded: what lm-eval makes of them, their data included; None before `load`.
    """

    manager: Any
    names: list[str]
    key: str
    loaded: Any = None


def find(tasks: list[str], key: str = "--tasks") -> Tasks:
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
            raise InputError(f"{key}: there is no file {file}")
    try:
        # The index of what lm-eval brings takes seconds to read.
        manager = TaskManager(include_path=directories, include_defaults=bool(named))
        below = [TaskManager(include_path=d, include_defaults=False) for d in directories]
    except Exception as error:  # lm-eval raises many kinds for a YAML file that is wrong
        raise InputError(f"{key}: {_line(error)}") from None
    for directory, found in zip(directories, below, strict=True):
        if not found.all_subtasks:
            raise InputError(f"{key}: {directory} holds no task (a .yaml file with a `task` key)")
    for name in named:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""  # too many to list: 14,000
            raise InputError(f"{key}: '{name}' is no task of lm-eval and no path{hint}")
    inside = [name for found in below for name in found.all_subtasks]
    return Tasks(manager, [*named, *files, *inside], key)


def load(tasks: Tasks) -> Tasks:
    """Read the tasks' data; `run` then reads no file, however often it is called.

    Raises:
        InputError: they cannot be read.
    """
    try:
        loaded = tasks.manager.load(tasks.names)
    except Exception as error:  # lm-eval and datasets raise many kinds: no network, no such file
        raise InputError(f"{tasks.key}: {_line(error)}") from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks._replace(loaded=loaded)


def run(
    tasks: Tasks,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    parallel: Parallel,
    *,
    batch_size: int,
    limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """lm-eval's results on the main process, None on the others; every process must call it.

    Random states and the model's mode are as before afterwards.

    Args:
        batch_size: requests at once.
        limit: examples of every task at most.
        quiet: without lm-eval's bars and notes, and without the processes that it forks for the
            standard error of a metric that is no mean, of which fewer resamples are then taken.

    Raises:
        InputError: the tasks were not loaded, and a task's data cannot be read.
        Interrupted: a process was asked to stop.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    if tasks.loaded is None:
        tasks = load(tasks)
    was_training, resamples = model.training, 1_000 if quiet else 100_000
    # Shapes change with every batch, so compiled blocks would be compiled again and again.
    with (
        _seeded(),
        _quiet() if quiet else nullcontext(),
        torch.compiler.set_stance("force_eager"),
        Lockstep(model, parallel) as lockstep,
    ):
        try:
            for task in tasks.loaded["tasks"].values():
                task.set_fewshot_seed(seed=SEED)  # the same examples every time
            scored = _shared(HFLM, parallel, lockstep, quiet=quiet)(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                mixed_precision_dtype=torch.bfloat16 if parallel.precision == "bf16" else None,
            )
            results: dict[str, Any] | None = evaluate(
                lm=scored,
                task_dict=tasks.loaded,
                limit=limit,
                log_samples=False,
                bootstrap_iters=resamples if parallel.is_main else 0,
            )
        finally:
            model.train(was_training)
    return results if parallel.is_main else None


def _shared(kind: Any, parallel: Parallel, lockstep: Lockstep, *, quiet: bool) -> Any:
    """lm-eval's `kind` of model, whose requests are shared out over the processes."""

    def answer(method: str) -> Any:
        def answered(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            first, last = (
                len(requests) * rank // parallel.world
                for rank in (parallel.rank, parallel.rank + 1)
            )
            mine = requests[first:last]
            silent = disable_tqdm or quiet or not parallel.is_main
            found = getattr(kind, method)(self, mine, disable_tqdm=silent) if mine else []
            lockstep.finish()
            return _from_all(found, parallel)

        return answered

    def tokens(self: Any, requests: Any, disable_tqdm: bool = False, **keys: Any) -> Any:
        silent = disable_tqdm or quiet or not parallel.is_main
        return kind._loglikelihood_tokens(self, requests, disable_tqdm=silent, **keys)

    methods = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    body = {name: answer(name) for name in methods}
    return type("Shared", (kind,), body | {"_loglikelihood_tokens": tokens})


def _from_all(answers: list[Any], parallel: Parallel) -> list[Any]:
    """The answers of all processes, in the order of their ranks: numbers, texts, or pairs."""
    if parallel.world == 1:
        return answers
    mine = torch.tensor(list(json.dumps(answers).encode()), dtype=torch.uint8)
    sizes = parallel.gather(torch.tensor([len(mine)], device=parallel.device)).tolist()
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine))).to(parallel.device)
    everyone = parallel.gather(padded).view(parallel.world, -1).cpu()
    found = [
        answer
        for text, size in zip(everyone, sizes, strict=True)
        for answer in json.loads(bytes(text[:size].tolist()))
    ]
    return [tuple(answer) if isinstance(answer, list) else answer for answer in found]


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager in which lm-eval says nothing but errors and forks no process."""
    log, key = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = log.level, os.environ.get(key)
    log.setLevel(logging.ERROR)
    os.environ[key] = "1"
    try:
        yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextmanager
def _seeded() -> Iterator[None]:
    """Context manager with the random states that lm-eval begins with; then they are as before."""
    python, numpys = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpys)


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """lm-eval's results as numbers: task, or group of tasks -> metric -> value.

    The standard error of a metric is under its name and `_stderr`, where there is one.
    """
    found: dict[str, dict[str, float]] = {}
    for task, values in (results["results"] | results.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, answers = key.partition(",")  # "acc,none": which answers were scored
            if comma and isinstance(value, int | float):
                name = metric if answers == "none" else f"{metric} ({answers})"
                found.setdefault(task, {})[name] = float(value)
    return found


def sentence(found: dict[str, dict[str, float]]) -> str:
    """The scores in a sentence, without standard errors."""
    return ", ".join(
        f"{task} {name} {value:.4f}"
        for task, values in found.items()
        for name, value in values.items()
        if not is_error(name)
    )


def is_error(name: str) -> bool:
    """Whether a name of `scores` is that of a standard error."""
    return name.partition(" (")[0].endswith("_stderr")


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
