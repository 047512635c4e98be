"""How many keys each layer, or each head, of a trained model needs, from a few images without labels."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from levattn.attention import AttentionSpec
from levattn.models import ModelConfig, ViT, patch_grid
from levattn.training.agreement import cosine_similarity, layer_errors
from levattn.training.attentions import Attention, unrolled, with_attention
from levattn.training.config import from_config_dict
from levattn.training.features import embedding_of
from levattn.training.workdir import provenance, write_json

# Powers of the influence that are tried, see `calibrate`.
_STRENGTHS = (1.0, 0.5, 0.0)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """A number of keys for each layer, or for each of its heads, and why.

    Attributes:
      attention: The spec of each layer.
      error: Relative error of each layer's attention with that many keys.
      uniform_error: The same with the mean number in every layer.
      influence: How far the embedding turns away from that of the dense model, 1 - cosine, when this layer alone
        has the mean number of keys.
      cosine: Similarity of the embedding to that of the dense model, all layers having their budgets.
      uniform_cosine: The same with the mean number in every layer.
      strength: Power of the influence in the weights under which the errors were summed and minimised.
      objective: That sum, as a share of its value with the mean number in every layer.
      num_images: On which all of this was measured.
    """

    attention: tuple[AttentionSpec, ...]
    error: tuple[float, ...]
    uniform_error: tuple[float, ...]
    influence: tuple[float, ...]
    cosine: float
    uniform_cosine: float
    strength: float
    objective: float
    num_images: int

    @property
    def k(self) -> tuple[int | float, ...]:
        """Keys of each layer, the mean where its heads differ."""
        heads = [spec.k_per_head for spec in self.attention]
        return tuple(spec.k if k is None else sum(k) / len(k) for spec, k in zip(self.attention, heads, strict=True))


def calibrate(
    model: ModelConfig,
    params: PyTree,
    batches: Sequence[Float[Array, "_ height width channels"]],
    spec: AttentionSpec,
    *,
    classifier: bool,
    by_head: bool = False,
    target_error: float | None = None,
    candidates: Sequence[int] | None = None,
    seed: int = 0,
) -> Budgets:
    """Chooses the keys of each layer: as many as `spec.k` on average, or as few as reach a target error.

    With a mean, it minimises the sum over the layers of their squared relative error (see `layer_errors`), each as a
    share of that at `spec.k`, times a power of the influence of the layer. The minimum over the candidates is exact,
    by dynamic programming. With power 1 the sum is a first-order estimate of 1 - cosine of the embedding. That holds
    where errors are small; where they are not, the influence of a layer by itself says less, so lower powers are tried
    too, and the budgets of which the embedding comes nearest to that of the dense model are taken. An equal share for
    all layers is among the choices.

    With `by_head` every head has a k of its own, and the errors that are summed are those of the heads by themselves.
    Attention runs once for each distinct k of a layer, so that few candidates are better than many.

    Args:
      model: Of any attention; dense attention is what is compared with.
      params: Of the model.
      batches: Normalised images, of equal size but for the last.
      spec: The method, its options, and the mean number of keys.
      classifier: Whether the output of the model is logits.
      by_head: Choose a k for each head of each layer; with a mean only.
      target_error: Relative error that each layer must reach. None: choose by the mean.
      candidates: Numbers of keys to choose from; `spec.k` is added to them, with a target also the number of tokens.
        None: 4, 6, 8, 12, 16, 24, ... up to all tokens; of heads half, once and twice `spec.k`.
      seed: Of methods that draw at random.

    Returns:
      The budgets. Cost: the dense model on the images, a layer's attention for each layer and candidate, and the whole
      model, compiled anew, for each layer and a few times more.

    Raises:
      ValueError: A spec without k or with a threshold, dense attention, k that exceeds the tokens, or both `by_head`
        and a target.
    """
    if spec.method == "dense" or spec.k is None or spec.eps is not None or spec.k_per_head is not None:
        raise ValueError(f"{spec=} must be of a method that keeps k keys: only k can be chosen for each layer")
    if by_head and target_error is not None:
        raise ValueError(f"{target_error=} must be None with by_head: it is the error of a whole layer")
    model, params = unrolled(model, jax.tree.map(jnp.asarray, params))
    depth = model.dims.depth
    num_tokens = int(np.prod(patch_grid(model, batches[0].shape[1:]))) + model.num_prefix_tokens
    if spec.k > num_tokens:
        raise ValueError(f"k={spec.k} must be in [1, {num_tokens}]: the sequence has {num_tokens} tokens")
    smallest = max(spec.keep_prefix, 1)
    if candidates is None:
        candidates = (spec.k // 2, 2 * spec.k) if by_head else _default_candidates(num_tokens)
    ks = sorted({spec.k, *candidates})
    ks = [k for k in ks if smallest <= k <= num_tokens]
    if target_error is not None:
        ks = sorted({*ks, num_tokens})

    # Rows are the layers, or all heads of the first layer, then all of the second, and so on.
    uniform_specs = [dataclasses.replace(spec, k=k) for k in ks]
    squared = np.moveaxis(layer_errors(model, params, batches, uniform_specs, by_head=by_head, seed=seed), 0, -1)
    squared = squared.reshape(-1, len(ks))
    rows = np.arange(len(squared))
    layers = rows // (len(rows) // depth)

    def attention(chosen: Sequence[int]) -> tuple[AttentionSpec, ...]:
        return tuple(_with_budgets(spec, [ks[i] for i in row]) for row in np.reshape(chosen, (depth, -1)))

    embed = functools.partial(_embed, model, params, batches, classifier=classifier, seed=seed)
    dense = embed(AttentionSpec("dense"))

    def cosine(attention: Attention) -> float:
        return float(cosine_similarity(embed(attention), dense).mean())

    alone = [tuple(spec if i == layer else AttentionSpec("dense") for i in range(depth)) for layer in range(depth)]
    influence = np.array([1 - cosine(attention) for attention in alone]).clip(0)
    uniform_cosine = cosine(spec)
    equal = [ks.index(spec.k)] * len(rows)
    uniform = np.bincount(layers, weights=squared[rows, equal])
    shares = squared / np.where(uniform > 0, uniform, 1)[layers, None]

    def costs(strength: float) -> Float[np.ndarray, "R N"]:
        return shares * (influence**strength)[layers, None]

    if target_error is not None:
        # The last candidate is all tokens, which reach any target but for rounding.
        reached = np.append(np.sqrt(squared[:, :-1]) <= target_error, np.full((depth, 1), True), axis=1)
        chosen, strength = reached.argmax(axis=1).tolist(), 1.0
        found = cosine(attention(chosen))
    else:
        proposals = [(allocate(costs(p), ks, len(rows) * spec.k), p) for p in _STRENGTHS]
        proposals = [(uniform_cosine if c == equal else cosine(attention(c)), c, p) for c, p in proposals]
        found, chosen, strength = max([(uniform_cosine, equal, 1.0), *proposals], key=lambda proposal: proposal[0])
    error = np.sqrt(layer_errors(model, params, batches, [attention(chosen), spec], seed=seed))
    of_choice, of_equal = (float(costs(strength)[rows, c].sum()) for c in (chosen, equal))
    return Budgets(
        attention=attention(chosen),
        error=tuple(error[0].tolist()),
        uniform_error=tuple(error[1].tolist()),
        influence=tuple(influence.tolist()),
        cosine=found,
        uniform_cosine=uniform_cosine,
        strength=strength,
        objective=of_choice / max(of_equal, np.finfo(float).tiny),
        num_images=sum(map(len, batches)),
    )


def _with_budgets(spec: AttentionSpec, ks: Sequence[int]) -> AttentionSpec:
    """The spec with a k for each head, or one k where these are equal."""
    if len(set(ks)) == 1:
        return dataclasses.replace(spec, k=int(ks[0]))
    return dataclasses.replace(spec, k=None, k_per_head=tuple(map(int, ks)))


def allocate(costs: Float[np.ndarray, "L N"], sizes: Sequence[int], total: int) -> list[int]:
    """Picks one size for each row so that sizes sum to `total` exactly and costs to the least that is possible.

    Args:
      costs: Of each size in each row.
      sizes: Positive.
      total: Sum of the chosen sizes; some choice must give it.

    Returns:
      Index of the size of each row. Cost: L N `total` operations.

    Raises:
      ValueError: No choice of sizes gives the total.
    """
    # best[t]: least cost of the rows so far at a sum of t.
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices: list[Int[np.ndarray, " T"]] = []
    for row in costs:
        options = np.full((len(sizes), total + 1), np.inf)
        for i, size in enumerate(sizes):
            if size <= total:
                options[i, size:] = best[: total + 1 - size] + row[i]
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if not np.isfinite(best[total]):
        raise ValueError(f"no choice of {list(sizes)} for {len(costs)} rows sums to {total=}")
    chosen = []
    for choice in reversed(choices):
        chosen.append(int(choice[total]))
        total -= sizes[chosen[-1]]
    return chosen[::-1]


def write_budgets(path: str | os.PathLike, budgets: Budgets) -> None:
    """Writes budgets as JSON, with the provenance of this process; the folder exists."""
    write_json(path, {"provenance": provenance(), **dataclasses.asdict(budgets)})


def read_budgets(path: str | os.PathLike) -> tuple[AttentionSpec, ...]:
    """The attention of each layer, from a file of `write_budgets` or one by hand: `{"attention": [{"k": 8}, ...]}`.

    Raises:
      FileNotFoundError: No such file.
      ValueError: It is not JSON of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"budgets={str(path)!r} does not exist: make it by eval.py --calibrate=32 --out=FOLDER")
    try:
        found: Any = json.loads(path.read_text())
        layers = found["attention"]
        return tuple(from_config_dict(AttentionSpec, layer, name=f"layer {i}") for i, layer in enumerate(layers))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"budgets={str(path)!r} is no file of budgets by layer: {error}") from error


def _default_candidates(num_tokens: int) -> list[int]:
    """Powers of two and the numbers half way between them, from 4 to all tokens."""
    return [k for i in range(2, num_tokens.bit_length()) for k in (2**i, 3 * 2 ** (i - 1)) if k < num_tokens] + [
        num_tokens
    ]


def _embed(model, params, batches, attention, *, classifier, seed) -> Float[np.ndarray, "N R"]:
    model = with_attention(model, attention)
    found = [_embedding(params, images, jax.random.key(seed), model=model, classifier=classifier) for images in batches]
    return np.concatenate([np.asarray(rows, np.float32) for rows in found])


@functools.partial(jax.jit, static_argnames=("model", "classifier"))
def _embedding(params, images, rng, *, model: ModelConfig, classifier: bool):
    output, features = ViT(model).apply({"params": params}, images, rngs={"selection": rng}, return_features=True)
    return embedding_of(output, features, classifier=classifier)
