"""Weights of a run that has left some as they were: the base's, and what was trained.

A checkpoint of such a run holds what is trained alone. A tensor of the model is one of three: the
base's own; one that was trained whole (a norm, a new head); or the base's with an adapter, merged
in float32 when it is read. So memory is needed for one tensor at a time, and whoever reads weights
need not know how they were trained.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict
from torch import Tensor

from llmnorm.config.adapter import Adapter, LowRankSettings, NoAdapterSettings
from llmnorm.machine import reading
from llmnorm.models.adapters import Factors, factor_names, is_adapter, merged
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import Stored, named_weights
from llmnorm.models.modeling import class_of
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
    """

    adapter: LowRankSettings | None
    tensors: dict[str, Stored]
    read_into: Reader
    base: Path
    base_is_run: bool

    @property
    def whole(self) -> list[str]:
        """The names of what was trained whole."""
        return [name for name in self.tensors if not is_adapter(name)]


class _OfRun(Settings):
    """What is read of the configuration of a run."""

    model_config = ConfigDict(extra="ignore")

    adapter: Adapter = NoAdapterSettings()
    """The adapter."""


def adapter_of(meta: Mapping[str, Any], where: str) -> LowRankSettings | None:
    """The adapter of the run that has written a checkpoint's `meta`; None where it had none.

    Raises:
        InputError: its settings are not valid; the message begins with `where`.
    """
    found = reading.checked(meta["config"], _OfRun, where).adapter
    return found if isinstance(found, LowRankSettings) else None


def beside(
    config: LlmNormConfig, base: Mapping[str, Stored], read_base: Reader, trained: Trained
) -> tuple[dict[str, Stored], Reader]:
    """The tensors of the whole model, and what reads them.

    Args:
        config: of the run's model.
        base: the base's tensors, by parameter name.
        read_base: fills tensors from the base.
        trained: what the run has trained.

    Returns:
        Dtypes and shapes, those of the base (a new head has the dtype of the base's embedding);
        and a function that fills tensors of any dtype, rounding once what was computed in float32.
    """
    with torch.device("meta"):
        names = named_weights(class_of(config)(config))
    own = set(trained.whole)
    new = base["model.embed_tokens.weight"].dtype
    stored = {}
    for name in names:
        if name in base and name not in own:
            stored[name] = base[name]
        elif name in own:
            shape, dtype = trained.tensors[name].shape, trained.tensors[name].dtype
            kept = base[name].dtype if name in base else new
            stored[name] = Stored(kept if dtype.is_floating_point else dtype, shape)

    def read_into(into: Mapping[str, Tensor]) -> None:
        rest = {}
        for name, tensor in into.items():
            factors = _factors(name, trained)
            if name in own:
                trained.read_into({name: tensor})
            elif factors is None:
                rest[name] = tensor
            else:
                assert trained.adapter is not None
                weight = torch.empty(base[name].shape, dtype=torch.float32)
                read_base({name: weight})
                with torch.no_grad():
                    tensor.copy_(merged(weight, factors, trained.adapter.scale))
        read_base(rest)

    return stored, read_into


def _factors(name: str, trained: Trained) -> Factors | None:
    """The adapter of a weight, read; None where it has none."""
    a, b, m = factor_names(name)
    if trained.adapter is None or a not in trained.tensors:
        return None
    names = [a, b] + ([m] if trained.adapter.magnitude else [])
    if missing := [n for n in names if n not in trained.tensors]:
        raise InputError(f"the checkpoint holds '{a}', but no '{missing[0]}'")
    tensors = {n: torch.empty(trained.tensors[n].shape, dtype=torch.float32) for n in names}
    trained.read_into(tensors)
    return Factors(tensors[a], tensors[b], tensors.get(m))
