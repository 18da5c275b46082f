"""Which linear layers of a class of transformers hold several projections, and in which rows.

    model.fused = fused_rows(model)         while it is on the meta device

A layer that computes q, k and v at once, or gate and up, holds matrices on top of each other, and a
rule for matrices wants each of them. No list of families says which layers do: a pass of a few
tokens on the meta device, which has shapes and no numbers, shows what becomes of a layer's output.

    qkv.split(sizes, -1), gate_up.chunk(2, -1), qkv[..., :q]   pieces that tile the last axis: the
                                                               weight's rows are cut in the same way
    qkv.view(batch, length, heads, 3 * width)                  q, k and v alternate from head to
                                                               head: no range of rows is one of them
    anything else                                              one projection

Where the output is not cut, but has as many rows as the configuration's heads (or gate and up) have
together, several projections are suspected, and `()` says that they cannot be told apart.

What would surprise: the pass may fail somewhere, since it is the class's own code. What was seen up
to there counts for every layer of the same kind, i.e. of the same name, shape and class around it.
"""

from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from llmnorm.models.foreign import Foreign

TOKENS = 8
Kind = tuple[type[nn.Module], str, tuple[int, ...]]


@torch.no_grad()
def fused_rows(model: Foreign) -> dict[str, tuple[int, ...]]:
    """By name of a linear layer that holds several projections: the rows of each.

    They are empty where the projections cannot be told apart. Other layers are not in the result.

    Args:
        model: with no adapter in it, and not laid out over processes.
    """
    watched = deepcopy(model).to("meta")
    outputs, layers = _Outputs(), dict[str, tuple[Kind, int]]()
    for unit, block in watched.units().items():
        modules = dict(block.named_modules())
        for name, module in modules.items():
            if isinstance(module, nn.Linear | Conv1D) and name:
                outer, _, own = name.rpartition(".")
                kind = type(modules[outer]), own, tuple(module.weight.shape)
                rows = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
                module.register_forward_hook(partial(outputs.watch, kind))
                layers[f"{unit}.{name}"] = kind, rows
            elif isinstance(getattr(module, "num_experts", None), int) and any(
                p.ndim == 3 for p in module.parameters(recurse=False)
            ):
                module.forward = _unchanged  # which experts a token goes to takes numbers
    with outputs, suppress(Exception):  # of any kind: it is the class's own code
        watched.hidden(torch.zeros(1, TOKENS, dtype=torch.long, device="meta"))
    suspected = _sums(model.config.get_text_config())
    found = {}
    for name, (kind, rows) in layers.items():
        pieces = _tiles(outputs.pieces.get(kind), rows)
        if pieces or rows in suspected:
            found[name] = pieces
    return found


def _unchanged(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of a module of experts."""
    return hidden


class _Outputs(TorchDispatchMode):
    """Notes what becomes of layers' outputs, by their kind.

    Attributes:
        pieces: the intervals [first, last) of the last axis that were cut off; None where an output
            of the kind was used in another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[Kind, set[tuple[int, int]] | None] = {}
        self._watched: dict[int, tuple[Kind, Tensor]] = {}  # by id, which lasts while they are kept

    def watch(self, kind: Kind, _: nn.Module, __: Any, output: Tensor) -> None:
        """A layer of this kind has given this output."""
        self.pieces.setdefault(kind, set())
        self._watched[id(output)] = kind, output

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation; a program that asks for a number is told 1, for a condition that it fails.

        Conditions on numbers decide about padding, packed rows and warnings.
        """
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1 if args[0].dtype != torch.bool else False
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._watched:
                kind, output = self._watched[id(leaf)]
                self._note(kind, [_interval(part, output) for part in tree_leaves(result)])
        return result

    def _note(self, kind: Kind, intervals: list[tuple[int, int] | None]) -> None:
        so_far = self.pieces[kind]
        if so_far is None or None in intervals:
            self.pieces[kind] = None
        else:
            so_far.update(interval for interval in intervals if interval is not None)


def _interval(part: Any, whole: Tensor) -> tuple[int, int] | None:
    """Which interval of the last axis of `whole` a part is a view of; None if it is none."""
    if not isinstance(part, Tensor) or part.untyped_storage()._cdata != (
        whole.untyped_storage()._cdata
    ):
        return None
    if part.shape[:-1] != whole.shape[:-1] or part.stride() != whole.stride():
        return None
    first = int(part.storage_offset() - whole.storage_offset())
    return first, first + part.shape[-1]


def _tiles(intervals: set[tuple[int, int]] | None, rows: int) -> tuple[int, ...]:
    """The lengths of several intervals that tile [0, rows); empty if they do not."""
    ordered = sorted(intervals or ())
    borders = [0, *(last for _, last in ordered)]
    if len(ordered) < 2 or borders[-1] != rows or [first for first, _ in ordered] != borders[:-1]:
        return ()
    return tuple(last - first for first, last in pairwise(borders))


def _sums(config: PreTrainedConfig) -> set[int]:
    """How many rows q, k and v have together by the configuration; and gate and up."""
    numbers = {
        name: value
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        + ("hidden_size", "intermediate_size")
        if isinstance(value := getattr(config, name, None), int)
    }
    found = set()
    if heads := numbers.get("num_attention_heads"):
        width = numbers.get("head_dim") or numbers.get("hidden_size", 0) // heads
        found.add((heads + 2 * numbers.get("num_key_value_heads", heads)) * width)
    if inner := numbers.get("intermediate_size"):
        found.add(2 * inner)
    return found - {0}
