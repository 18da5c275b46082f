"""What `llmnorm plan` is asked: a run's settings, so many GPUs, and how the model is laid out.

    layout_of(config, gpu_named("h100"), world=64, sharding="fsdp2")

Refused in one line is what `llmnorm train` would refuse when it starts: rows that do not divide
over the processes, a micro-batch that does not divide a process's share, replicas that do not
divide the processes.
"""

from dataclasses import dataclass

from llmnorm.analysis.plan.gpus import Gpu, gpu_named
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError, nearest

SHARDINGS = ("none", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
# Ways to spread a model that other trainers have, and why none is planned here.
NOT_OFFERED = {
    "tensor": "a rule of whole matrices would need its pieces put together in every step",
    "pipeline": "its schedule of micro-batches is a training loop of its own",
    "context": "a row is never cut, and its documents are kept apart inside a process",
    "expert": "experts are spread as all other weights are",
}


@dataclass(frozen=True)
class Layout:
    """A run on a number of processes, one for each GPU.

    Attributes:
        config: the run's settings, without `auto`; micro-batch and recomputation are those below.
        gpu: what each process computes on.
        world: processes.
        sharding: one of SHARDINGS, not `auto`.
        shards: processes over which one copy of what is sharded is spread; 1 for none and ddp.
        replicas: groups of `shards` processes that hold the same; world = shards * replicas.
        micro_batch: rows of `data.context_length` tokens that a process runs at once.
        accumulation: micro-batches of a process in a step; at most so many where a row holds
            several examples.
        recompute: whether blocks are recomputed in the backward pass.
    """

    config: RunConfig
    gpu: Gpu
    world: int
    sharding: str
    shards: int
    replicas: int
    micro_batch: int
    accumulation: int
    recompute: bool

    @property
    def device(self) -> str:
        """Where the run is planned for, "cpu" or "cuda"."""
        return "cpu" if self.config.training.device == "cpu" else self.gpu.device

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.config.data.context_length

    @property
    def nodes(self) -> int:
        """Computers that hold the GPUs."""
        return -(-self.world // self.gpu.per_node)

    @property
    def spread(self) -> bool:
        """Whether each process holds a part of the weights that a forward pass computes with."""
        return self.sharding in ("fsdp2", "hsdp", "zero3")


def layout_of(
    config: RunConfig,
    gpu: Gpu,
    world: int,
    *,
    sharding: str | None = None,
    replicas: int | None = None,
    micro_batch: int | None = None,
    recompute: bool | None = None,
) -> Layout:
    """The layout of a run; what is None is taken from its settings.

    Args:
        config: settings without `auto` (training/automatic.py resolves them).
        gpu: what each process computes on.
        world: processes.
        sharding: as `parallel.sharding`. `auto` is what it is without a launch file: `ddp`, or
            `hsdp` where there are replicas, or on one process `none`.
        replicas: as `parallel.replicas`.
        micro_batch: as `training.micro_batch`.
        recompute: as `parallel.activation_checkpointing`.

    Raises:
        InputError: unknown or impossible on so many processes; the nearest that is possible is
            named.
    """
    training, parallel = config.training, config.parallel
    groups = parallel.replicas if replicas is None else replicas
    kind = _sharding(sharding or parallel.sharding, world, groups)
    shards = 1 if kind in ("none", "ddp") else world // groups
    if micro_batch is not None:
        training = training.model_copy(update={"micro_batch": micro_batch})
    if recompute is not None:
        parallel = parallel.model_copy(update={"activation_checkpointing": recompute})
    rows = _rows_at_once(config, training.rows, training.micro_batch, world)
    share = -(-training.rows // world)
    return Layout(
        config=config.model_copy(update={"training": training, "parallel": parallel}),
        gpu=gpu,
        world=world,
        sharding=kind,
        shards=shards,
        replicas=world // shards,
        micro_batch=rows,
        accumulation=-(-share // rows),
        recompute=parallel.activation_checkpointing,
    )


def alone(config: RunConfig) -> Layout:
    """A process that holds the whole model, as `--print-memory` plans it: on a GPU of any kind.

    Raises:
        InputError: how many rows it has at once depends on the data.
    """
    return layout_of(config, gpu_named("h100"), 1, sharding="none", replicas=1)


def _sharding(asked: str, world: int, replicas: int) -> str:
    """The sharding that is meant, checked against the processes.

    Raises:
        InputError: unknown, or not possible.
    """
    for name, why in NOT_OFFERED.items():
        if asked.startswith(name):
            raise InputError(f"--sharding: {name} parallelism is not offered: {why}")
    if asked != "auto" and asked not in SHARDINGS:
        raise InputError(
            f"--sharding: '{asked}' is not known; {nearest(asked, ['auto', *SHARDINGS])}"
        )
    if replicas > world:
        raise InputError(
            f"parallel.replicas: {replicas} are more than the {world} GPUs; the most is {world}"
        )
    if world % replicas:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        close = min(divisors, key=lambda d: abs(d - replicas))
        raise InputError(
            f"parallel.replicas: {replicas} does not divide the {world} GPUs; the nearest that "
            f"does is {close}"
        )
    if asked == "auto":
        asked = "hsdp" if replicas > 1 else "ddp"
    if asked == "none" and world > 1:
        raise InputError(
            f"--sharding: 'none' is one process, but there are {world} GPUs; did you mean 'ddp'?"
        )
    if asked == "hsdp" and replicas == 1:
        raise InputError("--sharding: 'hsdp' needs parallel.replicas; 1 is 'fsdp2'")
    if replicas > 1 and asked not in ("fsdp2", "hsdp"):
        raise InputError(
            f"parallel.replicas: {replicas} has no meaning for sharding '{asked}'; "
            "valid: fsdp2, hsdp"
        )
    if asked == "ddp" and world == 1:
        return "none"
    return "hsdp" if replicas > 1 else asked


def _rows_at_once(config: RunConfig, rows: int, micro_batch: int | None, world: int) -> int:
    """Rows of a micro-batch.

    Raises:
        InputError: they do not divide, or depend on the data.
    """
    if not config.objective.even_batches:
        if micro_batch is None:
            raise InputError(
                "training.micro_batch: is missing, and how many rows the examples of a step fill "
                "depends on the data; give training.micro_batch"
            )
        return micro_batch
    if rows % world:
        close = min(
            (d for d in range(1, rows + 1) if rows % d == 0), key=lambda d: (abs(d - world), d)
        )
        fitting = max(1, round(rows / world)) * world
        raise InputError(
            f"training.global_batch: {rows} rows do not divide over {world} GPUs; {close} is the "
            f"nearest number that they divide over, training.global_batch={fitting} the nearest "
            f"batch for {world}"
        )
    share = rows // world
    if micro_batch is None:
        return share
    if share % micro_batch:
        close = min(
            (d for d in range(1, share + 1) if share % d == 0), key=lambda d: abs(d - micro_batch)
        )
        raise InputError(
            f"training.micro_batch: {micro_batch} does not divide the {share} rows of a process "
            f"(training.global_batch {rows} over {world}); the nearest that does is {close}"
        )
    return micro_batch
