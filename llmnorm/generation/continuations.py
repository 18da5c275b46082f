"""What a model that is being trained makes of prompts, as tokens.

    found = continuations(model, tokenizer, requests, settings, ends=ends)

The engine runs the requests, over the model's own forward pass (models/eager_step.py). Where the
model is spread over processes (`together`), a pass needs all of them, and an engine's rounds would
have to be the same in each: there Hugging Face's `generate` runs the passes until every process has
ended, and the tokens are chosen as the engine chooses them, by the same noise.

A class of transformers runs its own `generate`, a row at a time: not every class takes padding.

What would surprise: `together`, prompts are padded on the left; the cache neither stores nor shows
padding, so that logits are those of the prompt alone, up to the rounding of other shapes.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from llmnorm.config.foreign import LONGEST
from llmnorm.config.tree import GenerationSettings
from llmnorm.generation.contract import Proposal, Request
from llmnorm.generation.engine import Engine
from llmnorm.generation.row import Row, rows_of
from llmnorm.generation.sampling import verify
from llmnorm.models.eager_step import EagerStep
from llmnorm.models.foreign import Foreign
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmnorm.models.modeling import LlmNormForCausalLM

PAD = 0  # any token: no row sees it, and none is told it


def continuations(
    model: "LlmNormForCausalLM | Foreign",
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    *,
    ends: Collection[int],
    together: bool = False,
    calls: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens that follow each request's prompt, the end token included.

    Args:
        model: in evaluation mode.
        tokenizer: for stop strings.
        requests: of one row each.
        ends: the model's end tokens.
        together: the model is spread over processes, all of which make this call, each with
            requests of its own.
        calls: how many requests the process has that has most of them, where they may differ. A
            class of transformers runs as often on every process, each time for one row.
        advance: called for each token, so that a long text can be told from one that hangs.

    Raises:
        InputError: a request asks for what cannot be, or the model's logits are not finite.
    """
    if isinstance(model, Foreign):
        repeated = max(0, calls - len(requests)) if together else 0
        each = [
            _generated(model, tokenizer, [request], ends, together, advance)
            for request in [*requests, *[requests[-1]] * repeated]
        ]
        return [tokens for (tokens,) in each[: len(requests)]]
    if together:
        return _generated(model, tokenizer, requests, ends, together, advance)
    longest = max(len(r.prompt) + r.sampling.max_tokens for r in requests)
    context = min(longest, model.config.max_position_embeddings)
    settings = GenerationSettings(slots=len(requests), context=context)
    engine = Engine(EagerStep(model), tokenizer, settings, ends=ends)
    found: list[list[int]] = [[] for _ in requests]
    for event in engine.generate(requests):
        if event.finish == "error":
            raise InputError(str(event.message))
        found[event.request] += event.tokens
        advance()
    return found


def _generated(
    model: "LlmNormForCausalLM | Foreign",
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    ends: Collection[int],
    together: bool,
    advance: Callable[[], None],
) -> list[list[int]]:
    """As `continuations`, by Hugging Face's `generate`."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or LONGEST
    made = [
        rows_of(
            number,
            request,
            tokenizer=tokenizer,
            ends=ends,
            vocabulary=config.vocab_size,
            context=context,
        )
        for number, request in enumerate(requests)
    ]
    rows = [row for (row,) in made]
    width = max(row.prompt for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - row.prompt :] = torch.tensor(row.ids)
        mask[number, width - row.prompt :] = 1
    chosen = _Chosen(rows, advance)
    model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(row.limit for row in rows),
        do_sample=False,
        temperature=None,
        eos_token_id=None,
        pad_token_id=PAD,
        logits_processor=[chosen],
        stopping_criteria=[_Ended(chosen)],
        synced_gpus=together,
        use_cache=True,
    )
    if chosen.fault is not None:
        raise InputError(chosen.fault)
    return [row.ids[row.prompt :] for row in rows]


class _Chosen(LogitsProcessor):
    """Leaves `generate` one token a row to choose: what the row's own chooser has chosen."""

    def __init__(self, rows: Sequence[Row], advance: Callable[[], None]) -> None:
        self._rows, self._advance = rows, advance
        self.ended = [False] * len(rows)
        self.fault: str | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (rows, vocabulary) -> the same, -inf but for one token of each row."""
        self._advance()
        going = [number for number, ended in enumerate(self.ended) if not ended]
        tokens = [PAD] * len(self._rows)
        verdicts = verify(
            [self._rows[number].chooser for number in going],
            scores[going].unsqueeze(1),
            [0] * len(going),
            [Proposal([])] * len(going),
        )
        for number, verdict in zip(going, verdicts, strict=True):
            if verdict.fault is not None:
                self.fault, self.ended[number] = verdict.fault, True
                continue
            event = self._rows[number].commit(verdict)
            self.ended[number] = event.finish is not None
            tokens[number] = event.tokens[-1]
        only = torch.full_like(scores, -torch.inf)
        place = torch.tensor(tokens, device=scores.device).unsqueeze(1)
        return only.scatter(1, place, 0.0)


class _Ended(StoppingCriteria):
    """Which rows have ended, as the rows themselves say."""

    def __init__(self, chosen: _Chosen) -> None:
        self._chosen = chosen

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """(rows,), whether each has ended."""
        return torch.tensor(self._chosen.ended, device=input_ids.device)
