"""Scores on lm-eval's tasks while a run trains: `evaluation.tasks`.

The tasks are looked up and their data are read before the first step, so that a misspelt name or a
missing file ends the run there, and nothing is fetched later. The figures are those that
`llmnorm eval RUN --tasks` gives under the same sharding, and training goes on as if there were
none: random states and the model's mode are restored.
"""

from typing import TYPE_CHECKING, Any

from llmnorm.config.tree import RunConfig
from llmnorm.data.run_data import RunData
from llmnorm.generation.prompts import open_tokenizer
from llmnorm.objectives import benchmark_tasks
from llmnorm.parallel.processes import Parallel
from llmnorm.training.ema import EMA

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RunTasks:
    """The tasks of a run, which has some; every process makes every call.

    Raises:
        InputError: lm-eval is missing, there is no such task, or its data cannot be read.
    """

    def __init__(self, config: RunConfig, data: RunData, steps: int) -> None:
        self._settings, self._steps = config.evaluation, steps
        key = "evaluation.tasks"
        self._tasks = benchmark_tasks.load(benchmark_tasks.find(config.evaluation.tasks, key))
        self._tokenizer = open_tokenizer(data.tokenizer_directory, first=data.bos)

    def due(self, step: int) -> bool:
        """Whether an evaluation of this step scores them."""
        every = self._settings.tasks_every
        return step == self._steps or every is None or step % every == 0

    def scores(
        self, model: "PreTrainedModel", parallel: Parallel, ema: EMA | None
    ) -> dict[str, Any]:
        """Task -> metric -> value under "tasks"; of the moving average under "ema_tasks".

        On the main process; the others get nothing.

        Raises:
            Interrupted: a process was asked to stop.
        """
        found = {"tasks": self._scored(model, parallel)}
        if ema is not None:
            with ema.in_place_of_weights():
                found["ema_tasks"] = self._scored(model, parallel)
        return found if parallel.is_main else {}

    def _scored(self, model: "PreTrainedModel", parallel: Parallel) -> dict[str, Any]:
        results = benchmark_tasks.run(
            self._tasks,
            model,
            self._tokenizer,
            parallel,
            batch_size=self._settings.micro_batch or benchmark_tasks.AT_ONCE,
            limit=self._settings.tasks_limit,
            quiet=True,
        )
        return {} if results is None else benchmark_tasks.scores(results)
