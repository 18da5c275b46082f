"""The plan of the house, held by reading every import, those inside functions too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from llmnorm.machine.doctor import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmnorm"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = 0
# From the ground up; an import never goes up, and rooms on one floor do not import each other.
FLOORS = {
    "config": GROUND,
    "machine": GROUND,
    "nn": 1,
    "remote": 1,
    "models": 2,
    "optim": 2,
    "data": 3,
    "selection": 3,
    "generation": 3,
    "checkpoints": 3,
    "parallel": 4,
    "objectives": 5,
    "runs": 6,
    "exchange": 7,
    "training": 8,
    "evaluation": 9,
    "serving": 9,
    "analysis": 9,
    "commands": 10,
}
# Files beside the rooms; any other stands on the ground.
TOP = {"cli": 11, "__main__": 11}
LIGHT = {"optim/schedule", "optim/rates"}  # settings and all that is built from them
DISTRIBUTED = (
    "optim/sharded.py",
    "parallel/",
    "checkpoints/agreement.py",
    "checkpoints/checkpoints.py",
    "machine/doctor.py",
)
# On the ground, since setup and every room use them; they ask torch, but only inside functions.
ASK_TORCH = {
    "machine/gpus.py": {"part"},
    "machine/processor.py": set(),
    "machine/doctor.py": {"part", "machine", "machine/gpus", "machine/processor"},
}
BEFORE_TORCH = {"pydantic", "pydantic_core", "annotated_types", "yaml"}
# Modules that compile or load GPU code; an extra's modules may be missing altogether.
LATE = {"triton", "causal_conv1d", "mamba_ssm", "torchao"} | {
    m for ms in EXTRAS.values() for m in ms
}


class Import(NamedTuple):
    module: str
    inside: bool  # a function or `if TYPE_CHECKING`: not run when the file is imported
    line: int


def imports(source: str) -> Iterator[Import]:
    """The modules that a source imports; of `from a import b` both a and a.b (b may be one)."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, inside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield Import(str(node.module), inside, node.lineno)
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", inside, node.lineno)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
            inside = inside or node.test.id == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(source), False)


def place(path: str) -> tuple[int, str]:
    """The floor and the room of a file or module, given as a path below the package."""
    path = path.removesuffix(".py")
    parts = path.split("/")
    if parts[-1] == "settings" or path in LIGHT:
        return GROUND, parts[0]
    if parts[0] in FLOORS:
        return FLOORS[parts[0]], parts[0]
    return TOP.get(parts[0], GROUND), ""


def mistakes(path: str, source: str) -> list[str]:
    """What a file (its path below the package) imports against the plan."""
    floor, room = place(path)
    found = []
    for module, inside, line in imports(source):
        root = module.partition(".")[0]
        where = f"{path}:{line}: {module}"
        if root == "llmnorm":
            target = module.removeprefix("llmnorm").lstrip(".").replace(".", "/")
            if not target or not is_module(target):
                continue
            other, other_room = place(target)
            own_part = path.endswith("settings.py") and inside and room == other_room
            if other > floor and not own_part:
                found.append(f"{where} stands on a higher floor")
            elif other == floor != GROUND and room != other_room:
                found.append(f"{where} is another room on the same floor")
            elif target not in ASK_TORCH.get(path, {target}):
                found.append(f"{where} is more than {path} may import")
            continue
        if root in sys.stdlib_module_names:
            if root in ("pickle", "shelve", "marshal"):
                found.append(f"{where}: nothing is pickled")
            continue
        if not inside and root in LATE:
            found.append(f"{where} is imported at import time")
        if floor == GROUND and root not in BEFORE_TORCH and not (path in ASK_TORCH and inside):
            found.append(f"{where} is more than the ground floor may import")
        kernel = inside and root in LATE  # of an extra, asked for only where it is installed
        if room == "nn" and floor != GROUND and root != "torch" and not kernel:
            found.append(f"{where}: nn imports torch alone")
        if module.startswith("torch.distributed") and not path.startswith(DISTRIBUTED):
            found.append(f"{where}: take a `reduce` function instead")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name == "torch.distributed" and not path.startswith(DISTRIBUTED):
                found.append(f"{path}:{node.lineno}: {name}: take a `reduce` function instead")
            if name == "torch.load":
                found.append(f"{path}:{node.lineno}: {name}: nothing is unpickled")
    return found


def is_module(target: str) -> bool:
    """Whether a path below the package names a module, not a class inside one."""
    if target.partition("/")[0] in (*FLOORS, *TOP) and "/" not in target:
        return True
    return (PACKAGE / f"{target}.py").exists() or (PACKAGE / target).is_dir()


@pytest.mark.parametrize("path", [str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_keep_to_the_floors(path: str) -> None:
    """Oracle: the floors and nevers of the plan, stated above."""
    assert mistakes(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("nn/block.py", "from llmnorm.models import flops", "higher floor"),
        ("nn/block.py", "def f():\n    from llmnorm.optim import groups", "higher floor"),
        ("nn/block.py", "import numpy", "nn imports torch alone"),
        ("optim/groups.py", "import llmnorm.models", "another room"),
        ("checkpoints/store.py", "from llmnorm.parallel import processes", "higher floor"),
        ("objectives/scores.py", "from llmnorm.training import loop", "higher floor"),
        ("evaluation/directory.py", "from llmnorm.analysis import plots", "another room"),
        ("analysis/plots.py", "def f():\n    from llmnorm.commands import plot", "higher floor"),
        ("data/order.py", "import torch.distributed as dist", "reduce"),
        ("data/order.py", "def f():\n    from torch import distributed", "reduce"),
        ("runs/metrics.py", "import torch\ntorch.distributed.get_rank()", "reduce"),
        ("config/tree.py", "import torch", "ground floor"),
        ("optim/settings.py", "def build():\n    import torch", "ground floor"),
        ("optim/settings.py", "from llmnorm.optim import groups", "higher floor"),
        ("part.py", "from llmnorm.training import metrics", "higher floor"),
        ("machine/doctor.py", "from llmnorm.config.tree import RunConfig", "may import"),
        ("nn/norms/layer.py", "import triton", "import time"),
        ("models/modeling.py", "from flash_attn import flash_attn_func", "import time"),
        ("checkpoints/format.py", "import pickle", "pickled"),
        ("models/convert.py", "import torch\ntorch.load('x')", "unpickled"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str, complaint: str) -> None:
    """Oracle: imports that break one rule each."""
    assert any(complaint in mistake for mistake in mistakes(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("optim/settings.py", "def build():\n    from llmnorm.optim import groups"),
        ("training/loop.py", "from llmnorm.optim import groups\nimport transformers"),
        ("nn/mixers/varlen.py", "def f():\n    from flash_attn import flash_attn_func"),
        ("parallel/processes.py", "import torch.distributed"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    """Oracle: imports that the plan names as allowed."""
    assert mistakes(path, source) == []


def test_package_files_are_empty() -> None:
    """Oracle: zero bytes, but for the one that registers the Auto classes."""
    filled = [f for f in FILES if f.name == "__init__.py" and f.stat().st_size]
    assert filled == [PACKAGE / "models" / "__init__.py"]


def test_the_ground_floor_does_not_load_torch() -> None:
    """Oracle: sys.modules of a fresh interpreter that imported every ground-floor file."""
    modules = [
        ".".join(("llmnorm", *f.relative_to(PACKAGE).with_suffix("").parts))
        for f in FILES
        if place(str(f.relative_to(PACKAGE)))[0] == GROUND and f.name != "__init__.py"
    ]
    assert "llmnorm.part" in modules and "llmnorm.config.tree" in modules
    code = f"import {', '.join(modules)}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
