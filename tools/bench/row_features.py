"""Features of rows against their true gradients, on the model of a run.

usage: python tools/bench/row_features.py RUN [--pools 4] [--pool 128] [--picks 64] [--out FILE]

Pools are rows that come behind those of the run. The gradient of every row's mean loss is computed:
of all weights (`whole gradient`), and of the last values' projection alone (`exact`). Then for each
kind of feature by which a selection could compare the rows instead:

    correlation   of the distances between rows with those of the true gradients, by ranks
                  (Spearman), over all pairs: with `exact`, and with the whole gradient
    overlap       facility location picks rows of the large sources by whole gradients; the share of
                  these rows that is picked here too
    error         |mean gradient of the picks - mean gradient of the pool| / |the latter|

Kinds: `paper` is one zeroth-order probe in Adam's update, whose history are the slopes of another
pool; `projections` are exact gradients on so many random directions; `hidden` the mean of the last
hidden states. Picks keep the small sources, as CoLM does, but for `random` and `largest loss`.

What would surprise: the whole gradients of a pool are in memory at once, 4 bytes x rows x weights
(1.0 GB for 128 rows of the quickstart's model). Distances and errors are made of their inner
products in float64.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from report import Table, publish
from torch import Tensor, nn

from llmnorm.config.file import load
from llmnorm.exchange.loading import load_model
from llmnorm.models.row_features import (
    Feature,
    Gradient,
    Hidden,
    ZerothOrder,
    directions,
    projection,
)
from llmnorm.objectives.contract import Objective
from llmnorm.selection.colm import AdamNormaliser, CoLM, small_sources
from llmnorm.selection.controls import KeptRows, LargestLoss, Stratified, Uniform

PROJECTIONS = (1, 4, 16, 64, 256)
EPS = 1e-3


class Pool(NamedTuple):
    """What is known of a pool's rows.

    Attributes:
        numbers, sources: (n,) of the rows.
        losses: (n,) means.
        whole, exact: (n, n) inner products of the rows' gradients, float64: of all weights, and of
            the last values' projection.
    """

    numbers: Tensor
    sources: Tensor
    losses: Tensor
    whole: Tensor
    exact: Tensor


def inner_products(rows: Tensor) -> Tensor:
    """Of (n, d) float32 rows, (n, n) in float64, some columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(2**16, dim=1):
        wide = part.double()
        total += wide @ wide.t()
    return total


def coordinates(products: Tensor) -> Tensor:
    """Points (n, n) whose l2 distances are those of the vectors with these inner products."""
    values, vectors = torch.linalg.eigh(products)
    return vectors * values.clamp(min=0).sqrt()


def apart(points: Tensor, metric: str) -> Tensor:
    """Distances (n (n - 1) / 2,) of points (n, k)."""
    return torch.pdist(points.double(), p=1.0 if metric == "l1" else 2.0)


def correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of (m,) numbers: the correlation of their ranks."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def error(products: Tensor, picks: Tensor) -> float:
    """How far the mean gradient of some rows is from that of all, relative to the latter.

    Args:
        products: (n, n) inner products.
        picks: (b,) places.
    """
    n = len(products)
    every = torch.full((n,), 1 / n, dtype=torch.float64)
    gap = -every
    gap[picks] += 1 / len(picks)
    return math.sqrt(float(gap @ products @ gap) / float(every @ products @ every))


def read_pool(model: Any, objective: Objective, first: int, count: int, weight: Tensor) -> Pool:
    """Rows from number `first` on; `weight` is that of the last values' projection."""
    numbers = np.arange(first, first + count)
    weights = [p for p in model.parameters() if p.requires_grad]
    rows = torch.empty(count, sum(p.numel() for p in weights))
    exact = torch.empty(count, weight.numel())
    losses = torch.empty(count)
    for place in range(count):
        (batch,) = objective.read(numbers[place : place + 1], rank=0, world=1, micro_batch=1)
        loss = model(**batch.inputs_on(torch.device("cpu"))).loss
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        found = [
            p.new_zeros(p.shape) if g is None else g for p, g in zip(weights, grads, strict=True)
        ]
        torch.cat([g.flatten() for g in found], out=rows[place])
        exact[place] = next(g.flatten() for p, g in zip(weights, found, strict=True) if p is weight)
        losses[place] = loss.detach()
    sources = torch.from_numpy(objective.sources(numbers))
    return Pool(
        torch.from_numpy(numbers), sources, losses, inner_products(rows), inner_products(exact)
    )


def measure(model: Any, objective: Objective, numbers: Tensor, feature: Feature) -> Tensor:
    """What a feature makes of rows, (n, width)."""
    found = torch.empty(len(numbers), feature.width)
    for batch in objective.read(numbers.numpy(), rank=0, world=1, micro_batch=8):
        made = feature.measure(model, batch.inputs_on(torch.device("cpu")), batch.spans)
        found[batch.rows - int(numbers[0])] = made.features.float()
    return found


def figures(
    pool: Pool, features: dict[str, tuple[Tensor, str]], kept: set[int], budget: int, seed: int
) -> dict[str, dict[str, float]]:
    """The numbers of a pool, a kind each.

    Args:
        pool: its rows.
        features: of each kind the features (n, k) and the metric of their distances.
        kept: the sources whose rows are kept.
        budget: rows that are picked.
        seed: of the draws.
    """
    large = ~torch.isin(pool.sources, torch.tensor(sorted(kept), dtype=torch.int64))
    none = torch.zeros(len(pool.numbers), 0)

    def picks(selector: Any, seen: Tensor) -> Tensor:
        found: Tensor = selector.select(seen, pool.losses, pool.sources, budget, pool.numbers)
        return found

    def by(points: Tensor, metric: str) -> Tensor:
        return picks(CoLM(KeptRows(kept, seed), metric=metric, dimensions=2560), points)

    whole, exact = coordinates(pool.whole), coordinates(pool.exact)
    seen = {**features, "exact": (exact, "l2"), "whole gradient": (whole, "l2")}
    chosen = {
        "random": picks(Uniform(seed), none),
        "stratified": picks(Stratified(KeptRows(kept, seed)), none),
        "largest loss": picks(LargestLoss(), none),
    } | {name: by(points, metric) for name, (points, metric) in seen.items()}
    oracle = {place for place in chosen["whole gradient"].tolist() if large[place]}
    found: dict[str, dict[str, float]] = {}
    for name, places in chosen.items():
        found[name] = {"error": error(pool.whole, places)}
        if oracle:
            found[name]["overlap"] = len(oracle & set(places.tolist())) / len(oracle)
        if name in seen:
            distances = apart(*seen[name])
            found[name]["exact"] = correlation(distances, apart(exact, "l2"))
            found[name]["whole"] = correlation(distances, apart(whole, "l2"))
    return found


def features_of(
    model: Any, objective: Objective, at: nn.Module, pool: Tensor, before: Tensor, seed: int
) -> dict[str, tuple[Tensor, str]]:
    """The features of a pool's rows `pool`, and their metrics; `before` are another pool's rows."""
    probe = ZerothOrder(at, directions(at, 1, seed), EPS)
    history = AdamNormaliser(1)
    history.update(measure(model, objective, before, probe))
    found = {"paper": (history.features(measure(model, objective, pool, probe)), "l1")}
    most = measure(model, objective, pool, Gradient(at, directions(at, max(PROJECTIONS), seed)))
    for count in PROJECTIONS:
        found[f"{count} projection{'s' * (count > 1)}"] = (most[:, :count], "l2")
    hidden = Hidden(model.config.hidden_size)
    found["hidden"] = (measure(model, objective, pool, hidden), "l2")
    return found


def table(found: Sequence[dict[str, dict[str, float]]]) -> Table:
    """Means over the pools, ± their standard errors.

    Args:
        found: `figures` of each pool.
    """
    columns = {
        "exact": "correlation with exact",
        "whole": "with the whole gradient",
        "overlap": "overlap of picks",
        "error": "error of the mean gradient",
    }
    rows = []
    for name in found[0]:
        cells = [name]
        for key in columns:
            values = [pool[name][key] for pool in found if key in pool[name]]
            spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            text = f"{statistics.mean(values):.3f}" if values else "-"
            cells.append(text if spread is None else f"{text} ± {spread:.3f}")
        rows.append(cells)
    title = f"Means of {len(found)} pools"
    return Table(title, ["rows are chosen by", *columns.values()], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, publish."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pools", type=int, default=4)
    parser.add_argument("--pool", type=int, default=128, help="rows of a pool")
    parser.add_argument("--picks", type=int, default=64, help="rows that are picked of it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = load(given.run).config
    objective = config.objective.build(config, alone=True, command="llmnorm data")
    model, _ = load_model(given.run, device="cpu")
    at = projection(model.model.layers[-1])[1]
    assert isinstance(at.weight, Tensor)
    sources = objective.data.sources
    kept = small_sources([source.rows for source in sources]) if len(sources) > 1 else set()
    behind = config.total_steps(objective.data.rows) * config.pool
    found = []
    for number in range(given.pools):
        first = behind + (number + 1) * given.pool
        pool = read_pool(model, objective, first, given.pool, at.weight)
        before = pool.numbers - given.pool
        seen = features_of(model, objective, at, pool.numbers, before, config.seed)
        found.append(figures(pool, seen, kept, given.picks, config.seed))
    names = [source.name for number, source in enumerate(sources) if number in kept]
    title = f"Features of rows against true gradients: {given.picks} of {given.pool} rows"
    publish(given.out, title, [table(found)], {"pools": found, "kept": names})


if __name__ == "__main__":
    main()
