"""Runs of classes of transformers: what they say, that they go on, and what is refused."""

import json
import os
import shutil
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmnorm import cli
from llmnorm.models import adapters
from llmnorm.part import InputError
from llmnorm.runs.record import read_metrics
from llmnorm.training import foreign, loop
from tests.distributed.processes import command, launch_environment
from tests.distributed.processes import run as run_processes
from tests.families import directory_of
from tests.running import CHILDREN, PATIENCE, assert_same_run, llmnorm, metrics_of
from tests.test_data.chats import save_tokenizer

pytest.importorskip("peft", reason="needs the extra finetune")

WORDS = ["training.device=cpu", "training.global_batch=4", "schedule=constant"]
WORDS += ["optimizer.lr=1e-2", "checkpoint.every=2", "evaluation.every=2", "evaluation.samples=1"]
WORDS += ["evaluation.sample_tokens=4"]
RUNS = {
    "gemma2": ["training.precision=bf16", "parallel.activation_checkpointing=true"]
    + ["training.ema=0.9", "training.micro_batch=2", "optimizer=muon"],
    "gpt_oss": ["adapter=dora", "training.precision=bf16", "adapter.targets=[q_proj,v_proj]"],
    "mamba2": ["training.micro_batch=2"],
    "qwen3_moe": ["optimizer=conda", "optimizer.refresh_every=3"],
    "gpt2": ["adapter=dora", "model.dropout=config", "training.trainable=norms"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepared` makes, with a directory of each family that is trained here."""
    return prepared(tmp_path_factory.mktemp("foreign"), [*RUNS, "llama"])


def prepared(place: Path, families: Iterable[str]) -> Path:
    """Text, conversations and a directory of each family, all of one tokenizer."""
    tokenizer = save_tokenizer(place / "tokenizer")
    for family in families:
        directory_of(family, place / family, tokenizer)
    text = [{"text": f"{n}+{n}? It is {2 * n}. " * (1 + n % 7)} for n in range(90)]
    chat = [
        {
            "messages": [
                {"role": "user", "content": f"{n}+{n}?"},
                {"role": "assistant", "content": f"It is {2 * n}." * (1 + n % 3)},
            ]
        }
        for n in range(90)
    ]
    for name, lines in (("text", text), ("chat", chat)):
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, objective in (("text", "causal_lm"), ("chat", "sft")):
        (place / f"{name}.yaml").write_text(
            f"data: {{sources: [{{name: sums, path: {place / name}.jsonl}}], context_length: 48, "
            f"validation_bytes: 600, dir: {place / 'data'}}}\n"
            f"objective: {objective}\ntraining: {{steps: 4}}\noptimizer: adamw\n"
        )
    return place


def words(place: Path, kind: str, family: str, run: Path, *more: str) -> list[str]:
    begin = [str(place / f"{kind}.yaml"), f"model.pretrained={place / family}", f"run_dir={run}"]
    return [*begin, *WORDS, *more]


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that the user can mend: a line."""
    capfd.readouterr()
    assert cli.main(["train", *arguments]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("llmnorm: error")]
    return line


@pytest.mark.parametrize("family", RUNS)
def test_a_run_goes_on_to_the_same_numbers(family: str, place: Path, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run, to the bit; weights, optimizer, averages, texts, figures."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    llmnorm("train", *words(place, "text", family, whole, *RUNS[family]))
    llmnorm("train", *words(place, "text", family, parts, *RUNS[family], "training.steps=2"))
    llmnorm("train", parts, "training.steps=4")
    assert_same_run(whole, parts, 4)
    assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
    losses = [line["loss"] for line in metrics_of(whole) if "loss" in line]
    assert losses[-1] < losses[0]


def killed(arguments: list[str], step: int) -> None:
    """Train in a process of its own, which is killed by -9 in a step."""
    process = CHILDREN.Process(target=_dies, args=(arguments, step))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


def _dies(arguments: list[str], step: int) -> None:
    real = loop.step

    def take(prepared: Any, *given: Any) -> Any:
        if prepared.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(prepared, *given)

    loop.step = take
    cli.main(["train", *arguments])


def test_a_killed_run_goes_on_to_the_same_numbers(place: Path, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run, to the bit; killed by -9 in its fourth step."""
    more = ["adapter=lora", "training.trainable=norms"]
    arguments = [words(place, "text", "mamba2", tmp_path / n, *more) for n in "ab"]
    llmnorm("train", *arguments[0])
    killed(arguments[1], 4)
    llmnorm("train", *arguments[1])
    assert_same_run(tmp_path / "a", tmp_path / "b", 4)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_llama_of_transformers_learns_what_our_own_learns(
    kind: str, place: Path, tmp_path: Path
) -> None:
    """Oracle: our own class, which reads the same directory; an adapter, all figures and texts."""
    more = ["adapter=lora", "generation.temperature=0"]
    more += ["evaluation.answers=3"] if kind == "chat" else []
    for name in ("own", "transformers"):
        at = words(place, kind, "llama", tmp_path / name, *more, f"model.classes={name}")
        llmnorm("train", *at)
    own, other = (metrics_of(tmp_path / name) for name in ("own", "transformers"))
    assert len(own) == len(other)
    for mine, theirs in zip(own, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key in {"loss", "grad_norm"} & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], rel=2e-5)
        assert theirs["tokens"] == mine["tokens"]
        if "validation" in mine:
            found, wanted = theirs["validation"], mine["validation"]
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found.get("exact_match") == wanted.get("exact_match")
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("own", "transformers")]
    assert texts[0] == texts[1] and texts[0].count("continuation") == 2


def test_processes_evaluate_and_answer_as_one(place: Path, tmp_path: Path) -> None:
    """Oracle: one process; of two that share the model one has more questions than the other."""
    more = ["adapter=lora", "evaluation.answers=5", "evaluation.every=4"]
    runs = {name: words(place, "chat", "mamba2", tmp_path / name, *more) for name in ("1", "2")}
    llmnorm("train", *runs["1"])
    found = run_processes(
        partial(command, words=["train", *runs["2"], "parallel.sharding=fsdp2"]),
        tmp_path / "processes",
        environment=launch_environment("launch/accelerate/fsdp2.yaml"),
    )
    assert [answer[0] for answer in found] == [0, 0], found
    alone, shared = (metrics_of(tmp_path / name) for name in runs)
    assert [line["tokens"] for line in shared] == [line["tokens"] for line in alone]
    wanted, figures = alone[-1]["validation"], shared[-1]["validation"]
    assert figures["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert figures["exact_match"] == wanted["exact_match"]
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in runs]
    assert texts[0] == texts[1]


def test_samples_are_the_classs_own(place: Path, tmp_path: Path) -> None:
    """Oracle: transformers' greedy `generate` with the trained weights."""
    more = ["generation.temperature=0", "evaluation.every=4"]
    llmnorm("train", *words(place, "text", "mamba2", tmp_path / "run", *more))
    llmnorm("export", tmp_path / "run", tmp_path / "out")
    (line,) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    (sample,) = json.loads(line)["samples"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert sample["continuation"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_a_mixtures_balancing_loss_is_logged_apart_with_the_load_of_its_experts(
    place: Path, tmp_path: Path
) -> None:
    """Oracle: the run without it, whose first step has the same weights."""
    asked = {"output_router_logits": True, "router_aux_loss_coef": 2.5}
    directory_of("qwen3_moe", tmp_path / "base", place / "tokenizer", **asked)
    more = [f"model.pretrained={tmp_path / 'base'}", "logging.health_every=2", "adapter=lora"]
    more += ["training.precision=bf16", "training.micro_batch=2", "evaluation.every=4"]
    for name in ("off", "auto"):
        at = words(place, "text", "llama", tmp_path / name, *more, f"model.router_loss={name}")
        llmnorm("train", *at)
    off, auto = (metrics_of(tmp_path / name) for name in ("off", "auto"))
    assert not any("router_loss" in line for line in off)
    for line in (line for line in auto if "loss" in line):
        assert 1.9 < line["router_loss"] < 4.1  # 2 of 4 experts: 2 if balanced, at most 4
    assert auto[0]["loss"] == pytest.approx(off[0]["loss"], rel=1e-6)  # the cross-entropy alone
    assert auto[0]["grad_norm"] != pytest.approx(off[0]["grad_norm"], rel=1e-3)
    assert auto[-1]["validation"]["loss"] < 1.3 * off[-1]["validation"]["loss"]
    loads = read_metrics(tmp_path / "auto" / "metrics.jsonl").expert_load
    assert [*loads] == ["0", "1"] and [len(found) for found in loads.values()] == [2, 2]
    for load in (load for found in loads.values() for load in found):
        assert len(load.shares) == 4 and sum(load.shares) == pytest.approx(1, abs=1e-5)


def test_a_dry_run_shows_the_table_and_writes_nothing(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the lines of the looks, by hand."""
    more = ["parallel.activation_checkpointing=true", "--dry-run"]
    llmnorm("train", *words(place, "text", "mamba2", tmp_path / "run", *more))
    err = capfd.readouterr().err
    for line in (
        "Mamba2ForCausalLM, as it was found to be:",
        "documents      a document a row, padded on the right",
        "head           a linear head",
        "loss           that of the class",
        "recomputation  gradients as without it",
        "gradient       of the first step, finite in fp32",
    ):
        assert line in err
    (padding,) = [line for line in err.splitlines() if line.startswith("  padding")]
    assert 0 < float(padding.split()[1].rstrip("%")) < 50
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["model.norm=rms"], "model.norm: .* own class, which has none of llmnorm's parts"),
        (["model.depth_scaling=lns"], "model.depth_scaling: .* has none of llmnorm's parts"),
        (["model.dropout=0.1"], "give 0, or config for the values of its config.json"),
        (["model.classes=own"], "'gpt2' cannot be loaded .* model.classes=transformers trains it"),
        (["model.quantize=nf4"], "model.quantize: 'nf4' stores weights that an adapter is trained"),
        (
            ["model.quantize=nf4", "adapter=lora", "parallel.sharding=ddp"],
            "model.quantize: 'nf4' is for one process",
        ),
        (
            ["adapter=dora", "adapter.parameters=[down_proj]"],
            "adapter.parameters: PEFT puts LoRA alone .* give adapter.name=lora",
        ),
        (
            ["adapter=lora", "adapter.parameters=[down_proj]", "adapter.dropout=0.1"],
            "adapter.parameters: adapter.dropout is 0.1",
        ),
        (["adapter=lora", "adapter.parameters=[]"], "adapter.parameters: expected 1 values"),
        (["adapter=lora", "adapter.targets=none"], "adapter.targets: 'none' leaves nothing"),
        (
            ["adapter=lora", "adapter.parameters=[down_proj]"],
            "adapter.parameters: GPT2LMHeadModel has no stacks of experts; leave it out",
        ),
        (["objective=masked_lm"], "masked_lm"),
        (["objective.name=distill", "objective.teacher=x"], "choose causal_lm or sft"),
        (["selection=random", "selection.pool=8"], "selection: measures rows in llmnorm's own"),
        (["parallel.compile=true"], "parallel.compile: is for llmnorm's own blocks"),
        (["logging.health_every=1"], "health_every: a class .* the load of its experts .* none"),
        (["model.router_loss=0.01"], "router_loss: 0.01; GPT2LMHeadModel .* no balancing loss"),
        (["model.router_loss=on"], "model.router_loss: .*'on'"),
        (["optimizer.lr=auto"], "the Step Law"),
        (["data.context_length=1000"], "is more than model.max_position_embeddings 128"),
        (["--print-memory"], "--print-memory: counts the step of llmnorm's own classes"),
        (["adapter=lora", "adapter.targets=[c_attn,q_proj]"], "'q_proj' is no linear layer"),
    ],
)
def test_what_a_foreign_class_cannot_have_is_refused_by_name(
    more: list[str], why: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the key, what is wrong and the cure, in a line."""
    import re

    line = said(capfd, *words(place, "text", "gpt2", tmp_path / "run", *more))
    assert re.search(why, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["model.dropout=config"], "model.dropout: 'config' is for a class of transformers"),
        (["model.trust_remote_code=true"], "model.trust_remote_code: is for a class"),
        (["adapter=lora", "adapter.parameters=[down_proj]"], "adapter.parameters: names stacks of"),
        (["model.router_loss=0.1"], "model.router_loss: 0.1; llmnorm's own model has no experts"),
    ],
)
def test_what_our_own_class_cannot_have_is_refused_by_name(
    more: list[str], why: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same."""
    assert why in said(capfd, *words(place, "text", "llama", tmp_path / "run", *more))


def test_a_launch_that_would_shard_a_base_in_nf4_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the message; what accelerate exports for its FSDP file, which no key names."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    more = ["adapter=lora", "model.quantize=nf4"]
    line = said(capfd, *words(place, "text", "gpt2", tmp_path / "run", *more))
    assert "'nf4' is for one process" in line and "parallel.sharding is 'fsdp2'" in line


def test_new_tokens_of_a_template_are_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a tokenizer without the template's tokens."""
    base = tmp_path / "base"
    shutil.copytree(place / "gpt2", base)
    tree = json.loads((base / "tokenizer.json").read_text())
    text = json.dumps(tree).replace("<|im_start|>", "<|other|>")
    (base / "tokenizer.json").write_text(text)
    arguments = words(place, "chat", "gpt2", tmp_path / "run", "tokenizer.chat_template=chatml")
    line = said(capfd, *arguments, f"model.pretrained={base}")
    assert "of transformers gets no rows for new ones" in line


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the line that names the directory and its rows."""
    base = directory_of("gpt2", tmp_path / "base", place / "tokenizer", vocab_size=100)
    arguments = words(place, "text", "gpt2", tmp_path / "run", f"model.pretrained={base}")
    line = said(capfd, *arguments)
    assert f"model.pretrained: {base} has 100 embedding rows" in line, line
    assert not (tmp_path / "run").exists()


def test_print_groups_names_the_classs_parameters(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: GPT-2's names, and its values cut off under a rule; nothing is written."""
    at = words(place, "text", "gpt2", tmp_path / "run")
    for rule, suffix, expected in (
        ("adamw", "", ["32", "x", "96", "adamw"]),
        ("muon", ".2", ["32", "x", "32", "muon"]),
    ):
        llmnorm("train", *at, f"optimizer={rule}", "--print-groups")
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
        (row,) = (r for r in rows if r[0] == f"transformer.h.0.attn.c_attn.weight{suffix}")
        assert row[1:5] == expected and ("transposed" in row) is (rule == "muon")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        ("gpt_oss", ["transformers' packed mask", "auto trains it as transformers' own class"]),
        ("llama", ["positions that restart at 0", "auto trains it as llmnorm's own class"]),
    ],
)
def test_doctor_says_how_a_directory_would_be_trained(
    family: str, lines: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the ways of the two families."""
    llmnorm("doctor", place / family)
    out = capsys.readouterr().out
    assert all(line in out for line in lines), out


def test_a_target_that_is_not_used_stops_the_run_by_name(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Oracle: a Llama whose v_proj is multiplied by its weight alone, around the layer."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    real = LlamaAttention.forward

    def forward(self: Any, *args: Any, **given: Any) -> Any:
        layer = self.v_proj
        base = getattr(layer, "base_layer", layer)
        self._modules["v_proj"] = base
        try:
            return real(self, *args, **given)
        finally:
            self._modules["v_proj"] = layer

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    more = ["adapter=lora", "model.classes=transformers"]
    line = said(capfd, *words(place, "text", "llama", tmp_path / "run", *more))
    assert "v_proj.lora_" in line and "gets no gradient from a step" in line
    assert "leave that layer out of adapter.targets" in line


def test_gradients_of_zeros_alone_stop_the_run_by_name() -> None:
    """Oracle: two kinds of layers, one of them with zeros in every gradient."""

    class Alone:
        @staticmethod
        def reduce(values: Tensor) -> Tensor:
            return values

    trained = []
    for kind, value in (("q_proj", 1.0), ("v_proj", 0.0)):
        for layer in range(2):
            parameter = nn.Parameter(torch.zeros(3))
            parameter.grad = torch.full((3,), value)
            trained.append((f"model.layers.{layer}.{kind}.lora_B.default.weight", parameter))
    parallel: Any = Alone()
    foreign.refuse_unused([], trained[:2], parallel)
    with pytest.raises(InputError, match="adapters around 'v_proj' get gradients of 0 alone"):
        foreign.refuse_unused([], trained, parallel)
    assert adapters.is_adapter(trained[0][0])


def test_a_first_step_that_is_not_finite_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a head with a number that is not one; hidden states are finite."""
    base = tmp_path / "base"
    shutil.copytree(place / "llama", base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("inf")
    model.save_pretrained(base)
    more = ["model.classes=transformers", f"model.pretrained={base}"]
    line = said(capfd, *words(place, "text", "llama", tmp_path / "run", *more))
    assert "not finite" in line or "as it would be trained" in line
