"""Measures of trained weights."""

from collections.abc import Iterator

from tools.golden.vectors import NotServed, Result, Vectors, relative, serves


@serves("measure/farms")
def farms(vectors: Vectors) -> Iterator[Result]:
    """Pooled eigenvalues of every weight, and Hill's exponent from one of the middle ones on.

    The learning rates that such a file may hold beside them are a training recipe, which we lack.
    """
    from llmnorm.analysis.depth.spectra import hill, window_eigenvalues

    p = vectors.hyperparameters
    # Thresholds of the zeros, if they are filtered, and of the histogram of `xmin_peak`.
    p.ignore("lr", "bins", "evals_thresh")
    p.only(filter_zeros=False)
    middle = p.get("xmin_pos", 2)
    eigenvalues, alphas, refused = [], [], []
    for number, config in enumerate(p["configs"]):
        start, ops = config["fix_fingers"], config["sampling_ops_per_dim"]
        windows = {"window": config["num_row_samples"], "ratio": config.get("Q_ratio", 1.0)}
        if start != "xmin_mid":
            refused.append(NotServed("fix_fingers", start))
        elif not isinstance(ops, int):
            refused.append(NotServed("sampling_ops_per_dim", ops))
        else:
            for index, alpha in enumerate(vectors[f"alpha_{number}"].tolist()):
                pooled = window_eigenvalues(vectors[f"weight_{index}"], ops=ops, **windows)
                eigenvalues.append(relative(pooled, vectors[f"eigs_{number}/{index}"]))
                alphas.append(abs(hill(pooled, int(len(pooled) / middle)) - alpha))
    if alphas:
        yield Result("eigenvalues", max(eigenvalues), vectors.tolerance["eigs_max_rel"])
        yield Result("alpha", max(alphas), vectors.tolerance["alpha_max_abs"])
    for refusal in refused:
        raise refusal
