"""The class's own way from hidden states to logits, whatever stands between them.

A causal language model of transformers calls its base model and makes logits of what it returns: a
product, and what the family adds (a cap, a scale, a multiplier). Here the same forward pass runs
with a base model that only returns the hidden states it is given. So no key of a configuration is
read, and a family that nobody has heard of is right too.

The balancing loss of a mixture of experts is asked for in the same way: the base model returns
router logits and the hidden states of no token.

Shapes: hidden (batch, length, hidden), ids (batch, length), logits (batch, length, vocabulary),
router logits (tokens, experts) of each layer with experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Balance(NamedTuple):
    """A class's balancing loss, as its own function gives it.

    Attributes:
        loss: of the router logits.
        added: what the class adds to its `labels=` loss: its coefficient times `loss`.
    """

    loss: Tensor
    added: Tensor


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
        twin = self._twin(_Output(last_hidden_state=hidden))
        found: Tensor = self._kind.forward(twin, input_ids=ids, use_cache=False).logits
        return found

    def balance(self, router_logits: tuple[Tensor, ...]) -> Balance | None:
        """The class's balancing loss of router logits; None where it has none.

        No parameter of the model is used: the head is left out, and there is no token to have a
        cross-entropy. So the model may be on the meta device.
        """
        nothing = router_logits[0].new_empty(1, 0, 1)
        twin = self._twin(_Output(last_hidden_state=nothing, router_logits=router_logits))
        head = self._model.get_output_embeddings()
        for name, module in twin._modules.items():
            if module is head:
                twin._modules[name] = nn.Identity()
        twin.__dict__["_loss_function"] = _no_loss(router_logits[0])
        ids = nothing.new_empty((1, 0), dtype=torch.long)
        asked = {"input_ids": ids, "labels": ids, "output_router_logits": True}
        forward = cast(Callable[..., Any], self._kind.forward)
        output = forward(twin, use_cache=False, **asked)
        loss = getattr(output, "aux_loss", None)
        return Balance(loss, output.loss) if isinstance(loss, Tensor) else None

    def _twin(self, output: "_Output") -> Any:
        """The model with a base that returns `output`."""
        model = self._model
        twin: Any = object.__new__(self._kind)
        twin.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
        twin._modules[model.base_model_prefix] = _Given(output, model.base_model)
        return twin


def _no_loss(like: Tensor) -> Callable[..., Tensor]:
    """A loss function that gives 0 whatever it is asked."""
    return lambda *_, **__: like.new_zeros(())


class _Given(nn.Module):
    """Stands for a base model: returns what it was given; its attributes are the base's."""

    def __init__(self, output: "_Output", base: nn.Module) -> None:
        super().__init__()
        self._output = output
        object.__setattr__(self, "_base", base)  # no submodule

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_base"), name)


class _Output(dict[str, Any]):
    """An output of what it was given; whatever else a class asks it for is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if key == 0:
            return self["last_hidden_state"]
        return () if isinstance(key, slice) else self.get(key)
