"""`llmnorm serve`: an OpenAI-compatible HTTP server on a run or a directory."""

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, local, text
from llmnorm.commands.configured import load_config, note
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.config.generation import GenerationSettings
    from llmnorm.config.serving import ServingSettings

HELP = "serve a trained run or a model directory over HTTP, by OpenAI's API"
TAKES_SETTINGS = True
FLAGS = {"host": "serving.host", "port": "serving.port", "name": "serving.name"}
FLAGS |= {"draft": "generation.draft"}  # option -> key
SECTIONS = ("generation", "serving")


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, which weights, a file of settings, and short names of some of them."""
    add_model(parser)
    add_checkpoint(parser)
    add_import(parser)
    help = "a PEFT adapter that is merged into the model"
    parser.add_argument("--adapter", type=local, metavar="DIR", help=help)
    help = "a YAML file with the sections generation and serving, over those of the run"
    parser.add_argument("--config", type=local, metavar="FILE", help=help)
    parser.add_argument("--host", type=text, metavar="ADDRESS", help="to listen at")
    parser.add_argument("--port", type=text, metavar="PORT", help="to listen at")
    parser.add_argument("--name", type=text, metavar="NAME", help="what requests call the model")
    help = "what proposes tokens: a smaller model, or what stands in the text already"
    parser.add_argument("--draft", type=text, metavar="none|lookup|RUN_OR_DIR", help=help)


def run(parsed: argparse.Namespace, overrides: list[str]) -> int:
    """Serve until a signal; what is wrong with settings, keys and port is told before loading."""
    for option, key in FLAGS.items():
        if (value := getattr(parsed, option)) is not None:
            overrides = [*overrides, f"{key}={value}"]
    settings, serving = _settings(parsed, overrides)
    _check_installed()

    from llmnorm.serving.access import AccessLog
    from llmnorm.serving.keys import read_keys
    from llmnorm.serving.metrics import Metrics
    from llmnorm.serving.server import address_of, bind

    keys, metrics = read_keys(serving), Metrics()
    log = AccessLog(serving.access_log, metrics.lost_lines.inc)
    with bind(serving) as bound:
        from llmnorm.exchange.served import load_target
        from llmnorm.serving.app import make_app
        from llmnorm.serving.loading import model_of_target
        from llmnorm.serving.server import Ending, serve
        from llmnorm.serving.service import Service

        target = load_target(
            parsed.path,
            settings,
            checkpoint=parsed.checkpoint,
            ema=parsed.ema,
            adapter=parsed.adapter,
            merge=True,
            key="serving.chat_template",
        )
        name = serving.name or parsed.path.resolve().name
        model, engine, says = model_of_target(target, settings, serving, name)
        note(says)
        note(_about_access(serving, address_of(bound), len(keys)))
        ending = Ending()
        service = Service(engine, serving, settings.slots, metrics, ending.died)
        app = make_app(model, service, serving, metrics, log, keys)
        # Hundreds of thousands of objects have been made that stay. To look at all of them was a
        # fourth of the HTTP side's time (16 streams of 2.6M parameters), and stopped every stream.
        gc.collect()
        gc.freeze()
        return serve(bound, app, service, ending)


def _settings(
    parsed: argparse.Namespace, overrides: list[str]
) -> "tuple[GenerationSettings, ServingSettings]":
    """The settings of a run, a file and the command line.

    Raises:
        InputError: one is not valid, or the directory holds nothing that continues text.
    """
    from llmnorm.config.file import sections
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe, is_stock, refuse_encoder

    import_modules(parsed.imports, "--import")
    path: Path = parsed.path
    classes: list[str] | None = None
    run = path if (path / "config.yaml").is_file() else None
    if run is not None:
        classes = [load_config(run, []).objective.architecture]
    else:
        try:
            classes = describe(path, "serve").architectures
        except InputError:
            if not is_stock(path):
                raise
    settings, serving = sections(SECTIONS, overrides, run=run, file=parsed.config)
    refuse_encoder(classes, f"serve: {path}", "text is continued by")
    try:
        settings.check_draft()
    except ValueError as error:
        raise InputError(str(error)) from None
    if settings.method in ("eqspec", "exspec"):
        raise InputError(
            f"generation.method: '{settings.method}' is for files of requests; a server runs "
            "auto, plain or ragged"
        )
    return settings, serving


def _check_installed() -> None:
    """Refuse where the server's packages are missing.

    Raises:
        InputError: they are; the message has the line that installs them.
    """
    from importlib.util import find_spec

    from llmnorm.machine.doctor import EXTRAS, missing_extra

    for module in EXTRAS["serve"]:
        if find_spec(module) is None:
            raise missing_extra(module)


def _about_access(serving: "ServingSettings", address: str, keys: int) -> list[str]:
    """Where the server is, and who may ask."""
    asked = f"{keys} key{'s' * (keys > 1)} may ask" if keys else "no key is asked for"
    lines = [f"serving at {address}/v1 ({asked})"]
    if not keys and not _loopback(serving.host):
        lines.append(
            f"anybody who reaches {serving.host} may ask; set serving.api_key_file, or listen at "
            "127.0.0.1 behind a proxy"
        )
    return lines


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
