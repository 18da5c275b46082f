"""Noise that is a function of numbers, so that no draw depends on which others were made before it.

    exponentials([key(seed, position)], [tokens])     one number for each token

A token is drawn by a race: token i arrives after exponential_i / p_i, and the first one is drawn,
which is i with probability p_i. It is the Gumbel-max trick (Maddison et al. 2014, arXiv 1411.0030)
with exp(-gumbel) in the gumbel's place. Where a draft and its target race with the same numbers,
they mostly draw the same token, and what the target draws does not depend on the draft.

The hash is lowbias32 (C. Wellons, github.com/skeeto/hash-prospector) twice, with 32 bits of the
key before each: with one key alone the numbers of two positions could be the same ones in another
order.
"""

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: splitmix64's step
TABLED = 4096  # tokens from which on lines are hashed one by one, in the processor's cache


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


def exponentials(keys: Sequence[int], tokens: NDArray[np.integer]) -> NDArray[np.float32]:
    """Exponentially distributed numbers (lines, tokens) of float32, each above 0.

    Args:
        keys: one for each line (`key`).
        tokens: ids (lines, tokens), or (1, tokens), the same in every line.
    """
    low = np.array([k & 0xFFFFFFFF for k in keys], np.uint32)[:, None]
    high = np.array([k >> 32 for k in keys], np.uint32)[:, None]
    ids = tokens.astype(np.uint32)
    if ids.shape[1] < TABLED:
        return _waits(ids ^ low, high)
    out = np.empty((len(keys), ids.shape[1]), np.float32)
    for line in range(len(keys)):
        own = ids[line if len(ids) > 1 else 0]
        out[line] = _waits(own ^ low[line], high[line])
    return out


def _waits(x: NDArray[np.uint32], high: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The hash of x, changed in place, as -log(1 - u) of a uniform number u.

    u near 0, where the earliest arrivals are, has all 32 bits.
    """
    y = np.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0)):
        np.right_shift(x, shift, out=y)
        np.bitwise_xor(x, y, out=x)
        if factor:
            np.multiply(x, np.uint32(factor), out=x)
    np.add(x, high, out=x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0)):
        np.right_shift(x, shift, out=y)
        np.bitwise_xor(x, y, out=x)
        if factor:
            np.multiply(x, np.uint32(factor), out=x)
    u = x.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)
    # torch's logarithm is the same function for every element; it runs on several threads alike.
    waits = torch.from_numpy(u).neg_().log1p_().neg_()
    result: NDArray[np.float32] = waits.numpy()
    return result


def _mixed(x: int) -> int:
    """The output function of splitmix64, on 64 bits."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
