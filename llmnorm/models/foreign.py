"""A causal language model of transformers' own class, as the training loop asks it.

    model = empty_foreign(kind, config)     parameters on the meta device, buffers with values
    model.units()                           the blocks, by name: what is sharded and recomputed
    model(input_ids=, position_ids=, shift_labels=, num_items_in_batch=).loss

The model is of a class derived from transformers' with the same name. So its parameters have their
names, `generate` and `save_pretrained` work, and a forward pass without `shift_labels` is the
class's own. Nothing here knows a family: how packed documents are kept apart (`Rows`) and what
stands between hidden states and logits (`Head`) is looked at when the weights are there
(models/looks.py), and set as `ways`.

Shapes: input_ids, shift_labels, position_ids (batch, length); hidden (batch, length, hidden).

What would surprise:
- There is no cache in a pass that trains: with the default `use_cache` every class mixes packed
  documents.
- Dropout and router noise of the class are off unless they are asked for. `saved_config` has the
  values of the directory, for checkpoints and exports.
- A plain linear head becomes our `LanguageHead`, which can make the loss without the logits.
- Routers of experts compute in float32, and trained experts are cast to the products' dtype
  (nn/experts.py). The class's balancing loss is trained where `router_loss` is not 0
  (models/router_loss.py), whatever its configuration says.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmnorm.models.foreign_head import OwnHead
from llmnorm.models.router_loss import Balanced, balance_of_rows
from llmnorm.nn.experts import give_precision, routers, stack_names
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import IGNORED, chunk_size, cross_entropy
from llmnorm.part import InputError

Rows = Literal["positions", "mask", "kernels", "apart"]
"""How packed documents are kept apart: by positions that restart at 0; by transformers' own packed
mask besides; by the arguments of kernels (cu_seq_lens, seq_idx); by giving each document a row."""
Head = Literal["linear", "own", "logits"]
"""How the loss is made of hidden states: as a linear head's, in chunks without logits; by the
class's own forward pass on hidden states, in chunks that are recomputed; from all of its logits."""

_RANDOM = re.compile(r"drop|jitter")  # in the names of configuration keys
# What a micro-batch tells of its documents (`document_bounds` in data/loader.py).
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Ways(NamedTuple):
    """How a model is run, as the looks have found it."""

    rows: Rows
    head: Head


class Foreign(PreTrainedModel):
    """What is added to a class of transformers.

    Attributes:
        kind: the class.
        saved_config: its configuration as the directory has it.
        ways: how it is run; None before it was looked at.
        fused: linear layers that hold several projections (fused.py), if that was looked at.
        is_mixture: whether it has experts.
        router_loss: what its balancing loss is multiplied by in training; 0: it is left out.
    """

    kind: type[PreTrainedModel]
    saved_config: PreTrainedConfig
    ways: Ways | None
    fused: Mapping[str, tuple[int, ...]]
    is_mixture: bool
    router_loss: float
    _unit_names: tuple[str, ...]
    _accepted: Callable[[str], bool]

    def units(self) -> dict[str, nn.Module]:
        """The blocks by name, none inside another."""
        return {name: self.get_submodule(name) for name in self._unit_names}

    @property
    def apart(self) -> bool:
        """Whether it is to be given one document a row (objectives/apart.py)."""
        return self.ways is not None and self.ways.rows == "apart"

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        documents: Mapping[str, Any] | None = None,
        rows: Rows = "positions",
    ) -> Tensor:
        """Last hidden states (batch, length, hidden).

        Args:
            position_ids: restart at 0 where a document starts; None: a document a row.
            documents: where they lie in the rows laid end to end, for `kernels`.
            rows: how documents are kept apart.
        """
        given = self._inputs(input_ids, position_ids, documents, rows)
        return _last(self._of_base(given)).view(*input_ids.shape, -1)

    def _of_base(self, given: Mapping[str, Any]) -> Any:
        """The base model's output; of the arguments it gets those that it takes."""
        return self.base_model(**{n: value for n, value in given.items() if self._accepted(n)})

    def trained(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        position_ids: Tensor | None = None,
        label_positions: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_only: bool = True,
        row_tokens: Sequence[int] | None = None,
        row_labels: Sequence[int] | None = None,
        **documents: Any,
    ) -> CausalLMOutputWithPast | Balanced:
        """The loss of a micro-batch, as `LlmNormForCausalLM` takes it with `loss_only`.

        Where `router_loss` is not 0, in training mode and with `row_tokens`, the balancing loss is
        part of the loss, and the output is a `Balanced`.

        Args:
            shift_labels: the label of position i stands at i; -100 is not counted.
            label_positions: (labels,), where labels are in the rows laid end to end; elsewhere the
                head is not run.
            num_items_in_batch: what the summed loss is divided by; the real labels if None.
            row_tokens, row_labels: of a mixture, how many tokens of each row are no padding, and
                how many labels each has.
            documents: `DOCUMENTS`.
        """
        assert self.ways is not None, "looked at before it is trained"
        rows, head = self.ways
        items = num_items_in_batch
        if items is None:
            items = (shift_labels != IGNORED).sum().clamp(min=1)
        given = self._inputs(input_ids, position_ids, documents, rows)
        balanced = self.router_loss > 0 and self.training and row_tokens is not None
        if balanced:
            given["output_router_logits"] = True
        output: Any
        if head == "logits":
            output = self.kind.forward(self, **given)
            logits = output.logits.view(*input_ids.shape, -1)
            loss = cross_entropy(logits, shift_labels, items)
        else:
            output = self._of_base(given)
            hidden = _last(output).view(input_ids.numel(), -1)
            loss = self._summed(hidden, input_ids, shift_labels, label_positions, items)
        if not balanced:
            return CausalLMOutputWithPast(loss=cast(Any, loss))
        assert row_tokens is not None and row_labels is not None
        found = getattr(output, "router_logits", None)
        balance = balance_of_rows(self, found, row_tokens, row_labels) / items
        return Balanced(loss + self.router_loss * balance, loss.detach(), balance.detach())

    def _summed(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        shift_labels: Tensor,
        label_positions: Tensor | None,
        items: Tensor | float,
    ) -> Tensor:
        """The summed loss of hidden (tokens, hidden) over `items`, without all logits at once."""
        assert self.ways is not None
        ids, labels = input_ids.flatten(), shift_labels.flatten()
        if label_positions is not None:
            if not len(label_positions):  # a pass over shards needs all weights on every process
                label_positions = label_positions.new_zeros(1)
            hidden, ids, labels = (
                t.index_select(0, label_positions) for t in (hidden, ids, labels)
            )
        if self.ways.head == "linear":
            loss: Tensor = self.get_output_embeddings()(hidden, labels, items)
            return loss
        return self._by_own_head(hidden, ids, labels) / items

    def own_logits(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The class's own logits (batch, length, vocabulary) of given hidden states."""
        return OwnHead(self, self.kind).logits(hidden, input_ids)

    def _by_own_head(self, hidden: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of hidden (tokens, hidden), logits being there for a chunk at a time."""
        step = chunk_size(self.get_input_embeddings().weight, hidden.device.type)
        total = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(labels), step):
            part = slice(first, first + step)
            total = total + checkpoint(
                self._chunk, hidden[part], ids[part], labels[part], use_reentrant=False
            )
        return total

    def _chunk(self, hidden: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.own_logits(hidden.unsqueeze(0), ids.unsqueeze(0))
        return cross_entropy(logits.squeeze(0), labels, 1.0)

    def _inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        documents: Mapping[str, Any] | None,
        rows: Rows,
    ) -> dict[str, Any]:
        """The class's arguments; rows are laid end to end for kernels, which want that."""
        given: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if rows == "apart" or position_ids is None:
            return given | {"input_ids": input_ids}
        if rows == "kernels":
            flat = position_ids.reshape(1, -1)
            numbers = ((flat == 0).cumsum(-1) - 1).int()
            given |= {"seq_idx": numbers, **(documents or {})}
            return given | {"input_ids": input_ids.reshape(1, -1), "position_ids": flat}
        if rows == "mask":
            like = torch.empty(*input_ids.shape, 1, device=input_ids.device)
            given["attention_mask"] = create_masks_for_generate(
                config=self.config,
                inputs_embeds=like,
                attention_mask=None,
                past_key_values=None,
                position_ids=position_ids,
            )
        return given | {"input_ids": input_ids, "position_ids": position_ids}


def skeleton(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class of transformers: float32 parameters on the meta device, real buffers.

    Args:
        kind: a causal language model's class.
        config: of the class; what a constructor changes is changed in a copy.

    Raises:
        InputError: the class cannot be made with this configuration.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return kind._from_config(deepcopy(config), dtype=torch.float32).float()
    except Exception as error:  # of any kind: it is the class's own code
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{kind.__name__}: cannot be made of this configuration: {reason}"
        ) from None


def empty_foreign(
    kind: type[PreTrainedModel], config: PreTrainedConfig, *, dropout: bool = False
) -> Foreign:
    """A `skeleton` that can be trained, once its weights are there.

    Args:
        dropout: leave dropout and router noise as the configuration has them.

    Raises:
        InputError: the class cannot be made with this configuration, or has no blocks.
    """
    quiet = deepcopy(config)
    if not dropout:
        _without_noise(quiet)
    for each in (quiet, quiet.get_text_config()):  # they are asked for where they are wanted
        if getattr(each, "output_router_logits", False):
            each.output_router_logits = False
    model = skeleton(kind, quiet)
    if model.base_model is model:
        raise InputError(
            f"{kind.__name__}: has no base model beside its head, so that its hidden states cannot "
            "be asked for"
        )
    names = unit_names(model)
    is_mixture = bool(routers(model)) or any(stack_names(m) for m in model.modules())
    give_precision(model)
    _give_language_head(model)
    model.__class__ = type(kind.__name__, (Foreign, kind), {"forward": _forward(kind)})
    foreign = cast(Foreign, model)
    foreign.kind, foreign.saved_config, foreign.ways = kind, deepcopy(config), None
    foreign.fused = {}
    foreign.is_mixture, foreign.router_loss = is_mixture, 0.0
    foreign._unit_names, foreign._accepted = names, _accepts(type(model.base_model))
    foreign.config.use_cache = False
    foreign.tie_weights()
    return foreign


def _forward(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward pass of the derived class; with the signature of the class, which `generate`
    reads.

    `inside` is called with the model in the place of a pass: where a sharded model has the weights
    that stand outside of its blocks.
    """

    @wraps(kind.forward)
    def forward(self: Foreign, *args: Any, **given: Any) -> Any:
        if (inside := given.pop("inside", None)) is not None:
            return inside(self)
        if given.get("shift_labels") is not None:
            return self.trained(*args, **given)
        return kind.forward(self, *args, **given)

    return forward


def _accepts(base: type[nn.Module]) -> Callable[[str], bool]:
    """Whether the base model's forward pass takes an argument of a name."""
    parameters = inspect.signature(base.forward).parameters
    every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return partial(_is_accepted, frozenset(parameters), every)


def _is_accepted(names: frozenset[str], every: bool, name: str) -> bool:
    return every or name in names


def unit_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The blocks: those that the class says not to split, else the items of its longest list."""
    kinds = set(model._no_split_modules or ())
    found: list[str] = []
    for name, module in model.named_modules():  # an outer one comes first
        inner = found and name.startswith(f"{found[-1]}.")
        if name and type(module).__name__ in kinds and not inner:
            found.append(name)
    if not found:
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        if lists:
            longest = max(lists, key=lambda n: len(lists[n]))
            found = [f"{longest}.{number}" for number in range(len(lists[longest]))]
    if not found:
        raise InputError(
            f"{type(model).__name__}: has no blocks that can be sharded or recomputed: it names "
            "none (_no_split_modules) and has no list of modules"
        )
    return tuple(found)


def _give_language_head(model: PreTrainedModel) -> None:
    """Put our head in the place of a plain linear one, around the same parameters."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return
    name = next(n for n, module in model.named_modules() if module is head)
    with torch.device("meta"):
        own = LanguageHead(head.in_features, head.out_features, bias=head.bias is not None)
    own.weight, own.bias, own.training = head.weight, head.bias, head.training
    model.set_submodule(name, own)


def _last(output: Any) -> Tensor:
    """The last hidden states of a base model's output."""
    found = getattr(output, "last_hidden_state", None)
    hidden: Tensor = output[0] if found is None else found
    return hidden


def _without_noise(config: PreTrainedConfig) -> None:
    """Set what a configuration, or one inside it, says of dropout and router noise to 0."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _without_noise(value)
        elif _RANDOM.search(name) and isinstance(value, float):
            setattr(config, name, 0.0)
