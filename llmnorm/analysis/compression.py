"""A run's bits per byte beside those of gzip and xz on the same validation text.

`References` are bits per byte by compressor and source:
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
    """The bits per byte of gzip and xz on the run's validation text.

    Empty where the run's prepared data is gone; an error of its configuration is printed as a note.
    """
    try:
        config = load(run.path).config
        packed = find(config.data, config.tokenizer)
    except InputError as error:
        print(f"llmnorm: note: gzip and xz are not shown: {error}", file=sys.stderr)
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
        compressor: {ALL: sum(s.bytes * rate[s.name] for s in packed.sources) / total, **rate}
        for compressor, rate in rates.items()
    }


def losses_against(
    bits_per_byte: Mapping[str, float], references: References
) -> dict[str, list[str]]:
    """The compressors that need fewer bits than the run, each with the sources on which it does."""
    ahead = {
        compressor: [
            name for name, rate in bits_per_byte.items() if rates.get(name, math.inf) < rate
        ]
        for compressor, rates in references.items()
    }
    return {compressor: names for compressor, names in ahead.items() if names}


def verdict(bits_per_byte: Mapping[str, float], references: References) -> str:
    """One line: the run is ahead of all compressors, or behind which on which sources."""
    ahead = losses_against(bits_per_byte, references)
    if not ahead:
        return f"ahead of {' and '.join(references)} on every source"
    listed = {
        compressor: "every source"
        if len(names) == len(bits_per_byte)
        else ", ".join(map(label, names))
        for compressor, names in ahead.items()
    }
    return "; ".join(f"behind {compressor} on {names}" for compressor, names in listed.items())


def label(name: str) -> str:
    """The name of a source as it is shown."""
    return "all sources" if name == ALL else name
