"""GLUE's scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.objectives.scores import accuracy, f1, matthews, pearson, spearman

PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20)


def test_by_hand() -> None:
    """Oracle: three hits of five; precision 2/3, recall 2/2; a line and its ranks."""
    predicted, true = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 0])
    assert accuracy(predicted, true) == 0.8
    assert f1(predicted, true, 2) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert matthews(predicted, true, 2) == pytest.approx((2 * 2 - 1 * 0) / (3 * 2 * 3 * 2) ** 0.5)
    x, y = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 4.0, 4.0, 25.0])
    assert spearman(x, y) == pytest.approx(1) and 0.9 < pearson(x, y) < 0.99
    assert pearson(x, -2 * x + 1) == pytest.approx(-1)


def test_what_has_no_score_is_zero() -> None:
    """Oracle: 0 / 0 is 0, never nan."""
    same, true = np.zeros(4, np.int64), np.array([0, 0, 1, 1])
    assert matthews(same, true, 2) == pearson(same * 1.0, true) == 0
    assert f1(same, same, 2) == 0 and spearman(same, true) == 0


@settings(max_examples=25)
@given(PAIRS)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_they_are_sklearns_and_scipys(pairs: list[tuple[int, int]]) -> None:
    """Oracle: scikit-learn and scipy, where they are installed."""
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    predicted, true = (np.array(column) for column in zip(*pairs, strict=True))
    kept = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
    assert f1(predicted, true, 3) == pytest.approx(metrics.f1_score(true, predicted, **kept))
    assert matthews(predicted, true, 3) == pytest.approx(
        metrics.matthews_corrcoef(true, predicted), abs=1e-12
    )
    if len(set(predicted)) > 1 < len(set(true)):
        for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
            assert ours(predicted * 1.0, true * 1.0) == pytest.approx(
                theirs(predicted, true)[0], abs=1e-12
            )
