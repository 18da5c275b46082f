"""What `llmnorm data CONFIG --show N` and `--stats` print of prepared data."""

import numpy as np

from llmnorm.data.loader import IGNORED, Loader
from llmnorm.data.packed import PackedData
from llmnorm.data.tokenizer import TextEncoder


def show(packed: PackedData, count: int, *, seed: int = 0) -> None:
    """Prints the run's first `count` rows as the model sees them.

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


def stats(packed: PackedData, tokens_budget: int | None = None) -> None:
    """Prints documents, tokens, bytes per token and the epochs of each source at the budget."""
    columns = "documents", "MB", "tokens", "bytes/token", "rows", "share", "epochs", "held out kB"
    print(f"{'source':<16}" + "".join(f"{column:>13}" for column in columns))
    total = sum(source.weight for source in packed.sources)
    for s in packed.sources:
        share = s.weight / total
        rows = None if tokens_budget is None else tokens_budget / packed.context_length * share
        cells = (
            f"{s.documents}",
            f"{s.bytes / 1e6:.2f}",
            f"{s.tokens}",
            f"{s.bytes / s.tokens:.2f}",
            f"{s.rows}",
            f"{share:.1%}",
            "-" if rows is None else f"{rows / s.rows:.2f}",
            f"{s.validation_bytes / 1e3:.0f}",
        )
        print(f"{s.name:<16}" + "".join(f"{cell:>13}" for cell in cells))
    print(
        f"vocabulary {packed.vocab_size}, context {packed.context_length}, "
        f"identity {packed.identity}, in {packed.directory}"
    )
