"""Noise that is a function of numbers, so that no draw depends on which others were made before it.

    exponentials(keys, tokens)        one number for each pair of key(seed, position) and token

A token is drawn by a race: token i arrives after exponential_i / p_i, and the first one is drawn,
which is i with probability p_i. It is the Gumbel-max trick (Maddison et al. 2014, arXiv 1411.0030)
with exp(-gumbel) in the gumbel's place. Where a draft and its target race with the same numbers,
they mostly draw the same token, and what the target draws does not depend on the draft.

The hash is lowbias32 (C. Wellons, github.com/skeeto/hash-prospector), once of the token, then with
the key: half of the key's bits before it and half in the middle, since with one half alone the
numbers of two positions could be the same ones in another order.
"""

import math
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: splitmix64's step
FACTORS = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
NEAR = 4.0  # `race_of_all` first looks at tokens at most exp(4) times less likely than the first


def fresh_seed() -> int:
    """64 bits that nobody can know, for rows without a seed."""
    return secrets.randbits(64)


def key(seed: int, position: int) -> int:
    """64 bits for a row's token at `position`; seeds from -2^63 to 2^64 - 1."""
    return _mixed(_mixed(seed) + position * GOLDEN)


class Uniforms:
    """Numbers from (0, 1), one after another: splitmix64 (Steele et al. 2014), 53 bits each."""

    def __init__(self, seed: int) -> None:
        self._state = _mixed(seed)

    def __call__(self) -> float:
        """The next one."""
        self._state = (self._state + GOLDEN) & MASK
        return ((_mixed(self._state) >> 11) + 0.5) * 2.0**-53


def exponentials(keys: NDArray[np.uint64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Exponentially distributed numbers (n,), each above 0, for keys (n,) and tokens (n,)."""
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    return _waits(_keyed(_spread(tokens.astype(np.uint32)), low, high))


class Racing(NamedTuple):
    """Tokens (n,) of one line with their scores (n,), logits over temperature, and its key."""

    key: int
    tokens: NDArray[np.int64]
    scores: NDArray[np.float64]


def race(lines: Sequence[Racing]) -> list[tuple[int, float]]:
    """For each line the token that is drawn, and its place: its score and a gumbel, the largest."""
    keys = np.repeat(
        np.array([line.key for line in lines], np.uint64), [len(line.tokens) for line in lines]
    )
    waits = exponentials(keys, np.concatenate([line.tokens for line in lines]))
    return _first(lines, waits)


def race_of_all(
    lines: Sequence[NDArray[np.floating]],
    largest: Sequence[float],
    temperatures: Sequence[float],
    keys: Sequence[int],
) -> list[int]:
    """The tokens drawn from whole lines of logits (vocabulary,), whose largest ones are given.

    Of each line the tokens near the likeliest one race. Of the others only those can win whose
    exponential is so small that it makes up for exp(-NEAR), and their hashes show which these are.
    """
    near, early = [], []
    for line, top, temperature, own in zip(lines, largest, temperatures, keys, strict=True):
        tokens = (line > top - NEAR * temperature).nonzero()[0]
        near.append(Racing(own, tokens, _scores(line, tokens, top, temperature)))
    hashes = []
    firsts = race(near)
    for line, top, temperature, own, (_, place) in zip(
        lines, largest, temperatures, keys, firsts, strict=True
    ):
        found = _keyed(_vocabulary(len(line)), np.uint32(own & 0xFFFFFFFF), np.uint32(own >> 32))
        few = -math.expm1(-math.exp(-NEAR - place) * 1.001) * 2.0**32 + 512  # more, by rounding
        tokens = (found <= np.uint32(min(few, 2.0**32 - 1))).nonzero()[0]
        hashes.append(found[tokens])
        early.append(Racing(own, tokens, _scores(line, tokens, top, temperature)))
    lasts = _first(early, _waits(np.concatenate(hashes)))
    return [
        a if place >= other else b for (a, place), (b, other) in zip(firsts, lasts, strict=True)
    ]


def _scores(
    line: NDArray[np.floating], tokens: NDArray[np.int64], top: float, temperature: float
) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = (line[tokens].astype(np.float64) - top) / temperature
    return scores


def _first(lines: Sequence[Racing], waits: NDArray[np.float32]) -> list[tuple[int, float]]:
    """As `race`, with the lines' exponentials one after another; (-1, -inf) without tokens."""
    gumbels = -np.log(waits.astype(np.float64))
    found, start = [], 0
    for _, tokens, scores in lines:
        end = start + len(tokens)
        if len(tokens):
            places = scores + gumbels[start:end]
            at = int(places.argmax())
            found.append((int(tokens[at]), float(places[at])))
        else:
            found.append((-1, -math.inf))
        start = end
    return found


@lru_cache(maxsize=4)
def _vocabulary(tokens: int) -> NDArray[np.uint32]:
    return _spread(np.arange(tokens, dtype=np.uint32))


def _spread(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """lowbias32 of x, in place."""
    y = x >> 16
    np.bitwise_xor(x, y, out=x)
    np.multiply(x, FACTORS[0], out=x)
    np.right_shift(x, 15, out=y)
    np.bitwise_xor(x, y, out=x)
    np.multiply(x, FACTORS[1], out=x)
    np.right_shift(x, 16, out=y)
    np.bitwise_xor(x, y, out=x)
    return x


def _keyed(
    x: NDArray[np.uint32], low: NDArray[np.uint32] | np.uint32, high: NDArray[np.uint32] | np.uint32
) -> NDArray[np.uint32]:
    """lowbias32 of x ^ low, with `high` added in the middle."""
    x = x ^ low
    y = x >> 16
    np.bitwise_xor(x, y, out=x)
    np.multiply(x, FACTORS[0], out=x)
    np.right_shift(x, 15, out=y)
    np.bitwise_xor(x, y, out=x)
    np.add(x, high, out=x)
    np.multiply(x, FACTORS[1], out=x)
    np.right_shift(x, 16, out=y)
    np.bitwise_xor(x, y, out=x)
    return x


def _waits(hashes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """-log(1 - u), where the hashes are uniform numbers u; near 0 these have all 32 bits."""
    u = hashes.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)
    waits: NDArray[np.float32] = torch.from_numpy(u).neg_().log1p_().neg_().numpy()
    return waits


def _mixed(x: int) -> int:
    """The output function of splitmix64, on 64 bits."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
