"""Scores of predictions: GLUE's (Wang et al. 2018, arXiv 1804.07461, table 1).

Shapes: predicted and true (examples,), class numbers 0, 1, ... or real numbers. A score that is
0 / 0 (a class that never occurs and is never predicted, predictions that are all the same) is 0.
"""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64] | NDArray[np.int64]


def accuracy(predicted: Numbers, true: Numbers) -> float:
    """Share of predictions that are right."""
    return float((predicted == true).mean())


def f1(predicted: Numbers, true: Numbers, classes: int) -> float:
    """2 precision recall / (precision + recall): of the second of two classes, else their mean."""
    each = []
    for one in [1] if classes == 2 else range(classes):
        hits = int(((predicted == one) & (true == one)).sum())
        claimed = int((predicted == one).sum() + (true == one).sum())
        each.append(2 * hits / claimed if claimed else 0.0)
    return float(np.mean(each))


def matthews(predicted: Numbers, true: Numbers, classes: int) -> float:
    """Matthews' correlation of any number of classes (Gorodkin 2004, equation 2)."""
    table = np.zeros((classes, classes))
    np.add.at(table, (true.astype(int), predicted.astype(int)), 1)
    t, p, n = table.sum(1), table.sum(0), table.sum()
    below = (n * n - p @ p) * (n * n - t @ t)
    return float((np.trace(table) * n - t @ p) / np.sqrt(below)) if below > 0 else 0.0


def pearson(predicted: Numbers, true: Numbers) -> float:
    """Correlation of the numbers."""
    a, b = predicted - predicted.mean(), true - true.mean()
    below = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / below) if below > 0 else 0.0


def spearman(predicted: Numbers, true: Numbers) -> float:
    """Correlation of their ranks; equal numbers share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(true))


def _ranks(values: Numbers) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
