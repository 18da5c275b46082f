"""`llmnorm inspect`: what every block of a model does, as one page, pictures and JSON.

    inspect([Path("runs/quickstart")])                      writes runs/quickstart/plots/inspect/
    inspect([Path("runs/pre"), Path("runs/lns")])           both in the same pictures
    inspect([Path("gpt2")], data=Path("runs/quickstart"))   any decoder that transformers loads

A run is measured on its own validation rows. An exported or stock directory has none; it is
measured on those of `--data` or of the run that it is compared with, tokenised by its own
tokenizer. The files written are inspect.html (a page with everything in it), inspect.json and a PNG
per figure.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmnorm.analysis.depth.measure import measure
from llmnorm.analysis.depth.page import page
from llmnorm.analysis.depth.pictures import pictures
from llmnorm.analysis.depth.pieces import held_out
from llmnorm.analysis.depth.subject import Subject, open_subject
from llmnorm.analysis.depth.weight_distance import Weights, block_matrices, weight_distance
from llmnorm.data.packed import PackedData
from llmnorm.machine.doctor import version
from llmnorm.machine.files import json_text, write_whole
from llmnorm.objectives.heldout import configuration, validation_data
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

ROWS = 128
MOST_NUMBERS = 2**27  # in a batch's logits, the streams of all blocks, or one block's attention


def inspect(
    paths: Sequence[Path],
    overrides: Iterable[str] = (),
    *,
    rows: int = ROWS,
    checkpoint: str = "latest",
    ema: bool = False,
    data: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure one model or two, write the page and print a summary.

    Args:
        paths: one or two of: run, checkpoint, exported or stock directory.
        overrides: `key=value` for the configuration whose validation rows are read.
        rows: validation rows to measure on; all, if there are fewer.
        checkpoint: which checkpoint of a run: `latest`, `best` or a step.
        ema: take a run's moving average of the weights.
        data: the configuration or run whose validation rows are read instead of the run's own.
        output: directory to write; None: RUN/plots/inspect or DIR/inspect of the first path.

    Raises:
        InputError: a model or its validation rows cannot be read, a model cannot be inspected, or
            the directory cannot be written.
    """
    settings = list(overrides)
    subjects = [open_subject(path, checkpoint=checkpoint, ema=ema) for path in paths]
    runs = [subject.run for subject in subjects if subject.run is not None]
    texts = [data or (runs[0] if subject.run is None and runs else None) for subject in subjects]
    configs = [
        configuration("inspect", subject.path, subject.run, text, settings)
        for subject, text in zip(subjects, texts, strict=True)
    ]
    if output is None:
        run = subjects[0].run
        output = paths[0] / "inspect" if run is None else run / "plots" / "inspect"
    parallel = Parallel(configs[0].parallel, configs[0].training)
    try:
        if parallel.world > 1:
            raise InputError("inspect: runs as one process; start it without a launcher")
        packed = [
            validation_data(
                subject.path,
                config,
                parallel,
                data=text,
                longest=subject.longest,
                tokenizer=subject.tokenizer,
                trained_on=subject.trained_on,
            )
            for subject, config, text in zip(subjects, configs, texts, strict=True)
        ]
        with _writing(output):
            output.mkdir(parents=True, exist_ok=True)
        found = _measured(subjects, packed, rows, parallel.device)
    finally:
        parallel.close()
    _write(output, found)
    print("\n\n".join([*map(_summary, found), f"page: {output / 'inspect.html'}"]))


def _measured(
    subjects: Sequence[Subject], packed: Sequence[PackedData], rows: int, device: torch.device
) -> list[dict[str, Any]]:
    """The figures of each model.

    One model is in memory at a time; the first one's matrices are kept for `weight_distance`.
    """
    found: list[dict[str, Any]] = []
    before: Weights | None = None
    for subject, text_of, name in zip(subjects, packed, _names(subjects), strict=True):
        model = subject.load().to(device)
        config = model.config.get_text_config()
        streams = (config.num_hidden_layers + 1) * config.hidden_size
        heads = getattr(config, "num_attention_heads", 1) * text_of.context_length
        widest = text_of.context_length * max(config.vocab_size, streams, heads)
        text = held_out(text_of, rows, at_once=max(1, min(16, MOST_NUMBERS // widest)))
        entry = {
            "name": name,
            "weights": str(subject.path),
            "step": subject.step,
            "ema": subject.ema,
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "data": text_of.identity,
            "rows": text.rows,
            "tokens": text.tokens,
            **measure(model, text, name=name),
        }
        if before is not None:
            entry["figures"]["weight_distance"] = weight_distance(before, block_matrices(model))
        elif len(subjects) > 1:
            before = block_matrices(model)
        found.append(entry)
    return found


def _names(subjects: Sequence[Subject]) -> list[str]:
    """The models' names; their paths where two names are equal."""
    names = [subject.name for subject in subjects]
    return names if len(set(names)) == len(names) else [str(s.path) for s in subjects]


def _write(output: Path, found: list[dict[str, Any]]) -> None:
    drawn = pictures(found)
    numbers = json_text({"llmnorm": version(), "models": found}, indent=1) + "\n"
    files = {f"{name}.png": png for name, png in drawn.items()}
    files["inspect.json"] = numbers.encode()
    files["inspect.html"] = page(found, drawn).encode()
    with _writing(output):
        for name, content in files.items():
            write_whole(output / name, content)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None


def _summary(found: dict[str, Any]) -> str:
    """A table for the terminal with a line per block, and the findings."""
    figures = found["figures"]
    removed = figures["removal"]
    loss, error = (removed["loss"][key] for key in ("mean", "standard_error"))
    lines = [
        f"{found['name']}: {found['architecture']}, {found['layers']} blocks, loss "
        f"{loss:.4f}{_error(error)} on {found['tokens']} tokens of {sum(found['rows'].values())} "
        "rows",
        f"{'block':>5}{'variance':>11}{'mixer':>10}{'mlp':>10}{'loss without':>21}{'angle':>9}"
        f"{'gradient':>10}{'alpha':>7}",
    ]
    for layer in range(found["layers"]):
        change, spread = (removed["block"][key][layer] for key in ("mean", "standard_error"))
        lines.append(
            f"{layer + 1:>5}{figures['variance'][layer + 1]:>11.4g}"
            f"{_number(figures['branch_ratio']['mixer'][layer], '.2e'):>10}"
            f"{_number(figures['branch_ratio']['mlp'][layer], '.2e'):>10}"
            f"{f'{change:+.4f}{_error(spread)}':>21}"
            f"{figures['angular_distance'][layer][layer + 1]:>9.4f}"
            f"{figures['gradients']['block'][layer]:>10.3g}"
            f"{_number(figures['spectra']['alpha'][layer], '.2f'):>7}"
        )
    lines += found["findings"]
    lines += [f"not measured: {name}: {reason}" for name, reason in found["absent"].items()]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
