"""Run recorded vectors of official implementations against our parts.

    python -m tools.golden DIR [--kind NAME] [--markdown]

DIR holds safetensors files whose header says kind, hyperparameters, source and tolerance. For every
file and precision a line is printed: file, kind, precision, largest error, tolerance, verdict. A
kind that no part serves yet is `no part`. Exit code 1 if an error is above its tolerance.

A kind is added as one function in the file of its room (see vectors.py). A header may name several
parts (`norm/layernorm,rmsnorm`).
"""

import argparse
import fnmatch
import sys
from pathlib import Path

# Importing a room registers what it serves.
from tools.golden import attention, matrix, mixers, norms, optimizers, placements, spectra  # noqa: F401
from tools.golden.vectors import Vectors, serving


def parts_of(kind: str) -> list[str]:
    """`norm/layernorm,rmsnorm` -> [norm/layernorm, norm/rmsnorm]."""
    parts: list[str] = []
    for group in kind.split(";"):
        room, slash, names = group.strip().partition("/")
        parts += [f"{room}/{name.strip()}" for name in names.split(",")] if slash else [room]
    return parts


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
    failed = False
    for path in files:
        vectors = Vectors(path)
        for part in parts_of(vectors.kind):
            if not fnmatch.fnmatch(part, options.kind):
                continue
            run = serving(part)
            if run is None:
                print(row.format(path.stem, part, "", "", "", "no part"))
                continue
            for result in run(vectors):
                good = result.error <= result.tolerance
                failed |= not good
                numbers = (f"{result.error:.1e}", f"{result.tolerance:.1e}")
                verdict = "ok" if good else "ABOVE TOLERANCE"
                print(row.format(path.stem, part, result.precision, *numbers, verdict))
    return int(failed)
