"""`llmnorm eval`: evaluate a trained model; print a table and write a JSON file.

On validation rows it computes the objective's figures (loss, perplexity and bits per byte; of
masked tokens loss and accuracy; a classification's scores), of every source and in total. Those of
`distill` beside its teacher are left out, with a note, where the teacher is gone. The function is
the one that training calls. So with the same processes and micro batch, it gives the figures of a
run's last evaluation again, to the last digit. A run has validation rows of its own. For a
directory without a run, `--data` names the corpus, and the directory's tokenizer makes the rows.
objectives/benchmark_tasks.py runs lm-eval's tasks.

The file is `RUN/eval/step_00001000.json` (`step_00001000-ema.json` for the moving average), of an
exported or stock directory `DIR/eval.json`, with an adapter `ADAPTER/eval.json`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llmnorm.config.foreign import LONGEST
from llmnorm.config.pretrained import refuse_encoder
from llmnorm.config.tree import ParallelSettings, RunConfig, TrainingSettings
from llmnorm.exchange.loading import empty_of, open_source, tokenizer_of
from llmnorm.exchange.peft_adapter import with_adapter
from llmnorm.exchange.source import Source
from llmnorm.machine.doctor import version
from llmnorm.machine.files import json_text, write_whole
from llmnorm.models.building import class_of
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import empty_foreign
from llmnorm.models.looks import look
from llmnorm.objectives import benchmark_tasks
from llmnorm.objectives.figures import table
from llmnorm.objectives.heldout import configuration, validation_objective
from llmnorm.objectives.settings import CausalLMSettings
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.training.evaluation import evaluate
from llmnorm.training.teacher import give_teacher

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
        batch_size: rows or requests at once; None: the configuration's micro batch, and 8 requests.

    Raises:
        InputError: something that the user can mend, in one line.
    """
    if limit is not None and not tasks:
        raise InputError("--limit: counts examples of --tasks; validation rows are all evaluated")
    benchmark = benchmark_tasks.find(tasks) if tasks else None
    source = open_source(path, checkpoint=checkpoint, ema=ema)
    if benchmark and source.kind is None:  # transformers' classes are known to be causal here
        refuse_encoder(source.config.architectures, f"--tasks: {path}", "lm-eval's tasks ask for")
    config = _config(path, source, data, list(overrides), bool(tasks))
    parallel = Parallel(
        config.parallel if config else ParallelSettings(),
        config.training if config else TrainingSettings(steps=1),
    )
    try:
        if parallel.spread and adapter is not None:
            raise InputError(
                "--adapter: needs the whole model on every process, which sharding "
                f"'{parallel.sharding}' does not give; launch with "
                "launch/accelerate/ddp.yaml and parallel.sharding=auto"
            )
        objective = None
        if config:
            objective = validation_objective(
                path,
                config,
                parallel,
                data=data,
                architecture=_architecture(source),
                longest=_longest(source),
                tokenizer=source.tokenizer,
                trained_on=source.meta.get("data"),
            )
        tokenizer = tokenizer_of(source, path)
        scored = _laid_out(source, parallel)
        if adapter is not None:
            wrapped = with_adapter(scored, adapter)
            # What a foreign model is asked here is not what PEFT's wrapper hands on.
            scored = wrapped if source.kind is None else scored
        result: dict[str, Any] = {
            "llmnorm": version(),
            "weights": str(path),
            "step": source.meta.get("step"),
            "ema": ema,
            "adapter": str(adapter) if adapter else None,
        }
        paragraphs = [_title(result)]
        if config and objective:
            rows = batch_size or config.evaluation.micro_batch  # as in the run's own evaluations
            rows = rows or objective.rows_at_once(config.training, parallel.world)
            try:
                give_teacher(config, objective, parallel, {} if data else source.meta)
            except InputError as error:  # a run may outlive its teacher
                parallel.say(f"llmnorm: note: no figures beside the teacher: {error}")
            figures = evaluate(scored, objective, micro_batch=rows, parallel=parallel)
            result |= {"data": objective.data.identity, "validation": figures}
            paragraphs.append(table(figures))
        if benchmark:
            own = config.evaluation.micro_batch if config else None  # as in the run's own scores
            results = benchmark_tasks.run(
                benchmark,
                scored,
                tokenizer,
                parallel,
                batch_size=batch_size or own or benchmark_tasks.AT_ONCE,
                limit=limit,
            )
            if results is not None:
                result |= {"limit": limit, "tasks": benchmark_tasks.figures(results)}
                paragraphs.append(benchmark_tasks.table(results))
        if parallel.is_main:
            print("\n\n".join(paragraphs), flush=True)  # first: they have taken minutes
            output = _output(path, source, ema, adapter)
            _write(output, result)
            print(f"\nwritten to {output}")
    finally:
        parallel.close()


def _laid_out(source: Source, parallel: Parallel) -> "PreTrainedModel":
    """The model in evaluation mode, over all processes; of transformers' classes looked at."""

    def fill(modules: Mapping[str, nn.Module]) -> None:
        source.read_into(named_weights(modules))

    if source.kind is None:
        own = empty_of(source, "meta").eval()
        parallel.lay_out(own, fill)
        return own
    model = empty_foreign(source.kind, source.config).eval()
    parallel.lay_out(model, fill)
    found = look(model, autocast=parallel.autocast, gradient=parallel.gradient)
    parallel.say(f"{source.kind.__name__}, as it was found to be:\n{found.table()}")
    return model


def _architecture(source: Source) -> str:
    """The class of ours whose objectives fit the weights."""
    if source.kind is not None:
        return CausalLMSettings.architecture
    return class_of(source.own).__name__


def _longest(source: Source) -> int:
    """How many positions the model has; a class of transformers may name no number."""
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else LONGEST


def _config(
    path: Path, source: Source, data: Path | None, overrides: list[str], tasks: bool
) -> RunConfig | None:
    """The settings of the validation rows; None where only tasks are evaluated."""
    if tasks and not overrides and data is None and source.run is None:
        return None
    run = source.run.path if source.run else None
    otherwise = ", or --tasks, or both"
    return configuration("eval", path, run, data, overrides, otherwise=otherwise)


def _title(result: dict[str, Any]) -> str:
    parts = [result["weights"]]
    if result["step"] is not None:
        parts.append(f"step {result['step']}")
    if result["ema"]:
        parts.append("moving average")
    if result["adapter"]:
        parts.append(f"adapter {result['adapter']}")
    return ", ".join(parts)


def _output(path: Path, source: Source, ema: bool, adapter: Path | None) -> Path:
    if adapter is not None:
        return adapter / "eval.json"
    if source.run is None:
        return path / "eval.json"
    return source.run.evaluations / f"step_{source.meta['step']:08d}{'-ema' if ema else ''}.json"


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json_text(result, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; the figures stand above"
        ) from None
