"""Exported directories under generate, pipeline, PEFT and lm-eval, each used as its manual says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.running import SMOKE, llmnorm

PROMPTS = ["The", "A run is", "It was not so long ago that", "x", "When the"]


def encoded(directory: Path, prompts: list[str]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    return tokenizer(prompts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("prompts", [PROMPTS[1:2], PROMPTS], ids=["1", "5"])
def test_greedy_is_one_text_whatever_the_cache_and_the_batch(
    exported: Path, stock: Path, prompts: list[str]
) -> None:
    """Oracle: the stock class; each prompt alone and without a cache."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    batch = encoded(exported, prompts)
    options = {"max_new_tokens": 12, "do_sample": False}
    got = model.generate(**batch, **options)
    assert got.equal(model.generate(**batch, **options, use_cache=False))
    other = AutoModelForCausalLM.from_pretrained(stock)
    assert got.equal(other.generate(**batch, **options))
    for prompt, row in zip(prompts, got, strict=True):
        alone = model.generate(**encoded(exported, [prompt]), **options, use_cache=False)[0]
        assert row[-12:].equal(alone[-12:])
    assert len(set(got[:, -12:].flatten().tolist())) > 1  # no constant text, which anything gives


def test_a_hybrid_is_one_override_and_is_exported_and_generated_from(
    tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: transformers' greedy text without a cache; the run's own text."""
    run, out = tmp_path / "run", tmp_path / "out"
    places = [f"run_dir={run}", f"data.dir={smoke_data}"]
    # 0.1 and 1e-2 as in conftest.py: other tokens than the most frequent one have a chance.
    settings = ["training.steps=8", "model.initializer_range=0.1", "optimizer.lr=1e-2"]
    llmnorm("train", SMOKE, "model.mixer=[nala,softmax]", *settings, *places)
    llmnorm("export", run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    batch = encoded(out, PROMPTS)
    got = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert got.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=False))
    assert len(set(got[:, -12:].flatten().tolist())) > 1  # no constant text, which anything gives
    capsys.readouterr()
    texts = []
    for directory in (run, out):
        llmnorm("generate", directory, "--prompt", "The", "generation.temperature=0")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("The") and len(texts[0]) > 8


def test_beam_search_and_sampling(exported: Path, stock: Path) -> None:
    """Oracle: the stock class with its own cache; sampled by the same noise."""
    batch = encoded(exported, PROMPTS)
    texts = []
    for directory in (exported, stock):
        model = AutoModelForCausalLM.from_pretrained(directory)
        beams = model.generate(**batch, max_new_tokens=8, num_beams=4, num_return_sequences=2)
        torch.manual_seed(1)
        texts.append([beams, model.generate(**batch, max_new_tokens=8, do_sample=True, top_k=20)])
    for ours, theirs in zip(*texts, strict=True):
        assert ours.equal(theirs)


def test_pipeline_answers(exported: Path, stock: Path) -> None:
    """Oracle: the stock class in the same pipeline."""
    answers = []
    for directory in (exported, stock):
        generator = pipeline("text-generation", model=str(directory), device="cpu")
        answers.append(generator(PROMPTS[:2], max_new_tokens=8, do_sample=False))
    assert answers[0] == answers[1]
    for prompt, (answer,) in zip(PROMPTS, answers[0], strict=False):
        assert answer["generated_text"].startswith(prompt)
        assert len(answer["generated_text"]) > len(prompt)


def test_peft_trains_an_adapter_in_a_plain_trainer(exported: Path, tmp_path: Path) -> None:
    """Oracle: the loss falls, the weights below stay, the saved adapter gives the same logits."""
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    model = AutoModelForCausalLM.from_pretrained(exported)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = Path("tests/data/text/notes.txt").read_text()[:8000]
    ids = torch.tensor(tokenizer(text).input_ids)[: 32 * 24].view(24, 32)
    trainer = Trainer(
        tuned,
        TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.1
    for name, parameter in tuned.base_model.model.named_parameters():
        if "lora" not in name:
            assert parameter.equal(before[name.replace(".base_layer", "")]), name
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(exported)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    tuned.eval()
    with torch.no_grad():
        got, expected = loaded(ids[:2]).logits, tuned(ids[:2]).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert (got - model_logits(exported, ids[:2])).abs().max() > 1e-2


def model_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(ids).logits


def test_lm_eval_scores_a_directory(exported: Path, stock: Path) -> None:
    """Oracle: log-softmax of full logits; the stock class under the same harness."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("The first", " of them"), ("It was", " not so long ago"), ("", "Nothing before")]
    scores = []
    for directory in (exported, stock):
        harness = HFLM(
            pretrained=str(directory), trust_remote_code=True, device="cpu", batch_size=2
        )
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
            for i, pair in enumerate(pairs)
        ]
        scores.append(harness.loglikelihood(requests))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for (context, continuation), ours, theirs in zip(pairs, *scores, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]
        start = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
        whole = start + tokenizer.encode(continuation, add_special_tokens=False)
        logits = model_logits(exported, torch.tensor([whole]))[0]
        chances = logits.log_softmax(-1)[range(len(start) - 1, len(whole) - 1), whole[len(start) :]]
        assert ours[0] == pytest.approx(float(chances.sum()), abs=1e-4)
