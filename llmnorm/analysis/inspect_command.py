"""`llmnorm inspect`: what every block of a model does, as one page, pictures and JSON.

    inspect([Path("runs/quickstart")])                      writes runs/quickstart/plots/inspect/
    inspect([Path("runs/pre"), Path("runs/lns")])           both in the same pictures
    inspect([Path("gpt2")], data=Path("runs/quickstart"))   any decoder that transformers loads

A run is measured on its validation rows; a directory, which has none, on those of `--data` (or of
the run beside it), in its own tokens. The files: inspect.html (everything in one file),
inspect.json and a PNG a figure.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmnorm.analysis.depth import measure
from llmnorm.analysis.depth_page import page
from llmnorm.analysis.depth_plots import pictures
from llmnorm.analysis.pieces import held_out
from llmnorm.analysis.subject import Subject, open_subject
from llmnorm.config import RunConfig
from llmnorm.doctor import version
from llmnorm.part import InputError
from llmnorm.training.heldout import configuration, validation_data
from llmnorm.training.parallel import Parallel

ROWS = 128
MOST_NUMBERS = 2**27  # of the largest tensors of a batch: logits, and the streams of all blocks


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
    """Measure one model or two, write the page and say what was found.

    Args:
        paths: one or two of: run, checkpoint, exported or stock directory.
        overrides: of the settings whose rows are read.
        rows: validation rows to measure on; all, if there are fewer.
        checkpoint: of runs: `latest`, `best` or a step.
        ema: of runs: the moving average of the weights.
        data: the configuration or run whose validation rows are read instead of the run's own.
        output: directory to write; RUN/plots/inspect or DIR/inspect of the first path if None.

    Raises:
        InputError: something that the user can mend, in one line.
    """
    settings = list(overrides)
    subjects = [open_subject(path, checkpoint=checkpoint, ema=ema) for path in paths]
    runs = [subject.run for subject in subjects if subject.run is not None]
    found = []
    for subject in subjects:
        borrowed = data or (runs[0] if subject.run is None and runs else None)
        config = configuration("inspect", subject.path, subject.run, borrowed, settings)
        found.append(_measured(subject, config, borrowed, rows))
    for one, name in zip(found, _names(subjects), strict=True):
        one["name"] = name
    run = subjects[0].run
    if output is None:
        output = paths[0] / "inspect" if run is None else run / "plots" / "inspect"
    _write(output, found)
    print("\n\n".join([*map(_said, found), f"page: {output / 'inspect.html'}"]))


def _measured(subject: Subject, config: RunConfig, data: Path | None, rows: int) -> dict[str, Any]:
    parallel = Parallel(config.parallel, config.training)
    try:
        if parallel.world > 1:
            raise InputError("inspect: is one process; start it without a launcher")
        packed = validation_data(
            subject.path,
            config,
            parallel,
            data=data,
            longest=subject.longest,
            tokenizer=subject.tokenizer,
            trained_on=subject.trained_on,
        )
        model = subject.load().to(parallel.device)
        text_config = model.config.get_text_config()
        # At least eight batches, since gradients are means over them; and what fits.
        streams = (text_config.num_hidden_layers + 1) * text_config.hidden_size
        widest = packed.context_length * max(text_config.vocab_size, streams)
        at_once = max(1, min(16, rows // 8, MOST_NUMBERS // widest))
        text = held_out(packed, rows, at_once=at_once)
        return {
            "name": subject.name,
            "weights": str(subject.path),
            "step": subject.step,
            "ema": subject.ema,
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "layers": text_config.num_hidden_layers,
            "hidden_size": text_config.hidden_size,
            "data": packed.identity,
            "rows": text.rows,
            "tokens": text.tokens,
            **measure(model, text, name=subject.name),
        }
    finally:
        parallel.close()


def _names(subjects: Sequence[Subject]) -> list[str]:
    """As short as tells them apart."""
    names = [subject.name for subject in subjects]
    return names if len(set(names)) == len(names) else [str(s.path) for s in subjects]


def _write(output: Path, found: list[dict[str, Any]]) -> None:
    drawn = pictures(found)
    content = json.dumps({"llmnorm": version(), "models": found}, indent=1) + "\n"
    files = {f"{name}.png": png for name, png in drawn.items()}
    files["inspect.json"] = content.encode()
    files["inspect.html"] = page(found, drawn).encode()
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content_bytes in files.items():
            temporary = output / f".writing-{name}"
            temporary.write_bytes(content_bytes)
            temporary.replace(output / name)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None


def _said(found: dict[str, Any]) -> str:
    """A table for the terminal, a line a block, and the findings."""
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
    lines += [f"not measured: {name}: {why}" for name, why in found["absent"].items()]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
