"""Choosing tokens: what a draft proposes (`draw`) and what the target commits (`verify`).

    tokens, q = draw(choosers, draft_logits)                  once for each drafted token
    verdicts = verify(choosers, target_logits, first, proposals)

What is committed follows the target alone, whatever was proposed, in one of three ways:

    temperature 0    the likeliest token of the changed logits, the lowest id among equals
    a seed           the winner of a race whose noise is a function of (seed, position, token)
                     (noise.py); a draft that races with the same noise is mostly right. The text
                     is the same with and without drafts, alone and among others.
    no seed          a drafted token x is accepted with probability min(1, p(x) / q(x)); the first
                     refused one is replaced by a draw from max(p - q, 0), normalised (Leviathan et
                     al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). This accepts
                     1 - TV(p, q) of the drafts, the most that is possible.

p is the target's law after all of the row's processors (processors.py), with the drafts before the
token as if they had been committed; q is what `draw` drew from.

What would surprise: log-probabilities are the target's own, before any processor. Everything is
chosen on the CPU, in one thread or elementwise, so that the number of rows and threads changes
nothing; from a GPU the logits come over in one piece, or where every row is greedy and unchanged,
the tokens alone: one synchronisation in both cases.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmnorm.generation.choosers import RowChooser
from llmnorm.generation.contract import Chooser, Chosen, Proposal, Verdict
from llmnorm.generation.noise import Racing, race, race_of_all
from llmnorm.generation.processors import Changes
from llmnorm.generation.truncation import Law, Line, largest_of, law_of, truncates

__all__ = ["RowChooser", "chosen_of", "draw", "verify"]

BLOCK = 256  # tokens, when one of a whole vocabulary is looked for
NO_TOKEN = "no token is left that the row's limits allow"
NOT_FINITE = "the model's logits are not finite numbers"


def draw(choosers: Sequence[Chooser], logits: Tensor) -> tuple[list[int], list[Tensor | None]]:
    """A draft's next token for each row; the choosers advance over it, hypothetically.

    Args:
        choosers: `RowChooser`s.
        logits: of the draft, (rows, vocabulary).

    Returns:
        The tokens; and the distributions (vocabulary,) that they were drawn from, float32 on the
        CPU, or None where a token was certain (greedy, seeded).
    """
    rows = _rows(choosers)
    lines = _Lines([(row, []) for row in rows], _on_cpu(rows, logits))
    tokens: list[int] = []
    laws: list[Tensor | None] = []
    for number, row in enumerate(rows):
        law = None
        if lines.faults[number] is not None:
            # Any token may be proposed, and what is wrong with the row is `verify`'s to say.
            row.suppose(0, allowed=False)
            tokens.append(0)
            laws.append(None)
            continue
        if row.decides:
            token = int(lines.decided[number])
        else:
            found = lines.law(number)
            law = _over_vocabulary(found, found.weights(), lines.vocabulary).astype(np.float32)
            token = _drawn(law, row.uniform())
        row.suppose(token)
        tokens.append(token)
        laws.append(None if law is None else torch.from_numpy(law))
    return tokens, laws


def verify(
    choosers: Sequence[Chooser],
    logits: Tensor,
    first: Sequence[int],
    proposals: Sequence[Proposal],
) -> list[Verdict]:
    """What a round commits to each row: the accepted drafts and one more token, the bonus.

    The tokens are not cut at ends, stops or a row's most tokens. Hypothetical tokens of `draw` are
    taken back first.

    Args:
        choosers: `RowChooser`s; the committed tokens become theirs.
        logits: of the target, (rows, width, vocabulary), of each row's pending token and drafts.
        first: the index of the row's pending token in `width`.
        proposals: a row's drafts follow its pending token; without any this is a plain step.

    Returns:
        A verdict for each row. One that has a `fault` commits nothing: no token is allowed, the
        logits are not finite, a processor has raised an error; the other rows are not touched.
    """
    rows = _rows(choosers)
    for row in rows:
        row.settle()
    width = logits.shape[1]
    picked = [
        number * width + first[number] + i
        for number, proposal in enumerate(proposals)
        for i in range(len(proposal.tokens) + 1)
    ]
    raw = logits.reshape(-1, logits.shape[-1])
    if len(picked) < len(raw):
        raw = raw[torch.tensor(picked, device=raw.device)]
    raw = _on_cpu(rows, raw)
    lines = _Lines([(r, p.tokens) for r, p in zip(rows, proposals, strict=True)], raw)
    verdicts, start = [], 0
    for row, proposal in zip(rows, proposals, strict=True):
        tokens, fault = _accepted(row, proposal, lines, start)
        for token in tokens:
            row.commit(token)
        fault = fault or row.fault
        if fault is None:
            chosen = None
            if row.sampling.logprobs is not None:
                given = raw[start : start + len(tokens)]
                chosen = chosen_of(given, tokens, row.sampling.logprobs)
            verdicts.append(Verdict(tokens, len(tokens) - 1, chosen))
        else:
            verdicts.append(Verdict([], 0, fault=fault))
        start += len(proposal.tokens) + 1
    return verdicts


def _accepted(
    row: RowChooser, proposal: Proposal, lines: "_Lines", start: int
) -> tuple[list[int], str | None]:
    """The accepted tokens and the bonus, of the row whose lines begin at `start`; or a fault.

    Where the fault comes behind accepted drafts these are committed, the last one in the place of
    the bonus: it is the next round that cannot begin.
    """
    tokens: list[int] = []
    for i, drafted in enumerate([*proposal.tokens, None]):
        line = start + i
        fault = lines.faults[line]
        if fault is not None:
            return tokens, None if tokens else fault
        if row.decides:
            token = int(lines.decided[line])
        else:
            law = lines.law(line)
            weights = law.weights()
            if drafted is None:
                at = _drawn(weights, row.uniform())
                return [*tokens, at if law.tokens is None else int(law.tokens[at])], None
            p = _over_vocabulary(law, weights, lines.vocabulary)
            given = proposal.distributions
            q = None if given is None else given[i].cpu().numpy()
            if row.uniform() * (1.0 if q is None else float(q[drafted])) < p[drafted]:
                token = drafted
            else:
                token = _drawn(_residual(p, drafted, q), row.uniform())
        tokens.append(token)
        if token != drafted:
            break
    return tokens, None


def _over_vocabulary(law: Law, weights: Line, vocabulary: int) -> Line:
    """Probabilities (vocabulary,) of a law with these weights."""
    weights = weights / weights.sum()
    if law.tokens is None:
        return weights
    whole = np.zeros(vocabulary, weights.dtype)
    whole[law.tokens] = weights
    return whole


def _residual(p: Line, drafted: int, q: NDArray[np.float32] | None) -> Line:
    """max(p - q, 0), not normalised; q is 1 at the drafted token where it is None.

    Where nothing is left (p is q, up to rounding) it is p.
    """
    if q is None:
        rest = p.copy()
        rest[drafted] = 0
    else:
        rest = np.maximum(p - q, 0)
    return rest if rest.sum() > 0 else p


def _drawn(weights: Line, uniform: float) -> int:
    """The index at which the running sum of the weights passes this share of the whole."""
    start = 0
    if len(weights) > 4 * BLOCK:  # first the block, then in it
        sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)
        mass = np.cumsum(sums)
        share = uniform * mass[-1]
        block = min(int(np.searchsorted(mass, share, side="right")), len(sums) - 1)
        start, weights = block * BLOCK, weights[block * BLOCK : (block + 1) * BLOCK]
        uniform = (share - (mass[block] - sums[block])) / sums[block]
    mass = np.cumsum(weights, dtype=np.float64)
    # Never a token without weight, at an end that rounding has passed either.
    share = min(max(uniform, 0.0) * mass[-1], np.nextafter(mass[-1], 0))
    return start + int(np.searchsorted(mass, share, side="right"))


def chosen_of(raw: Tensor, tokens: Sequence[int], alternatives: int) -> list[Chosen]:
    """Log-probabilities of raw logits (tokens, vocabulary), float32 or float64 on the CPU: the
    tokens' own, and so many of the likeliest."""
    found = []
    for line, token in zip(raw.numpy(), tokens, strict=True):
        largest = line.max()
        mass = np.exp(line - largest).sum(dtype=np.float64)
        total = float(largest) + float(np.log(mass))
        top: list[tuple[int, float]] = []
        if alternatives:
            best = largest_of(line, min(alternatives, len(line)))
            best = best[np.argsort(-line[best], kind="stable")][:alternatives]
            top = [(int(other), float(line[other]) - total) for other in best]
        found.append(Chosen(float(line[token]) - total, top))
    return found


class _Lines:
    """The changed logits of rows at each of their positions, and what follows from them.

    Attributes:
        faults: of each line, why no token can be chosen; None: one can.
        decided: the token of each line of rows that decide by the target's logits alone.
    """

    def __init__(self, rows: Sequence[tuple[RowChooser, Sequence[int]]], raw: Tensor) -> None:
        self.vocabulary = raw.shape[1]
        if raw.device.type != "cpu":  # `_on_cpu` has left them where they are: all rows are greedy
            best = torch.stack([raw.argmax(-1).double(), raw.amax(-1).double()]).cpu().numpy()
            self.decided, self.faults = best[0].astype(np.int64), _faults(best[1])
            return
        changed = _changed(rows, raw)
        logits = changed.numpy()
        self.decided = logits.argmax(-1)
        self.faults = _faults(logits[np.arange(len(logits)), self.decided])
        # Of each line its row, and how many drafts are before it.
        lines = [(row, ahead) for row, drafts in rows for ahead in range(len(drafts) + 1)]
        for number, (row, _) in enumerate(lines):
            self.faults[number] = row.fault or self.faults[number]
        drawn = [
            number
            for number, (row, _) in enumerate(lines)
            if not row.greedy and self.faults[number] is None
        ]
        self._logits, self._owners = logits, [row for row, _ in lines]
        self._race([(number, *lines[number]) for number in drawn if lines[number][0].decides])

    def law(self, line: int) -> Law:
        """The law of a line whose row has neither a seed nor temperature 0."""
        largest = self._logits[line, self.decided[line]]
        return law_of(self._logits[line], float(largest), self._owners[line].sampling)

    def _race(self, lines: Sequence[tuple[int, RowChooser, int]]) -> None:
        """Decide lines of seeded rows, each with the drafts before it."""
        some: list[tuple[int, Racing]] = []
        whole: list[tuple[int, float, float, int]] = []
        for line, row, ahead in lines:
            if truncates(row.sampling, self.vocabulary):
                tokens, scores = self.law(line)
                assert tokens is not None
                some.append((line, Racing(row.key(ahead), tokens, scores.astype(np.float64))))
            else:
                largest = float(self._logits[line, self.decided[line]])
                whole.append((line, largest, row.sampling.temperature, row.key(ahead)))
        if some:
            for (line, _), (token, _) in zip(some, race([r for _, r in some]), strict=True):
                self.decided[line] = token
        if whole:
            numbers, largests, temperatures, keys = zip(*whole, strict=True)
            logits = [self._logits[line] for line in numbers]
            self.decided[list(numbers)] = race_of_all(logits, largests, temperatures, keys)


def _changed(rows: Sequence[tuple[RowChooser, Sequence[int]]], raw: Tensor) -> Tensor:
    """The lines after all that stands before the temperature; `raw` is left as it is."""
    changes, line = Changes(), 0
    for row, drafts in rows:
        row.note(changes, line, drafts)
        line += len(drafts) + 1
    further = any(row.sampling.processors for row, _ in rows)
    if not changes and not further:
        return raw
    lines = raw.clone()
    changes.make(lines)
    line = 0
    for row, drafts in rows:
        end = line + len(drafts) + 1
        if row.sampling.processors:
            row.process(lines[line:end], drafts)
        line = end
    return lines


def _faults(largest: NDArray[np.floating]) -> list[str | None]:
    """What is wrong with lines whose largest logits are these."""
    return [
        None if math.isfinite(value) else NO_TOKEN if value == -math.inf else NOT_FINITE
        for value in largest.tolist()
    ]


def _rows(choosers: Sequence[Chooser]) -> list[RowChooser]:
    rows = [chooser for chooser in choosers if isinstance(chooser, RowChooser)]
    assert len(rows) == len(choosers), "choosers of this module"
    return rows


def _on_cpu(rows: Sequence[RowChooser], logits: Tensor) -> Tensor:
    """Logits (lines, vocabulary) as tokens are chosen from them: float32 or float64, contiguous."""
    if not all(r.greedy and r.plain and r.sampling.logprobs is None for r in rows):
        logits = logits.cpu()
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.detach().to(wide).contiguous()
