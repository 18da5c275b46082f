"""The balancing loss of a mixture of experts of transformers, a row at a time.

    model.router_loss = coefficient("auto", model)     what a run's settings ask for
    balance_of_rows(model, router_logits, row_tokens, row_labels)

The loss is E sum_e f_e P_e (Fedus et al. 2021, Switch Transformer, arXiv 2101.03961, equations 4 to
6): f_e is the share of the tokens that are sent to expert e, P_e their mean probability of it. A
product of two means is not the mean of products: four rows together have another loss than the mean
of the four. So the class's own function is called with one row at a time, without its padding, and
a row counts by its labels. The sum over a global batch is then the same in whatever micro-batches
and over however many processes its rows are run.

What would surprise: a row is what the class is given as one. A packed row counts as one, whatever
documents it holds; where the class is given one document a row (`apart`), each document counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from llmnorm.models.foreign_head import Balance, OwnHead
from llmnorm.nn.experts import expert_count
from llmnorm.nn.loss import IGNORED
from llmnorm.nn.precision import without_autocast
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.models.foreign import Foreign

_DIGITS = 6  # of a coefficient that is found by dividing two losses


@dataclass
class Balanced(ModelOutput):
    """The loss of a micro-batch with the balancing loss in it.

    Attributes:
        loss: cross-entropy + coefficient * balance; only this has a gradient.
        cross_entropy: the summed cross-entropy over `num_items_in_batch`.
        balance: the balancing loss of each row times its labels, summed, over the same.
    """

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    balance: Tensor | None = None


def coefficient(asked: float | Literal["auto", "off"], model: "Foreign") -> float:
    """What the balancing loss is multiplied by in training; 0 where there is none.

    Args:
        asked: `model.router_loss`. `auto`: the class's own coefficient if its configuration says
            `output_router_logits`, else 0.
        model: may be on the meta device.

    Raises:
        InputError: a coefficient is given, and the class has no balancing loss.
    """
    if asked == "off":
        return 0.0
    if asked == "auto":
        text = model.saved_config.get_text_config()
        if not getattr(text, "output_router_logits", False):
            return 0.0
        return own_coefficient(model) or 0.0
    if own_coefficient(model) is None:
        raise InputError(
            f"model.router_loss: {asked:g}; {model.kind.__name__} of transformers has no balancing "
            "loss, since it makes none of router logits; leave it out"
        )
    return float(asked)


def own_coefficient(model: "Foreign") -> float | None:
    """What the class multiplies its balancing loss by; None where it has none.

    It is found by asking the class for the loss of router logits that are all equal.
    """
    experts = expert_count(model)
    if experts is None:
        return None
    try:
        found = OwnHead(model, model.kind).balance((torch.zeros(2 * experts, experts),))
    except Exception:  # of any kind: it is the class's own code
        return None
    if found is None or not float(found.loss):
        return None
    return float(f"{float(found.added) / float(found.loss):.{_DIGITS}g}")


def balance_of_rows(
    model: "Foreign",
    router_logits: Sequence[Tensor] | None,
    row_tokens: Sequence[int],
    row_labels: Sequence[int],
) -> Tensor:
    """The class's balancing loss of every row times the row's labels, summed: 0-dim.

    Args:
        router_logits: of each layer with experts, (rows * length, experts) or (rows, length,
            experts), as the base model returns them. They are outputs, so recomputed blocks do not
            return them twice.
        row_tokens: how many tokens of each row are no padding; padding stands behind them.
        row_labels: how many labels each row has. A row without labels is left out.

    Raises:
        InputError: the class has returned none.
    """
    name = model.kind.__name__
    if not router_logits:
        raise InputError(f"model.router_loss: {name} has returned no router logits; give off")
    layers = [layer.flatten(0, -2) for layer in router_logits]
    length = len(layers[0]) // len(row_tokens)
    head = OwnHead(model, model.kind)
    total = layers[0].new_zeros(())
    with without_autocast(layers[0].device.type):
        for row, (tokens, labels) in enumerate(zip(row_tokens, row_labels, strict=True)):
            if not labels:
                continue
            part = slice(row * length, row * length + tokens)
            found: Balance | None = head.balance(tuple(layer[part] for layer in layers))
            assert found is not None, "looked at when the coefficient was chosen"
            total = total + labels * found.loss
    return total


@torch.no_grad()
def balance_beside_own(model: "Foreign", ids: Tensor, bound: float) -> str:
    """Compare the balancing loss of a row with the class's own, where it is trained.

    Args:
        model: with its weights, looked at as far as its head.
        ids: (1, length).
        bound: a difference by rounding, over the loss.

    Returns:
        What is trained, in a few words.

    Raises:
        InputError: they differ.
    """
    if not model.router_loss:
        factor = own_coefficient(model)
        if factor is None:
            return "the class has none"
        return f"off; the class trains {factor:g} times its own where it is asked to"
    length, was_training = ids.shape[1], model.training
    labels = torch.cat((ids[:, 1:], ids.new_full((1, 1), IGNORED)), 1)
    model.train()  # elsewhere there is none
    sizes = {"row_tokens": (length,), "row_labels": (length - 1,)}
    found = float(model(input_ids=ids, shift_labels=labels, **sizes).balance)
    model.train(was_training)
    asked = {"use_cache": False, "return_dict": True, "output_router_logits": True}
    wanted = model(input_ids=ids, **asked).aux_loss
    if wanted is None or abs(found - float(wanted)) > bound * float(wanted):
        own = "missing" if wanted is None else f"{float(wanted):.6g}"
        raise InputError(
            f"model.router_loss: the balancing loss of {model.kind.__name__} is {own}, and "
            f"{found:.6g} as it would be trained; give off"
        )
    return f"{model.router_loss:g} times the class's own, a row at a time"
