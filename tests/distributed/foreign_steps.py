"""Steps of tiny models of classes of transformers under any sharding.

tools/bench/foreign.py runs all families through it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llmnorm.config.adapter import LoraSettings
from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.models.adapters import is_adapter, loaded_name, set_first_values
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import Foreign, empty_foreign, skeleton
from llmnorm.models.foreign_adapters import foreign_targets, inject_in_blocks
from llmnorm.models.frozen import freeze
from llmnorm.models.fused import fused_rows
from llmnorm.models.looks import look
from llmnorm.objectives.apart import as_asked
from llmnorm.optim.groups import split
from llmnorm.parallel.check import check
from llmnorm.parallel.processes import Parallel
from llmnorm.training.step import count, forward_backward
from tests.distributed.tiny import settings_of
from tests.families import packed_rows, tiny

STEPS, ROWS = 4, 4


class Found(NamedTuple):
    """What one run of a few steps gives.

    Attributes:
        ways: how the model was found to be run.
        losses: of the steps, and of one more.
        norms: of their gradients.
        balances: of the mixture's balancing loss, 0 where none is trained.
    """

    ways: list[str]
    losses: list[float]
    norms: list[float]
    balances: list[float]


def steps(
    family: str,
    sharding: str,
    *,
    adapter: bool = False,
    experts: bool = False,
    recomputed: bool = False,
    micro_batches: int = 1,
    optimizer: str = "adamw",
    router_loss: float = 0.0,
    replicas: int = 1,
    dtype: torch.dtype = torch.float32,
    after: Callable[[Foreign, torch.optim.Optimizer], None] = lambda model, optimizer: None,
) -> Found:
    """Train a tiny model of a family for some steps; every process makes the call.

    Args:
        adapter: train LoRA around all linear layers that PEFT wraps.
        experts: and around the stacks of experts.
        router_loss: what a mixture's balancing loss is multiplied by.
        dtype: of the weights.
        after: called after the last step.
    """
    parallel = Parallel(
        ParallelSettings(sharding=sharding, replicas=replicas, activation_checkpointing=recomputed),
        TrainingSettings(steps=1, device="cpu"),
    )
    own = tiny(family)
    model = empty_foreign(type(own), own.config).train().to(dtype)
    model.fused = fused_rows(model)
    if dtype == torch.float64:  # which grouped products do not take
        model.config._experts_implementation = "eager"
    if adapter:
        stacks = ["gate_up_proj", "down_proj"] if experts else None
        settings, blocks = LoraSettings(rank=4, parameters=stacks), [*model.units()]
        targets = foreign_targets(skeleton(type(own), own.config), settings, blocks)
        inject_in_blocks(model, settings, targets.names, blocks, targets.stacks)
        freeze(model, norms=False, new_head=False)
    values = own.state_dict()
    model.router_loss = router_loss

    def fill(modules: Any) -> None:
        with torch.no_grad():
            for name, tensor in named_weights(modules).items():
                if not is_adapter(name):
                    tensor.copy_(values[loaded_name(name)])
        set_first_values(modules, seed=0)

    replica = parallel.prepare(model, fill)
    look(model, autocast=parallel.autocast, gradient=parallel.gradient, recomputes=recomputed)
    groups = split(model)
    rule = settings_of(optimizer, lr=1e-3).build(groups, parallel.exchange())
    parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
    share = ROWS // parallel.world // micro_batches
    losses, norms, balances = [], [], []
    for step in range(STEPS + 1):
        first = step * ROWS + parallel.rank * share * micro_batches
        batches = [packed_rows(share, first + share * n) for n in range(micro_batches)]
        if step == 0:
            check(parallel, model, torch.cat([batch.rows for batch in batches]))
        batches = as_asked(model, batches, parallel)
        labels, _ = count(batches, parallel)
        balance = torch.zeros(())
        loss = parallel.reduce(forward_backward(replica, batches, labels, parallel, balance))
        balances.append(float(parallel.reduce(balance)))
        norms.append(float(parallel.clip(parameters, 1.0)))
        losses.append(float(loss))
        if step < STEPS:
            rule.step()
        rule.zero_grad(set_to_none=True)
        parallel.end_step()
    after(model, rule)
    assert model.ways is not None
    return Found([*model.ways], losses, norms, balances)
