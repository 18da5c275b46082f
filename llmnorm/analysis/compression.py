"""A run's bits per byte beside what gzip and xz reach on the same validation text.

`References` are rates in bits per byte by who reached them:
`{"gzip -9": {"all": 2.60, "code": 2.11, ...}, "xz -9e": {...}}`; "all" is the mean over the sources
weighted by their training bytes, as in metrics.jsonl.
"""

import math
import sys
from collections.abc import Mapping

from llmnorm.config.file import load
from llmnorm.data.packed import PackedData
from llmnorm.data.packing import find
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.record import ALL

References = Mapping[str, Mapping[str, float]]

MODEL = "this run"


def references(run: RunDirectory) -> References:
    """What gzip and xz reach on the run's validation text; nothing where the corpus is gone."""
    try:
        config = load(run.path).config
        packed = find(config.data, config.tokenizer)
    except InputError as error:
        print(f"llmnorm: note: without gzip and xz: {error}", file=sys.stderr)
        return {}
    return compression(packed) if packed else {}


def compression(packed: PackedData) -> dict[str, dict[str, float]]:
    """The bits per byte of `gzip -9` and `xz -9e` on the validation text, one stream a source."""
    rates = {
        "gzip -9": {
            s.name: 8 * s.validation_gzip_bytes / s.validation_bytes for s in packed.sources
        },
        "xz -9e": {s.name: 8 * s.validation_xz_bytes / s.validation_bytes for s in packed.sources},
    }
    total = sum(s.bytes for s in packed.sources)
    return {
        who: {ALL: sum(s.bytes * rate[s.name] for s in packed.sources) / total, **rate}
        for who, rate in rates.items()
    }


def losses_against(
    bits_per_byte: Mapping[str, float], references: References
) -> dict[str, list[str]]:
    """Who is ahead of the run, and on which sources; whoever is nowhere ahead is left out."""
    ahead = {
        who: [name for name, rate in bits_per_byte.items() if rates.get(name, math.inf) < rate]
        for who, rates in references.items()
    }
    return {who: names for who, names in ahead.items() if names}


def table(bits_per_byte: Mapping[str, float], references: References) -> str:
    """The rates as text, a line a source, and a last line that names who is behind where."""
    columns = {MODEL: bits_per_byte, **references}
    width = max(len(name) for name in [*bits_per_byte, "bits per byte"])
    lines = [f"{'bits per byte':{width}}" + "".join(f"{who:>10}" for who in columns)]
    for name in bits_per_byte:
        cells = (columns[who].get(name) for who in columns)
        numbers = (f"{cell:>10.3f}" if cell is not None else f"{'-':>10}" for cell in cells)
        lines.append(f"{name:{width}}" + "".join(numbers))
    if references:
        lines.append(verdict(bits_per_byte, references))
    return "\n".join(lines)


def verdict(bits_per_byte: Mapping[str, float], references: References) -> str:
    """One line: ahead of all of them, or behind whom on what."""
    ahead = losses_against(bits_per_byte, references)
    if not ahead:
        return f"ahead of {' and '.join(references)} on every source"
    named = {
        who: "every source" if len(names) == len(bits_per_byte) else ", ".join(map(label, names))
        for who, names in ahead.items()
    }
    return "; ".join(f"behind {who} on {names}" for who, names in named.items())


def label(name: str) -> str:
    """What a row of rates is called."""
    return "all sources" if name == ALL else name
