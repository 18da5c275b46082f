"""Supervised fine-tuning: the rows of a step, what is trained of them, and the figures."""

import copy
import dataclasses
import json
import re
import shutil
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.data.best_fit import lay_out
from llmnorm.data.order import Order
from llmnorm.data.report import stages_table
from llmnorm.data.run_data import Stage
from llmnorm.data.stages import Course, Pace
from llmnorm.exchange.loading import load_model
from llmnorm.generation.prompts import open_tokenizer
from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.objectives.answers import SLACK
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.figures import table
from llmnorm.objectives.sft import SFT
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.training.prepare import _micro_batch, prepare
from llmnorm.training.signals import StopRequest
from llmnorm.training.step import count, forward_backward, step
from tests.models.test_generation import MIXERS, build
from tests.models.test_generation import greedy as by_hand
from tests.objectives.examples import (
    PAD,
    Stream,
    Template,
    conversations,
    example,
    objective,
    on_disk,
)
from tests.running import SMOKE, assert_same_run, llmnorm, metrics_of
from tests.training.test_step import reads


def steps(sft: SFT, count: int, **keys: Any) -> list[list[MicroBatch]]:
    keys = {"first_row": 0, "rank": 0, "world": 1, "micro_batch": 1} | keys
    return list(islice(sft.batches(**keys), count))


def alone(model: Any, ids: np.ndarray, trained: np.ndarray) -> torch.Tensor:
    """The losses of an example's trained tokens, from the logits of the example by itself."""
    tokens = torch.from_numpy(ids)
    losses = F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
    return losses[torch.from_numpy(trained[1:])]


# The rows of a step.

LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=9)


@given(
    lengths=st.lists(LENGTHS.filter(lambda n: min(map(sum, n)) > 1), min_size=1, max_size=3),
    batch=st.integers(1, 9),
    world=st.integers(1, 3),
    micro_batch=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_every_process_sees_its_part_of_the_same_steps(lengths, batch, world, micro_batch) -> None:
    """Oracle: the order of rows, and each example cut out of the rows again by its positions."""
    data = conversations(lengths, room=23)
    sft = objective(data, batch=batch)
    weights = [len(n) for n in lengths]
    source, index = Order(weights, weights, sft.config.data_seed).locate(0, 3 * batch)
    keys = {"global_batch": batch, "micro_batch": micro_batch, "world": world}
    mine = [steps(sft, 3, rank=rank, **keys) for rank in range(world)]
    for turn in range(3):
        parts = [process[turn] for process in mine]
        assert len({len(part) for part in parts}) == 1
        for together in zip(*parts, strict=True):
            assert len({b.inputs["input_ids"].shape for b in together}) == 1
            assert 1 <= len(together[0].inputs["input_ids"]) <= micro_batch
        found: list[int] = []
        for batch_ in [b for part in parts for b in part]:
            numbers, labels = iter(batch_.rows.tolist()), 0
            ids, positions, shifted = (
                batch_.inputs[key] for key in ("input_ids", "position_ids", "shift_labels")
            )
            for row in range(len(ids)):
                starts = [*(positions[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
                for start, stop in zip(starts, starts[1:], strict=False):
                    if not (ids[row, start:stop] != PAD).any():
                        assert (shifted[row, start:stop] == -100).all()
                        continue
                    number = next(numbers)
                    found.append(number)
                    stream = data.sources[source[number]].train
                    tokens, trained = stream.read(int(index[number]))
                    assert ids[row, start:stop].tolist() == tokens[:-1].tolist()
                    expected = np.where(trained[1:], tokens[1:], -100)
                    assert shifted[row, start:stop].tolist() == expected.tolist()
                    labels += int(trained[1:].sum())
            assert next(numbers, None) is None
            assert labels == batch_.labels == len(batch_.inputs["label_positions"])
        assert sorted(found) == list(range(turn * batch, (turn + 1) * batch))
        assert sum(b.labels for part in parts for b in part) >= batch
    again = steps(sft, 1, first_row=2 * batch, **keys)[0]
    for one, other in zip(again, mine[0][2], strict=True):
        assert one.rows.equal(other.rows) and one.labels == other.labels
        assert one.inputs["input_ids"].equal(other.inputs["input_ids"])


def test_an_epoch_shows_each_example_once() -> None:
    """Oracle: counting the sources' examples over the steps of two epochs."""
    data = conversations([[(3, 2)] * 5, [(1, 4)] * 2, [(6, 1)] * 11], room=20)
    sft = objective(data, "training.steps=null", "training.epochs=2", batch=6)
    length = sft.config.training.total_steps(data.rows, data.context_length)
    assert length == 6  # 36 examples of 6 a step
    seen = [first for first, _, _ in islice(sft._steps(0, 6), length)]
    assert seen == [0, 6, 12, 18, 24, 30]
    for epoch in range(2):
        parts = [(s, i) for _, s, i in islice(sft._steps(18 * epoch, 6), 3)]
        places = [(s, i) for source, index in parts for s, i in zip(source, index, strict=True)]
        assert len(set(places)) == 18


def test_stages_choose_the_examples_and_the_average_one() -> None:
    """Oracle: by hand: 10 examples of the first source, then 10 of the second."""
    data = conversations([[(6, 5)] * 7, [(2, 9)] * 4], room=30)
    sft = objective(data, "training.steps=4", batch=5)
    stages = Stage(0, (1, 0)), Stage(10, (0, 1))
    sft.read_in(stages)
    assert sft.sources(np.arange(20)).tolist() == [0] * 10 + [1] * 10
    seen = [first for first, source, _ in islice(sft._steps(0, 5), 4) if source.any()]
    assert seen == [10, 15]
    assert sft.head_share == (0.5 * 5 + 0.5 * 9) / 10
    table = stages_table(sft.data, Course(stages, Pace(0, 0, 5), 4))
    assert "stage 2 of 2, rows 10 to 19, from step 3 on: source_1 100.0%" in table


def test_the_settings_of_a_batch_count_examples_and_rows() -> None:
    """Oracle: by hand, 7 examples of 10 tokens in rows of 30: three rows, three examples each."""
    sft = objective(conversations([[(6, 5)] * 7], room=30), batch=7)
    (step,) = steps(sft, 1, global_batch=7, micro_batch=2)
    assert [len(batch.inputs["input_ids"]) for batch in step] == [2, 1]
    assert "7 examples a step in rows of 30 tokens, which are 77.8% filled" in sft.describe(70)
    assert "10.00" in sft.describe(70)  # epochs
    assert sft.head_share == 0.5
    training = TrainingSettings(steps=1, global_batch=7)
    assert [sft.rows_at_once(training, world) for world in (1, 2, 3, 4)] == [3, 2, 1, 1]
    assert sft.rows_at_once(training.model_copy(update={"micro_batch": 9}), 2) == 9


# The loss.

MANY = [(180, 1), (170, 7), (160, 40), (10, 200)]  # each more than half of a row of 230


@pytest.mark.parametrize(
    ("room", "rows"), [(230, [4]), (230, [2, 2]), (230, [1, 1, 1, 1]), (800, [1])], ids=str
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_is_the_mean_over_its_trained_tokens(room, rows, world) -> None:
    """Oracle: each example by itself in float64, the sum over 248 tokens divided by 248."""
    data = conversations([MANY], room=room)
    model = build(mixer="softmax").train()
    losses = torch.cat([alone(model, *one) for one in data.sources[0].train.examples])
    assert len(losses) == 248
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    model.zero_grad()
    parallel = Parallel(ParallelSettings(), TrainingSettings(steps=1, device="cpu"))
    sft, keys = objective(data), {"global_batch": 4, "micro_batch": rows[0], "world": world}
    processes = [steps(sft, 1, rank=rank, **keys)[0] for rank in range(world)]
    if world == 1:
        assert [len(batch.inputs["input_ids"]) for batch in processes[0]] == rows
    labels = sum(count(batches, parallel)[0] for batches in processes).double()
    assert labels == 248
    # The loss is summed in float32.
    loss = sum(forward_backward(model, batches, labels, parallel) for batches in processes)
    assert float(loss) == pytest.approx(float(losses.detach().mean()), rel=1e-6)
    found = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(found) == pytest.approx(float(norm), rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_conversations_of_a_row_are_as_alone(mixer: Any) -> None:
    """Oracle: each by itself in float64; the other one changed, to the bit."""
    model = build(mixer=mixer)
    first, second = example(5, 6, seed=1), example(4, 9, seed=2)

    def losses(*row: tuple[np.ndarray, np.ndarray]) -> list[torch.Tensor]:
        inputs = lay_out([row], 26, PAD)
        positions, labels = inputs.pop("label_positions"), inputs.pop("shift_labels")
        found = model(**inputs).logits[0, positions]
        return list(F.cross_entropy(found, labels[0, positions], reduction="none").split((6, 9)))

    with torch.no_grad():
        together = losses(first, second)
        for found, one in zip(together, (first, second), strict=True):
            torch.testing.assert_close(found, alone(model, *one), rtol=0, atol=1e-12)
        changed = copy.deepcopy(first)
        changed[0][:] = changed[0][::-1]
        others = losses(changed, second)
    assert others[1].equal(together[1]) and not others[0].equal(together[0])


# The figures.


@pytest.fixture(scope="module")
def tokenizer(smoke_data: Path) -> Path:
    return next((smoke_data / "packed").glob("*/tokenizer"))


def process() -> Parallel:
    return Parallel(ParallelSettings(), TrainingSettings(steps=1, device="cpu"))


@pytest.mark.parametrize("micro_batch", [1, 3, 50])
def test_the_validation_loss_is_a_mean_over_trained_tokens(tokenizer, micro_batch) -> None:
    """Oracle: each held-out example by itself; totals weigh the sources by their bytes."""
    lengths = [[(3, 9), (8, 1), (20, 5), (2, 2)], [(4, 1), (1, 30)]]
    data = conversations(lengths, room=32, tokenizer_directory=tokenizer)
    model = build(mixer="softmax")
    with torch.no_grad():
        found = objective(data).evaluate(model, micro_batch=micro_batch, parallel=process())
        losses = [
            float(torch.cat([alone(model, *one) for one in source.validation.examples]).mean())
            for source in data.sources
        ]
    assert [figures["loss"] for figures in found["sources"].values()] == pytest.approx(losses)
    total = (100 * losses[0] + 200 * losses[1]) / 300
    assert found["loss"] == pytest.approx(total) and "exact_match" not in found
    assert found["perplexity"] == pytest.approx(np.exp(total))


@pytest.mark.parametrize("micro_batch", [1, 2, 50])
def test_an_answer_is_right_if_it_ends_as_the_reference(tokenizer, micro_batch) -> None:
    """Oracle: the argmax of full passes, one prompt and one token at a time, read by hand."""
    lengths = [(3, 9), (8, 1), (20, 5), (2, 2), (11, 4), (5, 5)]
    data = conversations([lengths, lengths[:2]], room=32, tokenizer_directory=tokenizer)
    model = _decoder()
    said = []
    for ids, trained in data.sources[0].train.examples:
        prompt = torch.from_numpy(ids[~trained])
        said.append([int(logits.argmax()) for logits in by_hand(model, prompt, 30)])
    stop = said[0][4]  # the first answer ends with its fifth token at the latest
    decode = open_tokenizer(tokenizer).decode
    answers = [ids[: ids.index(stop)] if stop in ids else None for ids in said]
    assert answers[0] is not None and None in answers
    references = [decode(a or ids[:8]) for a, ids in zip(answers, said, strict=True)]
    references[0] = f" {references[0]}\n"  # white space at the ends does not count
    longest = [_longest(tokenizer, reference) for reference in references]
    right = [a is not None and len(a) < n for a, n in zip(answers, longest, strict=True)]
    references[1] += "?"
    right[1] = False
    held = [Stream(data.sources[0].train.examples[:n], references) for n in (6, 2)]
    pairs = zip(data.sources, held, strict=True)
    sources = [dataclasses.replace(source, validation=stream) for source, stream in pairs]
    data = dataclasses.replace(data, template=Template([stop]), sources=sources)
    assert True in right
    sft = objective(data, "evaluation.answers=5", "evaluation.samples=3")
    with torch.no_grad():
        found = sft.evaluate(model, micro_batch=micro_batch, parallel=process())
    shares = [sum(right[:5]) / 5, sum(right[:2]) / 2]
    assert [f["exact_match"] for f in found["sources"].values()] == pytest.approx(shares)
    assert found["exact_match"] == pytest.approx((100 * shares[0] + 200 * shares[1]) / 300)
    texts = sft.texts(model, process())
    assert [text["reference"] for text in texts] == [references[0], references[0], references[1]]
    assert texts[0]["continuation"] == decode(answers[0])
    assert texts[0]["prompt"] == decode(list(held[0].prompt(0)))


def test_what_asks_nothing_is_not_asked(tokenizer) -> None:
    """Oracle: by hand: a plain text, an answer that is cut off, one as long that has its end."""
    asking, text = example(4, 3, seed=0), example(1, 6, seed=1)
    cut, whole = example(4, 5, seed=2), example(4, 5, seed=3)
    whole[0][-1], cut[0][-1] = 1, 5
    data = conversations([[(4, 3)]], room=8, tokenizer_directory=tokenizer)
    held = Stream([text, cut, asking, whole, asking], [*"abcde"])
    data = dataclasses.replace(
        data, sources=[dataclasses.replace(data.sources[0], validation=held)]
    )
    answers = objective(data)._answers
    for number in (2, 9):  # asked again: the same
        for _ in range(2):
            found = answers._questions(data.sources[0], number)
            assert [question.reference for question in found] == [*"cde"][:number]
    assert found[0].prompt == asking[0][:4].tolist()


def _decoder() -> LlmNormForCausalLM:
    shape = {"vocab_size": 512, "hidden_size": 24, "num_hidden_layers": 1, "pad_token_id": PAD}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return build_model(LlmNormConfig(**shape, **heads), seed=0).double().eval()


def _longest(tokenizer: Path, reference: str) -> int:
    tokens = len(open_tokenizer(tokenizer).encode(reference, add_special_tokens=False))
    return tokens + tokens // 4 + SLACK


def test_sources_without_answers_are_no_wrong_answers() -> None:
    """Oracle: the mean by hand over the sources that have the figure."""
    data = conversations([[(3, 2)], [(3, 2)], [(3, 2)]], room=8)
    figures = {"source_0": {"exact_match": 0.5}, "source_1": {}, "source_2": {"exact_match": 1.0}}
    found = objective(data)._mean(figures, "exact_match")
    assert found == pytest.approx((100 * 0.5 + 300 * 1.0) / 400)
    loss = {"loss": 1.0}
    shown = table({**loss, "exact_match": 0.5, "sources": {"a": loss}})
    assert shown.splitlines()[-1].split() == ["a", "1.0000", "-"]


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.steps=null", "training.tokens=9000"], "training.tokens counts rows that are"),
        (["optimizer.lr=auto"], "optimizer.lr: auto: the Step Law is one of pretraining"),
        (["training.global_batch=auto"], "training.global_batch: auto: the Step Law"),
        (["model.mixer=hydra"], "'hydra' looks at later tokens and cannot answer"),
        (["objective=causal_lm", "evaluation.answers=3"], "rows of 'causal_lm' have no answers"),
        (["objective.too_long=cut"], "too_long: 'cut' is not valid"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    """Oracle: the message, one line."""
    with pytest.raises(InputError, match=message) as error:
        load(SMOKE, ["objective=sft", *words])
    assert "\n" not in str(error.value)


def test_batches_need_not_divide() -> None:
    """Oracle: the settings that packed text refuses."""
    words = ["training.global_batch=7", "training.micro_batch=3"]
    assert load(SMOKE, ["objective=sft", *words]).config.training.micro_batch == 3
    with pytest.raises(InputError, match="training.micro_batch 3 does not divide"):
        load(SMOKE, words)


def test_every_process_needs_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message, and 7 examples over 7 processes."""
    sft, parallel = objective(conversations([[(6, 5)] * 7], room=30), batch=7), process()
    monkeypatch.setattr(parallel, "world", 7)
    assert _micro_batch(sft.config, sft, parallel) == 1
    monkeypatch.setattr(parallel, "world", 8)
    with pytest.raises(InputError, match="7 rows are too few for 8 processes; give at least 8"):
        _micro_batch(sft.config, sft, parallel)


# A run on disk.


@pytest.fixture(scope="module")
def config(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration on top of the smoke run."""
    return on_disk(tmp_path_factory.mktemp("tuned"), run)


@pytest.fixture(scope="module")
def tuned(config: Path) -> Path:
    """A run of 12 steps, saved every four."""
    directory = config.parent / "run"
    llmnorm("train", config, f"run_dir={directory}")
    return directory


def test_the_losses_of_a_run_are_those_of_single_examples(tuned: Path, run: Path) -> None:
    """Oracle: the first step and the held-out examples, one by one, in float64."""
    settings = load(tuned).config
    data = settings.objective.build(settings, alone=True, command="").data
    lines = metrics_of(tuned)
    assert all(0 < line["loss"] < 20 for line in lines if "loss" in line)
    assert sum(data.sources[0].dropped.values()) == 1
    source, index = Order(
        [s.weight for s in data.sources], [s.examples for s in data.sources], 0
    ).locate(0, 7)
    first = [data.sources[s].train.read(int(i)) for s, i in zip(source, index, strict=True)]
    with torch.no_grad():
        model = load_model(run)[0].double()
        losses = torch.cat([alone(model, *one) for one in first])
        assert lines[0]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert lines[0]["tokens"] == sum(len(ids) - 1 for ids, _ in first)
        model = load_model(tuned)[0].double()
        for source in data.sources:
            held = [source.validation.read(n) for n in range(len(source.validation))]
            losses = torch.cat([alone(model, *one) for one in held])
            found = lines[-1]["validation"]["sources"][source.name]
            assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
            assert 0 <= found["exact_match"] <= 1
    last = json.loads((tuned / "samples.jsonl").read_text().splitlines()[-1])["samples"]
    asked = [source.validation.answer(0)[1] for source in data.sources]
    assert [sample["reference"] for sample in last[:2]] == asked


def test_a_run_goes_on_to_the_same_numbers(tuned: Path, config: Path, tmp_path: Path) -> None:
    """Oracle: the run without a stop, to the bit, its answers too."""
    again = tmp_path / "run"
    shutil.copytree(tuned, again)
    shutil.rmtree(again / "checkpoints" / "step_00000012")  # as if it had been killed before
    (again / "DONE").unlink()
    llmnorm("train", again)
    assert_same_run(again, tuned, 12)
    assert (again / "samples.jsonl").read_text() == (tuned / "samples.jsonl").read_text()


def test_the_commands_work_or_say_why_not(
    tuned: Path, run: Path, config: Path, tmp_path: Path, capsys
) -> None:
    """Oracle: the run's own figures; one line a refusal."""
    whole = metrics_of(tuned)[-1]["validation"]
    llmnorm("eval", tuned)
    found = json.loads((tuned / "eval" / "step_00000012.json").read_text())["validation"]
    assert found == whole
    assert "exact match" in capsys.readouterr().out
    llmnorm("export", tuned, tmp_path / "exported")
    llmnorm("eval", tmp_path / "exported", "--data", config)
    again = json.loads((tmp_path / "exported" / "eval.json").read_text())["validation"]
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert again["exact_match"] == whole["exact_match"]
    llmnorm("eval", run, "--data", config)  # what the base answers; it has no template of its own
    before = json.loads((run / "eval" / "step_00000012.json").read_text())["validation"]
    held = load(tuned).config.objective.preparation(load(tuned).config).find().sources[0].validation
    with torch.no_grad():
        model = load_model(run)[0].double()
        losses = torch.cat([alone(model, *held.read(n)) for n in range(len(held))])
    assert before["sources"]["sums"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    capsys.readouterr()
    llmnorm("train", config, "--dry-run", f"run_dir={tmp_path}/run", "evaluation.prompts=[2+2?]")
    shown = capsys.readouterr().err
    assert re.search(r"7 examples a step in rows of 64 tokens, which are [89]\d\.\d% filled", shown)
    assert cli.main(["inspect", str(tuned)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "trains on conversations, and packed text is needed here" in line


def test_a_comparison_counts_the_tokens_of_examples(
    tuned: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the examples' lengths; the tokens that the run has read; a line if none are known."""
    arms = ["--arm", "lora", "adapter=lora", "--arm", "dora", "adapter=dora"]
    options = ["--lr-points", "1", "--seeds", "1", "--plan", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    llmnorm("compare", config, *arms, *options)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = next(int(line[2].replace(",", "")) for line in lines if line[:1] == ["lora/seed1-x1"])
    settings = load(tuned).config
    data = settings.objective.preparation(settings).find()
    weights = [source.weight for source in data.sources]
    means = [(source.train.sizes - 1).mean() for source in data.sources]
    assert found == round(12 * 7 * np.average(means, weights=weights))
    assert found == pytest.approx(metrics_of(tuned)[-2]["tokens"], rel=0.1)
    words = [f"data.dir={tmp_path}", *arms]
    assert cli.main(["compare", str(config), *words, *options]) == 2
    assert "is known once the data is prepared; run `llmnorm data` once" in capsys.readouterr().err


def test_prompts_are_answered_as_turns_of_a_user(tuned: Path) -> None:
    """Oracle: the template written out, and greedy text of the model by itself."""
    settings = load(tuned, ["evaluation.prompts=[2+2?]", "evaluation.sample_tokens=5"]).config
    model, tokenizer = load_model(tuned)
    sft = settings.objective.build(settings, alone=True, command="")
    (text,) = sft.texts(model, process())
    assert text.keys() == {"prompt", "continuation"}
    assert text["prompt"] == "<|bos|>user: 2+2?<|eos|>assistant: "
    ids = torch.tensor(tokenizer.encode(text["prompt"], add_special_tokens=False))
    said = [int(logits.argmax()) for logits in by_hand(model.eval(), ids, 5)]
    said = said[: said.index(1)] if 1 in said else said
    assert text["continuation"] == tokenizer.decode(said)


def test_a_step_reads_its_device_once(config: Path, tmp_path: Path) -> None:
    """Oracle: the one line that may read, as in pretraining (tests/training/test_step.py)."""
    settings = load(config, [f"run_dir={tmp_path}/run", "parallel.sharding=none"]).config
    directory = run_directory.agree(settings, going_on=False)
    with ExitStack() as stack:
        prepared = prepare(settings, directory, stack, data_command="", dry_run=True)
        micro_batches = next(prepared.batches())
        with reads() as found:
            outcome = step(prepared, micro_batches, StopRequest())
    assert outcome.finite and prepared.progress.row == 7
    counted = Counter(found)
    assert counted.pop(("tolist", "training/step.py: step")) == 1
    on_the_host = ("models/context.py", "nn/visibility.py", "nn/norms/rms_cpu.py", "nn/loss.py: b")
    assert all(
        where.startswith(on_the_host) or (name, where) == ("tensor", "training/step.py: count")
        for name, where in counted
    )
