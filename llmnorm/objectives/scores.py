"""Scores of predictions: those of GLUE (Wang et al. 2018, arXiv 1804.07461, table 1).

Shapes: predicted and true (examples,), class numbers 0, 1, ... or real numbers. A score that would
be 0 / 0 is 0: F1 of a class that neither occurs nor is predicted, a correlation with a constant.
"""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64] | NDArray[np.int64]


def accuracy(predicted: Numbers, true: Numbers) -> float:
    """Share of predictions that are right."""
    return float((predicted == true).mean())


def f1(predicted: Numbers, true: Numbers, classes: int) -> float:
    """F1 = 2 precision recall / (precision + recall).

    Of two classes, that of class 1; of more, the mean over the classes.
    """
    each = []
    for number in [1] if classes == 2 else range(classes):
        hits = int(((predicted == number) & (true == number)).sum())
        claimed = int((predicted == number).sum() + (true == number).sum())
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
    """Pearson's correlation of the numbers."""
    a, b = predicted - predicted.mean(), true - true.mean()
    below = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / below) if below > 0 else 0.0


def spearman(predicted: Numbers, true: Numbers) -> float:
    """Spearman's correlation: Pearson's of the ranks; equal numbers get the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(true))


def _ranks(values: Numbers) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
