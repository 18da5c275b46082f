"""The loud check before the first step, and the lines of the log that say what is there.

What was asked for can silently become something else on the way through launcher and libraries: two
unconnected trainings, replicas where shards were meant, processes that all read the same rows. So
nothing is taken from the settings here but what to compare with.
"""

import torch
from torch import Tensor, nn

from llmnorm.optim.fragments import Fragment, master, whole_shape
from llmnorm.parallel.processes import Parallel, local


def check(parallel: Parallel, model: nn.Module, rows: Tensor) -> None:
    """Compare what is there with what was asked for; every process makes this call.

    Args:
        model: as it is trained.
        rows: numbers of the rows that this process reads first.

    Raises:
        RuntimeError: they differ; the text names the difference.
    """
    found = parallel.found()
    _demand(
        found == parallel.sharding,
        f"sharding '{parallel.sharding}' was asked for, but the model's is '{found}'",
    )
    processes = int(parallel.reduce(torch.ones((), device=parallel.device)))
    _demand(
        processes == parallel.world,
        f"{parallel.world} processes were launched, {processes} are connected",
    )
    held, whole = 0, 0
    for name, parameter in model.named_parameters():
        _demand(
            parameter.device.type == parallel.device.type,
            f"{name} is on {parameter.device}, not on {parallel.device}",
        )
        _demand(
            parameter.dtype in (torch.float32, torch.float64),
            f"{name} is {parameter.dtype}, no master weight",
        )
        weight = master(parameter)
        cut = any(placement.is_shard() for placement in getattr(weight, "placements", ()))
        cut |= isinstance(weight, Fragment)
        # Stages 1 and 2 cut what they step.
        due = parallel.spread or (parallel.zero is not None and parameter.requires_grad)
        _demand(cut == due, f"{name} is {'' if cut else 'not '}sharded")
        share = parallel.world // parallel.settings.replicas if cut else 1
        held += local(weight).numel() * share
        whole += whole_shape(weight).numel() * parallel.world
    total = int(parallel.reduce(torch.tensor(held, device=parallel.device)))
    _demand(total == whole, f"the processes' parts make {total} numbers, not {whole}")
    copies = parallel.settings.replicas if parallel.spread else parallel.world
    held_sum = torch.stack([local(p.detach()).double().sum() for p in model.parameters()]).sum()
    sums = parallel.gather(held_sum.view(1)).view(copies, -1)  # (replicas, processes of each)
    _demand(bool((sums == sums[0]).all()), "replicas hold different weights")
    faults = [*parallel.zero.faults()] if parallel.zero is not None else []
    anywhere = int(parallel.reduce(torch.tensor(len(faults), device=parallel.device)))
    _demand(anywhere == 0, (faults or ["another process says what"])[0])
    read = parallel.gather(rows.to(parallel.device))
    _demand(len(read.unique()) == len(read), "several processes read the same rows")


def describe(parallel: Parallel, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Backend, processes, sharding, and the bytes that this process holds."""
    weights = [local(p) for p in model.parameters()]
    gradients = [local(master(p)) for p in model.parameters() if p.requires_grad]
    if parallel.zero is not None:
        weights = parallel.zero.weights(model)
        if parallel.zero.stage == 1:  # until they are reduced
            gradients = [p for p in model.parameters() if p.requires_grad]
    state = [local(t) for fields in optimizer.state.values() for t in fields.values()]
    replicas = f" x {parallel.settings.replicas} replicas" if parallel.sharding == "hsdp" else ""
    balance = getattr(optimizer, "balance", None)  # only with owners of matrices
    owners = "" if balance is None else f", busiest owner {balance:.2f} times the mean"
    return (
        f"{parallel.world} process(es) on {parallel.device.type} ({parallel.backend}), sharding "
        f"{parallel.found()}{replicas}, precision {parallel.precision}; a process holds "
        f"{_size(weights)} of weights, {_size(gradients)} of gradients, {_size(state)} of "
        f"optimizer state{owners}"
    )


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(f"check before the first step: {otherwise}")


def _size(tensors: list[Tensor]) -> str:
    return f"{sum(t.numel() * t.element_size() for t in tensors) / 2**20:.1f} MiB"
