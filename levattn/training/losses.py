"""Cross-entropies, label smoothing and MixUp, on device. Losses are per example: evaluation masks its padding."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key


def smooth_targets(labels: Int[Array, " B"], num_classes: int, smoothing: float = 0.0) -> Float[Array, "B N"]:
    """One-hot targets with `smoothing` of their mass spread evenly over all classes, the right one included."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(
    logits: Float[Array, "B N"], targets: Float[Array, "B N"], kind: Literal["softmax", "sigmoid"] = "softmax"
) -> Float[Array, " B"]:
    """Cross-entropy of each example, in float32.

    Args:
      logits: Of any float dtype.
      targets: Probabilities; need not sum to one for "sigmoid".
      kind: "softmax", or "sigmoid": one yes-or-no question a class, summed over classes (Beyer et al., 2020,
        "Are we done with ImageNet?").

    Returns:
      One loss an example.
    """
    logits = logits.astype(jnp.float32)
    if kind == "softmax":
        return optax.softmax_cross_entropy(logits, targets)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


def mixup(
    key: Key[Array, ""], images: Float[Array, "B h w c"], targets: Float[Array, "B N"], alpha: float
) -> tuple[Float[Array, "B h w c"], Float[Array, "B N"]]:
    """Mixes each example with its neighbour in the batch (Zhang et al., 2018, "mixup").

    One weight for the batch, drawn from Beta(alpha, alpha) and taken from 1/2 upward, so that an example's own
    label is the larger part.

    Args:
      key: Of the draw.
      images: Normalised images.
      targets: Their targets.
      alpha: Of the Beta distribution; 0 returns the batch as it is.

    Returns:
      Mixed images and targets.
    """
    if alpha == 0:
        return images, targets
    weight = jax.random.beta(key, alpha, alpha)
    weight = jnp.maximum(weight, 1 - weight)
    return tuple(weight * x + (1 - weight) * jnp.roll(x, 1, axis=0) for x in (images, targets))
