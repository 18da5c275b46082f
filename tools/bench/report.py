"""Publishing a benchmark's figures: tables on screen, docs/results/*.json, docs/benchmarks.md.

usage: python tools/bench/report.py      (makes the page from the files again)

A file of docs/results holds `title`, `command`, `machine`, `tables` (title, columns, rows of text)
and the figures themselves. The page is made from these files alone, so all its numbers were
measured (tests/tools/test_report.py makes it again).
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "benchmarks.md"
# What makes a processor one with fewer instructions; without them a command would measure another.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
HEADING = """# Benchmarks

Every table was measured by the command above it, which runs ours and its peer on the same work in turns; a ratio is the median of its rounds. Absolute times belong to the machine that is named and say little about another; ratios travel better. The page is made from `docs/results/` by `tools/bench/report.py`.
"""  # noqa: E501


class Table(NamedTuple):
    """A table of a benchmark; every cell is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def publish(out: Path | None, title: str, tables: Sequence[Table], figures: dict[str, Any]) -> None:
    """Print the tables; with `out`, write tables and figures there.

    If `out` is in docs/results, docs/benchmarks.md is made again too.

    Args:
        out: the JSON file to write, or None.
        title: heading of the benchmark on the page.
        tables: what is shown.
        figures: JSON values that are kept beside the tables.
    """
    for table in tables:
        print(f"\n{table.title}")
        widths = [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
        for row in (table.columns, *table.rows):
            cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
            print("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    found = machine()
    print(f"\n{describe(found)}")
    if out is None:
        return
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    variables = [f"{name}={os.environ[name]} " for name in LIMITS if name in os.environ]
    result = {
        "title": title,
        "command": f"{''.join(variables)}python {script}",
        "machine": found,
        "tables": [table._asdict() for table in tables],
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)
    if out.resolve().parent == RESULTS:
        PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of docs/benchmarks.md, from the files of docs/results."""
    parts = [HEADING]
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        parts.append(
            f"## {result['title']}\n\n`{result['command']}`, {describe(result['machine'])}\n"
        )
        for table in result["tables"]:
            parts.append(f"{table['title']}:\n\n{markdown(table)}\n")
    return "\n".join(parts)


def markdown(table: dict[str, Any]) -> str:
    """A table of a file as it stands in a page."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory_of(key: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the resident size now, VmHWM its peak.

    (The peak of `resource.getrusage` may be that of the parent.)
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def machine() -> dict[str, Any]:
    """The machine, its load and the versions, on which the figures depend."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def describe(found: dict[str, Any]) -> str:
    """A machine in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['processor']}, {found['cores']} cores, {found['threads']} thread(s), "
        f"{found['cpu_capability']}, load {found['load']}, Python {found['python']}, {versions}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    model = found.get("model name", platform.processor() or platform.machine())
    return f"{model} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
