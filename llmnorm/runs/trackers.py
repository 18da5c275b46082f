"""A run's figures in accelerate's trackers (TensorBoard, W&B, trackio, ...).

metrics.jsonl is the record, and a tracker shows it. For each of its lines a tracker gets
`values(line)` at the line's step: `train/loss`, `health/<layer>/entropy`,
`validation/bits_per_byte`, `validation/<source>/loss`, `samples`, ... `RUN/tracker.json` holds each
tracker's id of the run, by which a resumed run finds its chart.

A killed run resumes from its newest checkpoint. Its trackers have seen later steps by then, and may
have lost the last ones that were sent. So the chart is first made equal to metrics.jsonl:

    tensorboard   files in RUN/tensorboard, flushed at every line; its reader drops what lies past
                  the checkpoint (purge_step)
    wandb         the server is asked for its last step; only later steps are sent. Offline nobody
                  can be asked, and the new directory gets the run from its beginning
    trackio       as wandb, with its own server
    others        start another chart, from the run's beginning

What would surprise: a tracker that fails does not stop the run. The error is printed once, and the
tracker gets nothing more.
"""

import importlib.util
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from llmnorm.config.saved import to_tree, to_yaml
from llmnorm.config.tree import LoggingSettings, RunConfig
from llmnorm.machine.doctor import EXTRAS, missing_extra
from llmnorm.machine.files import write_whole
from llmnorm.machine.reading import read_object
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import read_lines

# Keys of a line of metrics.jsonl that a tracker does not get.
LEFT_OUT = ("step", "skipped_in_a_row", "not_finite", "clock")


def check(settings: LoggingSettings) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        InputError: a package is missing; the message holds the command that installs it.
    """
    for name in settings.trackers:
        if importlib.util.find_spec(name) is not None:
            continue
        if name in EXTRAS["track"]:
            raise missing_extra(name)
        raise InputError(
            f"logging.trackers: {name} is not installed; run: .venv/bin/pip install {name}"
        )


def values(line: Mapping[str, Any]) -> dict[str, float | str]:
    """What a tracker gets for a line of metrics.jsonl or samples.jsonl: name -> value."""
    if "samples" in line:
        return {
            f"samples/{number}": f"{sample['prompt']} → {sample['continuation']}"
            + (f" ({sample['reference']})" if "reference" in sample else "")
            for number, sample in enumerate(line["samples"])
        }
    if "validation" in line:
        parts = [part for part in ("validation", "tasks", "ema_tasks") if part in line]
        return dict(leaf for part in parts for leaf in _leaves(part, line[part]))
    trained = {key: value for key, value in line.items() if key not in (*LEFT_OUT, "health")}
    return dict(_leaves("train", trained)) | dict(_leaves("health", line.get("health", {})))


class Trackers:
    """Context manager of a run's trackers.

    Args:
        start: the step that the run starts or resumes at, where metrics.jsonl ends too.
        whole: the last step whose lines are all in metrics.jsonl: `start`, or the one before it
            where the evaluation of `start` is still to be made.
        enabled: whether this is the main process; on the others nothing is opened.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        *,
        start: int,
        whole: int,
        enabled: bool,
    ) -> None:
        # name -> (accelerate's object, the last step that its chart has)
        self._open: dict[str, tuple[Any, int]] = {}
        for name in dict.fromkeys(config.logging.trackers) if enabled else ():
            try:
                self._begin(name, config, run, start, whole)
            except Exception as error:  # trackers raise errors of any kind
                self._failed(name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let every tracker send what it still holds."""
        for name, opened in list(self._open.items()):
            try:
                opened[0].finish()
            except Exception as error:
                self._failed(name, error)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl or samples.jsonl, unless the chart has its step already."""
        for name, (tracker, last) in list(self._open.items()):
            if line["step"] <= last:
                continue
            try:
                tracker.log(values(line), step=line["step"])
            except Exception as error:
                self._failed(name, error)

    def _begin(
        self, name: str, config: RunConfig, run: RunDirectory, start: int, whole: int
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        title = config.logging.name or run.path.resolve().name
        known = _read(run.tracker)
        key = known.get(name) or secrets.token_hex(4)
        if name == "trackio" and name not in known:  # found by its name, so that must be unique
            key = f"{title}-{key}"
        # Written before the tracker starts: a run that is killed in between finds its chart too.
        write_whole(run.tracker, json.dumps(known | {name: key}, indent=1) + "\n")
        project = config.logging.project
        match name:
            case "tensorboard":
                tracker = kind("tensorboard", run.path, purge_step=whole + 1)
            case "wandb":
                tracker = kind(project, id=key, name=title, dir=str(run.path), resume="allow")
            case "trackio":
                tracker = kind(project, name=key, resume="allow", embed=False)
            case _:
                arguments = (run.path,) if kind.requires_logging_directory else ()
                tracker = kind(project, *arguments)
        tracker.start()
        has = _last_step(name, tracker, whole if name in known else 0)
        if name == "tensorboard":  # its table of settings would appear as a run of its own
            tracker.log({"config": f"```yaml\n{to_yaml(config)}```"}, step=start)
        else:
            tracker.store_init_configuration(dict(_leaves("", to_tree(config))))
        for line in _history(run):
            if has < line["step"] <= start:
                tracker.log(values(line), step=line["step"])
        self._open[name] = tracker, has

    def _failed(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        reason = " ".join(str(error).split()) or type(error).__name__
        text = (
            f"tracker {name} failed and gets nothing more; the run goes on, and metrics.jsonl has "
            f"every line: {reason}"
        )
        tqdm.write(text, file=sys.stderr)


def _last_step(name: str, tracker: Any, whole: int) -> int:
    """The last step of a started tracker's chart; -1 where it cannot be asked."""
    match name:
        case "tensorboard":
            return whole
        case "wandb":
            return tracker.run.step - 1
        case "trackio":
            return tracker.run._next_step - 1
    return -1


def _history(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl and samples.jsonl so far, by step."""
    entries = [e for path in (run.metrics, run.samples) for e in read_lines(path).entries]
    return [entry.value for entry in sorted(entries, key=lambda entry: entry.step)]


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    found = read_object(path)
    return {name: key for name, key in found.items() if isinstance(key, str)}


def _leaves(path: str, tree: Any) -> Iterator[tuple[str, float | str]]:
    """Flatten a tree: `{"sources": {"prose": {"loss": 3}}}` -> `("validation/prose/loss", 3)`.

    None is left out, and a list becomes its JSON text.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            below = path if key == "sources" and path == "validation" else f"{path}/{key}"
            yield from _leaves(below.lstrip("/"), value)
    elif isinstance(tree, list):
        yield path, json.dumps(tree)
    elif tree is not None:
        yield path, tree
