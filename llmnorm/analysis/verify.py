"""`llmnorm doctor RUN`: what of a run is whole, what is lost, and the command that goes on.

Everything is read to its last byte and nothing is written: the settings, the checksums of every
checkpoint, each line of metrics.jsonl and samples.jsonl, the tokenizer and the prepared data.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.checkpoints.format import check_files, read_checkpoint
from llmnorm.config.file import load
from llmnorm.config.manifest import directory_of, meta_of_run, steps_in
from llmnorm.config.tree import RunConfig
from llmnorm.data.prepared import sources_of
from llmnorm.exchange.loading import open_source
from llmnorm.generation.prompts import open_tokenizer
from llmnorm.machine import reading
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory, free
from llmnorm.runs.lines import read_lines
from llmnorm.runs.lock import is_locked


class Finding(NamedTuple):
    """What was found of one thing.

    Attributes:
        name: of the thing: "metrics.jsonl".
        text: what it is, or what is wrong with it.
        whole: whether nothing of it is lost.
    """

    name: str
    text: str
    whole: bool


def verify_run(path: Path) -> tuple[str, list[str]]:
    """Read the whole of a run.

    Returns:
        A report of a few lines, and the names of what is lost.

    Raises:
        InputError: `path` is no run directory.
    """
    run = RunDirectory(path)
    if not any(p.exists() for p in (run.config, run.checkpoints, run.metrics)):
        raise InputError(
            f"{path}: is no run directory (it has no config.yaml, checkpoints or metrics.jsonl)"
        )
    config, found = None, []
    try:
        config = load(path).config
        found.append(Finding("config.yaml", "whole", True))
    except InputError as error:
        found.append(Finding("config.yaml", "; ".join(str(error).split("\n")), False))
    whole, last, checkpoints = _checkpoints(run)
    found += checkpoints
    newest = whole[-1] if whole else None
    meta = newest[1] if newest else {}
    if newest and config:
        found += _weights(run, newest[0])
    reached, lines = _lines(run.metrics)
    found += [*lines, *_lines(run.repeated)[1], *_lines(run.samples)[1]]
    trained = max(reached, last)
    if trained and not any(finding.name.startswith("checkpoints") for finding in checkpoints):
        found.append(Finding("checkpoints", f"none is there, of a run of {trained} steps", False))
    if trained or run.tokenizer.exists():
        found.append(_attempt("tokenizer", lambda: _tokenizer(run, meta)))
    if config:
        found.append(_attempt("data", lambda: _data(config, meta)))
    width = max(len(finding.name) for finding in found)
    report = [str(path), *(f"  {f.name:{width}}  {f.text}" for f in found)]
    if is_locked(path):
        report.append("  a process trains here now: what it writes at this moment may look damaged")
    lost = [finding.name for finding in found if not finding.whole]
    report.append(_next(run, config, newest[0] if newest else None, trained, lost))
    return "\n".join(report), lost


def _attempt(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, check(), True)
    except InputError as error:
        return Finding(name, str(error), False)


def _checkpoints(run: RunDirectory) -> tuple[list[tuple[int, dict[str, Any]]], int, list[Finding]]:
    """Steps and metas of the whole checkpoints, the last step that has any, and all findings."""
    try:
        steps = steps_in(run.checkpoints)
    except InputError as error:
        return [], 0, [Finding("checkpoints", str(error), False)]
    whole, found = [], []
    for step in steps:
        name = f"checkpoints/{directory_of(step)}"
        try:
            checkpoint = read_checkpoint(run.path / name)
            check_files(checkpoint, contents=True)
            whole.append((step, meta_of_run(checkpoint.path, checkpoint.manifest)))
        except InputError as error:
            found.append(Finding(name, str(error), False))
        else:
            size = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
            found.append(Finding(name, f"whole ({size / 1e6:,.1f} MB)", True))
    return whole, max(steps, default=0), found


def _weights(run: RunDirectory, step: int) -> list[Finding]:
    """A finding where the weights of the newest whole checkpoint do not fit their configuration."""
    found = _attempt("weights", lambda: str(open_source(run.path, checkpoint=str(step)).run))
    return [] if found.whole else [found]


def _lines(file: Path) -> tuple[int, list[Finding]]:
    """The last step in a .jsonl file, and what was found; nothing of a file that is not there."""
    if not file.exists() and not file.is_symlink():
        return 0, []
    entries, bad = [], []
    try:
        reading.check_file(file)
        lines = read_lines(file)
        entries = lines.entries
        bad = [f"line {number} is damaged ({_why(raw)})" for number, raw in lines.damaged]
    except InputError as error:
        bad.append(str(error))
    count, last = len(entries), max((entry.step for entry in entries), default=0)
    if bad:
        more = f"; and {len(bad) - 3} more" if bad[3:] else ""
        return last, [Finding(file.name, f"{'; '.join(bad[:3])}{more}; {count} are whole", False)]
    return last, [Finding(file.name, f"whole ({count} lines, the last of step {last})", True)]


def _why(raw: bytes) -> str:
    return (reading.judge(raw)[1] or "it has no step").removeprefix("it: ")


def _tokenizer(run: RunDirectory, meta: dict[str, Any]) -> str:
    first = meta.get("model", {}).get("bos_token_id")
    tokenizer = open_tokenizer(run.tokenizer, first=first if isinstance(first, int) else None)
    return f"whole ({len(tokenizer):,} tokens)"


def _data(config: RunConfig, meta: dict[str, Any]) -> str:
    preparation = config.objective.preparation(config)
    if preparation is None:
        return "is read from its files when the run starts; not checked"
    known = config.data.directory / "packed" / str(meta.get("data"))
    if not (known / "MANIFEST.json").is_file():
        found = preparation.find()
        if found is None:
            raise InputError(f"is not prepared in {config.data.directory}")
        if meta and found.identity != meta["data"]:
            raise InputError(
                f"{found.directory}: is not {meta['data']}, which the checkpoint was trained on"
            )
        known = found.directory
    found = preparation.open(known, sources_of(config.data), contents=True)
    tokens = sum(source.tokens for source in found.sources)
    return f"whole ({known}, {tokens:,} tokens)"


def _next(
    run: RunDirectory,
    config: RunConfig | None,
    newest: int | None,
    trained: int,
    lost: list[str],
) -> str:
    """The command that goes on, or begins anew."""
    path = shlex.quote(str(run.path))
    if config is None:
        if newest is None:
            return "begin anew:  llmnorm train CONFIG"
        weights = shlex.quote(str(run.checkpoints / directory_of(newest)))
        return (
            f"its settings stand under meta.config in {run.checkpoints / directory_of(newest)}/"
            "MANIFEST.json; put them into config.yaml and run this again\n"
            f"the weights can be used as they are:  llmnorm export {weights} DIR"
        )
    again = f"prepare the data again:  llmnorm data {path}\n" if "data" in lost else ""
    if "weights" in lost or (newest is None and trained):
        config_file = shlex.quote(str(run.config))
        return f"{again}begin anew:  llmnorm train {config_file} run_dir={free(run.path)}"
    if newest is None:
        return f"{again}begin:  llmnorm train {path}"
    after = f" (from step {newest}" + (
        f"; the steps up to {trained} are trained again)" if trained > newest else ")"
    )
    return f"{again}go on:  llmnorm train {path}{after}"
