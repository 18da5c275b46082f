"""The texts that a run generates at every evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.running import SMOKE, assert_same_run, llmnorm


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight steps with an evaluation every four: prompts given, taken from rows, none."""
    place = tmp_path_factory.mktemp("samples")
    common = ["training.steps=8", "evaluation.every=4", f"data.dir={smoke_data}"]
    common += ["checkpoint.every=8", "model.dropout=0.1", "evaluation.sample_tokens=6"]
    kinds = {
        "prompts": ["evaluation.prompts=[The, It was]", "generation.temperature=0"],
        "rows": ["evaluation.samples=3"],
        "none": ["evaluation.samples=0"],
    }
    for name, settings in kinds.items():
        llmnorm("train", SMOKE, *common, *settings, f"run_dir={place / name}")
    return {name: place / name for name in kinds}


def test_prompts_are_continued_by_the_model_of_the_step(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """Oracle: greedy `generate` of the exported last checkpoint; every evaluation has its line."""
    lines = samples_of(runs["prompts"])
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        assert [sample["prompt"] for sample in line["samples"]] == ["The", "It was"]
    llmnorm("export", runs["prompts"], tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for sample in lines[-1]["samples"]:
        ids = tokenizer(sample["prompt"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert sample["continuation"] == tokenizer.decode(out, skip_special_tokens=True)


def test_rows_are_continued_where_no_prompt_is_given(runs: dict[str, Path]) -> None:
    """Oracle: the prompts stand in the held-out text, the sources taking turns, the same always."""
    first, last = samples_of(runs["rows"])
    prompts = [sample["prompt"] for sample in first["samples"]]
    assert len(prompts) == 3 and prompts == [sample["prompt"] for sample in last["samples"]]
    lines = Path("tests/data/text/prose.jsonl").read_text().splitlines()
    prose = [json.loads(line)["text"] for line in lines]
    notes = Path("tests/data/text/notes.txt").read_text()
    inside = lambda text: any(text.strip() in document for document in prose)  # noqa: E731
    assert inside(prompts[0]) and prompts[1].strip() in notes and inside(prompts[2])
    assert not (runs["none"] / "samples.jsonl").exists()


def test_a_run_with_samples_is_the_same_run(runs: dict[str, Path]) -> None:
    """Oracle: the run without any, to the bit, its noise (dropout) included."""
    for name in ("prompts", "rows"):
        assert_same_run(runs["none"], runs[name], 8)
