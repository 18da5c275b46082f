"""Run recorded vectors of official implementations against our parts.

    python -m tools.golden DIR [--kind NAME] [--markdown]

DIR holds safetensors files whose header says kind, hyperparameters, source and tolerance. A line is
printed for every file and precision: file, kind, precision, largest error, tolerance, verdict.

    ok                      the error is within the tolerance
    ABOVE TOLERANCE         it is not
    not served: KEY=VALUE   our part has no such setting; nothing is said about its numbers
    FAILED: ...             the run broke off, e.g. because a tensor has another shape or is missing
    no part: ...            the file is of something that llmnorm has no part for, and what that is

Exit code: 1 if a line says ABOVE TOLERANCE, not served or FAILED; 2 if there is nothing to run;
else 0. `no part` does not count: a folder may hold files of papers that llmnorm does not follow.

A kind is added as one function in the file of its room (see vectors.py). A header may name several
parts (`norm/layernorm,rmsnorm`).
"""

import argparse
import fnmatch
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llmnorm.part import InputError

# Importing a room registers what it serves.
from tools.golden import (  # noqa: F401
    attention,
    matrix,
    mixers,
    norms,
    optimizers,
    placements,
    selection,
    spectra,
)
from tools.golden.absent import no_part
from tools.golden.vectors import NotServed, Vectors, serving

Line = tuple[str, str, str, str]  # precision, error, tolerance, verdict


def parts_of(kind: str) -> list[str]:
    """`norm/layernorm,rmsnorm` -> [norm/layernorm, norm/rmsnorm]."""
    parts: list[str] = []
    for group in kind.split(";"):
        room, slash, names = group.strip().partition("/")
        parts += [f"{room}/{name.strip()}" for name in names.split(",")] if slash else [room]
    return parts


def compared(path: Path, part: str) -> Iterator[Line]:
    """The lines of one file and one of the parts that it names."""
    run = serving(part)
    if run is None:
        yield "", "", "", f"no part: {no_part(part)}"
        return
    vectors, count = Vectors(path, part), 0
    try:
        for result in run(vectors):
            count += 1
            verdict = "ok" if result.error <= result.tolerance else "ABOVE TOLERANCE"
            yield result.precision, f"{result.error:.1e}", f"{result.tolerance:.1e}", verdict
        for key, value in vectors.hyperparameters.unread():
            raise NotServed(key, value)
        if not count:
            yield "", "", "", "FAILED: the file holds nothing to compare"
    except (NotServed, InputError) as refusal:
        yield "", "", "", f"not served: {refusal}"
    except Exception as error:  # a file that does not fit must not keep the others from running
        what = str(error).strip().splitlines() or [""]
        yield "", "", "", f"FAILED: {type(error).__name__}: {what[0]}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of safetensors files")
    parser.add_argument("--kind", default="*", help="only this kind, e.g. rope/yarn or 'rope/*'")
    parser.add_argument("--markdown", action="store_true", help="print the table for a page")
    options = parser.parse_args(arguments)
    files = sorted(options.directory.glob("*.safetensors"))
    if not files:
        print(f"golden: {options.directory}: no safetensors file", file=sys.stderr)
        return 2
    row = "{:<32} {:<32} {:<25} {:>9} {:>9}  {}"
    if options.markdown:
        row = "| {} | {} | {} | {} | {} | {} |"
    print(row.format("file", "kind", "precision", "error", "tolerance", "verdict"))
    if options.markdown:
        print(row.format(*["---"] * 6))
    verdicts: Counter[str] = Counter()
    for path in files:
        for part in parts_of(Vectors(path).kind):
            if not fnmatch.fnmatch(part, options.kind):
                continue
            for line in compared(path, part):
                print(row.format(path.stem, part, *line), flush=True)
                verdicts[line[-1].partition(":")[0]] += 1
    if not verdicts:
        print(f"golden: {options.directory}: no file of kind {options.kind}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()), file=sys.stderr)
    return int(bool(verdicts.keys() - {"ok", "no part"}))
