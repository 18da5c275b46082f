"""The command line: arguments -> one function call a command; no logic.

Torch is imported only by the commands that compute, after the configuration has been validated, so
that help and every mistake are answered at once.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmnorm.part import InputError, nearest

if TYPE_CHECKING:
    from llmnorm.config import RunConfig
    from llmnorm.config_file import Loaded

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for a mistake that the user can mend)."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        overrides, others = _overrides(words)
        parser = _parser()
        parsed = parser.parse_args(others)
        if parsed.command is None:
            parser.print_help()
            return 0
        parsed.words = words
        if overrides and not parsed.overridable:
            raise InputError(f"{parsed.command}: takes no settings, got '{overrides[0]}'")
        return int(parsed.run(parsed, overrides) or 0)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"llmnorm: error: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `llmnorm parts | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before the first step; the loop itself saves and returns 130
        print("llmnorm: interrupted", file=sys.stderr)
        return 130


def train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    """`llmnorm train`."""
    from llmnorm.config_file import load
    from llmnorm.gpus import check_gpu, launch_hint
    from llmnorm.training import run_directory

    config, automatic = _numbers(_told(load(parsed.config, overrides)))
    if parsed.print_groups:
        from llmnorm.training.outline import groups_table

        print(groups_table(config))
        return 0
    run = run_directory.agree(config, going_on=parsed.config.is_dir())
    if run_directory.finished(run, config):
        print(f"{run.path} is finished (step {run.done.read_text().strip()})")
        print(run_directory.next_commands(run, config))
        return 0
    check_gpu(config.training.device)
    words = [str(parsed.config), *overrides]
    if config.training.device != "cpu" and (hint := launch_hint(words)):
        print(f"llmnorm: note: {hint}", file=sys.stderr)

    from llmnorm.training.loop import train

    command = shlex.join(["llmnorm", "data", *words])
    code = train(
        config,
        run,
        data_command=command,
        automatic=automatic,
        dry_run=parsed.dry_run,
        profile=parsed.profile,
    )
    if os.environ.get("RANK", "0") == "0" and not parsed.dry_run:
        print(run_directory.next_commands(run, config))
    return code


def data(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """`llmnorm data`."""
    from llmnorm.config_file import load

    config, _ = _numbers(_told(load(parsed.config, overrides)))
    if not config.objective.packs:
        raise InputError("data: a classification reads its files as it begins; nothing to prepare")

    from llmnorm.data import packing, report

    packed = packing.prepare(config.data, config.tokenizer)
    if parsed.show:
        report.show(packed, parsed.show, seed=config.data_seed)
    if parsed.stats or not parsed.show:
        rows = sum(source.rows for source in packed.sources)
        steps = config.training.total_steps(rows, packed.context_length)
        report.stats(packed, steps * config.training.rows * packed.context_length)


def config(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """`llmnorm config`."""
    if parsed.schema:
        if parsed.config is not None or overrides:
            raise InputError(
                "config: --schema stands alone; it is the same for every configuration"
            )
        import json

        from llmnorm.config_docs import json_schema

        print(json.dumps(json_schema(), indent=2))
        return
    if parsed.config is None:
        raise InputError("config: name a configuration file or run directory, or ask for --schema")
    from llmnorm.config import to_yaml
    from llmnorm.config_file import load

    print(to_yaml(_told(load(parsed.config, overrides))), end="")


def parts(parsed: argparse.Namespace, _: list[str]) -> None:
    """`llmnorm parts`."""
    from llmnorm.config_docs import describe_parts

    print(describe_parts(parsed.name))


def generate(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """`llmnorm generate`."""
    from llmnorm.config_file import load, section
    from llmnorm.pretrained import describe, refuse_encoder

    path = parsed.path
    if (path / "config.yaml").is_file():
        config = _told(load(path, overrides))
        settings = config.generation
        refuse_encoder([config.objective.architecture], f"generate: {path}", "text is continued by")
    else:
        refuse_encoder(
            describe(path, "generate").architectures, f"generate: {path}", "text is continued by"
        )
        settings = section("generation", overrides)

    from llmnorm.generation.sampling import generate
    from llmnorm.training.loading import load_model

    model, tokenizer = load_model(path, checkpoint=parsed.checkpoint, ema=parsed.ema)
    for text in generate(model, tokenizer, parsed.prompt or [""], settings):
        print(text, end="\n\n")


def export(parsed: argparse.Namespace, _: list[str]) -> None:
    """`llmnorm export`."""
    from llmnorm.pretrained import describe

    describe(parsed.path, "export")

    from llmnorm.training.export import export

    export(
        parsed.path,
        parsed.directory,
        stock=parsed.stock,
        average=parsed.average,
        ema=parsed.ema,
        checkpoint=parsed.checkpoint,
    )


def convert(parsed: argparse.Namespace, _: list[str]) -> None:
    """`llmnorm convert`."""
    from llmnorm.training.convert_command import convert_directory

    convert_directory(
        parsed.path,
        parsed.directory,
        target=parsed.to,
        untie=parsed.untie,
        checkpoint=parsed.checkpoint,
    )


def evaluate(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """`llmnorm eval`."""
    from llmnorm.pretrained import describe

    describe(parsed.path, "eval")

    from llmnorm.training.evaluate_command import evaluate_directory

    evaluate_directory(
        parsed.path,
        overrides,
        checkpoint=parsed.checkpoint,
        ema=parsed.ema,
        adapter=parsed.adapter,
        data=parsed.data,
        tasks=parsed.tasks,
        limit=parsed.limit,
        batch_size=parsed.batch_size,
    )


def plot(parsed: argparse.Namespace, _: list[str]) -> None:
    """`llmnorm plot`."""
    from llmnorm.analysis.plots import plot

    plot(parsed.runs, parsed.out)


def inspect(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """`llmnorm inspect`."""
    from llmnorm.pretrained import describe, is_stock, refuse_encoder

    paths = [parsed.path] + ([parsed.other] if parsed.other else [])
    for path in paths:
        if not is_stock(path):
            classes = describe(path, "inspect").architectures
            refuse_encoder(classes, f"inspect: {path}", "its figures are of")

    from llmnorm.analysis.depth.command import ROWS, inspect

    inspect(
        paths,
        overrides,
        rows=parsed.rows or ROWS,
        checkpoint=parsed.checkpoint,
        ema=parsed.ema,
        data=parsed.data,
        output=parsed.out,
    )


def runs(parsed: argparse.Namespace, _: list[str]) -> None:
    """`llmnorm runs`."""
    from llmnorm.analysis.runs import describe_runs

    print(describe_runs(parsed.directory))


def compare(parsed: argparse.Namespace, overrides: list[str]) -> int:
    """`llmnorm compare`."""
    from llmnorm.analysis.compare import compare, read_arms
    from llmnorm.analysis.compare_plan import read

    arms = read_arms(parsed.config, overrides, parsed.arm)
    protocol = read(
        arms,
        baselines=parsed.baseline,
        untuned=parsed.untuned,
        seeds=parsed.seeds,
        lr_points=parsed.lr_points,
        horizons=parsed.horizons,
    )
    return compare(
        protocol,
        parsed.out or Path("comparisons") / parsed.config.stem,
        command=shlex.join(["llmnorm", *parsed.words]),
        parallel=parsed.parallel,
        per_gpu=parsed.runs_per_gpu,
        plan=parsed.plan,
        keep_checkpoints=parsed.keep_checkpoints,
    )


def doctor(_: argparse.Namespace, __: list[str]) -> None:
    """`llmnorm doctor`."""
    from llmnorm.doctor import report

    print(report())


def _overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The settings, and all other words; those that follow `--arm NAME` stay where they are.

    argparse cannot have `key=value` both before and after options; they are told by their shape.
    """
    overrides, others, arm, arms = [], [], False, False
    for word in words:
        if word.startswith("-"):
            arm = word == "--arm"
            arms = arms or arm
        if arm or not OVERRIDE.match(word):
            others.append(word)
        elif arms:
            raise InputError(
                f"'{word}': settings of all arms stand before the first --arm, an arm's own right "
                "after --arm NAME"
            )
        else:
            overrides.append(word)
    return overrides, others


def _told(loaded: "Loaded") -> "RunConfig":
    """The configuration, after its notes have been said."""
    if os.environ.get("RANK", "0") == "0":
        for note in loaded.notes:
            print(f"llmnorm: note: {note}", file=sys.stderr)
    return loaded.config


def _numbers(config: "RunConfig") -> tuple["RunConfig", list[str]]:
    """The configuration with numbers for `auto`, and how they came about, which is said."""
    if not config.automatic():
        return config, []
    from llmnorm.training.automatic import resolve

    resolved = resolve(config)
    if os.environ.get("RANK", "0") == "0":
        for note in resolved.notes:
            print(f"llmnorm: note: {note}", file=sys.stderr)
    return resolved


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("expected names or paths, separated by commas")
    return names


def _checkpoint(text: str) -> str:
    if text not in ("latest", "best") and not text.isdecimal():
        hint = nearest(text, ["latest", "best", "a step"])
        raise argparse.ArgumentTypeError(f"'{text}' is no checkpoint; {hint}")
    return text


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest choice."""

    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if match:
            choices = re.findall(r"[\w-]+", match[3])
            what = "a command" if match[1] == "COMMAND" else f"valid for {match[1]}"
            message = f"'{match[2]}' is not {what}; {nearest(match[2], choices)}"
        elif match := re.match(r"unrecognized arguments: (-\S+)", message):
            hint = nearest(match[1], sorted(self._options()))
            message = f"there is no option {match[1]}; {hint}"
        elif message.startswith("unrecognized arguments: "):
            message += "; a setting is written key.sub=value"
        raise InputError(f"{message} (`{self.prog} --help` shows the usage)")

    def _options(self) -> set[str]:
        """Those of every command: the parser that complains does not know which one it was."""
        below = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for choices in below for parser in choices.values())]
        return {o for p in parsers for o in p._option_string_actions if o.startswith("--")}


class _Version(argparse.Action):
    def __call__(self, *_: object, **__: object) -> NoReturn:
        from llmnorm.doctor import versions

        print(versions())
        raise SystemExit(0)


class _Completion(argparse.Action):
    def __call__(self, _: object, __: object, shell: object, ___: object = None) -> NoReturn:
        from llmnorm.completion import script

        print(script(str(shell), _parser()))
        raise SystemExit(0)


def _argument(
    name: str, type: Callable[[str], Any], metavar: str, help: str, default: Any = None
) -> _Parser:
    """An argument that several commands share, as argparse wants it: a parser of its own."""
    shared = _Parser(add_help=False)
    shared.add_argument(name, type=type, metavar=metavar, help=help, default=default)
    return shared


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llmnorm",
        description="Pretrain transformers whose parts are swapped in one line of YAML.",
        epilog="CONFIG is a YAML file or a run directory; key.sub=value overrides a setting.",
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="of llmnorm, torch and CUDA")
    parser.add_argument(
        "--completion",
        choices=["bash", "zsh"],
        action=_Completion,
        help="print a completion script",
    )
    # What several commands take.
    config_file = _argument("config", Path, "CONFIG", "YAML file or run directory")
    model = _argument("path", Path, "RUN_OR_DIR", "run, exported or stock model")
    written = _argument("directory", Path, "DIR", "what is written; new or empty")
    checkpoint = _argument(
        "--checkpoint", _checkpoint, "latest|best|STEP", "which checkpoint of a run", "latest"
    )
    ema = _Parser(add_help=False)
    ema.add_argument("--ema", action="store_true", help="the moving average of the weights")

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str,
        help: str,
        run: object,
        *shared: _Parser,
        overridable: bool = True,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, parents=shared)
        sub.set_defaults(run=run, overridable=overridable)
        return sub

    sub = command("train", "train, or go on with a run", train, config_file)
    sub.add_argument(
        "--dry-run", action="store_true", help="stop after the checks before the first step"
    )
    sub.add_argument(
        "--print-groups",
        action="store_true",
        help="print which parameter gets which rule, and do nothing else",
    )
    sub.add_argument(
        "--profile",
        nargs="?",
        const="time",
        choices=["time", "memory"],
        metavar="time|memory",
        help="profile a few steps into the run directory",
    )
    sub = command("data", "prepare the corpus: tokenizer and packed rows", data, config_file)
    sub.add_argument("--show", type=_count, metavar="N", help="print N rows as the model sees them")
    sub.add_argument("--stats", action="store_true", help="documents, tokens, epochs")
    sub = command("config", "print the resolved settings", config)
    sub.add_argument("config", type=Path, metavar="CONFIG", nargs="?", help="YAML file or run")
    sub.add_argument("--schema", action="store_true", help="print the JSON schema for editors")
    sub = command("parts", "list the swappable parts with their settings", parts, overridable=False)
    sub.add_argument("name", metavar="NAME", nargs="?", help="one part or one key")
    text = "continue text with a trained run or a model directory"
    sub = command("generate", text, generate, model, checkpoint, ema)
    sub.add_argument("--prompt", action="append", help="text to continue; may be given repeatedly")
    text = "write a model directory for other tools"
    shared = model, written, checkpoint, ema
    sub = command("export", text, export, *shared, overridable=False)
    sub.add_argument(
        "--stock", action="store_true", help="as Llama, Qwen3 (QK-norm) or what it came from"
    )
    sub.add_argument(
        "--average", type=_count, default=1, metavar="N", help="mean of the last N checkpoints"
    )
    text = "write a model directory with the same function and another norm"
    sub = command("convert", text, convert, model, written, checkpoint, overridable=False)
    sub.add_argument(
        "--to",
        required=True,
        choices=["centred", "rms", "crms", "layer", "lns", "unscaled", "identity"],
        help="the norm; depth scaling out of or into the gains; no norm (from unified)",
    )
    sub.add_argument("--untie", action="store_true", help="give a tied head its own matrix")
    text = "evaluate a model on validation rows and lm-eval's tasks"
    sub = command("eval", text, evaluate, model, checkpoint, ema)
    sub.add_argument("--tasks", type=_names, metavar="A,B", help="lm-eval's tasks: names, paths")
    sub.add_argument("--limit", type=_count, metavar="N", help="examples of every task at most")
    sub.add_argument("--batch-size", type=_count, metavar="N", help="rows at once")
    sub.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT adapter on the model")
    sub.add_argument("--data", type=Path, metavar="CONFIG_OR_RUN", help="whose text is evaluated")
    sub = command("plot", "draw runs: loss, rates, gradient norm", plot, overridable=False)
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    sub.add_argument("--out", type=Path, metavar="FILE", help="picture to write (.png, .pdf, .svg)")
    text = "show what every block of a model does, or of two"
    sub = command("inspect", text, inspect, checkpoint, ema)
    sub.add_argument(
        "path", type=Path, metavar="RUN_OR_DIR", help="run, or any decoder's directory"
    )
    sub.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another beside it")
    sub.add_argument("--rows", type=_count, metavar="N", help="validation rows (default: 128)")
    sub.add_argument("--data", type=Path, metavar="CONFIG_OR_RUN", help="whose text is read")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the page is written")
    sub = command(
        "runs", "list run directories, how they differ and stand", runs, overridable=False
    )
    sub.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="DIR",
        help="where the runs are (default: runs)",
    )
    sub = command("compare", "is a part better here? paired, tuned, counted runs of arms", compare)
    sub.add_argument("config", type=Path, metavar="CONFIG", help="what the arms start from")
    sub.add_argument(
        "--arm",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "key=value"),
        help="an arm and what it changes; the first is the baseline, a single one meets CONFIG",
    )
    sub.add_argument("--seeds", type=_count, default=3, metavar="N", help="paired seeds (3)")
    sub.add_argument(
        "--lr-points", type=_count, default=5, metavar="N", help="learning rates an arm (5)"
    )
    sub.add_argument(
        "--horizons",
        choices=["baseline", "arms", "none"],
        default="baseline",
        metavar="baseline|arms|none",
        help="whose length is varied to turn loss into tokens (baseline)",
    )
    sub.add_argument(
        "--baseline", action="append", default=[], metavar="ARM", help="another baseline"
    )
    sub.add_argument(
        "--untuned", action="append", default=[], metavar="ARM", help="an arm that runs as written"
    )
    sub.add_argument("--parallel", type=_count, default=1, metavar="N", help="runs at a time (1)")
    sub.add_argument(
        "--runs-per-gpu", type=_count, default=1, metavar="N", help="small runs share a GPU (1)"
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: comparisons/<CONFIG's name>")
    sub.add_argument("--plan", action="store_true", help="print the runs and an estimate only")
    sub.add_argument("--keep-checkpoints", action="store_true", help="keep those of finished runs")
    text = "report what this machine can run, for a bug report"
    command("doctor", text, doctor, overridable=False)
    return parser
