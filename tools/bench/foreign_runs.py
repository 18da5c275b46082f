"""Runs of transformers' classes that are stopped or killed and go on, against uninterrupted ones.

usage: python tools/bench/foreign_runs.py [FAMILY ...] [--out docs/results/foreign_runs.json]

Tiny models of all families of tests/families.py are trained for 4 steps, all weights and LoRA, and
again with a stop after 2 steps; three of them also with kill -9 in the fourth step. Weights,
optimizer state, metrics and texts must be equal to the bit.

A family that --out has already is not measured again, so the command can be repeated after a stop.
"""

import argparse
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr

from report import RESULTS, Table, publish

from tests.families import FAMILIES
from tests.running import assert_same_run, llmnorm
from tests.training.test_foreign import killed, prepared, words

KINDS = {"all weights": [], "LoRA": ["adapter=lora"]}
KILLED = ("gemma3_text", "gpt_oss", "qwen3_next")


def measure(family: str) -> dict[str, str]:
    """What of a family is equal to the bit."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        place = prepared(Path(name), [family])
        for kind, more in KINDS.items():
            whole, parts, again = (place / f"{n} {kind}" for n in ("whole", "parts", "again"))
            llmnorm("train", *words(place, "text", family, whole, *more))
            llmnorm("train", *words(place, "text", family, parts, *more, "training.steps=2"))
            llmnorm("train", parts, "training.steps=4")
            found[kind] = same(whole, parts)
            if kind == "LoRA" and family in KILLED:
                arguments = words(place, "text", family, again, *more)
                killed(arguments, 4)
                llmnorm("train", *arguments)
                found["LoRA, killed"] = same(whole, again)
    return found


def same(one: Path, other: Path) -> str:
    """Whether two runs are equal, or in what they differ."""
    try:
        assert_same_run(one, other, 4)
    except AssertionError as error:
        return str(error).splitlines()[0][:60] or "differ"
    return "equal"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if none")
    parser.add_argument("--out", type=Path, default=RESULTS / "foreign_runs.json")
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    if options.out.is_file():
        found = json.loads(options.out.read_text())["families"]
    columns = [*KINDS, "LoRA, killed"]
    for family in options.families or FAMILIES:
        if family in found:
            continue
        with redirect_stdout(stderr):
            found[family] = measure(family)
        rows = [[name, *(row.get(key, "") for key in columns)] for name, row in found.items()]
        table = Table("Equal to the bit, once a run went on", ["", *columns], rows)
        publish(options.out, "Transformers' classes that go on", [table], {"families": found})


if __name__ == "__main__":
    main()
