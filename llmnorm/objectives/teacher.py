"""A frozen language model, whole on this process, whose distributions another one learns.

It is no part of the model that is trained: it is not sharded, not compiled, and in no checkpoint.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from llmnorm.nn.soft_targets import SoftTargets

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM

KEY = "objective.teacher"  # of the settings, for messages
ABOUT_LABELS = ("shift_labels", "loss_only")


class Teacher:
    """A frozen language model.

    Args:
        model: with its weights, on the device of the run.
        autocast: gives the context of a forward pass, that of the run.
    """

    def __init__(
        self, model: "LlmNormForCausalLM", autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._autocast = autocast

    @torch.no_grad()
    def soft_targets(self, inputs: Mapping[str, Any]) -> SoftTargets:
        """The distributions of all tokens of a micro-batch, its rows laid end to end.

        Args:
            inputs: a model's arguments by name, on the device; those about labels are left out.
        """
        with self._autocast():
            hidden = self._model.model(**read(inputs)).last_hidden_state
        return SoftTargets(hidden.flatten(0, -2), self._model.lm_head.weight)


def read(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of a micro-batch's arguments: all but those about labels."""
    return {name: value for name, value in inputs.items() if name not in ABOUT_LABELS}
