"""`llmnorm generate`: continue text, answer, talk, or answer a file, with a run or a directory."""

import argparse
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, local, text
from llmnorm.commands.configured import load_config, note
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.config.generation import GenerationSettings
    from llmnorm.exchange.served import Target
    from llmnorm.generation.batch_file import Totals
    from llmnorm.generation.contract import Request
    from llmnorm.generation.engine import Engine
    from llmnorm.generation.grouped import Grouped

HELP = "continue text, answer, or talk, with a trained run or a model directory"
TAKES_SETTINGS = True
SECTION = "generation"
FLAGS = {"max_tokens": "max_new_tokens", "temperature": "temperature", "seed": "seed"}
FLAGS |= {"draft": "draft"}  # option -> key of `generation`
AHEAD = 4  # rows that wait for each slot; EXSPEC's window has three a slot
BROKEN = 20  # lines of a file that are told; the output has all of them


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, which weights, what is asked, and short names of some settings."""
    add_model(parser)
    add_checkpoint(parser)
    add_import(parser)
    parser.add_argument("--adapter", type=local, metavar="DIR", help="a PEFT adapter on the model")
    asked = parser.add_mutually_exclusive_group()
    help = "text to continue; may be given several times"
    asked.add_argument("--prompt", type=text, action="append", metavar="TEXT", help=help)
    help = "a user's message to answer, by the chat template; may be given several times"
    asked.add_argument("--user", type=text, action="append", metavar="TEXT", help=help)
    help = "a conversation: a line of standard input is a message (/clear, /quit)"
    asked.add_argument("--chat", action="store_true", help=help)
    help = "a file of requests, a JSON object a line: prompt or messages, and settings; - is stdin"
    asked.add_argument("--prompts", type=local, metavar="FILE.jsonl|-", help=help)
    help = "the answers to --prompts; what a killed command has written is kept (default: stdout)"
    parser.add_argument("--output", type=local, metavar="FILE.jsonl", help=help)
    help = "what proposes tokens: a smaller model, or what stands in the text already"
    parser.add_argument("--draft", type=text, metavar="none|lookup|RUN_OR_DIR", help=help)
    parser.add_argument("--max-tokens", type=text, metavar="N", help="generated at most")
    parser.add_argument("--temperature", type=text, metavar="T", help="0: greedy")
    parser.add_argument("--seed", type=text, metavar="N", help="of the sampling; null: new noise")


def after_help() -> str:
    """Every setting, with its default; --max-tokens and so on stand for four of them."""
    from llmnorm.config.generation import GenerationSettings
    from llmnorm.config.schema import field_docs

    lines, docs = ["\nsettings, also in a run's config.yaml:"], field_docs(GenerationSettings)
    for name, field in GenerationSettings.model_fields.items():
        default = field.get_default()
        shown = "null" if default is None else str(default).lower()
        lines.append(f"  generation.{name}={shown}")
        lines += textwrap.wrap(docs[name], 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print each prompt with its continuation, the answers to messages, or write a file of them."""
    if parsed.output and not parsed.prompts:
        raise InputError("--output: holds the answers to --prompts FILE.jsonl, which is not given")
    for option, key in FLAGS.items():
        if (value := getattr(parsed, option)) is not None:
            overrides = [*overrides, f"generation.{key}={value}"]
    settings = _settings(parsed, overrides)

    from llmnorm.exchange.served import load_target

    option = next((o for o in ("user", "chat", "prompts") if getattr(parsed, o)), "prompt")
    target = load_target(
        parsed.path,
        settings,
        checkpoint=parsed.checkpoint,
        ema=parsed.ema,
        adapter=parsed.adapter,
        key=f"--{option}",
    )
    if parsed.prompts:
        _answer_file(target, settings, parsed.prompts, parsed.output)
    elif parsed.chat:
        _talk(target, settings)
    else:
        _print(target, settings, parsed.prompt or [""], parsed.user)


def _settings(parsed: argparse.Namespace, overrides: list[str]) -> "GenerationSettings":
    """The settings of a run, or of the command line alone.

    Raises:
        InputError: one is not valid, or text is not continued by what the directory holds.
    """
    from llmnorm.config.file import section
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe, is_stock, refuse_encoder

    import_modules(parsed.imports, "--import")
    path = parsed.path
    if (path / "config.yaml").is_file():
        config = load_config(path, overrides)
        settings = config.generation
        classes: list[str] | None = [config.objective.architecture]
    else:
        try:
            classes = describe(path, "generate").architectures
        except InputError:
            if not is_stock(path):
                raise
            classes = None  # of another class than ours: load_target knows what it is
        settings = section("generation", overrides)
    refuse_encoder(classes, f"generate: {path}", "text is continued by")
    try:
        settings.check_draft()
    except ValueError as error:
        raise InputError(str(error)) from None
    if parsed.chat and settings.n > 1:
        raise InputError(f"--chat: a message has one answer; generation.n is {settings.n}")
    if parsed.chat and settings.method in ("eqspec", "exspec"):
        raise InputError(
            f"--chat: generation.method '{settings.method}' is for many rows at once; leave it out"
        )
    return settings


def _print(
    target: "Target",
    settings: "GenerationSettings",
    prompts: Sequence[str],
    messages: Sequence[str] | None,
) -> None:
    """Print continuations behind their prompts, or answers alone; each as soon as it comes."""
    from llmnorm.generation.batch_file import Totals
    from llmnorm.generation.requests import request_of
    from llmnorm.generation.streams import answers

    if messages:
        turns = [[{"role": "user", "content": message}] for message in messages]
        tokens = [target.asker.messages(turn) for turn in turns]
        heads, stops = [""] * len(tokens), target.asker.stops
    else:
        tokens = [target.asker.text(prompt) for prompt in prompts]
        heads = [target.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
        stops = frozenset()
    requests = [request_of(ids, settings, stops=stops) for ids in tokens]
    engine = _engine(target, settings, requests)
    began, before, totals = time.perf_counter(), None, Totals()
    for place, row, event in answers(engine, requests):
        if (place, row) != before:
            _write(("" if before is None else "\n\n") + heads[place])
            before = place, row
        _write(event.text)
        totals.count(event)
    _write("\n")
    note(_closing(engine, totals, began))


def _talk(target: "Target", settings: "GenerationSettings") -> None:
    """A conversation: a line of standard input is a message."""
    from llmnorm.generation.contract import Request
    from llmnorm.generation.engine import Engine
    from llmnorm.generation.requests import request_of
    from llmnorm.generation.streams import converse

    stops = target.asker.stops  # refuses a model without a chat template before the first message
    settings = settings.model_copy(update={"slots": 1})
    engine = _engine(target, settings)
    assert isinstance(engine, Engine)

    def ask(messages: list[dict[str, str]]) -> Request:
        return request_of(target.asker.messages(messages), settings, stops=stops)

    def say(message: str) -> None:
        print(f"llmnorm: {message}", file=sys.stderr)

    converse(engine, ask, _typed(), _write, say)


def _typed() -> Iterator[str]:
    """Yield the lines of standard input, asked for by a sign where somebody types them."""
    if not sys.stdin.isatty():
        for raw in sys.stdin.buffer:
            yield raw.decode("utf-8", "replace")
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # with no answer to stop
            print("\n(/quit or Ctrl-D ends)")


def _answer_file(
    target: "Target", settings: "GenerationSettings", prompts: Path, output: Path | None
) -> None:
    """Answer a file of requests, or what an earlier command has left of it.

    Raises:
        InputError: the output is that of other requests; or, once all others are answered, there
            are requests that could not be.
    """
    from tqdm import tqdm

    from llmnorm.generation.batch_file import Output, Totals, answer_all
    from llmnorm.generation.requests import asked_in
    from llmnorm.machine.reading import json_lines, stream_lines

    piped = str(prompts) == "-"
    lines = stream_lines(sys.stdin.buffer, "-") if piped else json_lines(prompts, "--prompts")
    identity = target.identity() if output else ""
    asked = asked_in(lines, str(prompts), settings, target.asker, identity)
    count = None if piped else sum(1 for line in json_lines(prompts) if line.raw.strip())
    totals = Totals()
    with Output(output) as written:
        rest = written.resume(asked, totals)
        if totals.found:
            note([f"{output}: has the answers to {totals.found} requests, which stay"])
        if count is None or totals.found < count:
            engine = _engine(target, settings)
            began = time.perf_counter()
            with tqdm(
                total=count, initial=totals.found, unit="request", disable=None, dynamic_ncols=True
            ) as bar:

                def shown() -> None:
                    bar.set_postfix_str(_rate(totals, began), refresh=False)
                    bar.update(totals.found + totals.requests - bar.n)

                answer_all(
                    engine, rest, written, ahead=AHEAD * settings.slots, totals=totals, shown=shown
                )
            note(_closing(engine, totals, began))
    if totals.problems:
        more = len(totals.problems) - BROKEN
        listed = totals.problems[:BROKEN] + ([f"and {more} more lines"] if more > 0 else [])
        raise InputError("\n".join(listed))


def _engine(
    target: "Target", settings: "GenerationSettings", requests: "Sequence[Request]" = ()
) -> "Engine | Grouped":
    """The engine, with no more slots and context than `requests` need, if all are known.

    A deterministic one keeps them: bits depend on how wide the cache is.
    """
    if requests and not settings.deterministic:
        rows = sum(request.n for request in requests)
        longest = max(len(r.prompt) + r.sampling.max_tokens for r in requests)
        context = min(settings.context or target.context, longest)
        needed = {"slots": min(settings.slots, rows), "context": context}
        settings = settings.model_copy(update=needed)
    built = target.build(settings)
    note(built.says)
    return built.engine


def _rate(totals: "Totals", began: float) -> str:
    """Tokens, their rate, and the share of the drafted ones that were accepted."""
    rate = totals.tokens / max(time.perf_counter() - began, 1e-9)
    share = ""
    if totals.drafted:
        accepted = totals.accepted / totals.drafted
        share = f", {accepted:.2f} of {totals.drafted:,} drafted ones accepted"
    return f"{totals.tokens:,} tokens, {rate:,.0f} tokens/s{share}"


def _closing(engine: "Engine | Grouped", totals: "Totals", began: float) -> list[str]:
    """What is said at the end."""
    from llmnorm.generation.grouped import Grouped

    done = f"{totals.requests} requests: " if totals.requests else ""
    return [done + _rate(totals, began), *([engine.says] if isinstance(engine, Grouped) else [])]


def _write(piece: str, file: IO[str] | None = None) -> None:
    print(piece, end="", flush=True, file=file)
