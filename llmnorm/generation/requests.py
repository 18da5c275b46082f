"""Requests to the engine out of settings, and out of the lines of a file.

    {"prompt": "The river", "max_tokens": 20}
    {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0, "id": "q7"}

A line is one of these objects; beside them it may hold any key of `SAMPLED`, which then counts in
the place of `generation.KEY`. `id`, a text or a whole number, stands in the answer's line too.

What would surprise: a line without a seed of its own takes `generation.seed` plus its number, so
that the same prompt on two lines has two answers. Lines are counted from 1, empty ones too.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Request, Sampling
from llmnorm.machine.reading import Line, checked
from llmnorm.part import InputError, nearest

SAMPLED = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "n",
    "seed",
)  # the keys of `generation` that may differ from request to request
_ASKED = ("prompt", "messages")
_SHORT = {"max_tokens": "max_new_tokens"}  # OpenAI's name, which many files have


class Prompts(Protocol):
    """What is asked, as tokens of the model.

    Attributes:
        stops: tokens that end an answer to messages, beside the model's own end tokens.
    """

    @property
    def stops(self) -> frozenset[int]:
        """Raises InputError where messages cannot be answered."""
        ...

    def text(self, text: str) -> list[int]:
        """The tokens of a text to be continued. Raises InputError."""
        ...

    def messages(self, messages: Any) -> list[int]:
        """The tokens of messages to be answered. Raises InputError."""
        ...


def request_of(
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    stops: Iterable[int] = (),
    seed: int | None = None,
) -> Request:
    """A request by the settings alone.

    Args:
        stops: tokens that end the answer, beside the model's own end tokens.
        seed: in the place of `settings.seed`.
    """
    chosen = settings.seed if seed is None else seed
    sampling = Sampling(
        max_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        seed=chosen,
        stop=tuple(settings.stop),
        stop_tokens=frozenset(stops),
    )
    return Request(tuple(prompt), sampling, settings.n)


@dataclass(frozen=True)
class Asked:
    """A line of a file of requests.

    Attributes:
        number: of the line, from 1.
        where: file and line, for messages.
        request: None where there is a problem.
        problem: what is wrong with the line; begins with `where`.
        id: what the line calls itself, if it does.
        mark: the same for the same request to the same model, and for no other.
    """

    number: int
    where: str
    request: Request | None
    problem: str | None
    id: str | int | None
    mark: str


def asked_in(
    lines: Iterable[Line],
    where: str,
    settings: GenerationSettings,
    prompts: Prompts,
    model: str,
) -> Iterator[Asked]:
    """Yield what each line of a file asks; a broken line has a problem, and the others go on.

    Args:
        lines: of the file (`machine.reading.json_lines`); empty ones are left out.
        where: the file's name, for messages.
        settings: for what a line leaves out.
        model: what tells the model from others, for `Asked.mark`.
    """
    for line in lines:
        if not line.raw.strip():
            continue
        shown = f"{where}:{line.number}"
        request, name = None, None
        try:
            if line.value is None:
                raise InputError(f"{shown}: {str(line.problem).removeprefix('it: ')}")
            name = _id(line.value, shown)
            request = _request(line, shown, settings, prompts)
        except InputError as error:
            problem = str(error) if str(error).startswith(shown) else f"{shown}: {error}"
            mark = _mark(model, line.raw.decode(errors="replace"))
            yield Asked(line.number, shown, None, " ".join(problem.split()), name, mark)
        else:
            sampling = {k: v for k, v in vars(request.sampling).items() if k != "processors"}
            sampling["stop_tokens"] = sorted(request.sampling.stop_tokens)
            mark = _mark(model, [request.prompt, sampling, request.n, name])
            yield Asked(line.number, shown, request, None, name, mark)


def _id(value: dict[str, Any], where: str) -> str | int | None:
    name = value.get("id")
    if name is None or (isinstance(name, str | int) and not isinstance(name, bool)):
        return name
    raise InputError(f"{where}: id: expected a text or a whole number")


def _request(line: Line, where: str, settings: GenerationSettings, prompts: Prompts) -> Request:
    """Raises InputError: a key is unknown, missing or not valid, or there is no such prompt."""
    value = dict(line.value or {})
    value.pop("id", None)
    asked = [key for key in _ASKED if key in value]
    if len(asked) != 1:
        keys = ", ".join(f"{key:.40}" for key in list(value)[:9]) or "no key"
        raise InputError(f"{where}: a line holds prompt or messages, one of them; got {keys}")
    what = value.pop(asked[0])
    for short, key in _SHORT.items():
        if short in value:
            if key in value:
                raise InputError(f"{where}: {short} and {key} are the same; give one")
            value[key] = value.pop(short)
    if unknown := [key for key in value if key not in SAMPLED]:
        hint = nearest(unknown[0], [*_ASKED, "id", *SAMPLED])
        raise InputError(f"{where}: unknown key '{unknown[0]:.40}'; {hint}")
    given = {key: getattr(settings, key) for key in SAMPLED} | value
    own = checked(given, GenerationSettings, where)
    seed = own.seed
    if "seed" not in value and seed is not None:
        seed += line.number
    if asked[0] == "messages":
        return request_of(prompts.messages(what), own, stops=prompts.stops, seed=seed)
    if not isinstance(what, str):
        raise InputError(f"{where}: prompt: expected a text, got {type(what).__name__}")
    return request_of(prompts.text(what), own, seed=seed)


def _mark(model: str, asked: Any) -> str:
    text = json.dumps([model, asked], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
