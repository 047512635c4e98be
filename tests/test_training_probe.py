"""Probes are fitted on dense features alone, and judge others by the folds that were held out."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from levattn.training.config import ProbeConfig
from levattn.training.probe import probe

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(4), 15)
DENSE = (RNG.normal(size=(4, 8))[LABELS] + 0.7 * RNG.normal(size=(60, 8))).astype(np.float32)
OTHER = (DENSE + RNG.normal(size=DENSE.shape)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_hand(features, seed):
    """Right answers of both classifiers, by loops over folds and, for the neighbours, over images."""
    hits = np.zeros(2)
    for fit, held_out in StratifiedKFold(3, shuffle=True, random_state=seed).split(DENSE, LABELS):
        linear = LogisticRegression(C=100.0, max_iter=2000).fit(unit(DENSE[fit]), LABELS[fit])
        hits[0] += linear.score(unit(features[held_out]), LABELS[held_out]) * len(held_out)
        for i in held_out:
            near = np.argsort(-unit(DENSE[fit]) @ unit(features[i : i + 1])[0])[:5]
            hits[1] += np.bincount(LABELS[fit][near], minlength=4).argmax() == LABELS[i]
    return hits / len(LABELS)


def test_a_probe_is_scikit_learn_by_hand():
    config = ProbeConfig(folds=3, seeds=2)
    for features, result in zip((DENSE, OTHER), probe(DENSE, [DENSE, OTHER], LABELS, config), strict=True):
        expected = np.array([by_hand(features, seed) for seed in range(2)])
        assert result.linear == pytest.approx(expected[:, 0].mean())
        assert result.linear_std == pytest.approx(expected[:, 0].std())
        assert result.knn == pytest.approx(expected[:, 1].mean())


def test_nothing_is_fitted_to_the_features_that_are_judged():
    """Noise in place of features is at chance, even where it is the same noise for each class that could be learnt."""
    leak = RNG.normal(size=(4, 8))[LABELS].astype(np.float32) * 10
    dense, leaky = probe(DENSE, [DENSE, leak], LABELS, ProbeConfig(seeds=1))
    assert dense.linear > 0.8
    # Every image of a class gets the same answer, so the accuracy is a multiple of a quarter but for the folds.
    assert leaky.linear < 0.6


def test_the_length_of_features_does_not_matter():
    scaled = OTHER * RNG.uniform(0.5, 20, size=(60, 1)).astype(np.float32)
    plain, longer = probe(DENSE, [OTHER, scaled], LABELS, ProbeConfig(seeds=1))
    assert (plain.linear, plain.knn) == (longer.linear, longer.knn)


def test_labels_that_cannot_be_divided_into_folds_are_refused():
    with pytest.raises(ValueError, match="at least two classes"):
        probe(DENSE, [DENSE], np.zeros(60, int))
    labels = np.where(np.arange(60) < 4, 7, LABELS)
    with pytest.raises(ValueError, match=r"folds=5 .* class 7 has 4"):
        probe(DENSE, [DENSE], labels)
    with pytest.raises(ValueError, match="folds=1 must be at least 2"):
        ProbeConfig(folds=1)
