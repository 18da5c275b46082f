"""Validation: loss, perplexity and bits per byte, source by source.

Every token of the validation text is charged exactly once (the last row is padded with ignored
labels), so bits per byte = summed loss / ln 2 / bytes of the text, whatever the tokenizer; it can
be held against a compressor's rate on the same text. Totals weigh the sources by their training
bytes.
"""

import math
from typing import Any

import torch
from torch import nn

from llmnorm.data.loader import evaluation_batches
from llmnorm.data.packed import PackedData
from llmnorm.training.ema import EMA
from llmnorm.training.parallel import Parallel


@torch.no_grad()
def evaluate(
    model: nn.Module,
    packed: PackedData,
    *,
    micro_batch: int,
    parallel: Parallel,
    ema: EMA | None = None,
) -> dict[str, Any]:
    """The validation figures of `model` on every source of `packed`.

    Args:
        micro_batch: rows at once; the shape of every batch.
        parallel: this process; each evaluates its part of the rows, the sums are reduced.
        ema: the weights' moving average, evaluated too.

    Returns:
        `{"loss", "perplexity", "bits_per_byte", "sources": {name: the same three}}`, loss in nats
        a token; with `ema` the same of the averaged weights under "ema".
    """
    was_training = model.training
    model.eval()
    figures = _evaluate(model, packed, micro_batch, parallel)
    if ema is not None:
        with ema.in_place_of_weights():
            figures["ema"] = _evaluate(model, packed, micro_batch, parallel)
    model.train(was_training)
    return figures


def _evaluate(
    model: nn.Module, packed: PackedData, micro_batch: int, parallel: Parallel
) -> dict[str, Any]:
    sources: dict[str, dict[str, float]] = {}
    for index, source in enumerate(packed.sources):
        # Summed in float64: the total is the same to the last digits however rows are spread.
        total = torch.zeros(2, dtype=torch.float64)
        for batch in evaluation_batches(packed, index, parallel.rank, parallel.world, micro_batch):
            count = int((batch["shift_labels"] != -100).sum())
            if count == 0 and not parallel.spread:  # shards are gathered from all processes
                continue
            with parallel.autocast():
                loss = model(
                    input_ids=batch["input_ids"].to(parallel.device),
                    position_ids=batch["position_ids"].to(parallel.device),
                    shift_labels=batch["shift_labels"].to(parallel.device),
                    num_items_in_batch=1.0,
                    use_cache=False,
                ).loss
            total += torch.tensor([float(loss), count], dtype=torch.float64)
        summed, tokens = parallel.reduce(total).tolist()
        sources[source.name] = _figures(summed / tokens, summed / source.validation_bytes)
    weights = {s.name: s.bytes for s in packed.sources}
    share = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    loss = sum(share[name] * figures["loss"] for name, figures in sources.items())
    bits = sum(share[name] * figures["bits_per_byte"] for name, figures in sources.items())
    return {**_figures(loss, bits * math.log(2)), "sources": sources}


def _figures(nats_per_token: float, nats_per_byte: float) -> dict[str, float]:
    return {
        "loss": nats_per_token,
        "perplexity": math.exp(min(nats_per_token, 700.0)),
        "bits_per_byte": nats_per_byte / math.log(2),
    }
