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

import secrets
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: splitmix64's step
FACTORS = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
NEAR = 4.0  # `race` looks at all tokens that are at most exp(4) times less likely than the first


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


def race(scores: NDArray[np.floating], key: int) -> int:
    """The token drawn from the whole vocabulary: where exp(scores) / exponentials is largest.

    The tokens near the first one have raced; of the others only those can win whose exponential is
    so small that it makes up for exp(-NEAR), and these are found by their hashes.

    Args:
        scores: logits (vocabulary,), less the largest.
        key: of the row and position.
    """
    near = np.flatnonzero(scores > -NEAR)
    places = _places(scores[near], exponentials(np.full(len(near), key, np.uint64), near))
    first = int(places.argmax())
    bound = np.exp(-NEAR - places[first]) * 1.001  # by rounding
    hashes = _keyed(_vocabulary(len(scores)), np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32))
    few = -np.expm1(-bound) * 2.0**32 + 512
    early = np.flatnonzero(hashes <= np.uint32(min(few, 2.0**32 - 1)))
    others = _places(scores[early], _waits(hashes[early]))
    if len(others) and others.max() > places[first]:
        return int(early[others.argmax()])
    return int(near[first])


def _places(scores: NDArray[np.floating], waits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Who is drawn has the largest one: a score and a gumbel."""
    return scores.astype(np.float64) - np.log(waits.astype(np.float64))


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
