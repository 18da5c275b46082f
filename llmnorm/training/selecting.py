"""The rows of a step chosen out of a larger pool, with the weights as they are then.

    read        each process reads its part of the pool, and measures its rows (models/row_features)
    share       the measurements of all processes are put together, in the order of row numbers
    choose      every process calls the selector with the same numbers, so all know all picks
    read again  each process reads its part of the picks, by number

Nothing else is sent, and no row is. Where the selector only asks for numbers and sources, nothing
is read that is not trained on.

What would surprise:
- Rows are measured in evaluation mode, without dropout. Norms with running statistics then use
  these, so they are measured with another function than the one that is trained.
- Of two runs on different numbers of processes the picks are equal while their weights are equal to
  the bit. Later rounding decides a near tie, and float32 runs part.
"""

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmnorm.config.tree import RunConfig
from llmnorm.models.row_features import (
    Feature,
    Gradient,
    Hidden,
    Losses,
    ZerothOrder,
    directions,
    projection,
)
from llmnorm.nn.mixers.contract import Mixer
from llmnorm.nn.norms.running import RunningStatistics
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError, part_name
from llmnorm.selection.contract import Selector
from llmnorm.selection.controls import KeptRows, draw
from llmnorm.selection.settings import (
    FeatureSettings,
    KeepSettings,
    SelectionSettings,
    zero3_refusal,
)
from llmnorm.training.state import SELECTION, Progress

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM

FULL = 0.1  # of the steps; a run in which kept rows alone fill more batches than this says so
# Of the time of a pair of probes: exact gradients with 64 projections, by tools/bench/selecting.py.
PAIR = 0.9


class Selecting:
    """How the rows of a run's steps are chosen.

    Args:
        config: the run's settings, with a selection.
        objective: its rows.
        model: this process's part of the model, laid out.
        parallel: this process.
        statistics: of the model's norms.
        micro_batch: rows that one process runs at once.

    Raises:
        InputError: the pool does not divide over the processes, the selection does not fit the
            sources or the sharding, or the adapter has no layer where rows are measured.

    Attributes:
        state: the selector's tensors, by their names in a checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        model: "LlmNormForCausalLM",
        parallel: Parallel,
        statistics: RunningStatistics,
        micro_batch: int,
    ) -> None:
        settings = config.selection
        assert isinstance(settings, SelectionSettings)
        self._settings, self._objective, self._model = settings, objective, model
        self._parallel, self._statistics, self._micro_batch = parallel, statistics, micro_batch
        self._pool, self._batch = settings.pool, config.training.rows
        _check_pool(settings.pool, self._batch, parallel.world, config.objective.even_batches)
        sources = objective.data.sources
        self._names = [source.name for source in sources]
        sizes = [source.rows for source in sources]
        self._selector: Selector = settings.build(self._names, sizes, config.seed)
        self._kept: KeptRows | None = None
        if isinstance(settings, KeepSettings):
            self._kept = settings.kept(self._names, sizes, config.seed)
        self._feature, self._at = _feature(settings, model, parallel, config)
        self._seed, self._rows = config.seed, config.total_steps(objective.data.rows) * config.pool
        self.state: dict[str, Tensor] = {
            f"{SELECTION}{name}": tensor for name, tensor in self._selector.state().items()
        }
        self._figures: dict[str, Any] = {}
        self._steps = self._full = 0
        self._said = False
        self._seconds = self._training = 0.0
        self._chosen_at: float | None = None

    def steps(self, progress: Progress) -> Iterator[list[MicroBatch]]:
        """Yield, without end, this process's micro-batches of each step, chosen when asked for."""
        while True:
            yield self.choose(progress.row)

    def choose(self, first_row: int) -> list[MicroBatch]:
        """This process's micro-batches of the step whose pool begins at this row.

        Raises:
            InputError: what was measured of a row is not finite, or a selector of one's own gave
                something else than picks.
        """
        start = time.perf_counter()
        numbers = np.arange(first_row, first_row + self._pool)
        sources = torch.from_numpy(self._objective.sources(numbers))
        features, losses = self._measure(numbers)
        places = torch.from_numpy(numbers)
        chosen = self._selector.select(features, losses, sources, self._batch, places)
        _check_picks(chosen, self._batch, self._pool, self._settings)
        self._note(chosen, sources, losses, places, first_row + self._pool)
        micro_batches = self._objective.read(
            numbers[chosen.numpy()],
            rank=self._parallel.rank,
            world=self._parallel.world,
            micro_batch=self._micro_batch,
        )
        self._chosen_at = time.perf_counter()
        self._seconds += self._chosen_at - start
        return micro_batches

    def step_ended(self) -> None:
        """Count the time of a step for the share that choosing takes; say what is to be said."""
        if self._chosen_at is not None:
            self._training += time.perf_counter() - self._chosen_at
            self._chosen_at = None
        if not self._said and self._steps >= 10 and self._full > FULL * self._steps:
            self._said = True
            self._parallel.say(
                f"llmnorm: note: in {self._full} of {self._steps} steps the rows of the kept "
                "sources alone filled the batch, and none was chosen from the others; a larger "
                "training.global_batch or another selection.keep leaves room for them"
            )

    def line(self) -> dict[str, Any]:
        """What metrics.jsonl gets of the last step's selection, and of the time since the last."""
        whole = self._seconds + self._training
        found = {
            "selection": self._figures,
            "selection_seconds": self._seconds,
            "selection_share": self._seconds / whole if whole else 0.0,
        }
        self._seconds = self._training = 0.0
        return found

    def describe(self) -> str:
        """What is chosen, where rows are measured, and what it costs: some lines."""
        name = part_name(type(self._settings))
        lines = [
            f"selection {name}: {self._batch} of {self._pool} rows are trained on in a step; "
            f"{self._cost()}"
        ]
        if self._at:
            lines.append(f"rows are measured at the weight of {self._at} in the last layer")
        if self._kept is not None:
            data = self._objective.data
            weights = data.mixture(self._rows)
            mixture = [weight / sum(weights) for weight in weights]
            shares = self._kept.shares(mixture, self._pool, self._batch)
            trained = ", ".join(
                f"{n}: {max(1, round(1000 * s))}" for n, s in zip(self._names, shares, strict=True)
            )
            lines.append(
                "the rows that are trained on are a mixture that plain training has with about "
                f"data.weights={{{trained}}}"
            )
        return "\n".join(lines)

    def _cost(self) -> str:
        """What a step costs in plain steps, by the operations of this model."""
        pool, batch = self._pool, self._batch
        a_row = forwards(self._model, self._objective, self._settings)
        of_batch = (pool * a_row + 3 * batch) / (3 * batch)
        if a_row == 0:
            return "a step costs what a plain one does"
        return (
            f"a step costs as much as {of_batch:.2f} plain steps of {batch} rows, or "
            f"{of_batch * batch / pool:.2f} of {pool}; it pays if it needs less than "
            f"{100 / of_batch:.0f} % of the plain steps of {batch} rows, or where {pool} rows do "
            "not fit into memory"
        )

    def _measure(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features (pool, k) and losses (pool,) of all rows, on the CPU, the same everywhere."""
        feature = self._feature
        if feature is None:
            return torch.zeros(len(numbers), 0), torch.zeros(len(numbers))
        parallel, model = self._parallel, self._model
        wide = next(model.parameters()).dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        table = torch.zeros(len(numbers), feature.width + 1, dtype=dtype, device=parallel.device)
        was_training = model.training
        model.eval()
        try:
            for batch in self._objective.read(
                numbers, rank=parallel.rank, world=parallel.world, micro_batch=self._micro_batch
            ):
                with parallel.autocast():
                    inputs = batch.inputs_on(parallel.device)
                    found = feature.measure(model, inputs, batch.spans)
                parallel.phases.advance()
                rows = (batch.rows - int(numbers[0])).to(parallel.device)
                table[rows, :-1] = found.features.to(dtype)
                if found.losses is not None:
                    table[rows, -1] = found.losses.to(dtype)
        finally:
            model.train(was_training)
            self._statistics.discard()
        table = parallel.reduce(table).cpu()  # a row is measured by one process: x + 0 is exact
        sound = table.isfinite().all(1)
        if not sound.all():
            row = int(numbers[int((~sound).nonzero()[0])])
            raise InputError(
                f"selection: what was measured of row {row} is not finite, so no rows can be "
                "chosen; go on from the newest checkpoint with a lower optimizer.lr (a run of its "
                "own: training.branch_from)"
            )
        return table[:, :-1], table[:, -1]

    def _note(
        self, chosen: Tensor, sources: Tensor, losses: Tensor, numbers: Tensor, read: int
    ) -> None:
        """Keep the figures of a step."""
        counts = sources[chosen].bincount(minlength=len(self._names)).tolist()
        figures: dict[str, Any] = {
            "read": read,
            "picks": dict(zip(self._names, counts, strict=True)),
        }
        if self._feature is not None:
            uniform = draw(torch.arange(len(numbers)), len(chosen), numbers, self._seed + 1)
            figures["overlap_with_uniform"] = len(
                set(chosen.tolist()) & set(uniform.tolist())
            ) / len(chosen)
            if self._feature.has_losses:
                figures["pool_loss"] = float(losses.mean())
                figures["picked_loss"] = float(losses[chosen].mean())
        figures |= self._selector.figures()
        self._steps += 1
        self._full += bool(figures.get("kept_rows_fill_the_batch"))
        self._figures = figures


def _check_pool(pool: int, batch: int, world: int, even: bool) -> None:
    """Refuse a pool that does not divide over the processes, or is too small."""
    if pool < batch:
        raise InputError(
            f"selection.pool {pool} is less than the training.global_batch {batch} that are chosen "
            f"from it; give at least {batch}"
        )
    if even and pool % world:
        raise InputError(
            f"selection.pool: {pool} rows do not divide over {world} processes; "
            f"the nearest that does is {max(1, round(pool / world)) * world}"
        )


def _check_picks(chosen: Tensor, budget: int, pool: int, settings: SelectionSettings) -> None:
    """Refuse what a selector of another package gives that are no picks."""
    picks = chosen.tolist()
    ascending = all(a < b for a, b in zip(picks, picks[1:], strict=False))
    if len(picks) != budget or not ascending or picks[0] < 0 or picks[-1] >= pool:
        raise InputError(
            f"selection: '{part_name(type(settings))}' has chosen {len(picks)} places; it must "
            f"give {budget} different ones below {pool}, in ascending order"
        )


def _feature(
    settings: SelectionSettings, model: "LlmNormForCausalLM", parallel: Parallel, config: RunConfig
) -> tuple[Feature | None, str]:
    """What is measured, and the name of the layer where; "" where no layer matters."""
    if settings.reads == "numbers":
        return None, ""
    if settings.reads == "losses":
        return Losses(), ""
    assert isinstance(settings, FeatureSettings), settings
    if settings.feature == "hidden":
        return Hidden(model.config.hidden_size), ""
    if settings.feature == "gradient" and parallel.sharding == "zero3":
        raise InputError(zero3_refusal())
    name, at = projection(model.model.layers[-1])
    if config.has_adapter and not name.endswith("lora_B"):
        last = name.rpartition(".")[2]
        raise InputError(
            f"selection.feature: rows are measured at '{last}' of the last layer, where the "
            f"adapter has no layer; add {last} to adapter.targets, or give all-linear"
        )
    count = settings.probes if settings.feature == "zeroth_order" else settings.sketch
    drawn = directions(at, count, seed=config.seed)
    if settings.feature == "zeroth_order":
        return ZerothOrder(at, drawn, settings.eps), name
    return Gradient(at, drawn), name


def forwards(
    model: "LlmNormForCausalLM", objective: Objective, settings: SelectionSettings
) -> float:
    """What measuring a row costs, in forward passes of a row.

    A pass of L layers and a head that is worth h of them is L + h; the layers below the last one
    run once, the last one and the head twice for each probe.

    Args:
        model: its layers and head; their weights are not read.
        objective: says for how many tokens the head runs.
        settings: what is measured.
    """
    if settings.reads == "numbers":
        return 0.0
    if not isinstance(settings, FeatureSettings):
        return 1.0
    context = objective.data.context_length
    blocks = [_operations(block, context) for block in model.model.layers]
    head = _operations(model.lm_head, context) * objective.head_share
    whole, last = sum(blocks) + head, blocks[-1]
    measured = {
        "zeroth_order": 2 * settings.probes * (last + head),
        "gradient": PAIR * 2 * (last + head),
        "hidden": last,
    }
    return (sum(blocks) - last + measured[settings.feature]) / whole


def _operations(part: nn.Module, context: int) -> float:
    """Forward operations of a token."""
    total = 0.0
    for module in part.modules():
        if isinstance(module, Mixer):
            total += module.flops_per_token(context)
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if all(isinstance(size, int) for size in sizes) and not hasattr(module, "base_layer"):
            total += 2.0 * math.prod(sizes)  # type: ignore[arg-type]
    return total
