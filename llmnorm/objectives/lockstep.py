"""Forward passes of a model in step with the other processes, whatever each has to compute.

    with Lockstep(model, parallel) as lockstep:
        ...                    any number of passes, another one on each process
        lockstep.finish()      as often on every process

A forward pass over shards gathers weights from all processes, so all must make equally many. Before
each pass the processes reduce two numbers: how many of them have a pass to make, and whether one
was asked to stop. Who is in `finish` has none, and takes part in the others' with a single token.

Where every process has whole weights, `finish` only waits. The reduction is made all the same, so
that a signal ends all processes after the same pass.
"""

from typing import TYPE_CHECKING, Any, Self

import torch

from llmnorm.parallel.processes import Interrupted, Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lockstep:
    """Context manager of passes in step; every process enters it.

    Args:
        model: of which passes are made. Outside of the context it is as it was.
    """

    def __init__(self, model: "PreTrainedModel", parallel: Parallel) -> None:
        self._model, self._parallel, self._finishing = model, parallel, False

    def __enter__(self) -> Self:
        # In front of the hooks that gather weights.
        self._hook = self._model.register_forward_pre_hook(self._before_a_pass, prepend=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def finish(self) -> None:
        """Take part in the passes of the others until none is left.

        Raises:
            Interrupted: a process was asked to stop; it is raised on all of them.
        """
        parallel = self._parallel
        while self._with_a_pass(False):
            if not parallel.spread:
                continue
            token = torch.zeros(1, 1, dtype=torch.int64, device=parallel.device)
            self._finishing = True
            try:
                with torch.no_grad(), parallel.autocast():
                    self._model(input_ids=token)
            finally:
                self._finishing = False

    def _before_a_pass(self, *_: Any) -> None:
        if not self._finishing:
            self._with_a_pass(True)

    def _with_a_pass(self, mine: bool) -> int:
        """How many processes have a pass to make; `mine`: whether this one has."""
        parallel = self._parallel
        parallel.phases.advance()
        if parallel.world == 1:
            if asked := parallel.asked():
                raise Interrupted(asked)
            return int(mine)
        numbers = torch.tensor([float(mine), float(parallel.asked())], device=parallel.device)
        passes, asked = parallel.reduce(numbers).tolist()
        if asked > 0:
            raise Interrupted(round(asked))
        return round(passes)
