"""Which rows a run reads from where it starts, and in which stages.

`data.stages` says where a mixture ends: at a share of the run's length, or after so many rows or
tokens. When a run starts, these places become rows. Every checkpoint keeps them, so rows that were
read stay what they were, whatever the run's length becomes later. A run of 1,000 steps of 16 rows:

    data.stages                                 [{until: 0.8, weights: A}, {weights: B}]
    it begins with                              Stage(0, A), Stage(12800, B)
    from step 500 on it is to have 2,000 steps  Stage(0, A), Stage(25600, B)
    the same from step 900 on                   Stage(0, A), Stage(12800, B)
    a branch at step 500 with the weights C     Stage(0, A), Stage(8000, C)

What would surprise: where a branch reads other data, a longer context or another seed's order, row
n would be another row than its parent's. So its rows are counted from 0 again, while its steps go
on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.config.tree import RunConfig
from llmnorm.data.order import Order
from llmnorm.data.run_data import RunData, Stage
from llmnorm.data.settings import StageSettings
from llmnorm.part import InputError


class Start(NamedTuple):
    """The checkpoint that a run starts from.

    Attributes:
        path: its directory.
        meta: what it holds beside tensors.
        own: whether it is the run's own; else the run branches from it.
    """

    path: Path
    meta: Mapping[str, Any]
    own: bool


class Pace(NamedTuple):
    """How a run's steps read its rows: step `step` (from 0) begins with row `row`."""

    step: int
    row: int
    pool: int
    """Rows that a step reads."""

    def row_of(self, step: int) -> int:
        """The first row of a step."""
        return self.row + (step - self.step) * self.pool

    def step_of(self, row: int) -> int:
        """The number, from 1 as in metrics.jsonl, of the step that reads a row."""
        return self.step + (row - self.row) // self.pool + 1


@dataclass(frozen=True)
class Course:
    """What a run reads from where it starts.

    Attributes:
        stages: of all of its rows, those that were read before too.
        pace: from its start on.
        steps: its length, its parent's steps included.
        anew: of a branch whose rows begin at 0, what they are in place of its parent's: the end of
            a phrase, "the rows ..."; None where rows go on.
    """

    stages: tuple[Stage, ...]
    pace: Pace
    steps: int
    anew: str | None = None

    @property
    def rows(self) -> int:
        """The run's rows at its end."""
        return self.pace.row_of(max(self.steps, self.pace.step))


class _Asked(NamedTuple):
    """One of `data.stages`: its weights, source by source, and the key and value of its end."""

    weights: tuple[int, ...]
    end: tuple[str, float] | None


def course(config: RunConfig, data: RunData, start: Start | None = None) -> Course:
    """What a run reads.

    Args:
        config: its settings.
        data: what it reads; its own `stages` do not matter.
        start: where it starts from; None at its first step.

    Raises:
        InputError: a stage would have no row, or is to change where it was read already; or the
            length is in epochs and a branch reads other data than its parent.
    """
    steps = config.total_steps(data.rows)
    names = [source.name for source in data.sources]
    now = _asked(config.data.stages, names, [source.weight for source in data.sources])
    anew = None
    if start is not None:
        anew = None if start.own else _anew(config, data, start.meta)
        if config.training.epochs is not None and (
            anew or any(branch["anew"] for branch in start.meta.get("branches", ()))
        ):
            raise InputError(
                "training.epochs: counts passes over one corpus, and this branch reads other rows "
                "than its parent; give training.steps or training.tokens, which count its "
                "parent's too"
            )
    if start is None or anew:
        step = start.meta["step"] if start else 0
        pace, begun = Pace(step, 0, config.pool), [Stage(0, now[0].weights)]
    else:
        pace = Pace(start.meta["step"], start.meta["row"], config.pool)
        begun = _begun(start, pace, names, now)
    if steps <= pace.step:
        return Course(tuple(begun), pace, steps, anew)
    tokens = config.training.rows * data.context_length
    return Course(_with_those_ahead(begun, now, pace, steps, tokens), pace, steps, anew)


def already_read(meta: Mapping[str, Any]) -> dict[str, float]:
    """The epochs of each source that a run had read when it wrote a checkpoint."""
    sources = meta["sources"]
    first, *others = _saved(meta, [source["name"] for source in sources])
    later = [(stage.row, stage.weights) for stage in others]
    visits = Order(first.weights, [s["rows"] for s in sources], 0, later).visits(meta["row"])
    return {s["name"]: n / s["rows"] for s, n in zip(sources, visits, strict=True)}


def _asked(
    stages: Sequence[StageSettings] | None, names: Sequence[str], weights: Sequence[int]
) -> list[_Asked]:
    """The stages of the settings; one where there are none.

    Args:
        stages: the settings.
        names: of the sources.
        weights: of the sources, where a stage has none of its own.
    """
    found = []
    for stage in stages or [StageSettings()]:
        given = stage.weights
        chosen = weights if given is None else [given.get(name, 0) for name in names]
        ends = [(key, getattr(stage, key)) for key in stage.ends]
        found.append(_Asked(tuple(chosen), ends[0] if ends else None))
    return found


def _saved(meta: Mapping[str, Any], names: Sequence[str]) -> list[Stage]:
    """The stages in a checkpoint; one of before there were stages has one."""
    if "stages" not in meta:
        weights = {source["name"]: source["weight"] for source in meta["sources"]}
        return [Stage(0, tuple(weights[name] for name in names))]
    return [
        Stage(s["row"], tuple(s["weights"][name] for name in names), s["setting"])
        for s in meta["stages"]
    ]


def _anew(config: RunConfig, data: RunData, meta: Mapping[str, Any]) -> str | None:
    """Why the rows of a branch cannot be its parent's: the end of "the rows ..."."""
    if meta["data"] != data.identity:
        return f"of the data {data.identity} (before: {meta['data']})"
    then = meta["config"]["data"]
    if then["context_length"] != data.context_length:
        return f"of data.context_length {data.context_length} (before: {then['context_length']})"
    seed = then.get("seed")
    seed = meta["config"].get("seed", 0) if seed is None else seed
    if seed != config.data_seed:
        return f"in the order of seed {config.data_seed} (before: {seed})"
    return None


def _begun(start: Start, pace: Pace, names: Sequence[str], now: Sequence[_Asked]) -> list[Stage]:
    """The stages up to the one of row `pace.row`, which may begin with it.

    Raises:
        InputError: a run of its own has other settings of what it has read.
    """
    meta, row = start.meta, pace.row
    begun = [stage for stage in _saved(meta, names) if stage.row < max(row, 1)]
    number, weights = begun[-1].setting, begun[-1].weights
    stages = meta["config"]["data"].get("stages")
    settings = None if stages is None else [StageSettings.model_validate(s) for s in stages]
    of_source = {source["name"]: source["weight"] for source in meta["sources"]}
    then = _asked(settings, names, [of_source[name] for name in names])
    if (
        number is not None
        and len(now) > number
        and now[:number] == then[:number]
        and now[number].weights == weights
    ):
        return begun
    if start.own:
        raise InputError(
            f"data.stages: {start.path} has read the rows before {row} as it was told, so only "
            f"what begins at row {row} (step {pace.step}) or later can change; for another mixture "
            f"from there on, start a branch: run_dir=NEW training.branch_from={start.path}"
        )
    history = [stage._replace(setting=None) for stage in begun]
    if now[0].weights == weights:
        return [*history[:-1], history[-1]._replace(setting=0)]
    return [*history, Stage(row, now[0].weights)]


def _with_those_ahead(
    begun: Sequence[Stage], now: Sequence[_Asked], pace: Pace, steps: int, tokens: int
) -> tuple[Stage, ...]:
    """All stages of a run: those that have begun, and those ahead.

    Args:
        begun: the last is of row `pace.row`.
        now: the settings.
        pace: from that row on.
        steps: the run's length.
        tokens: of a step, as its length is counted.

    Raises:
        InputError: a stage has no row, or ends before the row that the run is at.
    """
    stages = list(begun)
    first = begun[-1].setting
    assert first is not None, "the last stage that has begun is one of the settings"
    for number in range(first, len(now) - 1):
        end = now[number].end
        assert end is not None, "checked in the settings"
        key, value = end
        row = int(value)
        if key == "until":
            row = pace.row_of(round(value * steps))
        elif key == "tokens":
            row = pace.row_of(math.ceil(value / tokens))
        begins = max(stages[-1].row, pace.row) if number == first else stages[-1].row
        if row < begins or row == stages[-1].row:
            where = f"row {row}" if row >= 0 else "a row before the branch"
            raise InputError(
                f"data.stages.{number}.{key}: {value} is {where}, and the stage is at row {begins} "
                f"by then; let it end later, or leave it out"
            )
        stages.append(Stage(row, now[number + 1].weights, number + 1))
    last, end_row = stages[-1], pace.row_of(steps)
    if last.row >= end_row:
        raise InputError(
            f"data.stages.{last.setting}: begins at row {last.row}, but the run ends at row "
            f"{end_row}; let the stage before end earlier, or leave this one out"
        )
    return tuple(stages)
