"""The check before the first step, and the line of the log that says how a run is laid out.

Between a launch file and a model there are several libraries, and each can turn a layout into
another without an error: two trainings that know nothing of each other, replicas in place of
shards, processes that all read the same rows. So the model, the processes and the rows themselves
are looked at and compared with the settings; a difference ends the run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.models import nf4
from llmnorm.optim.fragments import Fragment, master, whole_shape
from llmnorm.parallel.processes import Parallel, local


def check(parallel: Parallel, model: nn.Module, rows: Tensor) -> None:
    """Compare the layout with the settings; every process must call it.

    Args:
        model: after `Parallel.prepare`.
        rows: (n,) numbers of the rows that this process reads first, from 0 on; another process
            may read fewer or more.

    Raises:
        RuntimeError: they differ; the message names the difference.
    """
    found = parallel.found()
    _demand(
        found == parallel.sharding,
        f"parallel.sharding is '{parallel.sharding}', but the model is laid out as '{found}'",
    )
    processes = int(parallel.reduce(torch.ones((), device=parallel.device)))
    _demand(
        processes == parallel.world,
        f"{parallel.world} processes were launched, {processes} are connected",
    )
    numbers, whole = 0, 0
    for name, parameter in model.named_parameters():
        _demand(
            parameter.device.type == parallel.device.type,
            f"{name} is on {parameter.device}, not on {parallel.device}",
        )
        _demand(
            not parameter.requires_grad or parameter.dtype in (torch.float32, torch.float64),
            f"{name} is {parameter.dtype}, but weights are kept in float32 where they are trained",
        )
        weight = master(parameter)
        cut = any(placement.is_shard() for placement in getattr(weight, "placements", ()))
        cut |= isinstance(weight, Fragment)
        # ZeRO's stages 1 and 2 cut what is trained.
        due = parallel.spread or (parallel.zero is not None and parameter.requires_grad)
        _demand(cut == due, f"{name} is {'' if cut else 'not '}sharded")
        share = parallel.world // parallel.settings.replicas if cut else 1
        numbers += local(weight).numel() * share
        whole += whole_shape(weight).numel() * parallel.world
    total = int(parallel.reduce(torch.tensor(numbers, device=parallel.device)))
    _demand(total == whole, f"the processes hold {total} weights together, not {whole}")
    copies = parallel.settings.replicas if parallel.spread else parallel.world
    sums = torch.stack([local(p.detach()).double().sum() for p in model.parameters()])
    sums = parallel.gather(sums.sum().view(1)).view(copies, -1)  # (replicas, processes of each)
    _demand(bool((sums == sums[0]).all()), "replicas hold different weights")
    faults = [*parallel.zero.faults()] if parallel.zero is not None else []
    anywhere = int(parallel.reduce(torch.tensor(len(faults), device=parallel.device)))
    _demand(anywhere == 0, (faults or ["see the message of another process"])[0])
    read = _gathered(rows, parallel)
    _demand(len(read.unique()) == len(read), "several processes read the same rows")


def describe(parallel: Parallel, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Processes, backend, sharding, precision, and the bytes that this process holds: a line."""
    weights = [local(p) for p in model.parameters()]
    weights += [tensor for layer in nf4.layers(model).values() for tensor in layer.four_bits]
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


def _gathered(numbers: Tensor, parallel: Parallel) -> Tensor:
    """The `numbers` (n,), none below 0, of all processes, whose n may differ."""
    longest = int(parallel.gather(torch.tensor([len(numbers)], device=parallel.device)).max())
    filled = F.pad(numbers.to(parallel.device), (0, longest - len(numbers)), value=-1)
    found = parallel.gather(filled)
    return found[found >= 0]


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(f"check before the first step: {otherwise}")


def _size(tensors: list[Tensor]) -> str:
    return f"{sum(t.numel() * t.element_size() for t in tensors) / 2**20:.1f} MiB"
