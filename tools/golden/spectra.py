"""Measures of trained weights."""

from collections.abc import Iterator

from tools.golden.vectors import Result, Vectors, relative, serves


@serves("measure/farms")
def farms(vectors: Vectors) -> Iterator[Result]:
    """Pooled eigenvalues and Hill's exponent from the middle one on, of every weight.

    Their other start (`xmin_peak`, of the nearest fit) and learning rates are not ours.
    """
    from llmnorm.analysis.depth.spectra import hill, window_eigenvalues

    eigenvalues, alphas = 0.0, 0.0
    for number, config in enumerate(vectors.hyperparameters["configs"]):
        if config["fix_fingers"] != "xmin_mid":
            continue
        for index, alpha in enumerate(vectors[f"alpha_{number}"].tolist()):
            pooled = window_eigenvalues(
                vectors[f"weight_{index}"],
                window=config["num_row_samples"],
                ops=config["sampling_ops_per_dim"],
            )
            reference = vectors[f"eigs_{number}/{index}"]
            eigenvalues = max(eigenvalues, relative(pooled, reference))
            alphas = max(alphas, abs(hill(pooled) - alpha))
    yield Result("eigenvalues", eigenvalues, vectors.tolerance["eigs_max_rel"])
    yield Result("alpha", alphas, vectors.tolerance["alpha_max_abs"])
