"""Answers of a given form (JSON, a schema, a pattern, a grammar) by llguidance's masks.

    forms = Forms(tokenizer, vocabulary, ends)
    make = await forms.compiled(fields)         None where no form is asked for
    Sampling(..., processors=(make(),))         one for each row

A matcher follows the row's tokens and says which ones may come next; all others lose their logits.
Under speculation it is advanced along the draft and rolled back with it, so that what a seeded
request says is the same with and without drafts (tests/serving/test_structured.py).

Compiling is bounded by llguidance's limits, in steps of work and not in seconds, so that a schema
is taken or refused whatever else the machine does.
"""

import asyncio
import json
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmnorm.machine.doctor import missing_extra
from llmnorm.serving.fields import AnswerFields
from llmnorm.serving.refusals import Refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MOST_BYTES = 2**16  # of a schema, pattern or grammar
# Between the parts of JSON. llguidance's own pattern has no end, and weak models find none either.
SPACES = "[\\x20\\x0A\\x0D\\x09]{1,16}"
# Below llguidance's own (1e6, 5e5, 25e4): about 10 ms of work, a few thousand symbols.
FUEL, SYMBOLS, STATES = 500_000, 20_000, 20_000


class Forms:
    """Compiles forms for one tokenizer.

    Args:
        tokenizer: of the model.
        vocabulary: tokens that the model has.
        ends: tokens one of which ends an answer whose form is complete.

    Attributes:
        ends: the same.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", vocabulary: int, ends: Collection[int]
    ) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.ends = frozenset(ends)
        self._made: LLTokenizer | None = None
        self._turn = asyncio.Lock()  # one grammar is compiled at a time

    async def compiled(self, fields: AnswerFields) -> "Callable[[], Follower] | None":
        """What makes a processor for a row of the request; None where no form is asked for.

        Raises:
            Refusal: the form cannot be compiled, or the extra is not installed.
        """
        name, kind, text = _asked(fields)
        if not kind:
            return None
        if len(text) > MOST_BYTES:
            message = f"{name}: has {len(text):,} characters; at most {MOST_BYTES:,} are compiled"
            raise Refusal(400, message, "invalid_schema", param=name)
        if not self.ends or fields.ignore_eos:
            message = f"{name}: no token may end the answer, which has to end where its form does"
            raise Refusal(400, message, "invalid_value", param=name)
        async with self._turn:
            matcher = await asyncio.to_thread(self._compile, name, kind, text)
        return lambda: Follower(matcher.deep_copy(), self._vocabulary)

    def _compile(self, name: str, kind: str, text: str) -> "LLMatcher":
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            message = f"{name}: {missing_extra('llguidance')} (on the server)"
            raise Refusal(400, message, "unsupported_parameter", param=name) from None
        limits = LLParserLimits(
            initial_lexer_fuel=FUEL, max_grammar_size=SYMBOLS, max_lexer_states=STATES
        )
        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(
                    text, defaults={"whitespace_pattern": SPACES}
                )
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = LLMatcher.grammar_from_lark(text)
            matcher = LLMatcher(self._known(name), grammar, log_level=0, limits=limits)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise Refusal(400, f"{name}: {problem}", "invalid_schema", param=name)
        return matcher

    def _known(self, name: str) -> "LLTokenizer":
        """The tokenizer as llguidance knows it, made once."""
        if self._made is None:
            from llguidance.hf import from_tokenizer

            try:
                self._made = from_tokenizer(
                    self._tokenizer,  # type: ignore[arg-type]
                    n_vocab=self._vocabulary,
                    eos_token=sorted(self.ends),
                )
            except ValueError as error:
                message = f"{name}: the model's tokenizer is of a kind that has no forms ({error})"
                raise Refusal(400, message, "unsupported_parameter", param=name) from None
        return self._made


class Follower:
    """The processor of one row (`generation.contract.Processor`)."""

    def __init__(self, matcher: "LLMatcher", vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (vocabulary,), those of tokens that may not come now at -inf."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        may = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        return logits.masked_fill(~torch.from_numpy(may), float("-inf"))

    def advance(self, token: int) -> None:
        """The row's next token, which the mask allows."""
        self._matcher.consume_token(token)
        self._check()

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        self._matcher.rollback(count)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())


def _asked(fields: AnswerFields) -> tuple[str, str, str]:
    """The field that asks for a form, llguidance's kind of it, and its text; empty for none."""
    form, outputs = fields.response_format, fields.structured_outputs
    if form is not None and form.type == "json_object":
        return "response_format", "json", '{"type": "object"}'
    if form is not None and form.json_schema is not None:
        return "response_format", "json", _text(form.json_schema.schema_)
    if outputs is None:
        return "", "", ""
    name = "structured_outputs"
    if outputs.regex is not None:
        return name, "regex", outputs.regex
    if outputs.choice is not None:
        return name, "grammar", f"start: {' | '.join(map(_text, outputs.choice))}"
    if outputs.json_ is not None:
        given = outputs.json_
        return name, "json", given if isinstance(given, str) else _text(given)
    return name, "grammar", outputs.grammar or ""


def _text(schema: Any) -> str:
    return json.dumps(schema, ensure_ascii=False)
