"""Steps of transformers' classes over two processes against one, and against the class itself.

usage: python tools/bench/foreign_steps.py [FAMILY ...] [--out docs/results/foreign_steps.json]

Tiny models of all families of tests/families.py, every layer kind at least twice, logits to +-20,
three documents a row, in float32. Four steps of AdamW over 2 gloo processes under ddp, under fsdp2
with recomputation and under zero3; a figure is the largest relative difference of a loss to one
process, over these steps and one more. `class` is the largest difference of a step's loss and
gradients to the class's own `labels=` loss with a document a pass. The limit of these is 1e-5.
`norms` is the largest difference of a gradient's norm over the layouts; its limit is 1e-4, since a
delta rule enlarges the rounding of other shapes.

A family that --out has already is not measured again, so the command can be repeated after a stop.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from report import RESULTS, Table, publish

from tests.distributed.foreign_steps import steps
from tests.distributed.processes import run
from tests.families import FAMILIES
from tests.models.test_foreign import own_distance

LIMIT, OF_NORMS = 1e-5, 1e-4
LAYOUTS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"recomputed": True}, "zero3": {}}


def under(_: Path, rank: int, world: int, *, family: str) -> dict[str, Any]:
    """Losses and norms under every layout."""
    return {name: steps(family, name, **options)[1:] for name, options in LAYOUTS.items()}


def measure(family: str) -> dict[str, float]:
    """The differences of a family."""
    with tempfile.TemporaryDirectory() as place:
        first, second = run(partial(under, family=family), Path(place))
    if not isinstance(first, dict) or first != second:
        sys.exit(f"bench: error: {family}: {first}")
    alone = steps(family, "none")
    found = {"class": own_distance(family), "norms": 0.0}
    for name, (losses, norms) in first.items():
        found[name] = _apart(losses, alone.losses)
        found["norms"] = max(found["norms"], _apart(norms, alone.norms))
    return found


def _apart(found: list[float], wanted: list[float]) -> float:
    return max(abs(mine - its) / its for mine, its in zip(found, wanted, strict=True))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if none")
    parser.add_argument("--out", type=Path, default=RESULTS / "foreign_steps.json")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    if options.out.is_file():
        found = json.loads(options.out.read_text())["families"]
    for family in options.families or FAMILIES:
        if family in found:
            continue
        found[family] = measure(family)
        rows = [
            [name, *(f"{row[key]:.0e}" for key in ("class", *LAYOUTS, "norms")), verdict(row)]
            for name, row in found.items()
        ]
        table = Table("Largest difference", ["", "class", *LAYOUTS, "norms", "limits"], rows)
        title = "Transformers' classes over processes (CPU)"
        publish(options.out, title, [table], {"limit": LIMIT, "families": found})


def verdict(row: dict[str, float]) -> str:
    """Whether all differences are within their limits."""
    within = all(d <= (OF_NORMS if key == "norms" else LIMIT) for key, d in row.items())
    return "holds" if within else "beyond"


if __name__ == "__main__":
    main()
