"""The README.md of an exported model or adapter: data, settings and losses, and how to load it."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from llmnorm.config.modules import outside_modules
from llmnorm.exchange.source import Source
from llmnorm.objectives.figures import names
from llmnorm.part import InputError
from llmnorm.runs.lines import read_lines


class _Kind(NamedTuple):
    text: str
    pipeline: str
    loader: str


_KINDS = {  # by the ending of the class's name
    "ForCausalLM": _Kind("causal language model", "text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": _Kind("masked language model", "fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": _Kind(
        "text classifier", "text-classification", "AutoModelForSequenceClassification"
    ),
}


def _kind(architecture: str) -> _Kind:
    """By the class's name; one of transformers is a causal language model, whatever its name."""
    causal = _KINDS["ForCausalLM"]
    return next((k for ending, k in _KINDS.items() if architecture.endswith(ending)), causal)


def _nf4(skipped: Sequence[str]) -> str:
    """What loads a base as llmnorm stores it: left to itself it skips the head alone."""
    skip = f",\n    llm_int8_skip_modules={json.dumps([*skipped])}," if skipped else ""
    return (
        'config = BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        f"bnb_4bit_use_double_quant=True{skip}\n)\n"
    )


_PACKAGES = ("llmnorm", "torch", "transformers", "tokenizers", "safetensors")


def model_card(
    name: str, source: Source, architecture: str, *, steps: Sequence[int], ema: bool
) -> str:
    """The card's Markdown.

    Args:
        name: the heading.
        source: the (newest) weights that were exported.
        architecture: the class that config.json names.
        steps: the checkpoints that were averaged, or the single one; empty where the source is an
            exported or stock directory.
        ema: whether the weights are their moving average.
    """
    total = sum(torch.Size(stored.shape).numel() for stored in source.tensors.values())
    own = architecture.startswith("LlmNorm")
    kind = _kind(architecture)
    blocks = [
        f"---\nlibrary_name: transformers\npipeline_tag: {kind.pipeline}\ntags: [llmnorm]\n---",
        f"# {name}",
        f"A {kind.text} of {total:,} parameters, an export of llmnorm: `{architecture}`.",
        _how_to_load(own, kind.loader, outside_modules(_settings(source))),
        *(_of_the_run(source, steps, ema) if source.meta else [_no_run()]),
        "## Model\n\n" + _code("yaml", _yaml(_settings(source))),
    ]
    if source.meta:
        tree = {key: value for key, value in source.meta["config"].items() if key != "model"}
        blocks.append("## Configuration of the run\n\n" + _code("yaml", _yaml(tree)))
    blocks.append(_versions(_PACKAGES))
    return "\n\n".join(blocks) + "\n"


def adapter_card(
    name: str, source: Source, *, ema: bool, not_in_four_bits: Sequence[str] = ()
) -> str:
    """The card's Markdown of an adapter, as `model_card`'s of a model.

    Args:
        name: the heading.
        source: of the run that has trained it.
        ema: whether the weights are their moving average.
        not_in_four_bits: beside a base in NF4, the names of linear layers that are not stored so;
            empty: all but the head are.
    """
    trained = source.trained
    assert trained is not None and trained.adapter is not None
    total = sum(torch.Size(stored.shape).numel() for stored in trained.tensors.values())
    (architecture,) = source.config.architectures or ["LlmNormForCausalLM"]
    kind = _kind(architecture)
    base = f"`llmnorm export {trained.base} BASE`" if trained.base_is_run else str(trained.base)
    given = ", num_labels=N" if architecture.endswith("ForSequenceClassification") else ""
    needs, before, resized, ends = "", "", "", ""
    if trained.quantize == "nf4":
        needs, given = ", BitsAndBytesConfig", f"{given}, quantization_config=config"
        before = _nf4(not_in_four_bits)
    if trained.new_tokens.stop > trained.base_rows:
        rows = trained.new_tokens.stop
        resized = f"base.resize_token_embeddings({rows})  # rows of new tokens\n"
    tokens = source.config.eos_token_id
    if kind.pipeline == "text-generation" and tokens is not None:  # no file of PEFT's names them
        ends = f"base.generation_config.eos_token_id = {tokens}  # what ends a text\n"
    code = (
        f"from peft import PeftModel\nfrom transformers import {kind.loader}, AutoTokenizer{needs}"
        f"\n\n{before}base = {kind.loader}.from_pretrained(BASE{given})\n{resized}{ends}"
        "model = PeftModel.from_pretrained(base, DIRECTORY)\n"
        "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"
    )
    blocks = [
        f"---\nlibrary_name: peft\npipeline_tag: {kind.pipeline}\ntags: [llmnorm]\n---",
        f"# {name}",
        f"An adapter of {total:,} parameters for a {kind.text}, trained by llmnorm.",
        f"## Loading\n\nIts base: {base}.\n\n" + _code("python", code),
        *_of_the_run(source, [source.meta["step"]], ema, only_adapter=True),
        "## Configuration of the run\n\n" + _code("yaml", _yaml(source.meta["config"])),
        _versions((*_PACKAGES, "peft")),
    ]
    return "\n\n".join(blocks) + "\n"


def _versions(packages: Sequence[str]) -> str:
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"## Versions\n\nExported with {versions}."


def _how_to_load(own: bool, loader: str, modules: Sequence[str]) -> str:
    needs = "It needs the package llmnorm.\n\n" if own else ""
    if modules:
        needs = (
            f"It needs the package llmnorm and the code of {', '.join(modules)}, which is not in "
            "this directory. `llmnorm` imports it with "
            f"`{' '.join(f'--import {module}' for module in modules)}`.\n\n"
        )
    argument = ", trust_remote_code=True" if own else ""
    imports = "".join(f"import {module}\n" for module in modules)
    return (
        "## Loading\n\n"
        + needs
        + _code(
            "python",
            f"{imports}from transformers import {loader}, AutoTokenizer\n\n"
            f"model = {loader}.from_pretrained(DIRECTORY{argument})\n"
            "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)",
        )
    )


def _of_the_run(
    source: Source, steps: Sequence[int], ema: bool, *, only_adapter: bool = False
) -> list[str]:
    meta = source.meta
    of = (
        f"step {steps[0]}" if len(steps) == 1 else f"the mean of steps {', '.join(map(str, steps))}"
    )
    weights = f"Weights of {of}{' (their moving average)' if ema else ''}."
    if source.trained is not None:
        weights += f" Those that were not trained are of {source.trained.base}."
        if source.trained.quantize == "nf4":
            weights += (
                " In training the linear layers of its blocks were stored in NF4 (4 bits, double "
                "quantisation), and what was trained fits these rounded weights. "
            )
            weights += (
                "Beside the base's own weights it computes something else."
                if only_adapter
                else "They are what was merged here."
            )
    for branch in meta.get("branches", ()):
        rows = "on rows of its own" if branch["anew"] else f"from row {branch['row']:,} on"
        weights += f" Branched from {branch['path']} at step {branch['step']:,}, {rows}."
    if teacher := meta.get("teacher"):
        weights += f" They learned the distributions of {teacher['path']}."
    facts = (
        f"Trained for {meta['step']:,} steps on {meta['tokens']:,} tokens in "
        f"{meta['seconds'] / 60:,.1f} minutes, by llmnorm {meta['llmnorm']}."
    )
    return [
        f"## Training\n\n{weights} {facts}",
        "## Data\n\n" + _data(meta),
        "## Validation\n\n" + _losses(source, len(steps) > 1, ema),
    ]


def _data(meta: Mapping[str, Any]) -> str:
    """The sources, and the stages that the run has read where there is more than one."""
    table = _table(meta["sources"], ("name", "documents", "bytes", "tokens", "weight"))
    stages = [stage for stage in meta.get("stages") or () if stage["row"] < meta["row"]]
    if len(stages) < 2:
        return table
    rows = [
        {
            "from row": stage["row"],
            "weights": ", ".join(f"{name} {w}" for name, w in stage["weights"].items() if w),
        }
        for stage in stages
    ]
    return f"{table}\n\nRead in stages:\n\n{_table(rows, ('from row', 'weights'))}"


def _losses(source: Source, averaged: bool, ema: bool) -> str:
    """The validation figures at the checkpoint's step, source by source."""
    assert source.run is not None
    found = _evaluation(source.run.metrics, source.meta["step"])
    if found is None:
        return "Not evaluated at this step."
    figures = found.get("ema", found) if ema else found
    keys = names(figures)
    rows = [{"source": name, **values} for name, values in figures["sources"].items()]
    rows.append({"source": "all", **{key: figures[key] for key in keys}})
    what = f"At step {source.meta['step']}"
    if averaged:
        what += ", whose weights are the newest in the mean; the mean itself was not evaluated"
    return f"{what}. Loss in nats a token.\n\n" + _table(rows, ("source", *keys))


def _evaluation(metrics: Path, step: int) -> dict[str, Any] | None:
    """The last evaluation of a step in metrics.jsonl; None where there is none that can be read."""
    found = None
    with suppress(InputError):  # no such file; the card does without
        for entry in read_lines(metrics).entries:
            figures = entry.value.get("validation")
            if entry.step == step and isinstance(figures, dict):
                sources = figures.get("sources")
                if isinstance(sources, dict) and all(isinstance(v, dict) for v in sources.values()):
                    found = figures
    return found


def _no_run() -> str:
    return "## Training\n\nExported from a model directory, which does not say how it was trained."


def _settings(source: Source) -> dict[str, Any]:
    if source.kind is not None:
        return json.loads(source.config.to_json_string())
    return source.own.settings().model_dump(mode="json", exclude_none=True)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "not finite"
        if isinstance(value, float):
            return f"{value:.4f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(_given(tree), sort_keys=False, width=100, allow_unicode=True).rstrip()


def _given(tree: Any) -> Any:
    """The tree without keys that have no value."""
    if isinstance(tree, dict):
        return {k: _given(v) for k, v in tree.items() if v not in (None, {}, [])}
    return [_given(item) for item in tree] if isinstance(tree, list) else tree


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
