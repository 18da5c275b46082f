"""The masked objective in the loop, in evaluation, in every command."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data.loader import Loader, evaluation_batches
from llmnorm.exchange.loading import load_model
from llmnorm.models import LlmNormConfig, LlmNormForMaskedLM
from llmnorm.models.building import build_model
from llmnorm.objectives.masked_lm import EVALUATION, TRAINING
from llmnorm.part import InputError
from tests.running import MASKED, SMOKE, assert_same_run, llmnorm, metrics_of

MISTAKES = [
    (["model.mixer=hydra"], "mixer 'hydra' looks at later tokens .* `objective: masked_lm`"),
    (["model.mixer.bidirectional=true"], "mixer 'softmax' looks at later tokens"),
    (["objective=masked_lm", "tokenizer.mask=true"], "mixer 'softmax' sees no later tokens"),
    ([*MASKED, "model.mixer=ssd"], "mixer 'ssd' sees no later tokens .* hydra"),
    (
        [*MASKED, "model.num_hidden_layers=2", "model.mixer=[hydra, softmax]"],
        "'hydra', which looks at later .* 'softmax'",
    ),
    ([*MASKED, "tokenizer.mask=false"], "needs a mask token; add tokenizer.mask=true"),
    ([*MASKED, "evaluation.prompts=[a]"], "evaluation.prompts are continued"),
    ([*MASKED, "objective.mask_share=0"], "objective.mask_share: must be greater than 0"),
    ([*MASKED, "objective.kept=0.95"], "random 0.1 and kept 0.95 are more than 1"),
    (["objective=maskd_lm"], "did you mean 'masked_lm'"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    """Oracle: the message, one line."""
    with pytest.raises(InputError, match=message) as error:
        load(SMOKE, words)
    assert "\n" not in str(error.value)


def by_hand(model: LlmNormForMaskedLM, ids, rows, positions, masking, **how) -> tuple:
    """Loss sum, hits and number of the masked tokens of a batch, from full logits in float64."""
    seen, labels = masking(ids, rows, **how)
    with torch.no_grad():
        logits = model(seen, position_ids=positions).logits
    there = labels != -100
    loss = F.cross_entropy(logits[there], labels[there], reduction="sum")
    return float(loss), int((logits[there].argmax(-1) == labels[there]).sum()), int(there.sum())


def test_the_losses_are_those_of_full_logits_in_float64(masked: Path) -> None:
    """Oracle: the first step's rows and the last evaluation's, masked and summed by hand."""
    config = load(masked).config
    objective = config.objective.build(config, alone=True, command="")
    packed, masking = objective.data, objective._masking
    loader = Loader(packed, seed=config.seed, global_batch=16)
    (batch,) = next(loader.batches())
    trained, tokenizer = load_model(masked)
    first = build_model(LlmNormConfig.from_dict(trained.config.to_dict()), seed=config.seed)
    ids, rows, positions = (batch[key] for key in ("input_ids", "rows", "position_ids"))
    how = {"share": 0.3, "key": TRAINING + config.seed}
    loss, _, count = by_hand(first.double().eval(), ids, rows, positions, masking, **how)
    lines = metrics_of(masked)
    assert lines[0]["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert lines[0]["tokens"] == 16 * 64
    figures, total = lines[-1]["validation"], 0.0
    for index, source in enumerate(packed.sources):
        sums = [0.0, 0, 0]
        for batch in evaluation_batches(packed, index, micro_batch=7):
            ids, rows, positions = (batch[key] for key in ("input_ids", "rows", "position_ids"))
            how = {"share": 0.15, "key": EVALUATION + index}
            one = by_hand(trained.double(), ids, rows, positions, masking, **how)
            sums = [a + b for a, b in zip(sums, one, strict=True)]
        there = figures["sources"][source.name]
        assert there["loss"] == pytest.approx(sums[0] / sums[2], rel=1e-5)
        assert there["accuracy"] == pytest.approx(sums[1] / sums[2], abs=2 / sums[2])
        total += there["loss"] * source.bytes
    bytes_ = sum(source.bytes for source in packed.sources)
    assert figures["loss"] == pytest.approx(total / bytes_, rel=1e-12)
    assert tokenizer.mask_token_id == 3


def test_neither_cut_nor_kill_changes_a_run(masked: Path, start, tmp_path: Path) -> None:
    """Oracle: the run in one piece; its losses in other micro-batches, every bit after a kill."""
    run = tmp_path / "cut"
    words = ["train", SMOKE, *MASKED, "training.steps=6", "evaluation.every=3"]
    words += ["checkpoint.every=3", "training.ema=0.5"]
    child = start(*words, f"run_dir={run}", "training.micro_batch=4", "evaluation.micro_batch=3")
    assert child.finish() == 0, child.log.read_text()
    for one, other in zip(metrics_of(masked), metrics_of(run), strict=True):
        for key in ("loss", "grad_norm") if "loss" in one else ():
            assert one[key] == pytest.approx(other[key], rel=1e-5)
        if "validation" in one:
            assert one["validation"]["loss"] == pytest.approx(other["validation"]["loss"], rel=1e-5)
    run = tmp_path / "killed"
    for _ in range(10):  # on a busy machine the run may end before it is seen at its fifth line
        child = start(*words, f"run_dir={run}")
        while child.process.is_alive() and lines_in(run) < 5:  # a checkpoint and a step are behind
            time.sleep(0.005)
        child.process.kill()
        code = child.finish()
        if code == -signal.SIGKILL:
            break
        assert code == 0, child.log.read_text()
        shutil.rmtree(run)
    assert code == -signal.SIGKILL
    assert start(*words, f"run_dir={run}").finish() == 0
    assert_same_run(run, masked, 6)


def lines_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_commands_work_or_say_why_not(masked: Path, tmp_path: Path, capsys) -> None:
    """Oracle: the run's own figures; one line a refusal, exit code 2."""
    whole = metrics_of(masked)[-1]["validation"]
    average = whole.pop("ema")
    for words, expected, name in (([], whole, ""), (["--ema"], average, "-ema")):
        llmnorm("eval", masked, *words)
        found = json.loads((masked / "eval" / f"step_00000006{name}.json").read_text())
        assert found["validation"] == expected
    assert "accuracy" in capsys.readouterr().out
    exported = tmp_path / "exported"
    llmnorm("export", masked, exported)
    card = (exported / "README.md").read_text()
    assert "AutoModelForMaskedLM" in card and "masked language model" in card
    assert f"| {whole['loss']:.4f} | {whole['accuracy']:.4f} |" in card
    model = AutoModelForMaskedLM.from_pretrained(exported)
    assert type(model) is LlmNormForMaskedLM
    ours, _ = load_model(masked)
    assert all(t.equal(ours.state_dict()[name]) for name, t in model.state_dict().items())
    text = AutoTokenizer.from_pretrained(exported)("One <|mask|> morning", return_tensors="pt")
    assert int((text["input_ids"] == 3).sum()) == 1
    assert model(**text).logits.shape[:2] == text["input_ids"].shape
    # Text that is named by a configuration of the other objective.
    data = f"data.dir={load(masked).config.data.dir}"
    llmnorm("eval", exported, "--data", SMOKE, data, "--batch-size", "16")
    found = json.loads((exported / "eval.json").read_text())["validation"]
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    task = "tests/data/tasks/weather.yaml"
    capsys.readouterr()
    for words, part in (
        (["generate", masked], "text is continued by a causal language model"),
        (["generate", exported], "text is continued by a causal language model"),
        (["inspect", masked], "its figures are of a causal language model"),
        (["eval", masked, "--tasks", task], "lm-eval's tasks ask for a causal language model"),
        (["convert", masked, tmp_path / "c", "--to", "rms"], "algebra is that of a causal"),
        (["export", masked, tmp_path / "s", "--stock"], "stock architectures are of a causal"),
    ):
        assert cli.main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line and "LlmNormForMaskedLM" in line


def test_a_run_starts_from_a_masked_run(masked: Path, tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the loss of the loaded weights, head included, on the first evaluation's masks."""
    path = tmp_path / "next.yaml"
    path.write_text(
        f"data: {json.dumps(load(SMOKE).config.data.model_dump(mode='json'))}\n"
        f"model: {{pretrained: {masked}}}\nobjective: masked_lm\n"
        "optimizer: {name: adamw, lr: 0.0}\ntraining: {steps: 1, global_batch: 2}\n"
    )
    llmnorm("train", path, f"run_dir={tmp_path}/run", f"data.dir={smoke_data}")
    before = metrics_of(masked)[-1]["validation"]
    after = metrics_of(tmp_path / "run")[-1]["validation"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
