"""From the fields of a body to what the engine is asked.

    asked = await completions(model, fields)        -> prompts, and a request for each
    asked = await chat(model, fields)
    service.open(asked.requests)

The answers of a prompt stand together, in the prompts' order. Where the form of an answer is given,
each of the `n` answers is a request of its own, since its grammar follows one row.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmnorm.exchange.prompting import Asker
from llmnorm.generation.contract import Processor, Request, Sampling
from llmnorm.part import InputError
from llmnorm.serving.chat import Chat
from llmnorm.serving.fields import AnswerFields, ChatFields, CompletionFields, Fields
from llmnorm.serving.refusals import Refusal
from llmnorm.serving.service import of_input
from llmnorm.serving.structured import Forms
from llmnorm.serving.token_text import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 20_000  # characters; a longer text is tokenized in a thread, and the others are not held up
MOST_PROMPTS = 2_048


@dataclass
class Model:
    """What is served.

    Attributes:
        name: what requests call it.
        created: seconds since 1970.
        context: tokens that a row may have.
        vocabulary: tokens that the model has.
        slots: rows that run at once.
        fingerprint: tells weights and settings from others.
        tokenizer: of the HTTP side alone, the engine has its own.
        forms: compiles what structured answers must look like.
    """

    name: str
    created: int
    context: int
    vocabulary: int
    slots: int
    fingerprint: str
    tokenizer: "PreTrainedTokenizerBase"
    asker: Asker
    chat: Chat
    texts: TokenTexts
    forms: Forms

    def check_name(self, fields: Fields) -> None:
        """Refuse a request for another model.

        Raises:
            Refusal: 404.
        """
        if fields.model is not None and fields.model != self.name:
            raise Refusal(
                404,
                f"model: '{fields.model[:80]}' is not served; '{self.name}' is",
                "model_not_found",
                param="model",
            )

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


@dataclass
class Asked:
    """What the engine is asked.

    Attributes:
        requests: their rows are the answers.
        prompts: of each answer, its prompt's tokens.
        heads: of each answer, the text that is echoed before it.
        prompt_tokens: of all prompts, each counted once.
    """

    requests: list[Request]
    prompts: list[tuple[int, ...]]
    heads: list[str]
    prompt_tokens: int


async def completions(model: Model, fields: CompletionFields) -> Asked:
    """What POST /v1/completions asks.

    Raises:
        Refusal: it cannot be answered.
    """
    model.check_name(fields)
    given = fields.prompt
    texts: list[str] | None = None
    if isinstance(given, str):
        texts = [given]
    elif given and isinstance(given[0], str):
        texts = [text for text in given if isinstance(text, str)]
    if texts is not None:
        _check_count(len(texts))
        prompts = [await _off_loop(model.asker.text, text) for text in texts]
    else:
        lists = [given] if given and isinstance(given[0], int) else given
        _check_count(len(lists))
        prompts = [list(ids) for ids in lists]  # type: ignore[arg-type]
        if not prompts or not all(prompts):
            raise Refusal(400, "prompt: has no tokens", "invalid_value", param="prompt")
    heads = [""] * len(prompts)
    if fields.echo:
        heads = texts or [
            model.decode(ids, skip_special=fields.skip_special_tokens) for ids in prompts
        ]
    scored = None
    if fields.echo and fields.logprobs is not None:
        scored = fields.logprobs
    elif not fields.max_tokens:
        scored = 0
    given_length = "max_tokens" in fields.model_fields_set
    samplings = []
    for ids in prompts:
        length = _length(model, ids, fields.max_tokens, given=given_length)
        sampling = _sampling(model, fields, length, logprobs=fields.logprobs)
        samplings.append(replace(sampling, prompt_logprobs=scored))
    return await _asked(model, fields, prompts, heads, samplings)


async def chat(model: Model, fields: ChatFields) -> Asked:
    """What POST /v1/chat/completions asks.

    Raises:
        Refusal: it cannot be answered.
    """
    model.check_name(fields)

    def render(_: str) -> list[int]:
        return model.chat.tokens(
            fields.messages,
            fields.chat_template_kwargs,
            answer=fields.add_generation_prompt,
            begun=fields.continue_final_message,
        )

    ids = await _off_loop(render, "".join(str(m.get("content")) for m in fields.messages))
    wanted = fields.max_completion_tokens or fields.max_tokens
    length = _length(model, ids, wanted or model.context, given=wanted is not None)
    alternatives = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = _sampling(
        model,
        fields,
        length,
        logprobs=alternatives,
        stops=model.chat.stops,
        stop=model.chat.stop,
    )
    return await _asked(model, fields, [ids], [""], [sampling])


async def _off_loop(make: Callable[[str], list[int]], text: str) -> list[int]:
    """Tokens of a text, in a thread if it is long."""
    try:
        if len(text) > LONG:
            return await asyncio.to_thread(make, text)
        return make(text)
    except InputError as error:
        raise of_input(str(error)) from None


def _check_count(prompts: int) -> None:
    if prompts > MOST_PROMPTS:
        message = f"prompt: {prompts:,} prompts; at most {MOST_PROMPTS:,} a request"
        raise Refusal(400, message, "invalid_value", param="prompt")


def _length(model: Model, ids: Sequence[int], wanted: int, *, given: bool) -> int:
    """The tokens that an answer may have: those `wanted`; as many as fit, if none were asked for.

    Raises:
        Refusal: prompt and answer do not fit.
    """
    room = model.context + 1 - len(ids)  # the last token is not run
    if room < 1 or (given and wanted > room):
        answer = f" and max_tokens is {wanted:,}" if given else ""
        raise Refusal(
            400,
            f"the prompt has {len(ids):,} tokens{answer}; the context is {model.context:,} tokens",
            "context_length_exceeded",
            param="max_tokens" if given else None,
        )
    return min(wanted, room)


def _sampling(
    model: Model,
    fields: AnswerFields,
    length: int,
    *,
    logprobs: int | None,
    stops: frozenset[int] = frozenset(),
    stop: tuple[str, ...] = (),
) -> Sampling:
    return Sampling(
        max_tokens=length,
        min_tokens=fields.min_tokens,
        temperature=fields.temperature,
        top_k=fields.top_k if fields.top_k > 0 else None,
        top_p=fields.top_p,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=_bias(fields.logit_bias),
        seed=fields.seed,
        stop=(*fields.stop, *stop),
        stop_tokens=frozenset(fields.stop_token_ids)
        | (frozenset() if fields.ignore_eos else stops),
        ignore_end=fields.ignore_eos,
        logprobs=logprobs,
        skip_special=fields.skip_special_tokens,
        speculative=fields.speculative,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            message = f"logit_bias: '{key[:20]}' is no token id"
            raise Refusal(400, message, "invalid_value", param="logit_bias")
        bias[int(key)] = value
    return bias


async def _asked(
    model: Model,
    fields: AnswerFields,
    prompts: Sequence[Sequence[int]],
    heads: Sequence[str],
    samplings: Sequence[Sampling],
) -> Asked:
    if fields.n > model.slots:
        raise Refusal(
            400,
            f"n: is {fields.n}, and {model.slots} rows run at once (generation.slots)",
            "invalid_value",
            param="n",
        )
    make = await model.forms.compiled(fields)
    requests: list[Request] = []
    for ids, sampling in zip(prompts, samplings, strict=True):
        if make is None:
            requests.append(Request(tuple(ids), sampling, fields.n))
        else:
            ended = replace(sampling, stop_tokens=sampling.stop_tokens | model.forms.ends)
            requests += _followed(ids, ended, fields.n, make)
    of_answers = [tuple(ids) for ids in prompts for _ in range(fields.n)]
    repeated = [head for head in heads for _ in range(fields.n)]
    return Asked(requests, of_answers, repeated, sum(len(ids) for ids in prompts))


def _followed(
    ids: Sequence[int], sampling: Sampling, n: int, make: Callable[[], Processor]
) -> list[Request]:
    """A request for each answer, with a processor and a seed of its own."""
    requests = []
    for row in range(n):
        seed = None if sampling.seed is None else sampling.seed + row
        own = replace(sampling, seed=seed, processors=(make(),))
        if row:
            own = replace(own, prompt_logprobs=None)
        requests.append(Request(tuple(ids), own))
    return requests
