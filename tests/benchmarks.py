"""Local tasks of lm-eval, of every kind of request, for tests; no data set is fetched."""

import importlib.util
import json
from pathlib import Path

WEATHER = "tests/data/tasks/weather.yaml"  # two answers each, one of several tokens
INSTALLED = importlib.util.find_spec("lm_eval") is not None
KINDS = {
    # Whole texts, in windows of the model's context; unequal lengths.
    "tides": (
        """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
        [{"text": "The tide comes in. " * 40}, {"text": "The tide goes out."}, {"text": "Ebb."}],
    ),
    # Texts to go on with, of which one ends at once.
    "winds": (
        """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
        [{"text": "The wind", "end": " blew"}, {"text": "A long calm came", "end": " at night"}],
    ),
}


def write_tasks(directory: Path) -> list[str]:
    """Paths of a task of each kind; the multiple choice lies in the repository."""
    paths = [WEATHER]
    for name, (text, documents) in KINDS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        path = directory / f"{name}.yaml"
        path.write_text(head + text)
        paths.append(str(path))
    return paths
