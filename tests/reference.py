"""Plain float64 numpy for the tests: the definitions, written as they are read, with loops where loops are clearest."""

import numpy as np


def leverage_scores(keys: np.ndarray) -> np.ndarray:
    """Squared row norms of the left singular vectors of an (S, D) matrix whose columns are scaled to equal norms."""
    keys = np.asarray(keys, np.float64)
    norms = np.linalg.norm(keys, axis=0)
    keys = keys / np.where(norms > 0, norms, 1)
    left, singular, _ = np.linalg.svd(keys, full_matrices=False)
    kept = singular > max(keys.shape) * np.finfo(np.float32).eps * singular[0]
    return np.sum(left[:, kept] ** 2, axis=1)


def online_leverage_scores(keys: np.ndarray, rounding: float = 1e-13) -> np.ndarray:
    """Leverage score of the last row of every prefix; singular values under `rounding` of the largest count as zero."""
    keys = np.asarray(keys, np.float64)
    scores = np.zeros(len(keys))
    for j in range(len(keys)):
        left, singular, _ = np.linalg.svd(keys[: j + 1], full_matrices=False)
        scores[j] = np.sum(left[-1, singular > rounding * singular[0]] ** 2)
    return scores


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def attention_over(query, key, value, kept) -> np.ndarray:
    """Softmax attention of `T D` queries, where `kept[t]` lists the keys that query t sees. `T D`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((len(query), value.shape[1]))
    for t, places in enumerate(kept):
        places = np.asarray(places, int)
        if len(places):
            out[t] = softmax(key[places] @ query[t] / np.sqrt(query.shape[1])) @ value[places]
    return out
