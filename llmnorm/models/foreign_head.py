"""The class's own way from hidden states to logits, whatever stands between them.

A causal language model of transformers calls its base model and makes logits of what it returns: a
product, and what the family adds (a cap, a scale, a multiplier). Here the same forward pass runs
with a base model that only returns the hidden states it is given. So no key of a configuration is
read, and a family that nobody has heard of is right too.

Shapes: hidden (batch, length, hidden), ids (batch, length), logits (batch, length, vocabulary).
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class OwnHead:
    """A model without its base: all other modules, and so all parameters, are the model's.

    Args:
        model: of a class derived from `kind`, or of one that a wrapper has derived from that.
        kind: transformers' class.
    """

    def __init__(self, model: PreTrainedModel, kind: type[PreTrainedModel]) -> None:
        self._model, self._kind = model, kind

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The class's logits of the hidden states; called within a pass of the model."""
        model, prefix = self._model, self._model.base_model_prefix
        twin: Any = object.__new__(self._kind)
        twin.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
        twin._modules[prefix] = _Given(hidden, model.base_model)
        found: Tensor = self._kind.forward(twin, input_ids=ids, use_cache=False).logits
        return found


class _Given(nn.Module):
    """Stands for a base model: returns given hidden states; its attributes are the base's."""

    def __init__(self, hidden: Tensor, base: nn.Module) -> None:
        super().__init__()
        self._hidden = hidden
        object.__setattr__(self, "_base", base)  # no submodule

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output(last_hidden_state=self._hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_base"), name)


class _Output(dict[str, Any]):
    """An output with hidden states alone; whatever else a class asks it for is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if key == 0:
            return self["last_hidden_state"]
        return () if isinstance(key, slice) else self.get(key)
