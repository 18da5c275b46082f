"""Weights of a run that has left some as they were: the base's, and what was trained.

A checkpoint of such a run holds what is trained alone. A tensor of the model is one of four: the
base's own; one that was trained whole (a norm, a new head); the base's with an adapter (a linear
layer's, or a stack of experts), merged in float32 when it is read; or the base's embedding or head
with the rows of new tokens. Where the run stored linear layers of the base in NF4, these are
rounded to NF4 first, since that is what was trained beside. So memory is needed for one tensor at a
time, and whoever reads weights need not know how they were trained.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmnorm.config.adapter import Adapter, LowRankSettings, NoAdapterSettings
from llmnorm.machine import reading
from llmnorm.models import nf4
from llmnorm.models.adapters import Factors, factor_names, is_adapter, merged
from llmnorm.models.convert import Stored, named_weights
from llmnorm.models.expert_adapters import merged_stack, target_stacks
from llmnorm.models.four_bit_layers import stored_in_four_bits
from llmnorm.models.new_rows import rows_name
from llmnorm.part import InputError, Settings

Reader = Callable[[Mapping[str, Tensor]], None]


class Trained(NamedTuple):
    """What a checkpoint holds of a run that freezes weights, by names in the model as trained.

    Attributes:
        adapter: the run's; None where only norms or a head were trained.
        tensors: dtype and shape of all that was trained.
        read_into: fills the tensors that it is given.
        base: where the base lies.
        base_is_run: whether it is a run, which tools beside llmnorm do not read.
        quantize: how the linear layers of the base's blocks were stored in training: `nf4`; None:
            as they were.
        new_tokens: the ids of new tokens, whose rows of embedding and head were trained.
        base_rows: how many rows the base's embedding has; it may lack those of new tokens.
    """

    adapter: LowRankSettings | None
    tensors: dict[str, Stored]
    read_into: Reader
    base: Path
    base_is_run: bool
    quantize: str | None
    new_tokens: range
    base_rows: int

    @property
    def whole(self) -> list[str]:
        """The names of what was trained whole."""
        return [name for name in self.tensors if not is_adapter(name)]


class _Model(Settings):
    """What is read of the model's settings."""

    model_config = ConfigDict(extra="ignore")

    quantize: Literal["nf4"] | None = None
    """As in a run's configuration."""


class _OfRun(Settings):
    """What is read of the configuration of a run."""

    model_config = ConfigDict(extra="ignore")

    adapter: Adapter = NoAdapterSettings()
    """The adapter."""
    model: _Model = _Model()
    """How weights were stored."""


def adapter_of(meta: Mapping[str, Any], where: str) -> LowRankSettings | None:
    """The adapter of the run that has written a checkpoint's `meta`; None where it had none.

    Raises:
        InputError: its settings are not valid; the message begins with `where`.
    """
    found = reading.checked(meta["config"], _OfRun, where).adapter
    return found if isinstance(found, LowRankSettings) else None


def quantize_of(meta: Mapping[str, Any], where: str) -> str | None:
    """`model.quantize` of the run that has written a checkpoint's `meta`.

    Raises:
        InputError: its settings are not valid; the message begins with `where`.
    """
    return reading.checked(meta["config"], _OfRun, where).model.quantize


def beside(
    model: PreTrainedModel, base: Mapping[str, Stored], read_base: Reader, trained: Trained
) -> tuple[dict[str, Stored], Reader]:
    """The tensors of the whole model, and what reads them.

    Args:
        model: the run's, without an adapter, its parameters on the meta device.
        base: the base's tensors, by parameter name.
        read_base: fills tensors from the base.
        trained: what the run has trained.

    Returns:
        Dtypes and shapes, those of the base (a new head has the dtype of the base's embedding);
        and a function that fills tensors of any dtype, rounding once what was computed in float32.
    """
    names, config = named_weights(model), model.config
    asked = None if trained.adapter is None else trained.adapter.parameters
    stacks = {stack.name: stack for stack in target_stacks(model, asked)}
    turned = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    in_four_bits: set[str] = set()
    if trained.quantize is not None:
        in_four_bits = {f"{layer}.weight" for layer in stored_in_four_bits(model)}
    own = set(trained.whole)
    embedding = model.get_input_embeddings().weight
    new = base[next(name for name, p in model.named_parameters() if p is embedding)].dtype
    stored = {}
    for name in names:
        if rows_name(name) in trained.tensors:
            have, ids = trained.tensors[rows_name(name)].shape[0], trained.new_tokens
            if have != len(ids) or ids.stop > config.vocab_size:
                raise InputError(
                    f"the checkpoint's '{rows_name(name)}' has {have} rows, and its meta.base "
                    f"names the new tokens {ids.start} to {ids.stop - 1} of {config.vocab_size}"
                )
            stored[name] = Stored(base[name].dtype, (config.vocab_size, config.hidden_size))
        elif name in base and name not in own:
            stored[name] = base[name]
        elif name in own:
            shape, dtype = trained.tensors[name].shape, trained.tensors[name].dtype
            kept = base[name].dtype if name in base else new
            stored[name] = Stored(kept if dtype.is_floating_point else dtype, shape)

    def read_into(into: Mapping[str, Tensor]) -> None:
        rest = {}
        for name, tensor in into.items():
            stack = stacks.get(name)
            factors = _factors(f"{stack.layer}.weight" if stack else name, trained)
            if name in own:
                trained.read_into({name: tensor})
            elif (rows := rows_name(name)) in trained.tensors:
                ids = trained.new_tokens
                read_base({name: tensor[: trained.base_rows]})
                trained.read_into({rows: tensor[ids.start : ids.stop]})
            elif factors is None and name not in in_four_bits:
                rest[name] = tensor
            else:
                weight = torch.empty(base[name].shape, dtype=torch.float32)
                read_base({name: weight})
                if name in in_four_bits:
                    weight = nf4.rounded(weight, turned=name in turned)
                with torch.no_grad():
                    if factors is not None:
                        assert trained.adapter is not None
                        scale = trained.adapter.scale
                        if stack is None:
                            weight = merged(weight, factors, scale, turned=name in turned)
                        else:
                            a, b, _ = factors
                            weight = merged_stack(weight, a, b, scale, turned=stack.turned)
                    tensor.copy_(weight)
        read_base(rest)

    return stored, read_into


def _factors(name: str, trained: Trained) -> Factors | None:
    """The adapter of a weight, read; None where it has none.

    Args:
        name: of the weight in the model without an adapter; of a stack as if it were the weight of
            the layer around it.
    """
    a, b, m = factor_names(name)
    if trained.adapter is None or a not in trained.tensors:
        return None
    names = [a, b] + ([m] if trained.adapter.magnitude else [])
    if missing := [n for n in names if n not in trained.tensors]:
        raise InputError(f"the checkpoint holds '{a}', but no '{missing[0]}'")
    tensors = {n: torch.empty(trained.tensors[n].shape, dtype=torch.float32) for n in names}
    trained.read_into(tensors)
    return Factors(tensors[a], tensors[b], tensors.get(m))
