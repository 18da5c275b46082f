"""The keys that requests bring: read from a file that only its owner may read, or from a variable.

keys = read_keys(settings)          empty: none is asked for
number = keys.number(header)        which key it is, from 1; None: none of them
"""

import hashlib
import hmac
import os
import stat
from collections.abc import Sequence

from llmnorm.config.serving import ServingSettings
from llmnorm.machine.reading import check_file, read_text
from llmnorm.part import InputError

VARIABLE = "LLMNORM_API_KEY"
FILE = "serving.api_key_file"
SHORTEST = 8  # characters of a key


class Keys:
    """Keys, of which nothing but hashes is kept; a falsy value has none.

    Args:
        keys: as they are written.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def number(self, header: str | None) -> int | None:
        """Which key a header `Authorization` has, from 1; None where it has none of them.

        The time that it takes does not depend on the key.
        """
        kind, _, key = (header or "").partition(" ")
        if kind.lower() != "bearer":
            return None
        asked = _hash(key.strip())
        same = [hmac.compare_digest(asked, known) for known in self._hashes]
        return same.index(True) + 1 if any(same) else None


def read_keys(settings: ServingSettings) -> Keys:
    """The keys of the settings, or of the environment.

    Raises:
        InputError: the file cannot be used: others may read it, or it has no key.
    """
    path = settings.api_key_file
    if path is None:
        key = os.environ.get(VARIABLE)
        if key is not None:
            _check(key.strip(), VARIABLE)
        return Keys([] if key is None else [key.strip()])
    mode = check_file(path, FILE).st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"{FILE}: {path} can be read by others; run: chmod 600 {path}")
    lines = [line.strip() for line in read_text(path, FILE, limit=2**20).split("\n")]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InputError(f"{FILE}: {path} has no key; write one a line")
    for key in keys:
        _check(key, f"{FILE}: {path}")
    return Keys(keys)


def _check(key: str, where: str) -> None:
    if len(key) < SHORTEST or not key.isascii() or " " in key:
        raise InputError(
            f"{where}: a key has at least {SHORTEST} characters of ASCII and no space; "
            "`openssl rand -hex 24` makes one"
        )


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
