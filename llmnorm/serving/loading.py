"""From a loaded model to what is served: the engine, and what the HTTP side knows of the model.

    model, engine, says = model_of_target(target, settings, serving, name)

What would surprise: the engine gets a tokenizer of its own, so that two threads never use one.
"""

import copy
import hashlib
import json
import time

from llmnorm.config.generation import GenerationSettings
from llmnorm.config.saved import to_tree
from llmnorm.config.serving import ServingSettings
from llmnorm.exchange.served import Target
from llmnorm.generation.contract import Request, Sampling
from llmnorm.generation.engine import Counters, Engine
from llmnorm.machine.doctor import version
from llmnorm.serving.asking import Model
from llmnorm.serving.chat import chat_of
from llmnorm.serving.structured import Forms
from llmnorm.serving.token_text import TokenTexts


def model_of_target(
    target: Target, settings: GenerationSettings, serving: ServingSettings, name: str
) -> tuple[Model, Engine, list[str]]:
    """What is served, its engine, and what there is to say about them, a line each.

    Args:
        target: the model and its tokenizer.
        settings: of the engine; the draft is loaded.
        name: what requests call the model.

    Raises:
        InputError: the settings cannot be served with this model.
    """
    chat, about_chat = chat_of(target.asker, serving)
    own = target._replace(tokenizer=copy.deepcopy(target.tokenizer))
    built = own.build(settings)
    assert isinstance(built.engine, Engine), "eqspec and exspec are refused before"
    _warm_up(built.engine)
    tokenizer, vocabulary = target.tokenizer, target.asker.vocabulary
    model = Model(
        name=name,
        created=int(time.time()),
        context=min(settings.context or target.context, target.context),
        vocabulary=vocabulary,
        slots=settings.slots,
        fingerprint=_fingerprint(target, settings),
        tokenizer=tokenizer,
        asker=target.asker,
        chat=chat,
        texts=TokenTexts(tokenizer),
        forms=Forms(tokenizer, vocabulary, target.ends | chat.stops),
    )
    parameters = sum(weight.numel() for weight in target.model.parameters())
    dtype = str(target.model.dtype).removeprefix("torch.")
    says = [
        f"{name}: {type(target.model).__name__}, {parameters:,} parameters in {dtype}, on "
        f"{target.model.device}",
        *built.says,
        f"draft: {settings.draft}; {_about_equality(settings)}",
        f"messages: {about_chat}",
    ]
    return model, built.engine, says


def _warm_up(engine: Engine) -> None:
    """Run rows alone and together, so that no request waits until steps are captured."""
    for _ in engine.generate(
        Request((0,), Sampling(temperature=0, max_tokens=tokens, ignore_end=True))
        for tokens in (4, 8)
    ):
        pass
    engine.counters = Counters()


def _about_equality(settings: GenerationSettings) -> str:
    """What a client may rely on, where it asks the same twice."""
    if settings.deterministic:
        return "greedy and seeded answers are bit-equal in any company"
    return (
        "greedy and seeded answers are the same in any company and with any draft, but for ties "
        "within rounding"
    )


def _fingerprint(target: Target, settings: GenerationSettings) -> str:
    """Tells weights, settings and version from others: what makes seeded answers differ."""
    known = [target.identity(), str(target.model.dtype), to_tree(settings), version()]
    text = json.dumps(known, sort_keys=True)
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]
