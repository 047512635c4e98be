"""Keys, queries and values of trained heads: out of a file, or out of a checkpoint run on photographs."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from levattn.models import ViT
from levattn.training.pretrained import load_pretrained


class RealHeads(NamedTuple):
    """What meets in some heads of a model. None where it is not known."""

    keys: Float[np.ndarray, "H S D"]
    queries: Float[np.ndarray, "H T D"] | None = None
    values: Float[np.ndarray, "H S D"] | None = None


def read_heads(path: str | os.PathLike, num_heads: int = 12) -> RealHeads:
    """Keys of some heads, and their queries and values where these are known.

    Args:
      path: An array of keys (.npy), the last axes tokens and width, all before them counting as heads; or a checkpoint
        that `levattn.load_pretrained` reads, which is run on two photographs that come with scikit-learn.
      num_heads: Heads to take, at even distances.

    Raises:
      ValueError: The array has no two axes, or something that is not a finite number, or the checkpoint is not one.
      FileNotFoundError: There is nothing to read.
    """
    path = Path(path)
    if num_heads < 1:
        raise ValueError(f"{num_heads=} must be at least 1")
    if path.suffix != ".npy":
        return RealHeads(*(_spread(x, num_heads) for x in capture_heads(path)))
    keys = np.load(path, mmap_mode="r")
    if keys.ndim < 2 or not np.issubdtype(keys.dtype, np.floating):
        raise ValueError(
            f"{str(path)!r} holds {keys.dtype} of shape {keys.shape}: it must be (..., tokens, width) floats"
        )
    keys = _spread(keys.reshape(-1, *keys.shape[-2:]), num_heads)
    if not np.all(np.isfinite(keys)):
        raise ValueError(f"{str(path)!r} holds keys that are not finite: leave these out")
    return RealHeads(keys)


def capture_heads(path: str | os.PathLike) -> RealHeads:
    """Keys, queries and values of every head, layer and photograph of a checkpoint, see `read_heads`."""
    model = load_pretrained(path, allow_zero_head=True)
    apply_fn = jax.jit(lambda p, x: ViT(model.model).apply({"params": p}, x, capture=True, mutable="intermediates")[1])
    blocks = apply_fn(model.params, _photographs(model.preprocess))["intermediates"]["Transformer"]
    sown = [block["MultiHeadDotProductAttention_0"] for block in blocks.values()]
    arrays = (np.stack([np.asarray(layer[name][0]) for layer in sown]) for name in RealHeads._fields)
    # Layers (if scanned, one more axis in front), images, tokens, heads, width.
    return RealHeads(*(np.moveaxis(x, -2, -3).reshape(-1, x.shape[-3], x.shape[-1]) for x in arrays))


def _photographs(preprocess) -> Float[jax.Array, "2 height width 3"]:
    from sklearn.datasets import load_sample_images

    if len(preprocess.mean) != 3:
        raise ValueError(f"the checkpoint takes images of {len(preprocess.mean)} channels; the photographs have 3")
    size = preprocess.image_size
    images = []
    for image in load_sample_images().images:
        side = min(image.shape[:2])
        top, left = ((n - side) // 2 for n in image.shape[:2])
        square = jnp.asarray(image[top : top + side, left : left + side], jnp.float32)
        images.append(jax.image.resize(square, (size, size, 3), "bilinear"))
    return (jnp.stack(images) / 255 - jnp.asarray(preprocess.mean)) / jnp.asarray(preprocess.std)


def _spread(heads: np.ndarray, num_heads: int) -> np.ndarray:
    at = np.unique(np.linspace(0, len(heads) - 1, min(num_heads, len(heads))).astype(int))
    return np.asarray(heads[at], np.float32)
