"""What prepared data holds, as people read it: `llmnorm data CONFIG --show N` and `--stats`.

`train` prints the table of `--stats` too, before its first step.
"""

from collections.abc import Sequence

import numpy as np

from llmnorm.data.conversations import Conversations
from llmnorm.data.examples import Examples
from llmnorm.data.loader import IGNORED, Loader
from llmnorm.data.packed import PackedData
from llmnorm.data.run_data import RunData
from llmnorm.data.stages import Course
from llmnorm.data.tokenizer import TextEncoder


def show(packed: PackedData, count: int, *, seed: int = 0) -> None:
    """Print the run's first `count` rows as the model sees them.

    Pieces of different documents stand apart, each with its first position in the row; `no label`
    counts the tokens that are not predicted.
    """
    encoder = TextEncoder(packed.tokenizer_directory)
    batches = Loader(packed, seed=seed, global_batch=1).batches()
    for number in range(count):
        batch = {name: tensor.numpy()[0] for name, tensor in next(batches)[0].items()}
        name = packed.sources[int(batch["sources"])].name
        ignored = int((batch["shift_labels"] == IGNORED).sum())
        print(f"row {number}: source {name}, {packed.context_length} tokens, {ignored} no label")
        starts = np.flatnonzero(batch["position_ids"] == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], packed.context_length], strict=True):
            text = encoder.decode(batch["input_ids"][start:stop])
            print(f"  [{start}:{stop}] {text!r}")


def show_conversations(conversations: Conversations, count: int, *, seed: int = 0) -> None:
    """Print the run's first `count` examples.

    What is trained stands on lines of its own, between what is context.
    """
    sources, order = conversations.sources, conversations.order(seed)
    for number, (source, index) in enumerate(zip(*order.locate(0, count), strict=True)):
        ids, trained = sources[source].train.read(int(index))
        print(
            f"example {number}: source {sources[source].name}, {len(ids)} tokens, "
            f"{int(trained.sum())} trained"
        )
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        for start, stop in zip(borders, borders[1:], strict=False):
            use = "trained" if trained[start] else "context"
            print(f"  {use} {conversations.template.spell(ids[start:stop].tolist())!r}")


def sources_table(packed: PackedData, rows: int) -> str:
    """A line a source: its size, its share of a run of `rows` rows, and its epochs in it."""
    mixture = packed.mixture(rows)
    header = ["source", "documents", "MB", "tokens", "bytes/token", "rows", "share", "epochs"]
    lines = [[*header, "held out kB"]]
    for source, weight in zip(packed.sources, mixture, strict=True):
        share = weight / sum(mixture)
        lines.append(
            [
                source.name,
                f"{source.documents}",
                f"{source.bytes / 1e6:.2f}",
                f"{source.tokens}",
                f"{source.bytes / source.tokens:.2f}",
                f"{source.rows}",
                f"{share:.1%}",
                f"{rows * share / source.rows:.2f}",
                f"{source.validation_bytes / 1e3:.0f}",
            ]
        )
    vocabulary = (
        f"vocabulary {packed.vocab_size}, context {packed.context_length}, "
        f"identity {packed.identity}, in {packed.directory}"
    )
    return f"{_aligned(lines)}\n{vocabulary}"


def conversations_table(conversations: Conversations, rows: int) -> str:
    """A line a source: its examples, what is trained of them, and its part of a run.

    Args:
        rows: examples that the run reads.
    """
    mixture = conversations.mixture(rows)
    header = ["source", "examples", "tokens", "trained", "dropped", "share", "epochs", "held out"]
    lines = [header]
    for source, weight in zip(conversations.sources, mixture, strict=True):
        share = weight / sum(mixture)
        lines.append(
            [
                source.name,
                f"{source.examples}",
                f"{source.tokens}",
                f"{source.trained_tokens / source.tokens:.1%}",
                f"{sum(source.dropped.values())}",
                f"{share:.1%}",
                f"{rows * share / source.examples:.2f}",
                f"{len(source.validation)}",
            ]
        )
    vocabulary = (
        f"vocabulary {conversations.vocab_size}, context {conversations.context_length}, "
        f"identity {conversations.identity}, in {conversations.directory}"
    )
    reasons = [
        f"{count} {reason} ({source.name})"
        for source in conversations.sources
        for reason, count in source.dropped.items()
        if count
    ]
    dropped = [f"dropped: {', '.join(reasons)}"] if reasons else []
    return "\n".join([_aligned(lines), *dropped, vocabulary])


def examples_table(examples: Examples, names: tuple[str, str], rows: int) -> str:
    """A line a file: its examples and tokens, and the epochs of a run of `rows` examples.

    Args:
        names: what the training and the validation file are called.
    """
    lines = [["file", "examples", "tokens", "read as", "epochs"]]
    epochs = f"{rows / examples.rows:.2f}"
    for name, table, use, times in zip(
        names,
        (examples.train, examples.validation),
        ("training", "validation"),
        (epochs, "-"),
        strict=True,
    ):
        tokens = sum(map(len, table.ids))
        lines.append([name, f"{len(table.ids)}", f"{tokens}", use, times])
    some = ", ".join(examples.classes[:8]) + (", ..." if len(examples.classes) > 8 else "")
    labels = f"{len(examples.classes)} classes ({some})" if some else "labels are numbers"
    return (
        f"{_aligned(lines)}\n{labels}; vocabulary {examples.vocab_size}, at most "
        f"{examples.context_length} tokens an example, identity {examples.identity}"
    )


def stages_table(data: RunData, course: Course) -> str:
    """A line a stage: its rows, and the share and the epochs of each source; empty for one stage.

    A line below names each source of which the stage reads rows again.

    Args:
        data: read in the stages of the course.
        course: of the run; of a stage ahead of its start the first step is told.
    """
    stages, rows, pace = course.stages, course.rows, course.pace
    if len(stages) < 2:
        return ""
    order, lines = data.order(0), []
    for number, stage in enumerate(stages, start=1):
        end = stages[number].row if number < len(stages) else rows
        before, after = order.visits(stage.row), order.visits(end)
        texts, repeats = [], []
        for source, first, last in zip(data.sources, before, after, strict=True):
            if last == first:
                continue
            epochs = f"epochs {first / source.rows:.2f} to {last / source.rows:.2f}"
            texts.append(f"{source.name} {(last - first) / (end - stage.row):.1%} ({epochs})")
            if last > source.rows:
                repeats.append(
                    f"  no row of {source.name} is left over: by the end of stage {number} each "
                    f"was read {last / source.rows:.2f} times"
                )
        where = f"rows {stage.row} to {end - 1}"
        if stage.setting is None:
            where += ", of the run that this one branches from"
        elif stage.row >= pace.row and number > 1:
            where += f", from step {pace.step_of(stage.row)} on"
        lines.append(f"stage {number} of {len(stages)}, {where}: {', '.join(texts)}")
        lines += repeats
    return "\n".join(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of a table, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [cells[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        )
        for cells in lines
    )
