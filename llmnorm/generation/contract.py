"""What passes between the engine, a draft and the choice of tokens.

    request   -> the engine: token ids, and how their continuation is chosen
    proposal  -> of a draft for one row: tokens, and the distribution that they were drawn from
    verdict   -> of the target on a row's proposal: the tokens that are committed
    event     -> of the engine: what a row has gained in a round

A row's tokens are its prompt and what is committed. The cache of the target holds all of them but
the last one, the pending token, which is fed before the drafts (arXiv 2510.22876).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from llmnorm.nn.cache import RaggedCache

Finish = Literal["stop", "length", "abort", "error"]


class Step(Protocol):
    """A model behind rows of a cache: `models.decoding.Decoder`, or one like it.

    Attributes:
        context: tokens that a row may have.
        vocabulary: tokens that the logits are of.
        dtype: of keys and values, for `RaggedCache.reserve`.
        device: where ids, logits and the cache are.
        says: what it does, in one line.
    """

    context: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    says: str

    def new_cache(self) -> RaggedCache:
        """An empty cache of the model."""
        ...

    def step(
        self,
        ids: Tensor,
        cache: RaggedCache,
        counts: Sequence[int] | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """Append new tokens ids (rows, new) to the first rows; logits (rows, new, vocabulary), or
        (rows, 1, vocabulary) of each row's last real token."""
        ...


class Processor(Protocol):
    """Changes one row's logits before a token is chosen, and follows the row's tokens.

    Tokens that are advanced over may be hypothetical: drafts that are taken back.
    """

    def apply(self, logits: Tensor) -> Tensor:
        """Changed logits (vocabulary,) of the next token; the argument is left as it is."""
        ...

    def advance(self, token: int) -> None:
        """The row's next token."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a continuation is chosen.

    temperature: 0 is greedy. top_k, top_p, min_p: which tokens may be drawn. The penalties are
    those of Keskar et al. 2019 (repetition, over prompt and answer) and of OpenAI's API (presence,
    frequency, over the answer). allowed: no other token can come. seed: the noise is a function of
    (seed, position, token), the same with or without drafts; None: drafts are verified by rejection
    and the noise is new each time. stop: texts that end an answer and are no part of it.
    stop_tokens: beside the model's own end tokens. logprobs: how many alternatives are told with
    each token; None: none, and no log-probability either. prompt_logprobs: the same of the tokens
    of the prompt, which is run from its beginning then; with it, max_tokens may be 0. skip_special:
    special tokens are no part of the text. speculative: whether drafts may be used. processors:
    further ones, e.g. of a grammar, one set a row.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | None = None
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_end: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special: bool = True
    speculative: bool = True
    processors: Sequence[Processor] = ()


@dataclass(frozen=True)
class Request:
    """A prompt to be continued, in `n` rows that share one prefill.

    The n-th row of a seeded request has the seed plus n.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1


@dataclass(frozen=True)
class Proposal:
    """A draft's tokens for one row.

    distributions: (tokens, vocabulary), what each was drawn from; None: each was certain (lookup,
    a greedy draft, shared noise).
    """

    tokens: list[int]
    distributions: Tensor | None = None


@dataclass(frozen=True)
class Chosen:
    """A committed token's log-probability under the target, raw, and the likeliest alternatives.

    The chosen token's own is the same number there, where it is among them.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Verdict:
    """The tokens that a round commits to a row: the accepted drafts and the bonus token.

    chosen: one for each token, where the request asks for log-probabilities. fault: why the row
    cannot go on; then nothing is committed.
    """

    tokens: list[int]
    accepted: int
    chosen: list[Chosen] | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Event:
    """What one row has gained in a round.

    request: the number that `Engine.add` gave. row: which of its n. text: complete UTF-8 that no
    stop can take back any more. accepted: how many of the tokens, the first ones, were drafted, of
    `drafted` that were proposed. finish: None while the row goes on. cached: how many of the
    prompt's tokens an earlier row's cache has saved. prompt: of the prompt's tokens from the second
    on, where the request asks for it, in one event of its first row. accepted_characters: how many
    of the text's characters, the first ones, came with accepted tokens.
    """

    request: int
    row: int
    tokens: list[int]
    text: str
    accepted: int
    chosen: list[Chosen] | None = None
    finish: Finish | None = None
    message: str | None = None
    drafted: int = 0
    cached: int = 0
    prompt: list[Chosen] | None = None
    accepted_characters: int = 0


class Chooser(Protocol):
    """What chooses one row's tokens: its processors, its noise, how many tokens it has.

    Its functions over several rows are those of sampling.py.
    """

    sampling: Sampling

    def rollback(self, count: int) -> None:
        """Take back the last `count` hypothetical tokens."""
        ...


class Draft(Protocol):
    """Proposes tokens for the target's rows, by the target's numbers of rows."""

    def propose(self, rows: Sequence["DraftedRow"], counts: Sequence[int]) -> list[Proposal]:
        """At most `counts` tokens for each row; fewer, or none, where it knows no more."""
        ...

    def move(self, source: int, row: int) -> None:
        """The row `source` has become the row `row`, which was free."""
        ...

    def release(self, row: int) -> None:
        """The row is free."""
        ...


class DraftedRow(Protocol):
    """What a draft sees of a row.

    Attributes:
        slot: its number in the target's cache.
        ids: its tokens, those of the prompt and the committed ones, the pending one last.
        chooser: what chooses its tokens.
    """

    slot: int
    ids: list[int]
    chooser: Chooser


class Lengths(Protocol):
    """Decides how many tokens are drafted for each row (costs.py)."""

    def counts(self, rows: Sequence[DraftedRow]) -> list[int]:
        """Tokens to be drafted for each row in the next round."""
        ...

    def proposed(self, asked: int, found: int) -> None:
        """For `found` of the `asked` rows the draft had tokens."""
        ...

    def observe(self, slot: int, drafted: int, accepted: int) -> None:
        """What became of a row's drafts."""
        ...

    def move(self, source: int, row: int) -> None:
        """The row `source` has become the row `row`, which was free."""
        ...

    def release(self, row: int) -> None:
        """The row is free."""
        ...
