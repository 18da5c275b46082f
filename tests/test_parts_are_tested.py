"""Every part that can be named is in the tables that the tests of its kind run over.

A part joins the package by its entry in a union. Here each union is held to these tables, and the
message says what to add where; docs/adding-a-part.md is the page about it.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from llmnorm.config.adapter import Adapter
from llmnorm.nn.mixers.matrix.settings import Family
from llmnorm.nn.mixers.settings import Mixer
from llmnorm.nn.norms.settings import Norm
from llmnorm.objectives.settings import Objective
from llmnorm.optim.settings import Optimizer
from llmnorm.part import part_name, settings_in
from llmnorm.selection.settings import Selection
from tests.distributed import test_sharding
from tests.models import test_generation
from tests.models.adapter_kinds import ADAPTERS
from tests.nn import test_mixers
from tests.optim import test_official
from tests.optim.rules import RULES
from tests.training import test_selection

ROOT = Path(__file__).parents[1]


def offered(union: Any) -> set[str]:
    return {part_name(cls) for cls in settings_in(union)}


def causal_mixers() -> set[str]:
    return {n for n in offered(Mixer) if TypeAdapter(Mixer).validate_python(n).causal}


def mixers_in(table: dict[str, Any]) -> set[str]:
    """The mixers that a table of settings names, those of hybrids included."""
    listed = [m for v in table.values() for m in (v if isinstance(v, list) else [v])]
    names = [m if isinstance(m, str) else m.get("name", "softmax") for m in listed]
    return set(names)


def families() -> set[str]:
    found = [v["family"] for v in test_mixers.MIXERS.values() if "family" in v]
    return {f if isinstance(f, str) else f["name"] for f in found}


def official() -> set[str]:
    # AdamW's oracle is torch's own, in tests/optim/test_adamw.py.
    return {part_name(type(settings)) for _, settings in test_official.CASES.values()} | {"adamw"}


def objectives() -> set[str]:
    # The figures of causal_lm are those of tests/training, whose runs all have it.
    files = (ROOT / "tests/objectives").glob("test_*.py")
    return {f.stem.removeprefix("test_") for f in files} | {"causal_lm"}


def selections() -> set[str]:
    return {words[0].removeprefix("selection=") for words in test_selection.SELECTIONS.values()}


TABLES = {
    "tests/nn/test_mixers.py: MIXERS": (offered(Mixer), mixers_in(test_mixers.MIXERS)),
    "tests/nn/test_mixers.py: MIXERS, a family": (offered(Family), families()),
    "tests/models/test_generation.py: MIXERS": (causal_mixers(), mixers_in(test_generation.MIXERS)),
    "tests/distributed/test_sharding.py: MIXERS": (
        causal_mixers() | {"hydra", "matrix"},
        mixers_in(test_sharding.MIXERS),
    ),
    "tests/optim/rules.py: RULES": (
        offered(Optimizer),
        {part_name(type(settings())) for settings in RULES.values()},
    ),
    "tests/optim/test_official.py: CASES": (offered(Optimizer), official()),
    "tests/models/adapter_kinds.py: ADAPTERS": (
        offered(Adapter) - {"none"},
        {part_name(type(settings)) for settings in ADAPTERS.values()},
    ),
    "tests/objectives/test_NAME.py": (offered(Objective), objectives()),
    "tests/training/test_selection.py: SELECTIONS": (offered(Selection) - {"none"}, selections()),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_part_is_in_the_table(table: str) -> None:
    """Oracle: the union that is the registry."""
    wanted, listed = TABLES[table]
    missing = sorted(wanted - listed)
    assert not missing, f"{table}: add an entry for {', '.join(missing)} (docs/adding-a-part.md)"


@pytest.mark.parametrize(
    ("union", "page"),
    [
        (Norm, "norms"),
        (Mixer, "mixers"),
        (Optimizer, "optimizers"),
        (Objective, "encoders"),
        (Selection, "selection"),
    ],
)
def test_every_part_is_on_its_page(union: Any, page: str) -> None:
    """Oracle: the union; a page names a part as a configuration writes it."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    # `identity` is what `none` norms are made of; causal_lm is what every other page is about.
    names = offered(union) - {"identity", "causal_lm"}
    missing = sorted(n for n in names if not re.search(rf"`[^`\n]*\b{n}\b[^`\n]*`", text))
    assert not missing, f"docs/{page}.md: say what {', '.join(missing)} is (docs/adding-a-part.md)"
