"""lm-eval's client of completion servers, over HTTP, beside `llmnorm eval` of the directory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmnorm.objectives import benchmark_tasks
from tests.running import ROOT, llmnorm
from tests.serving.served import NAME, Served, save_model, serving
from tests.stock import CONTEXT

PROSE = """\
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
TEXTS = [
    "It is 4. 2+2? user thoughts",
    "Regen fiel auf die été 日本.",
    "final\n\nanalysis 3+3? " * 4,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lm_eval") / "model")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(model) as found:
        yield found


def test_a_served_model_has_the_figures_of_the_directory(
    served: Served, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `llmnorm eval`, which runs the model itself; a choice of two answers, and the
    perplexity of texts, in float64."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    pytest.importorskip("tenacity", reason="lm-eval's client of servers needs tenacity")
    from lm_eval import simple_evaluate

    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines)
    (tmp_path / "prose.yaml").write_text(PROSE.replace("TEXTS", str(tmp_path / "texts.jsonl")))
    monkeypatch.chdir(ROOT)  # the shipped task's data are below it
    tasks = [str(tmp_path / "prose.yaml"), "tests/data/tasks/weather.yaml"]
    found = benchmark_tasks.find(tasks)
    told: Any = simple_evaluate(
        model="local-completions",
        model_args={
            "model": NAME,
            "base_url": f"{served.url}/completions",
            "num_concurrent": 3,
            "max_length": CONTEXT + 1,
            # A tokenizer that begins texts with bos does so for a directory by itself.
            "tokenizer_backend": "huggingface",
            "tokenizer": str(model),
            "add_bos_token": True,
        },
        tasks=found.names,
        task_manager=found.manager,
        log_samples=False,
    )
    llmnorm("eval", model, "--tasks", ",".join(tasks))
    wanted = json.loads((model / "eval.json").read_text())["tasks"]["results"]
    assert set(wanted) == {"prose", "weather"}
    for task, figures in wanted.items():
        numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
        assert {key: told["results"][task][key] for key in numbers} == pytest.approx(
            numbers, rel=1e-9
        )
    assert wanted["weather"]["acc,none"] not in (0.0, 1.0)
    assert served.engine.counters.prompt_tokens > 100
