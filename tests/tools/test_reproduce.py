"""The reproductions' arms are runs that could be made."""

import importlib.util
from types import ModuleType

import pytest

from llmnorm.analysis import compare_plan
from llmnorm.analysis.compare import read_arms
from tests.running import ROOT


def script(name: str) -> ModuleType:
    path = ROOT / "tools" / "reproduce" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["curse_of_depth", "optimizers"])
def test_every_arm_is_a_configuration_of_its_own(name: str) -> None:
    """Oracle: the comparison's own reading, which refuses missing files, keys and equal arms."""
    module = script(name)
    if name == "optimizers":
        base, arms = module.BASE, [[arm, *settings] for arm, settings in module.ARMS.items()]
    else:
        base = module.RECIPES / f"{module.BASELINE}.yaml"
        arms = [[arm, str(module.RECIPES / f"{arm}.yaml")] for arm in module.ARMS]
    protocol = compare_plan.read(read_arms(base, [], arms), baselines=[arms[0][0]], seeds=3)
    assert list(protocol.configs) == list(module.ARMS)
