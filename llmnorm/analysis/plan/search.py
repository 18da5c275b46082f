"""Which layouts of a run fit into the GPUs' memory, the fastest first: `llmnorm plan --fit`.

    for candidate in fitting(config, gpu, world):
        candidate.layout, candidate.needed, candidate.step.seconds

Tried are every sharding, for `hsdp` every number of replicas, with and without recomputation, each
with the largest micro-batch that fits: a smaller one gathers weights more often and gives the GPU
less to do at once. No micro-batch has more than 65,536 tokens, at which a GPU is busy.

What would surprise: DeepSpeed's stages are listed whether or not it is installed here.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llmnorm.analysis.plan.gpus import GPUS, Gpu
from llmnorm.analysis.plan.layout import SHARDINGS, Layout, layout_of
from llmnorm.analysis.plan.memory import Memory, memory
from llmnorm.analysis.plan.recording import Recording, record
from llmnorm.analysis.plan.time import EFFICIENCY, StepTime, StepWork, step_time, step_work
from llmnorm.analysis.plan.work import Passes
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError

GIB = 2**30
MOST_TOKENS = 2**16  # of a micro-batch, unless a row has more


class Candidate(NamedTuple):
    """A layout that fits.

    Attributes:
        needed: bytes of its fullest process, with what is no tensor.
        step: its time.
    """

    layout: Layout
    needed: int
    step: StepTime


def fitting(
    config: RunConfig, gpu: Gpu, world: int, efficiency: float = EFFICIENCY
) -> list[Candidate]:
    """The layouts of `config` on `world` GPUs that fit, the fastest first.

    Raises:
        InputError: none fits; the nearest number of GPUs, or the nearest GPU, is named.
    """
    search = _Search(config, gpu)
    found = []
    for sharding, replicas in _shardings(world):
        for recompute in (False, True):
            fits = search.largest(world, sharding, replicas, recompute)
            if fits is not None:
                layout, needed = fits
                step = step_time(search.work(layout), efficiency)
                found.append(Candidate(layout, needed.needed, step))
    if not found:
        raise InputError(search.nothing_fits(world))
    return sorted(found, key=lambda candidate: candidate.step.seconds)


def _shardings(world: int) -> Iterator[tuple[str, int]]:
    """Every sharding of so many processes, with its replicas."""
    for sharding in SHARDINGS:
        if (sharding == "none") != (world == 1):
            continue
        if sharding == "hsdp":
            yield from (("hsdp", r) for r in range(2, world) if world % r == 0)
        else:
            yield sharding, 1


class _Search:
    """What layouts have in common is recorded once: a model at a micro-batch, however it is cut."""

    def __init__(self, config: RunConfig, gpu: Gpu) -> None:
        self.config, self.gpu = config, gpu
        self._recordings: dict[tuple[int, bool], Recording] = {}
        self._passes: dict[int, Passes] = {}

    def largest(
        self, world: int, sharding: str, replicas: int, recompute: bool
    ) -> tuple[Layout, Memory] | None:
        """The layout with the largest micro-batch that fits; None where none does."""
        share = max(1, self.config.training.rows // world)
        most = min(share, max(1, MOST_TOKENS // self.config.data.context_length))
        sizes = [rows for rows in range(1, most + 1) if share % rows == 0]
        best, low, high = None, 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            layout = layout_of(
                self.config,
                self.gpu,
                world,
                sharding=sharding,
                replicas=replicas,
                micro_batch=sizes[middle],
                recompute=recompute,
            )
            needed = memory(layout, self.recording(layout))
            if needed.fits:
                best, low = (layout, needed), middle + 1
            else:
                high = middle
        return best

    def recording(self, layout: Layout) -> Recording:
        """The layout's model."""
        key = (layout.micro_batch, layout.recompute)
        if key not in self._recordings:
            self._recordings[key] = record(layout.config, layout.micro_batch, layout.device)
        return self._recordings[key]

    def work(self, layout: Layout) -> StepWork:
        """The layout's step."""
        recording, rows = self.recording(layout), layout.micro_batch
        work = step_work(layout, recording, self._passes.get(rows))
        self._passes[rows] = work.passes
        return work

    def smallest(self, world: int) -> Memory:
        """What the layout needs that needs least: one row at once, recomputed, all spread."""
        layout = layout_of(
            self.config,
            self.gpu,
            world,
            sharding="none" if world == 1 else "fsdp2",
            replicas=1,
            micro_batch=1,
            recompute=True,
        )
        return memory(layout, self.recording(layout))

    def nothing_fits(self, world: int) -> str:
        """The message that names the nearest layout that fits."""
        least = self.smallest(world)
        message = (
            f"--fit: nothing fits: {world} x {self.gpu.name} with {least.there / GIB:.1f} GiB "
            f"each, and the least that a process needs is {least.needed / GIB:.1f} GiB (one row at "
            "once, blocks recomputed, everything spread)"
        )
        rows, more = self.config.training.rows, 2 * world
        while more <= rows:
            if rows % more == 0 and self.smallest(more).fits:
                return f"{message}; the nearest that fits is --gpus {more}"
            more *= 2
        larger = [each for each in GPUS.values() if each.memory_bytes >= least.needed]
        if larger:
            nearest = min(larger, key=lambda each: each.memory_bytes)
            return f"{message}; the nearest that fits is --gpu {nearest.name}"
        return f"{message}; a smaller model or a shorter data.context_length would need less"
