"""Real runs with every optimizer: they learn, are saved, and go on to the same numbers."""

import json
import shutil

import pytest

from llmnorm import cli
from llmnorm.optim.muon import Muon
from tests.running import SMOKE, assert_same_run, llmnorm, state_of

FIELDS = {
    "muon": {"momentum"},
    "normuon": {"momentum", "second_moment"},
    "conda": {"momentum", "second_moment", "basis", "step", "phase"},
    "adamp": {"momentum", "second_moment", "step"},
    "soap": {
        *("momentum", "second_moment", "step"),
        *("gram_left", "gram_right", "basis_left", "basis_right"),
    },
}
OPTIONS = {
    "muon": ["optimizer.lr=0.01", "optimizer.nap=true", "optimizer.weight_decay=0"],
    "normuon": [
        *("optimizer.preset=speedrun", "optimizer.auxiliary.schedule=linear"),
        "optimizer.momentum={from: 0.5, to: 0.95, steps: 6}",  # 4 steps before the resumption
    ],
    "conda": ["optimizer.refresh_every=3", "optimizer.refresh=staggered"],
    "adamp": [
        "optimizer.lr=0.01",
        "optimizer.groups=[{match: '*.mlp.*', lr: 0.5, weight_decay: 0}, "
        "{match: 'layers.1.*.down_proj.weight', rule: adamw}]",
    ],
    "soap": ["optimizer.lr=0.01", "optimizer.precondition_frequency=2"],
}


def test_a_run_gives_every_step_its_momentum(tmp_path, smoke_data, monkeypatch) -> None:
    """Oracle: the line written out; a run that is stopped and resumed gives the same values."""
    seen: list[float] = []
    update = Muon.update

    def recording(self, grad, state, hyperparameters, weight=None):
        seen.append(hyperparameters.momentum)
        return update(self, grad, state, hyperparameters, weight)

    monkeypatch.setattr(Muon, "update", recording)
    words = ["optimizer=muon", "optimizer.momentum={from: 0.6, to: 0.9, steps: 3}"]
    words += [f"data.dir={smoke_data}", f"run_dir={tmp_path / 'run'}", "evaluation.samples=0"]
    llmnorm("train", SMOKE, *words, "schedule=constant", "training.steps=2")
    llmnorm("train", tmp_path / "run", "training.steps=5")
    expected = [0.6, 0.7, 0.8, 0.9, 0.9]
    assert list(dict.fromkeys(round(m, 12) for m in seen)) == expected[:4]
    each = len(seen) // 5  # stacks of matrices
    assert seen == pytest.approx([m for m in expected for _ in range(each)])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_learns_and_goes_on(name: str, tmp_path, smoke_data, capsys) -> None:
    """Oracle: the uninterrupted run; the fields' names; a loss that has fallen."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["training.steps=8", "checkpoint.every=4", "evaluation.samples=0"]
    words += [f"optimizer={name}", *OPTIONS[name], f"data.dir={smoke_data}"]
    llmnorm("train", SMOKE, f"run_dir={whole}", *words)
    losses = [json.loads(x).get("loss") for x in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [x for x in losses if x is not None]
    assert losses[7] < losses[0] - 0.3
    matrix = "optimizer.model.layers.0.self_attn.q_proj.weight."
    fields = {key.removeprefix(matrix) for key in state_of(whole, 8) if key.startswith(matrix)}
    assert fields == FIELDS[name] | ({"initial_norm"} if name == "muon" else set())
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000008")
    (cut / "DONE").unlink()
    llmnorm("train", SMOKE, f"run_dir={cut}", *words)
    assert_same_run(cut, whole, 8)
    if name == "adamp":  # a branch keeps the rules of its parent's state
        branch = [f"training.branch_from={whole}/checkpoints/step_00000004", "optimizer.groups=[]"]
        words += [f"run_dir={tmp_path}/branch", *branch]
        assert cli.main(["train", str(SMOKE), *words]) == 2
        assert "layers.1.*.down_proj.weight: adamw by optimizer.groups" in capsys.readouterr().err
