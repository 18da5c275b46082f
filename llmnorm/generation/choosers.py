"""What chooses one row's tokens: settings, checked; tokens so far, noise and processors."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from llmnorm.generation.contract import Sampling
from llmnorm.generation.noise import Uniforms, fresh_seed, key
from llmnorm.generation.processors import Changes, History
from llmnorm.part import InputError

COLDEST = 1e-5  # temperatures under this are taken for 0


class RowChooser:
    """Chooses a row's tokens; the functions over several rows are those of sampling.py.

    Args:
        sampling: how.
        prompt: the row's first tokens.
        ends: the model's end tokens: they cannot come before `min_tokens` tokens of the answer,
            and nothing is asked of further processors behind them, both not with `ignore_end`.
        vocabulary: tokens that logits are of.

    Attributes:
        sampling: as given.
        greedy: the likeliest token is chosen.
        decides: a token follows from the target's logits alone: greedy or seeded.
        plain: logits are taken as they are, but for temperature, top-k, top-p and min-p.
        fault: what a further processor of the request has raised; the row cannot go on then.

    Raises:
        InputError: a setting is out of range, or names a token that is not in the vocabulary.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int], vocabulary: int
    ) -> None:
        _check(sampling, vocabulary)
        self.sampling = sampling
        self.greedy = sampling.temperature < COLDEST
        self.decides = self.greedy or sampling.seed is not None
        # Without a seed; else it is not asked.
        self.uniform = Uniforms(fresh_seed() if sampling.seed is None else 0)
        own = frozenset() if sampling.ignore_end else ends
        self._ends = own | sampling.stop_tokens
        self._forbidden = np.array([t for t in sorted(self._ends) if t < vocabulary], np.int64)
        self._bias = (
            np.array(list(sampling.logit_bias), np.int64),
            np.array(list(sampling.logit_bias.values()), np.float64),
        )
        allowed = sampling.allowed
        self._allowed = None if allowed is None else np.array(sorted(set(allowed)), np.int64)
        penalised = (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
        )
        self._history = History(prompt) if penalised else None
        self.plain = not (
            penalised
            or len(self._bias[0])
            or self._allowed is not None
            or sampling.min_tokens
            or sampling.processors
        )
        self.fault: str | None = None
        self._prompt = len(prompt)
        self._answer: list[int] = []
        self._hypothetical = 0  # so many of them, the last ones
        self._end: int | None = None  # the index of the first end token in the answer
        self._followed = 0  # so many of them, the first ones, further processors were advanced over

    def key(self, ahead: int) -> int:
        """The noise of the token that comes after `ahead` further ones; of seeded rows."""
        assert self.sampling.seed is not None
        return key(self.sampling.seed, self._prompt + len(self._answer) + ahead)

    def note(self, changes: Changes, line: int, drafts: Sequence[int]) -> None:
        """The built-in changes of the row's lines, from `line` on: one, and one for each draft."""
        if self.plain:
            return
        for ahead in range(len(drafts) + 1):
            if len(self._bias[0]):
                changes.bias(line + ahead, *self._bias)
            if self._history is not None:
                changes.penalties(line + ahead, self.sampling, self._history)
            if len(self._answer) + ahead < self.sampling.min_tokens:
                changes.forbid(line + ahead, self._forbidden)
            if self._allowed is not None:
                changes.allow(line + ahead, self._allowed)
            if self._history is not None and ahead < len(drafts):
                self._history.advance(drafts[ahead])
        if self._history is not None:
            self._history.rollback(len(drafts))

    def process(self, lines: Tensor, drafts: Sequence[int]) -> None:
        """Apply further processors to the row's lines (drafts + 1, vocabulary), in place.

        They are not asked behind an end token, nor behind a draft that they do not allow: lines
        behind these stay as they are, and nothing of them is committed. Sets `fault` where one
        raises an error.
        """
        followed = 0
        for line, drafted in zip(lines, [*drafts, None], strict=True):
            if self._end is not None or self.fault is not None:
                break
            changed = line
            try:
                for processor in self.sampling.processors:
                    changed = processor.apply(changed)
                line.copy_(changed)
            except Exception as error:  # of a request's own code; it costs this row only
                self._failed(error)
                break
            if drafted is None or drafted in self._ends or line[drafted] == -math.inf:
                break
            self._advance(drafted)
            followed += self.fault is None
        if followed and self.fault is None:
            for processor in self.sampling.processors:
                processor.rollback(followed)

    def suppose(self, token: int, *, allowed: bool = True) -> None:
        """Go on over a token that may be taken back; allowed: further processors know it."""
        self._append(token, allowed)
        self._hypothetical += 1

    def commit(self, token: int) -> None:
        """Go on over a token for good; sets `fault` where a processor raises an error."""
        assert not self._hypothetical
        self._append(token, True)

    def rollback(self, count: int) -> None:
        """Take back the last `count` hypothetical tokens.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= count <= self._hypothetical:
            raise ValueError(f"rollback of {count} tokens: {self._hypothetical} are hypothetical")
        if not count:
            return
        self._hypothetical -= count
        del self._answer[-count:]
        if self._history is not None:
            self._history.rollback(count)
        if self._end is not None and self._end >= len(self._answer):
            self._end = None
        beyond = self._followed - len(self._answer)
        if beyond > 0:
            self._followed -= beyond
            for processor in self.sampling.processors:
                processor.rollback(beyond)

    def settle(self) -> None:
        """Take back all hypothetical tokens."""
        self.rollback(self._hypothetical)

    def _append(self, token: int, allowed: bool) -> None:
        if self._history is not None:
            self._history.advance(token)
        if self._end is None and token in self._ends:
            self._end = len(self._answer)
        in_step = self._followed == len(self._answer)
        self._answer.append(token)
        if allowed and in_step and self._end is None and self.fault is None:
            self._advance(token)
            self._followed += 1

    def _advance(self, token: int) -> None:
        try:
            for processor in self.sampling.processors:
                processor.advance(token)
        except Exception as error:  # of a request's own code; it costs this row only
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.fault = f"a processor of the request has failed: {type(error).__name__}: {error}"


def _check(sampling: Sampling, vocabulary: int) -> None:
    """Refuse settings that are out of range."""
    number = {
        "min_tokens": (sampling.min_tokens >= 0, "at least 0"),
        "max_tokens": (sampling.max_tokens >= 0, "at least 0"),
        "temperature": (0 <= sampling.temperature < math.inf, "a number from 0 on"),
        "top_k": (sampling.top_k is None or sampling.top_k >= 1, "at least 1, or None"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= sampling.min_p < 1, "at least 0 and below 1"),
        # Logits are divided by it, and must stay finite in float32.
        "repetition_penalty": (
            0.001 <= sampling.repetition_penalty < math.inf,
            "above 0, at least 0.001",
        ),
        "presence_penalty": (math.isfinite(sampling.presence_penalty), "a number"),
        "frequency_penalty": (math.isfinite(sampling.frequency_penalty), "a number"),
        "logprobs": (sampling.logprobs is None or sampling.logprobs >= 0, "at least 0, or None"),
    }
    for name, (good, cure) in number.items():
        if not good:
            raise InputError(f"{name}: {getattr(sampling, name)}: must be {cure}")
    for token, value in sampling.logit_bias.items():
        if math.isnan(value) or value == math.inf:
            raise InputError(f"logit_bias: token {token}: {value}: must be a number, or -inf")
    if sampling.allowed is not None and not sampling.allowed:
        raise InputError("allowed: no token is allowed; leave it out to allow all")
    for name, tokens in (("logit_bias", sampling.logit_bias), ("allowed", sampling.allowed or ())):
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"{name}: there is no token {token}: the model has {vocabulary}, from 0 on"
                )
