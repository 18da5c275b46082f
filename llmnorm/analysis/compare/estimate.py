"""How long the runs of a comparison will take."""

import math
import time
from collections.abc import Iterable
from statistics import median

from llmnorm.analysis.compare.launch import Slots
from llmnorm.analysis.compare.ledger import Ledger
from llmnorm.analysis.compare.plan import Protocol, Run
from llmnorm.config.tree import RunConfig

START_SECONDS = 5.0  # of a run: imports, checks, evaluation


class Estimate:
    """How long runs take: by the finished runs' speed, or else by counting operations.

    Counting assumes that every operation of the model runs as fast as its largest matrix products
    on this machine, so it is a lower bound. Nothing is measured before the first estimate.
    """

    def __init__(self, protocol: Protocol, ledger: Ledger, places: Slots) -> None:
        self._protocol, self._ledger, self._places = protocol, ledger, places
        self._flops: dict[str, float] = {}
        self._rate: float | None = None

    @property
    def source(self) -> str:
        """What the estimate is based on, in a few words."""
        if any(r.tokens_per_second for r in self._ledger.records.values()):
            return "estimated from the finished runs"
        return "a lower bound: the models' operations at this machine's rate of matrix products"

    def seconds(self, runs: Iterable[tuple[Run, float]]) -> float:
        """Seconds that the given shares of runs take, one after the other.

        Args:
            runs: (run, share of it that is still to be trained) pairs.
        """
        measured: dict[str, list[float]] = {}
        for record in self._ledger.records.values():
            if record.tokens_per_second:
                arm = record.run.partition("/")[0]
                measured.setdefault(arm, []).append(record.tokens_per_second)
        total = 0.0
        for run, share in runs:
            if run.arm in measured:
                rate = median(measured[run.arm])
            elif measured:  # another arm's speed is a better estimate than a count
                rate = median([median(rates) for rates in measured.values()])
            else:
                rate = self._counted(run.arm)
            total += START_SECONDS + share * self._protocol.tokens_of(run) / rate
        return total

    def _counted(self, arm: str) -> float:
        """Tokens a second if every operation runs as fast as the model's largest products."""
        config = self._protocol.configs[arm]
        if arm not in self._flops:
            self._flops[arm] = _operations(config, round(self._protocol.row_tokens[arm]))
        if self._rate is None:
            rows = config.training.micro_batch or config.training.rows
            self._rate = _product_rate(
                min(rows * config.data.context_length, 8192),
                config.model.hidden_size,
                config.model.intermediate_size,
                self._places,
            )
        return self._rate / self._flops[arm]


def _operations(config: RunConfig, row_tokens: int) -> float:
    """Operations of a token of the model, without those of an adapter, which are few beside it."""
    import torch

    from llmnorm.models.building import class_of
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.flops import flops_per_token
    from llmnorm.training.foreign import outline_of_foreign

    if config.model.foreign:
        return flops_per_token(outline_of_foreign(config), row_tokens)
    settings = LlmNormConfig.from_settings(
        config.model,
        vocab_size=_vocabulary(config),
        architectures=[config.objective.architecture],
    )
    with torch.device("meta"):
        model = class_of(settings)(settings)
    return flops_per_token(model.requires_grad_(not config.freezes), row_tokens)


def _vocabulary(config: RunConfig) -> int:
    if config.model.vocab_size != "auto":
        return int(config.model.vocab_size)
    preparation = config.objective.preparation(config)
    prepared = None if preparation is None else preparation.find()
    return prepared.vocab_size if prepared else config.tokenizer.vocab_size


def _product_rate(rows: int, width: int, inner: int, places: Slots) -> float:
    """Operations a second of (rows, width) @ (width, inner), the best of five tries."""
    import torch

    device = torch.device("cuda" if places.gpus and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(places.threads)
    left, right = torch.randn(rows, width, device=device), torch.randn(width, inner, device=device)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * width * inner / best


def duration(seconds: float) -> str:
    """Seconds as text: `2 h 05 min`, `7 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
