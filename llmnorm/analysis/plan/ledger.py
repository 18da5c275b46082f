"""Bytes by what they are for, as a step goes on; the sum at its highest moment is the peak.

ledger.hold("activations", 4096)      from now on
ledger.rise("logits", 1024)           for a moment
ledger.drop("activations", 4096)
ledger.peak, ledger.at_peak, ledger.moment
"""

from collections import Counter


class Ledger:
    """What is live now, and what was live at the highest moment.

    Attributes:
        live: bytes now, by kind.
        peak: the most bytes that were live.
        at_peak: what they were, by kind.
        moment: when that was; the caller writes what it is doing into `doing`.
    """

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.doing = "between two steps"
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.moment = self.doing

    @property
    def total(self) -> int:
        """Bytes now."""
        return sum(self.live.values())

    def hold(self, kind: str, size: int) -> None:
        """Bytes that are live from now on."""
        self.live[kind] += size
        self.rise(kind, 0)

    def drop(self, kind: str, size: int) -> None:
        """Bytes that are let go."""
        self.live[kind] -= size

    def rise(self, kind: str, size: int) -> None:
        """Bytes that are live for a moment, beside those that are held."""
        if (total := self.total + size) > self.peak:
            self.peak, self.moment = total, self.doing
            self.at_peak = {k: n for k, n in (self.live + Counter({kind: size})).items() if n > 0}
