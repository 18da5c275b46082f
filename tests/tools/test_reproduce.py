"""The reproductions' arms are runs that could be made."""

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmnorm.analysis.compare.arms import read_arms, read_protocol
from tests.running import ROOT


def script(name: str) -> ModuleType:
    path = ROOT / "tools" / "reproduce" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "reproduce"))


@pytest.mark.parametrize("name", ["curse_of_depth", "optimizers"])
def test_every_arm_is_a_configuration_of_its_own(name: str) -> None:
    """Oracle: the comparison's own reading, which refuses missing files, keys and equal arms."""
    module = script(name)
    if name == "optimizers":
        base, arms = module.BASE, [[arm, *settings] for arm, settings in module.ARMS.items()]
    else:
        base = module.RECIPES / f"{module.BASELINE}.yaml"
        arms = [[arm, str(module.RECIPES / f"{arm}.yaml")] for arm in module.ARMS]
    protocol = read_protocol(read_arms(base, [], arms), baselines=[arms[0][0]], seeds=3)
    assert list(protocol.configs) == list(module.ARMS)


@pytest.mark.parametrize(
    ("name", "results", "page"),
    [
        ("curse_of_depth", "curse_of_depth", "norms"),
        ("optimizers", "optimizers_t0", "optimizers"),
        ("mixers", "mixers_language", "mixers"),
        ("mixers", "mixers_masked", "mixers"),
        ("mixers", "mixers_recall", "mixers"),
    ],
)
def test_a_page_shows_the_table_of_its_results(name: str, results: str, page: str) -> None:
    """Oracle: the table made again from the committed results."""
    directory = ROOT / "docs" / "results" / results
    found = json.loads((directory / "result.json").read_text())
    task = results.removeprefix("mixers_")
    table = script(name).table
    kept = directory / "measured.json"
    measured = json.loads(kept.read_text()) if kept.is_file() else {}
    text = table(task, found, measured) if name == "mixers" else table(found)
    assert (directory / "table.md").read_text() == text + "\n"
    assert text in (ROOT / "docs" / f"{page}.md").read_text()


@pytest.mark.parametrize("task", ["language", "masked", "recall"])
def test_mixers_are_compared_at_equal_size(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the comparison's own reading, and the parameters of all blocks, counted."""
    module = script("mixers")
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(module, "TEXTS", {"": 2, "-validation": 2})
    module.write_recall_texts()
    protocol = module.read(task, list(module.TASKS[task]), 3, [])
    assert list(protocol.configs) == list(module.TASKS[task])
    sizes = {}
    for name, config in protocol.configs.items():
        with torch.device("meta"):
            blocks = [
                (m.build(config.model, i), config.model.mlp.build(width, inner))
                for width, inner in [(config.model.hidden_size, config.model.intermediate_size)]
                for i, m in enumerate(config.model.mixers())
            ]
        sizes[name] = sum(p.numel() for pair in blocks for b in pair if b for p in b.parameters())
    if task != "masked":  # an encoder's families bring sizes of their own, as in the paper
        model = protocol.configs["softmax"].model
        one_wider = model.num_hidden_layers * 3 * model.hidden_size  # the MLPs
        assert max(sizes.values()) - min(sizes.values()) <= one_wider


@pytest.mark.parametrize("pairs", [8, 64])
def test_a_recall_text_asks_for_what_it_said(pairs: int) -> None:
    """Oracle: the pairs as they are said first, as a dictionary; each round asks for all."""
    text = script("mixers").recall_text(pairs, random.Random(0))
    assert len(text) == 256 and text.isascii()
    said, *rounds = (text[i : i + 2 * pairs] for i in range(0, 256, 2 * pairs))
    values = dict(zip(said[::2], said[1::2], strict=True))
    assert len(values) == pairs and rounds
    for asked in rounds:
        assert dict(zip(asked[::2], asked[1::2], strict=True)) == values
    assert all(asked != said for asked in rounds)


def test_the_share_of_the_own_token() -> None:
    """Oracle: sums by hand, two tokens of two channels."""
    share, v = script("own_token").own_share, torch.tensor([[[[1.0, 2.0]], [[2.0, -1.0]]]])
    assert share(torch.eye(2)[None, None], v) == 1
    assert share(torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]), v) == 0
    mixed = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]])  # own 9 * 5 + 5, others' 16 * 5
    assert share(mixed, v) == pytest.approx(50 / 130)
