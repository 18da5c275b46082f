"""The reproductions' arms are runs that could be made."""

import importlib
import importlib.util
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import torch

from llmnorm.analysis.compare import runs
from llmnorm.analysis.compare.arms import read_arms, read_protocol
from llmnorm.analysis.compare.ledger import Record
from llmnorm.config.file import load
from tests.objectives.examples import on_disk
from tests.running import ROOT, SMOKE


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


def test_every_arm_of_the_mixtures_is_a_configuration_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the comparison's own reading of the directory of random weights, made as it is."""
    module = script("mixtures")
    module.make_random(tmp_path)
    every = module.arms()
    shared = [f"model.pretrained={tmp_path}"]
    arms = read_arms(ROOT / module.BASE, shared, [[n, *words] for n, words in every.items()])
    protocol = read_protocol(arms, seeds=3)
    found = [config.model.router_loss for config in protocol.configs.values()]
    assert found == ["off", 0.01] * 3


@pytest.mark.parametrize(
    ("name", "results", "page"),
    [
        ("curse_of_depth", "curse_of_depth", "norms"),
        ("optimizers", "optimizers_t0", "optimizers"),
        ("mixers", "mixers_language", "mixers"),
        ("mixers", "mixers_masked", "mixers"),
        ("mixers", "mixers_recall", "mixers"),
        ("colm", "colm_pretraining", "selection"),
        ("colm", "colm_finetuning", "selection"),
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


def test_anneals_branch_from_the_last_step_of_their_stable_run(tmp_path: Path) -> None:
    """Oracle: the configurations that the commands give: one length, and decay, for all anneals."""
    module = script("anneal")
    settings = ["stable.training.steps=400", "data.validation_bytes=99"]
    found = {}
    for arm in (module.STABLE, *module.ANNEALS, module.STAGES):
        command, file, *words = module.words(arm, 2, tmp_path, settings)
        assert command == "train"
        found[arm] = load(Path(file), words).config
        assert found[arm].data.validation_bytes == 99 and found[arm].seed == 2
        assert found[arm].run_dir == tmp_path / f"{arm}-2"
    assert (found["stable"].training.steps, found["stages"].training.branch_from) == (400, None)
    for arm in module.ANNEALS:
        point = tmp_path / "stable-2" / "checkpoints" / "step_00000400"
        assert found[arm].training.branch_from == point and found[arm].training.steps == 2500
        assert found[arm].schedule.decay_steps(2500) == 500
    tokens = {c.training.rows * c.data.context_length for c in found.values()}
    assert len(tokens) == 1  # of a step


def test_the_table_of_the_anneals_is_of_paired_seeds(tmp_path: Path) -> None:
    """Oracle: losses made of an arm's and a seed's part, so that the seeds' cancels."""
    module = script("anneal")
    arms = {"stable": 3.5, "same": 3.0, "better": 2.9, "longer": 3.1}
    losses = {
        arm: {
            str(seed): {"code": loss + 0.3 * seed, "notes": 2 * loss + 0.1 * seed}
            for seed in (1, 2, 3)
        }
        for arm, loss in arms.items()
    }
    course = [
        {"step": step, "tokens": 9 * step, "sources": {"code": 4 - step / 9, "notes": 5 - step / 9}}
        for step in (1, 2, 3)
    ]
    found = {"losses": {"64": losses}, "stages": {"1": course}, "rows": [{}, {"step": 2}]}
    text = module.table(found)
    assert "Rows of 64 tokens:" in text
    assert "| +0.1000 [+0.1000, +0.1000] | -0.1000 [-0.1000, -0.1000] |" in text
    assert "| +0.2000 [+0.2000, +0.2000] | -0.2000 [-0.2000, -0.2000] |" in text
    module.draw(found, tmp_path / "anneal.png")
    assert (tmp_path / "anneal.png").read_bytes()[:4] == b"\x89PNG"


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


class Finished:
    """A run that has ended before it is asked."""

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        raise AssertionError


def test_selections_are_compared_at_equal_steps(
    tmp_path: Path, smoke_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Oracle: losses that are a function of the arm and the seed, written as a run writes them: the
    differences are those of the function, and a wider arm takes the rate that is better."""
    module = script("colm")
    monkeypatch.setitem(module.TASKS, "pretraining", module.Task(SMOKE))
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    better = {arm: 0.1 * place for place, arm in enumerate(module.ARMS)}
    monkeypatch.setattr(module, "RANDOM_SEEDS", 1)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0)
    started: list[str] = []

    def start(arguments: Sequence[str], log: IO[bytes], _: Mapping[str, str]) -> Finished:
        words = dict(word.partition("=")[::2] for word in arguments[1:])
        directory, arm = Path(words["run_dir"]), Path(words["run_dir"]).parent.name
        wide = float(words.get("optimizer.lr", 0)) > 3.1e-3
        loss = 4 + 0.01 * int(words["seed"]) - better[arm]
        loss += {"plain_2b": 0.2, "plain_4b": -0.5}.get(arm, 0) * wide
        sources = {"prose": {"loss": loss}, "notes": {"loss": loss + 0.3}}
        figures = {"loss": loss, "perplexity": 1.0, "sources": sources}
        common = {"step": 30, "tokens": 9, "seconds": 2.0}
        rates = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1e6}
        lines = [{**common, **rates, "memory_bytes": 2**20}, {**common, "validation": figures}]
        directory.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)
        (directory / "DONE").touch()
        started.append(str(directory.relative_to(tmp_path / "runs" / "colm_pretraining")))
        return Finished()

    words = ["pretraining", "--parallel", "1", "--seeds", "2", "--set", f"data.dir={smoke_data}"]
    assert module.main([*words, "--plan"], start) == 0
    assert "21 of 21 runs to make" in capsys.readouterr().out and not started
    assert module.main([*words, "--pilot"], start) == 0
    assert "standard deviation 0.0071; " in capsys.readouterr().out
    assert started == ["plain/seed1-x1", "random/seed1-x1", "plain/seed2-x1"]
    assert module.main(words, start) == 0
    assert len(started) == len(set(started)) == 21
    results = tmp_path / "results" / "colm_pretraining"
    assert (results / "comparison.png").is_file()
    found = json.loads((results / "result.json").read_text())
    assert (results / "table.md").read_text() == module.table(found) + "\n"
    assert found["mixture"] == pytest.approx({"prose": 2 / 3, "notes": 1 / 3})
    arms = found["arms"]
    assert list(arms) == list(module.ARMS)
    assert arms["plain_2b"]["lr"] == 3e-3 and arms["plain_4b"]["lr"] == pytest.approx(6e-3)
    first = arms["plain"]["runs"]["1"]
    assert first["figures"] == pytest.approx({"mixture": 4.11, "mean": 4.16})
    assert list(arms["random"]["runs"]) == ["1"] and list(arms["colm"]["runs"]) == ["1", "2"]
    rows = {arm: (arms[arm]["rows_read"], arms[arm]["rows_trained"]) for arm in arms}
    assert rows["colm"] == (960, 480) and rows["plain_2b"] == (960, 960)
    plain, twice, chosen = (arms[arm]["operations"] for arm in ("plain", "plain_2b", "stratified"))
    assert twice == 2 * plain and chosen == plain  # uniform picks read nothing in vain
    assert plain < arms["loss"]["operations"] < arms["colm"]["operations"]
    gaps = {(pair["arm"], pair["other"]): pair["mixture"] for pair in found["differences"]}
    assert gaps["colm", "stratified"] == pytest.approx({"value": -0.2, "low": -0.2, "high": -0.2})
    assert gaps["plain", "plain_2b"]["value"] == pytest.approx(0.1)


def test_selections_of_examples_are_runs_that_could_be_made(tmp_path: Path, run: Path) -> None:
    """Oracle: the comparison's own reading of every arm; the mixture of `stratified` by hand: all
    examples of `words`, the small source, are kept out of twice the batch."""
    module = script("colm")
    task = module.Task(on_disk(tmp_path, run), ("adapter=lora", "evaluation.answers=1"))
    figures = importlib.import_module("colm_figures")
    protocol, objective = module.read(task, module.ARMS, 2, [])
    assert list(protocol.configs) == list(module.ARMS)
    rows = {source.name: source.rows for source in objective.data.sources}
    share = 2 * rows["words"] / sum(rows.values())
    weights = {"sums": round(1000 * (1 - share)), "words": round(1000 * share)}
    assert protocol.configs["reweighted"].data.weights == weights
    costs = {arm: figures.operations(protocol, objective, arm) for arm in module.ARMS}
    assert costs["plain"] < costs["gradient"] < costs["colm"] < costs["plain_4b"]
    record = Record("plain/seed1-x1", 12, 9, 1.0, None, [], None, "CPU", "0")
    sources = {
        "sums": {"loss": 1.0, "exact_match": 0.5},
        "words": {"loss": 2.0, "exact_match": 1.0},
    }
    found = figures.of_a_run(
        replace(record, figures={"sources": sources}), {"sums": 0.9, "words": 0.1}
    )
    assert found["figures"] == pytest.approx({"mixture": 1.1, "mean": 1.5, "exact_match": 0.75})
    diverged = figures.of_a_run(record, {"sums": 0.9, "words": 0.1})
    assert diverged["figures"] == {"mixture": math.inf, "mean": math.inf}
