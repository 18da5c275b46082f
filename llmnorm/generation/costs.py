"""What passes of a model cost, and how many tokens are worth drafting.

    E(p, K) = (1 - p^(K+1)) / (1 - p)         tokens a row and round (Leviathan et al. 2023, eq. 1)
    speed-up = E / (K c + v(B, K+1))          over plain decoding with the same batch

p: acceptance of a token; K: drafted tokens; c: time of a draft's step over one of the target; v:
time of a target's pass of K + 1 tokens in each of B rows over one of 1 token. Leviathan's form has
v = 1, which no CPU gives.

Times come from a committed table (cost_table.py) by kind of processor and threads, so nothing is
timed here, and the same rounds give the same lengths again. A pass of a model takes so much for
each layer and so much for each million of weights; both depend on the rows and the tokens of each.

    Example: 1 row, 1 token, (0.06, 0.5): a model of 8 layers and 26M weights takes 13.5 ms.

What the host does beside the passes is added: DRAWN for a token that is drawn by temperature, PASS
for a pass of the draft. At 8 rows of 4 drafts the draws alone are a sixth of a 23M model's step.

Surprise: figures are those of our captured step in float32 with softmax attention. Recurrent layers
replay what is rolled back, for which ROLLBACK is added; other costs of theirs are not in the table.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from llmnorm.generation.contract import DraftedRow
from llmnorm.generation.cost_table import MACHINES, TABLE
from llmnorm.machine.processor import Processor, processor

Times = Mapping[int, Mapping[int, tuple[float, float]]]
"""batch -> tokens a row -> milliseconds (for a layer, for a million weights)."""

UNMEASURED: Times = {1: {1: (0.2, 0.0)}}  # a GPU: as many launches, however many tokens
LENGTHS = (1, 2, 3, 4, 8, 16)  # that are chosen from; the pass of each is traced once, in 30 steps
ON, OFF = 1.03, 0.99  # the speed-up from which drafting begins, and under which it ends
BETTER = 1.03  # by how much another length must be better than the one in use
LEAST = 0.02  # chance that a token is accepted, under which it is not drafted
RETRY = 32  # rounds without drafts, after which one token is drafted to see
OF_ROW, OF_ALL = 64, 240  # drafted tokens that an acceptance remembers, of a row and of all rows
PRIOR = 32  # drafted tokens that the acceptance of all rows counts for in a row's own
FIRST = 20  # drafted tokens that the acceptance assumed at the start counts for
ASSUMED, OF_LOOKUP = 0.5, 0.2  # that acceptance, of a model's drafts and of a lookup's
DRAWN = 0.015  # ms of choosing a token by temperature, a thousand tokens of the vocabulary
PASS = 0.15  # ms of a pass of the draft beside its step, all rows
ROLLBACK = 0.27  # of a verification, median of the mixers with a state (tools/bench/rollback.py)


class Size(NamedTuple):
    """Of a model: layers, millions of weights that a pass reads, and tokens of the vocabulary."""

    layers: int
    millions: float
    vocabulary: int = 0


def size_of(model: nn.Module) -> Size:
    """The size of a Hugging Face model; embeddings are not read, unless they are the head too."""
    parts: Any = model
    weights = sum(parameter.numel() for parameter in parts.parameters())
    embeddings, head = parts.get_input_embeddings(), parts.get_output_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        weights -= embeddings.weight.numel()
    return Size(parts.config.num_hidden_layers, weights / 1e6, embeddings.weight.shape[0])


@dataclass(frozen=True)
class Costs:
    """Costs of a target's verifications and of a draft's steps, in plain steps of the target.

    Attributes:
        tables: the times that apply; of several the dearest, for a machine that has none.
        target: its size.
        draft: its size; None: drafts cost nothing, as those of a lookup.
        recurrent: whether the target has recurrent layers.
        says: which table is used, in one line.
    """

    tables: Sequence[Times]
    target: Size
    draft: Size | None = None
    recurrent: bool = False
    says: str = ""
    _known: dict[tuple[bool, int, int, int], float] = field(
        default_factory=dict, init=False, repr=False
    )

    def v(self, batch: int, tokens: int, drawn: int = 0) -> float:
        """Time of a target's pass of so many tokens in each of `batch` rows over that of one.

        Args:
            drawn: rows whose tokens are drawn by temperature; the others are greedy.
        """
        # Measured times are noisy; more tokens are never cheaper.
        ratio = max(1.0, self._over_a_step(False, batch, tokens, drawn))
        return ratio * (1 + ROLLBACK * (self.recurrent and tokens > 1))

    def c(self, batch: int, drawn: int = 0) -> float:
        """Time of a draft's pass of `batch` rows over that of a target's step."""
        return self._over_a_step(True, batch, 1, drawn) if self.draft is not None else 0.0

    def _over_a_step(self, draft: bool, batch: int, tokens: int, drawn: int) -> float:
        """Time of a pass with what the host does for it, over that of a plain step."""
        key = draft, batch, tokens, drawn
        if key not in self._known:  # rounds ask for few of them, again and again
            choice = DRAWN * self.target.vocabulary / 1000 * drawn
            size = (self.draft or self.target) if draft else self.target
            host = choice * tokens + PASS * draft
            self._known[key] = max(
                (_time(times, size, batch, tokens) + host)
                / (_time(times, self.target, batch, 1) + choice)
                for times in self.tables
            )
        return self._known[key]


def costs_for(
    target: Size,
    draft: Size | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    recurrent: bool = False,
) -> Costs:
    """The costs on this machine.

    Args:
        device: "cpu" or "cuda".
        threads: that torch multiplies with. Of the measured numbers the next lower one is taken.
    """
    if device != "cpu":
        says = f"draft lengths: nothing is measured on {device}; a pass is taken to cost its layers"
        return Costs([UNMEASURED], target, draft, recurrent, says)
    found, own = processor(), TABLE.get(processor())
    if own is None:
        tables = [times for measured in TABLE.values() for times in measured.values()]
        says = f"draft lengths: the dearest of {len(tables)} tables ({_name(found)} has none)"
        return Costs(tables, target, draft, recurrent, says)
    measured = sorted(own)
    nearest = measured[max(0, bisect_right(measured, threads) - 1)]
    says = f"draft lengths: costs of {MACHINES[found]}, {nearest} thread(s)"
    return Costs([own[nearest]], target, draft, recurrent, says)


def _name(found: Processor) -> str:
    return f"{found.vendor or 'an unknown processor'} family {found.family}, {found.instructions}"


def _time(times: Times, size: Size, batch: int, tokens: int) -> float:
    """Milliseconds of a pass, between measured batches and tokens on a straight line."""
    by_batch = {
        rows: _between(
            {n: a * size.layers + b * size.millions for n, (a, b) in row.items()}, tokens
        )
        for rows, row in times.items()
    }
    return _between(by_batch, batch)


def _between(known: Mapping[int, float], at: int) -> float:
    """The value at a point on the line through its neighbours, or through the last two."""
    points = sorted(known)
    if len(points) == 1:
        return known[points[0]]
    upper = min(max(1, bisect_right(points, at)), len(points) - 1)
    low, high = points[upper - 1], points[upper]
    share = (at - low) / (high - low)
    return known[low] + share * (known[high] - known[low])


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a round of so many drafts commits to a row, the bonus token among them."""
    if acceptance == 1:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def speed_up(acceptance: float, drafted: int, batch: int, costs: Costs, drawn: int = 0) -> float:
    """Of rounds of so many drafts a row over plain decoding of the same batch."""
    return _gain([acceptance] * batch, drafted, costs, drawn=drawn)


def _gain(
    acceptances: Sequence[float],
    drafted: int,
    costs: Costs,
    *,
    riding: int = 0,
    drawn: int = 0,
    found: float = 1.0,
) -> float:
    """The speed-up of a round in which these rows draft and `riding` others do not.

    Each row has drafts with a chance of `found`; a pass for which no row has any is a plain step.
    """
    batch, any_found = len(acceptances) + riding, 1 - (1 - found) ** len(acceptances)
    tokens = batch + found * sum(expected_tokens(p, drafted) - 1 for p in acceptances)
    pass_time = drafted * costs.c(batch, drawn) + costs.v(batch, drafted + 1, drawn)
    return tokens / batch / (any_found * pass_time + 1 - any_found)


def best_length(
    acceptances: Sequence[float],
    costs: Costs,
    *,
    riding: int = 0,
    drawn: int = 0,
    found: float = 1.0,
    now: int = 0,
) -> int:
    """How many tokens a round should draft at most; 0: none, since it does not pay.

    A pass is as wide as its longest row, so the length is one for all rows of the round: of
    LENGTHS the one with the largest speed-up over all of them. That in use stays unless another is
    better by BETTER; drafting begins at a speed-up of ON and ends under OFF.

    Args:
        acceptances: of the rows that draft.
        costs: of the models.
        riding: rows of the pass that do not draft.
        drawn: rows whose tokens are drawn by temperature.
        found: the chance that a draft has tokens for a row; below 1 for a lookup.
        now: the length in use.
    """
    if not acceptances:
        return 0
    gains = {
        length: _gain(acceptances, length, costs, riding=riding, drawn=drawn, found=found)
        for length in LENGTHS
    }
    best = max(LENGTHS, key=lambda length: gains[length])
    if not now:
        return best if gains[best] >= ON else 0
    if gains[best] < OFF:
        return 0
    stays = now in gains and gains[now] >= OFF and gains[best] < BETTER * gains[now]
    return now if stays else best


@dataclass
class _Acceptance:
    """An average over the last drafted tokens, of which `memory` count.

    A token behind a rejected one was never looked at, and is none.
    """

    memory: int
    accepted: float = 0.0
    looked_at: float = 0.0

    def observe(self, drafted: int, accepted: int) -> None:
        looked_at = min(drafted, accepted + 1)
        kept = (1 - 1 / self.memory) ** looked_at
        self.accepted = self.accepted * kept + accepted
        self.looked_at = self.looked_at * kept + looked_at

    def estimate(self, prior: float, weight: float) -> float:
        """The share accepted, with the prior counting for `weight` tokens."""
        return (self.accepted + prior * weight) / (self.looked_at + weight)


class DraftLengths:
    """How many tokens are drafted for each row, from round to round.

    With a number, so many. With "auto", `best_length` by the measured acceptance of every row, with
    that of all rows as its prior, and by how often the draft has tokens for a row at all: a lookup
    finds some for about half of the rows. A row is drafted fewer where the last ones would hardly
    be accepted (LEAST). Where nothing is drafted, a round of one token is tried every RETRY rounds,
    and again as long as half of them are accepted.

    Args:
        costs: of the models.
        draft_tokens: a number, or "auto".
    """

    def __init__(self, costs: Costs, draft_tokens: int | Literal["auto"] = "auto") -> None:
        self.costs, self._fixed = costs, draft_tokens
        self.length = 0
        self._all, self._found = _Acceptance(OF_ALL), _Acceptance(OF_ALL)
        self._rows: dict[int, _Acceptance] = {}
        self._waited = RETRY  # rounds since the last one with drafts; at the start one is due
        self._tried = [0, 0]  # asked and accepted tokens of the round that was tried

    def acceptance(self, slot: int) -> float:
        """The chance that a row's drafted token is accepted, as it is estimated now."""
        assumed = OF_LOOKUP if self.costs.draft is None else ASSUMED
        common = self._all.estimate(assumed, FIRST)
        own = self._rows.get(slot)
        return common if own is None else own.estimate(common, PRIOR)

    def counts(self, rows: Sequence[DraftedRow]) -> list[int]:
        """Tokens to draft for each row of the next pass; 0 where its request wants no drafts."""
        wanted = [row.chooser.sampling.speculative for row in rows]
        if self._fixed != "auto":
            return [self._fixed if some else 0 for some in wanted]
        found = {
            row.slot: self.acceptance(row.slot)
            for row, some in zip(rows, wanted, strict=True)
            if some
        }
        self.length = best_length(
            list(found.values()),
            self.costs,
            riding=len(rows) - len(found),
            drawn=sum(row.chooser.sampling.temperature > 0 for row in rows),
            found=self._found.estimate(1.0, FIRST),
            now=self.length,
        )
        if not self.length:
            return self._retried(wanted)
        self._waited, self._tried = 0, [0, 0]
        return [
            _worth_drafting(found[row.slot], self.length) if row.slot in found else 0
            for row in rows
        ]

    def _retried(self, wanted: Sequence[bool]) -> list[int]:
        """Of a round that drafts nothing, or one token a row to see whether that has changed."""
        asked, accepted = self._tried
        self._tried = [0, 0]
        self._waited += 1
        if self._waited < RETRY and not (asked and 2 * accepted >= asked):
            return [0] * len(wanted)
        return [int(some) for some in wanted]

    def proposed(self, asked: int, found: int) -> None:
        """Of `asked` rows that were to be drafted for, the draft had tokens for `found`."""
        for number in range(asked):
            self._found.observe(1, int(number < found))
        self._tried[0] += asked - found

    def observe(self, slot: int, drafted: int, accepted: int) -> None:
        """What came of a row's drafts in the last round."""
        if not drafted:
            return
        self._waited = 0  # a try in which a lookup has found nothing is none
        self._tried[0] += drafted
        self._tried[1] += accepted
        self._all.observe(drafted, accepted)
        self._rows.setdefault(slot, _Acceptance(OF_ROW)).observe(drafted, accepted)

    def move(self, source: int, row: int) -> None:
        """The row `source` has become the row `row`, which was free."""
        self.release(row)
        if source in self._rows:
            self._rows[row] = self._rows.pop(source)

    def release(self, row: int) -> None:
        """The row is free; the next one in it begins with what is known of all rows."""
        self._rows.pop(row, None)


def _worth_drafting(acceptance: float, length: int) -> int:
    """How many of so many tokens are accepted with a chance of at least LEAST."""
    return sum(acceptance**k >= LEAST for k in range(1, length + 1))
