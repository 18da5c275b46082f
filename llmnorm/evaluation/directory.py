"""`llmnorm eval`: what a trained model is worth, as a table and a JSON file.

On validation rows: the objective's figures (loss, perplexity and bits per byte; of masked tokens
loss and accuracy; a classification's scores) of every source and in total, by the same function as
during training, so that a run's last evaluation is reproduced to the last digit (same processes,
same micro batch). A run has its rows; a directory without a run is told by `--data`
which corpus to use, and its own tokenizer makes the rows. On lm-eval's tasks: benchmark_tasks.py.

The file: `RUN/eval/step_00001000.json` (`-ema` where the average was evaluated), `DIR/eval.json`,
with an adapter `ADAPTER/eval.json`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmnorm.config.pretrained import refuse_encoder
from llmnorm.config.tree import ParallelSettings, RunConfig, TrainingSettings
from llmnorm.evaluation import benchmark_tasks
from llmnorm.exchange.loading import Source, empty_of, open_source, tokenizer_of
from llmnorm.machine.doctor import missing_extra, version
from llmnorm.machine.files import write_whole
from llmnorm.models.convert import named_weights
from llmnorm.models.modeling import class_of
from llmnorm.objectives.figures import table
from llmnorm.objectives.heldout import configuration, validation_objective
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.training.evaluation import evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_directory(
    path: Path,
    overrides: Iterable[str] = (),
    *,
    checkpoint: str = "latest",
    ema: bool = False,
    adapter: Path | None = None,
    data: Path | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Evaluate the model at `path`, print a table and write the figures beside it.

    Args:
        path: a run directory, one of its checkpoints, an exported or a stock directory.
        overrides: of the run's settings, or of `data`'s.
        checkpoint: of a run: `latest`, `best` or a step.
        ema: of a run: the moving average of the weights.
        adapter: a PEFT adapter to put on the model.
        data: the configuration or run whose corpus is evaluated instead of the run's own.
        tasks: lm-eval's tasks, by name or path.
        limit: examples of every task at most.
        batch_size: rows or requests at once; None: as the configuration says, or 8.

    Raises:
        InputError: something that the user can mend, in one line.
    """
    if limit is not None and not tasks:
        raise InputError("--limit: counts examples of --tasks; validation rows are all evaluated")
    asked = benchmark_tasks.find(tasks) if tasks else None
    source = open_source(path, checkpoint=checkpoint, ema=ema)
    if asked:
        refuse_encoder(source.config.architectures, f"--tasks: {path}", "lm-eval's tasks ask for")
    config = _config(path, source, data, list(overrides), bool(tasks))
    parallel = Parallel(
        config.parallel if config else ParallelSettings(),
        config.training if config else TrainingSettings(steps=1),
    )
    try:
        if parallel.spread and (adapter is not None or asked):
            raise InputError(
                f"--{'adapter' if adapter else 'tasks'}: needs the whole model on every process, "
                f"which sharding '{parallel.sharding}' does not give; launch with "
                "launch/accelerate/ddp.yaml and parallel.sharding=auto"
            )
        objective = None
        if config:
            objective = validation_objective(
                path,
                config,
                parallel,
                data=data,
                architecture=class_of(source.config).__name__,
                longest=source.config.max_position_embeddings,
                tokenizer=source.tokenizer,
                trained_on=source.meta.get("data"),
            )
        tokenizer = tokenizer_of(source, path)
        model = empty_of(source, "meta").eval()
        parallel.lay_out(model, lambda modules: source.read_into(named_weights(modules)))
        scored: PreTrainedModel = model
        if adapter is not None:
            scored = _with_adapter(scored, adapter)
        found: dict[str, Any] = {
            "llmnorm": version(),
            "weights": str(path),
            "step": source.meta.get("step"),
            "ema": ema,
            "adapter": str(adapter) if adapter else None,
        }
        said = [_title(found)]
        if config and objective:
            rows = batch_size or _micro_batch(config, parallel)
            figures = evaluate(scored, objective, micro_batch=rows, parallel=parallel)
            found |= {"data": objective.data.identity, "validation": figures}
            said.append(table(figures))
        if asked:
            results = benchmark_tasks.run(
                asked, scored, tokenizer, parallel, batch_size=batch_size or 8, limit=limit
            )
            if results is not None:
                found |= {"limit": limit, "tasks": benchmark_tasks.figures(results)}
                said.append(benchmark_tasks.table(results))
        if parallel.is_main:
            output = _output(path, source, ema, adapter)
            _write(output, found)
            print("\n\n".join([*said, f"written to {output}"]))
    finally:
        parallel.close()


def _config(
    path: Path, source: Source, data: Path | None, overrides: list[str], tasks: bool
) -> RunConfig | None:
    """Whose rows are evaluated, and how; None where only tasks are."""
    if tasks and not overrides and data is None and source.run is None:
        return None
    run = source.run.path if source.run else None
    otherwise = ", or --tasks, or both"
    return configuration("eval", path, run, data, overrides, otherwise=otherwise)


def _micro_batch(config: RunConfig, parallel: Parallel) -> int:
    """Rows at once, as in the run's own evaluations."""
    share = max(1, config.training.rows // parallel.world)
    return config.evaluation.micro_batch or config.training.micro_batch or share


def _with_adapter(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"--adapter: {adapter} has no adapter_config.json, so it is no adapter")
    try:
        from peft import PeftModel
    except ImportError:
        raise missing_extra("peft") from None
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (ValueError, RuntimeError) as error:  # another architecture, other shapes
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--adapter: {adapter} does not fit the model: {reason}") from None


def _title(found: dict[str, Any]) -> str:
    parts = [found["weights"]]
    if found["step"] is not None:
        parts.append(f"step {found['step']}")
    if found["ema"]:
        parts.append("moving average")
    if found["adapter"]:
        parts.append(f"adapter {found['adapter']}")
    return ", ".join(parts)


def _output(path: Path, source: Source, ema: bool, adapter: Path | None) -> Path:
    if adapter is not None:
        return adapter / "eval.json"
    if source.run is None:
        return path / "eval.json"
    return source.run.evaluations / f"step_{source.meta['step']:08d}{'-ema' if ema else ''}.json"


def _write(path: Path, found: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
