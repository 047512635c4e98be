"""Is a contender right? Its numbers against definitions written in float64 numpy, on the first and the last head."""

import dataclasses
import functools

import jax
import numpy as np

from levattn.attention.layer import choose_coreset
from levattn.attention.spec import AttentionSpec
from levattn.bench.contenders import Contender, Inputs
from levattn.bench.timing import Program, head

# Norm of the error over the norm of the reference. Float32 products may run in TF32 on GPUs, which has 10 bits.
TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
_GRADIENT_FACTOR = 2  # gradients pass through twice as many roundings
_MAX_PAIRS = 2**26  # of queries and keys in the reference of a head; beyond, some of the queries are looked at
_SLACK = 1e-3  # by which a kept key may score below the k-th best: scores are computed in float32
_BLOCK = 2**22

# The methods whose keys stand for themselves. Of the others the coreset is taken as it is.
_KEEPS = ("leverage", "row_norm", "random", "kmeans", "oracle")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the check found; the worst of the heads looked at.

    Attributes:
      error: Relative error of the output; None if it is not finite.
      gradient_error: The same of the worst gradient; None without gradients or a reference for them.
      recall: Share of the k keys of highest float64 score that was kept; None where keys are not kept by such a score.
      complaint: What is wrong; None if nothing is.
    """

    error: float | None
    gradient_error: float | None = None
    recall: float | None = None
    complaint: str | None = None


def check(contender: Contender, inputs: Inputs, program: Program, backward: bool) -> Verdict:
    """Runs the program and compares.

    Dense attention is compared with softmax over all keys. A method that keeps keys is compared with softmax over the
    keys it says it keeps, and these, where it ranks by leverage or norm, with the best by float64 scores: QR for
    leverage. A method that merges keys is compared with softmax over its weighted keys, and its gradients only
    have to be finite, as part of them flows through the merging. Sequences too long for all pairs of queries
    and keys in float64 are compared on some of their queries, without the gradients of keys and values.

    Args:
      contender: Whose program it is.
      inputs: Queries, keys, values, cotangent.
      program: As built for them.
      backward: Whether its outputs hold gradients.
    """
    batch, _, num_heads, _ = inputs[0].shape
    places = sorted({(0, 0), (batch - 1, num_heads - 1)})
    found = program.heads(places)
    spec = contender.spec
    coreset = None if spec is None else _choose(*inputs[:3], spec=spec)
    errors, gradient_errors, recalls, complaints = [], [], [], []
    for place, got in zip(places, found, strict=True):
        query, key, value, cotangent = (head(x, *place) for x in inputs)
        indices, log_weights = np.arange(len(key)), np.zeros(len(key))
        keys, values, keeps = key, value, True
        if spec is not None:
            valid = np.asarray(coreset.valid[place])
            indices, log_weights = (np.asarray(x[place])[valid] for x in (coreset.indices, coreset.log_weights))
            keeps = spec.method in _KEEPS
            keys, values = (key[indices], value[indices]) if keeps else (
                head(x, *place)[valid] for x in (coreset.keys, coreset.values)
            )  # fmt: skip
            if (ranked := scores(spec, key)) is not None:
                recalls.append(recall_of(ranked, spec.k, indices))
                complaints.append(wrong_keys(ranked, spec.k, indices))
        rows = _rows(len(query), len(keys))
        expected = reference(query[rows], keys, values, log_weights, cotangent[rows])
        errors.append(_relative(got[0][rows], expected[0]))
        if not all(np.isfinite(x).all() for x in got):
            complaints.append("not finite")
        if backward and keeps:
            gradient_errors.append(_relative(got[1][rows], expected[1]))
            if len(rows) == len(query):
                for x, of_kept in zip(got[2:], expected[2:], strict=True):
                    of_all = np.zeros_like(x)
                    of_all[indices] = of_kept
                    gradient_errors.append(_relative(x, of_all))
    limit = TOLERANCE[inputs[0].dtype.name]
    error, gradient_error = max(errors), max(gradient_errors, default=None)
    if not error <= limit:
        complaints.append(f"the output is off by {error:.2g}, more than {limit:g}")
    if gradient_error is not None and not gradient_error <= _GRADIENT_FACTOR * limit:
        complaints.append(f"a gradient is off by {gradient_error:.2g}, more than {_GRADIENT_FACTOR * limit:g}")
    return Verdict(
        error=_finite(error),
        gradient_error=_finite(gradient_error),
        recall=float(np.mean(recalls)) if recalls else None,
        complaint="; ".join(dict.fromkeys(filter(None, complaints))) or None,
    )


def reference(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, log_weights: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Softmax attention of one head in float64, and the gradients of <output, cotangent>.

    Args:
      query: `T D`.
      keys: `K D`.
      values: `K D`.
      log_weights: `K`, added to the logits.
      cotangent: `T D`.

    Returns:
      The output, and the gradients by queries, keys and values.
    """
    scale = query.shape[1] ** -0.5
    outs, by_query = np.empty_like(cotangent), np.empty_like(query)
    by_keys, by_values = np.zeros_like(keys), np.zeros_like(values)
    block = max(_BLOCK // len(keys), 1)
    for start in range(0, len(query), block):
        at = slice(start, start + block)
        logits = query[at] @ keys.T * scale + log_weights
        probs = np.exp(logits - logits.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)
        outs[at] = probs @ values
        by_probs = cotangent[at] @ values.T
        by_logits = probs * (by_probs - np.sum(probs * by_probs, 1, keepdims=True)) * scale
        by_query[at] = by_logits @ keys
        by_keys += by_logits.T @ query[at]
        by_values += probs.T @ cotangent[at]
    return outs, by_query, by_keys, by_values


def scores(spec: AttentionSpec, keys: np.ndarray) -> np.ndarray | None:
    """Float64 scores of the keys of a head (`S D`, of full rank) for the methods that rank by one, else None."""
    match spec.method:
        case "leverage":
            return np.sum(np.square(np.linalg.qr(keys)[0]), axis=1)
        case "row_norm":
            return np.sum(np.square(keys), axis=1)
    return None


def recall_of(ranked: np.ndarray, k: int, indices: np.ndarray) -> float:
    """Share of the k keys of highest score that are among `indices`."""
    best = np.argsort(-ranked, kind="stable")[:k]
    return len(np.intersect1d(best, indices)) / k


def wrong_keys(ranked: np.ndarray, k: int, indices: np.ndarray) -> str | None:
    """What is wrong with keeping the keys at `indices`; None if they are the best k, but for rounding of the scores."""
    if len(np.unique(indices)) != k:
        return f"it keeps {len(np.unique(indices))} keys of k={k}"
    worst = ranked[indices].min() / np.sort(ranked)[-k]
    return f"a kept key scores {worst:.3f} of the k-th best" if worst < 1 - _SLACK else None


@functools.partial(jax.jit, static_argnames="spec")
def _choose(query, key, value, *, spec):
    return choose_coreset(query, key, value, spec)


def _rows(num_queries: int, num_keys: int) -> np.ndarray:
    """Queries to compare, the first and the last among them: padding goes wrong at the end."""
    return np.unique(np.linspace(0, num_queries - 1, min(num_queries, max(_MAX_PAIRS // num_keys, 2))).astype(int))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _finite(x: float | None) -> float | None:
    return x if x is not None and np.isfinite(x) else None
