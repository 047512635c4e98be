"""Whether features still say what is in an image: classifiers fitted on dense features, read out from others."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int

from levattn.training.config import ProbeConfig

DEFAULTS = ProbeConfig()


class TooFewImages(ValueError):
    """A class has fewer images than there are folds."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Accuracies of one set of features, fractions.

    Attributes:
      linear: Of the linear probe, the mean over the seeds; every image is held out once in each.
      linear_std: Its standard deviation over the seeds.
      knn: Of the k-NN classifier, the mean over the seeds.
    """

    linear: float
    linear_std: float
    knn: float


def probe(
    dense: Float32[np.ndarray, "N R"],
    others: Sequence[Float32[np.ndarray, "N R"]],
    labels: Int[np.ndarray, " N"],
    config: ProbeConfig = DEFAULTS,
) -> list[ProbeResult]:
    """Fits on the dense features of the training folds, and classifies the other features of the fold held out.

    So nothing at all is fitted to the features that are judged. Both classifiers look at directions only: the linear
    probe is multinomial logistic regression on features scaled to length 1, neighbours are those of largest cosine
    similarity. (Scaling every feature to unit variance, as is common, blows up those that hardly vary under dense
    attention: it took 20 points from a CLIP model under leverage, and nothing from the dense one.)

    Args:
      dense: Features to fit on, one row an image.
      others: Features of the same images to judge; give `dense` as one of them for the ceiling.
      labels: Class of each image.
      config: Folds, seeds and the rest.

    Returns:
      A result for each of `others`.

    Raises:
      ValueError: Fewer than two classes.
      TooFewImages: A class with fewer images than there are folds.
    """
    # Slow to import, and only needed here.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs images of at least two classes, and all of these {len(labels)} are of one")
    if counts.min() < config.folds:
        raise TooFewImages(
            f"folds={config.folds} needs as many images of every class, and class {classes[counts.argmin()]} has "
            f"{counts.min()}: use fewer folds or more images"
        )
    hits = np.zeros((2, len(others), config.seeds))
    for seed in range(config.seeds):
        for fit, held_out in StratifiedKFold(config.folds, shuffle=True, random_state=seed).split(dense, labels):
            linear = LogisticRegression(C=1 / config.regularisation, max_iter=2000)
            nearest = KNeighborsClassifier(min(config.neighbours, len(fit)), metric="cosine")
            for kind, classifier in enumerate((make_pipeline(Normalizer(), linear), nearest)):
                classifier.fit(dense[fit], labels[fit])
                for i, features in enumerate(others):
                    hits[kind, i, seed] += np.sum(classifier.predict(features[held_out]) == labels[held_out])
    linear, knn = hits / len(labels)
    return [
        ProbeResult(float(of_linear.mean()), float(of_linear.std()), float(of_knn.mean()))
        for of_linear, of_knn in zip(linear, knn, strict=True)
    ]
