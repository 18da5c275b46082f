"""`llmnorm generate`: continue text, or answer a question, with a run or a model directory."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, local, text
from llmnorm.commands.configured import load_config
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmnorm.config.tree import GenerationSettings

HELP = "continue text or answer, with a trained run or a model directory"
TAKES_SETTINGS = True
SECTION = "generation"


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, which weights, and the prompts."""
    add_model(parser)
    add_checkpoint(parser)
    add_import(parser)
    parser.add_argument("--adapter", type=local, metavar="DIR", help="a PEFT adapter on the model")
    asked = parser.add_mutually_exclusive_group()
    help = "text to continue; may be given several times"
    asked.add_argument("--prompt", type=text, action="append", help=help)
    help = "a user's message to answer, by the chat template; may be given several times"
    asked.add_argument("--user", type=text, action="append", metavar="TEXT", help=help)
    parser.epilog = (
        "Settings of the sampling: generation.max_new_tokens=64, generation.temperature=0.8 (0: "
        "greedy), generation.top_k=50, generation.top_p=0.95, generation.seed=0."
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print each prompt with its continuation, or the answer to each message."""
    from llmnorm.config.file import section
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe, refuse_encoder

    import_modules(parsed.imports, "--import")
    path = parsed.path
    if (path / "config.yaml").is_file():
        config = load_config(path, overrides)
        settings = config.generation
        classes: list[str] | None = [config.objective.architecture]
    else:
        classes = describe(path, "generate").architectures
        settings = section("generation", overrides)
    refuse_encoder(classes, f"generate: {path}", "text is continued by")

    from llmnorm.exchange.loading import model_of, open_source
    from llmnorm.exchange.peft_adapter import with_adapter
    from llmnorm.generation.texts import generate

    source = open_source(path, checkpoint=parsed.checkpoint, ema=parsed.ema)
    own = parsed.adapter and (parsed.adapter / "tokenizer.json").is_file()
    if own:  # what the adapter was trained with, its chat template too
        source = source._replace(tokenizer=parsed.adapter)
    model, tokenizer = model_of(source, path)
    scored: PreTrainedModel = model
    if parsed.adapter:
        scored = with_adapter(model, parsed.adapter)
    texts = generate(scored, tokenizer, parsed.prompt or [""], settings)
    if parsed.user:
        assert source.tokenizer is not None  # or there would be no `tokenizer`
        texts = _answers(scored, tokenizer, source.tokenizer, parsed.user, settings)
    for number, whole in enumerate(texts):
        print(whole if number == 0 else f"\n{whole}", flush=True)


def _answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: Path,
    messages: list[str],
    settings: "GenerationSettings",
) -> Iterator[str]:
    """Yield the answer to each message, alone, without the token that ends the turn.

    Args:
        directory: of the tokenizer; its chat template renders a message as in training.

    Raises:
        InputError: there is no template, it cannot render a message, or it writes tokens that the
            model does not have.
    """
    from llmnorm.data.chat import ChatTemplate
    from llmnorm.generation.continuation import continuation

    template = ChatTemplate(directory, key="--user")
    for message in messages:
        turn = [{"role": "user", "content": message}]
        prompt = template.render(turn, generation_prompt=True)
        if max(prompt) >= model.config.vocab_size:
            raise InputError(
                f"--user: {directory} has a token with the id {max(prompt)}, the model has "
                f"{model.config.vocab_size}; give the adapter that was trained with it (--adapter)"
            )
        answer = continuation(model, tokenizer, prompt, settings, stops=template.stops)
        yield template.decode(answer)
