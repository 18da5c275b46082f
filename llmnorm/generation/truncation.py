"""Which tokens of a line may be drawn: temperature, top-k, top-p and min-p, in this order.

Top-p: Holtzman et al. 2020 (arXiv 1904.09751): the likeliest tokens whose mass reaches p, among
those that top-k leaves. Min-p: Nguyen et al. 2024 (arXiv 2407.01082). Tokens with equal logits at
a border stay together, as in Hugging Face's top-k.

A line is an array (vocabulary,) of float32 or float64. Each is looked at by itself, in one thread,
so that what it gives depends on no other line. The vocabulary is never sorted: top-k is a
selection, and for top-p the tokens above a floor are sorted, with a lower floor where they do not
hold the mass. (32,000 tokens, an AVX-512 Xeon, one thread: 0.06 ms a line; sorted 0.8 ms.)
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmnorm.generation.contract import Sampling

Line = NDArray[np.float32] | NDArray[np.float64]

FLOOR = 256  # times less than the mass that top-p drops has a token below the first floor
GROUP = 16  # tokens of which a maximum is taken before a selection
LOWER = 16  # how many times lower the next floor is


class Law(NamedTuple):
    """What may be drawn, and how likely it is.

    Attributes:
        tokens: ids; None: the whole vocabulary.
        scores: of each, logits over temperature, less the largest.
    """

    tokens: NDArray[np.int64] | None
    scores: Line

    def weights(self) -> Line:
        """Of each, not normalised."""
        return np.exp(self.scores)


def law_of(line: Line, largest: float, sampling: Sampling) -> Law:
    """The law of a line whose largest logit is `largest`, a finite number.

    The sampling's temperature is above 0.
    """
    vocabulary, temperature = len(line), sampling.temperature
    if not truncates(sampling, vocabulary):
        scores = line - line.dtype.type(largest)
        scores /= line.dtype.type(temperature)
        return Law(None, scores)
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        tokens = largest_of(line, sampling.top_k)
        if sampling.top_p < 1:
            weights = np.exp(_scores(line[tokens], largest, temperature))
            tokens = tokens[weights >= (_border(weights, sampling.top_p * weights.sum()) or 0.0)]
    elif sampling.top_p < 1:
        tokens = _nucleus(line, largest, sampling)
    else:
        low = largest + temperature * math.log(sampling.min_p)
        tokens = (line >= low - 1e-3 * (1 + abs(low))).nonzero()[0]  # a few more, by rounding
    scores = _scores(line[tokens], largest, temperature)
    if sampling.min_p:
        enough = np.exp(scores) >= sampling.min_p
        tokens, scores = tokens[enough], scores[enough]
    return Law(tokens, scores)


def truncates(sampling: Sampling, vocabulary: int) -> bool:
    """Whether some tokens may not be drawn."""
    top_k = vocabulary if sampling.top_k is None else sampling.top_k
    return top_k < vocabulary or sampling.top_p < 1 or sampling.min_p > 0


def largest_of(line: Line, count: int) -> NDArray[np.int64]:
    """The tokens of the `count` largest logits, and those equal to the last of them; none at -inf.

    The least of the `count` largest maxima of groups is a floor: so many logits at least reach it.
    """
    some, group = line, GROUP
    if len(line) >= 2 * group * count:
        whole = len(line) // group * group
        maxima = line[:whole].reshape(group, -1).max(0)
        floor = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        some = line[(line >= floor).nonzero()[0]]
    border = np.partition(some, len(some) - count)[len(some) - count]
    return (line >= border if border > -math.inf else line > -math.inf).nonzero()[0]


def _nucleus(line: Line, largest: float, sampling: Sampling) -> NDArray[np.int64]:
    """The tokens of top-p."""
    weights = line - line.dtype.type(largest)
    weights *= line.dtype.type(1 / sampling.temperature)
    np.exp(weights, out=weights)
    total = float(np.add.reduce(weights))
    mass, floor = sampling.top_p * total, (1 - sampling.top_p) * total / FLOOR
    while True:
        tokens = (weights > floor).nonzero()[0]
        found = weights[tokens]
        border = _border(found, mass)
        # Where all tokens above the floor hold the mass, those of top-p are among them.
        if border is not None:
            return tokens[found >= border]
        if floor == 0:  # p is all of the mass, up to rounding
            return tokens
        floor = floor / LOWER if floor > 1e-30 * total else 0.0


def _border(weights: Line, mass: float) -> float | None:
    """The least weight of the largest ones that reach `mass` together; None: all do not."""
    ordered = weights.copy()
    ordered.sort()
    ordered = ordered[::-1]
    reached = int(ordered.cumsum(dtype=np.float64).searchsorted(mass))
    return float(ordered[reached]) if reached < len(ordered) else None


def _scores(logits: Line, largest: float, temperature: float) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = (logits.astype(np.float64) - largest) / temperature
    return scores
