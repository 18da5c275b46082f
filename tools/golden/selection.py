"""CoLM's mini-batch coresets."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tools.golden.vectors import NotServed, Result, Vectors, absolute, largest, relative, serves

UNAMBIGUOUS = 1e-4  # relative gap of the best two gains, from which on the order of picks is exact
METRICS = {"l1": "l1", "euclidean": "l2", "cosine": "cosine"}


def unlike(got: Tensor, reference: Tensor) -> float:
    """How many numbers differ; infinite where there are more or fewer of them."""
    if got.shape != reference.shape:
        return torch.inf
    return float((got != reference).sum())


@serves("colm/facility_location")
def facility_location(vectors: Vectors) -> Iterator[Result]:
    """Similarity, picks in order, what each adds, and cluster sizes."""
    from llmnorm.selection.facility_location import (
        cluster_sizes,
        facility_location,
        similarity_of,
    )

    limits = vectors.tolerance
    for case in vectors.hyperparameters["cases"]:
        case.ignore("n", "k", "seed")
        own = vectors.below(str(case["case"]))
        if case["metric"] not in METRICS:
            raise NotServed("metric", case["metric"])
        alike = torch.from_numpy(similarity_of(own["features"], METRICS[case["metric"]]))
        recorded = own["similarity"].clone()
        if case["metric"] == "euclidean":
            # The official distances are made of products, so that of a row to itself is not 0 but
            # the rounding of them, 3e-3 of these rows.
            recorded.diagonal().copy_(alike.diagonal())
        yield Result("similarity", relative(alike, recorded), float(limits["similarity_rel"]))
        order, gains = facility_location(own["similarity"].numpy(), case["budget"])
        yield Result(
            "gains", relative(torch.from_numpy(gains), own["gains"]), float(limits["gains_rel"])
        )
        objective = torch.tensor([gains.sum()])
        yield Result("objective", relative(objective, own["objective"]), float(limits["gains_rel"]))
        if case["min_relative_margin"] > UNAMBIGUOUS:
            yield Result("order", unlike(torch.from_numpy(order), own["order"]), 0)
            sizes = torch.from_numpy(cluster_sizes(own["similarity"].numpy(), order))
            yield Result("cluster sizes", unlike(sizes, own["weights"]), 0)


@serves("colm/sparsify")
def sparsify(vectors: Vectors) -> Iterator[Result]:
    """Each source's coordinates in the order of their importance, and its rows' values there."""
    from llmnorm.selection.colm import coordinates

    for case in vectors.hyperparameters["cases"]:
        case.ignore("n", "d", "seed")
        own = vectors.below(str(case["case"]))
        features, sources = own["features"], own["sources"]
        kept = torch.full_like(own["kept_dimensions"], -1)
        masked = torch.zeros_like(own["masked"])
        for source in range(case["n_sources"]):
            rows = sources == source
            if rows.any():
                found = coordinates(features[rows], case["h"], case["topk"])
                kept[source] = found
                masked[rows] = features[rows][:, found]
        yield Result("coordinates", unlike(kept, own["kept_dimensions"]), 0)
        yield Result("masked", unlike(masked, own["masked"]), 0)


@serves("colm/adam_normalisation")
def adam_normalisation(vectors: Vectors) -> Iterator[Result]:
    """Features and moments of some steps, with the recorded picks."""
    from llmnorm.selection.colm import AdamNormaliser

    p, limits = vectors.hyperparameters, vectors.tolerance
    p.ignore("n", "budget")
    betas = p["beta1"], p["beta2"]
    normaliser = AdamNormaliser(p["d"], betas=betas, eps=p["eps"], dtype=torch.float32)
    for step in range(p["steps"]):
        own = vectors.below(str(step))
        features = normaliser.features(own["raw"])
        yield Result("features", relative(features, own["features"]), limits["features_rel"])
        normaliser.update(own["raw"][own["selected"]])
        yield Result("m", absolute(normaliser.first, own["m"]), limits["m_abs"])
        yield Result("v", relative(normaliser.second, own["v"]), limits["v_rel"])


@serves("colm/budgets")
def budgets(vectors: Vectors) -> Iterator[Result]:
    """Budgets by source: exact, up to the order of sources with equally many rows."""
    from llmnorm.selection.controls import allocate

    for case in vectors.hyperparameters["cases"]:
        own = vectors.below(str(case["case"]))
        sizes = case["sizes"]
        counts = torch.bincount(own["sources"], minlength=len(sizes)).tolist()
        assert counts == list(sizes), (counts, sizes)
        shares = allocate(counts, case["budget"], case["start"])
        pairs = sorted(zip(counts, shares, strict=True))
        wanted = sorted(zip(counts, own["budgets"].tolist(), strict=True))
        yield Result("budgets", float(pairs != wanted), 0)


@serves("colm/pipeline")
def pipeline(vectors: Vectors) -> Iterator[Result]:
    """Steps from gradients to picks: Adam's update, coordinates, budgets, facility location.

    The picks of a step whose order is ambiguous are compared by their number in each source and by
    what of the objective they reach.
    """
    from llmnorm.selection.colm import AdamNormaliser, coordinates, pick
    from llmnorm.selection.controls import KeptRows
    from llmnorm.selection.facility_location import similarity_of

    p, limits = vectors.hyperparameters, vectors.tolerance
    p.ignore("n", "n_sources", "features")
    p.only(source_wise="proportional", start="floor", topk="largest")
    if p["metric"] not in METRICS:
        raise NotServed("metric", p["metric"])
    metric, dimensions, budget = METRICS[p["metric"]], p["h"], p["budget"]
    keep = set(p["keep_sources"])
    betas = p["beta1"], p["beta2"]
    normaliser = AdamNormaliser(p["d"], betas=betas, eps=p["eps"], dtype=torch.float32)
    for step in range(p["steps"]):
        own = vectors.below(str(step))
        raw, sources = own["raw"], own["sources"]
        numbers = torch.arange(len(raw))
        large = torch.tensor([source not in keep for source in sources.tolist()])
        features = normaliser.features(raw)
        recorded = torch.zeros_like(features)
        recorded[large] = own["adam_features"]
        yield Result(
            "features",
            relative(features[large], own["adam_features"]),
            limits["adam_features_rel"],
        )
        masked = torch.zeros(len(raw), min(dimensions, raw.shape[1]))
        for source in sources[large].unique():
            rows = sources == source
            masked[rows] = recorded[rows][:, coordinates(recorded[rows], dimensions)]
        exact = p["min_relative_margin"][step] > UNAMBIGUOUS
        if exact:  # where features tie, so do the coordinates
            yield Result("masked", largest(masked[large] - own["masked_features"]), 0)
        picks: list[Tensor] = []
        reached: list[float] = []
        apart: list[float] = []
        theirs = own["selected"]

        def inside(rows: Tensor, count: int) -> Tensor:
            found = pick(recorded, rows, count, metric, dimensions)  # noqa: B023
            picks.append(found.order)  # noqa: B023
            reached.append(found.covered)  # noqa: B023
            place = {row: at for at, row in enumerate(rows.tolist())}
            chosen = [place[row] for row in theirs.tolist() if row in place]  # noqa: B023
            assert len(chosen) == count, "another budget than recorded"
            made = recorded[rows]  # noqa: B023
            alike = similarity_of(made[:, coordinates(made, dimensions)], metric)
            covered = alike[:, chosen].max(1, initial=0.0).astype("float64").sum()
            apart.append(abs(found.covered - covered) / max(covered, 1e-30))  # noqa: B023
            return found.order

        kept = KeptRows(keep, seed=0)
        chosen = kept.select(sources, budget, numbers, inside)
        order = torch.cat([numbers[~large], *picks])
        if exact:
            yield Result("selected", unlike(order, theirs), 0)
        yield Result("number", unlike(torch.tensor(len(chosen)), torch.tensor(len(theirs))), 0)
        yield Result("objective", max(apart, default=0.0), 1e-5)
        taken = theirs[large[theirs]]
        normaliser.update(raw[taken])
        yield Result("m", absolute(normaliser.first, own["m"]), limits["m_abs"])
        yield Result("v", relative(normaliser.second, own["v"]), limits["v_rel"])


@serves("colm/zeroth_order")
def zeroth_order(vectors: Vectors) -> Iterator[Result]:
    """Losses of rows on both sides of a direction, and their difference: a layer in float64."""
    import torch.nn.functional as F

    from llmnorm.models.row_features import perturbed

    p, limits = vectors.hyperparameters, vectors.tolerance
    p.ignore("n", "seq", "hidden", "vocab", "lora_rank")
    p.only(probes=1, selection="grad", perturbed=("v_proj.weight", "v_proj.lora_B"))
    eps, x, direction = p["eps"], vectors["hidden"], vectors["z"]
    lora = p["perturbed"] == "v_proj.lora_B"
    weight = vectors["lora_B"] if lora else vectors["v_weight"]
    at = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=x.dtype)
    at.weight.data.copy_(weight)
    kept = x @ vectors["v_weight"].t() if lora else torch.zeros(())

    def losses() -> Tensor:
        v = kept + at(x @ vectors["lora_A"].t() if lora else x)
        logits = (x + vectors["attention"] @ v @ vectors["o_weight"].t()) @ vectors[
            "unembedding"
        ].t()
        flat = logits[:, :-1].flatten(0, 1), vectors["labels"][:, 1:].flatten()
        return F.cross_entropy(*flat, reduction="none").view(len(x), -1).mean(1)

    sides = []
    for sign in (1, -1):
        with torch.no_grad(), perturbed(at, direction, sign * eps):
            sides.append(losses())
    slope = (sides[0] - sides[1]) / (2 * eps)
    yield Result("losses", absolute(torch.stack(sides, 1), vectors["losses"]), limits["losses_abs"])
    yield Result(
        "projected gradient",
        absolute(slope, vectors["projected_gradient"]),
        limits["projected_gradient_abs"],
    )
    features = slope[:, None] * direction.flatten()
    yield Result("features", absolute(features, vectors["features"]), limits["features_abs"])
    exact = torch.stack(
        [
            (torch.autograd.grad(loss, at.weight, retain_graph=True)[0] * direction).sum()
            for loss in losses()
        ]
    )
    apart = absolute(slope, vectors["exact_directional_derivative"])
    yield Result("exact derivative", apart, 1.01 * limits["finite_vs_exact_abs"])
    yield Result("derivative", absolute(exact, vectors["exact_directional_derivative"]), 1e-10)
