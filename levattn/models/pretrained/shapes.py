"""The sizes of a model, and the parameters that it wants, by name and shape."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict

from levattn.models.config import MAX_DEPTH, ModelConfig
from levattn.models.pretrained.layout import ImageSize, sides_of
from levattn.models.variants import SIZES, Variant, decode
from levattn.models.vit import ViT


def param_shapes(model: ModelConfig, image_size: ImageSize, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """Names, the path in the parameter tree joined by "/", to shapes. Nothing is allocated.

    Args:
      model: Of which the parameters are.
      image_size: Of its images, in pixels.
      channels: Of its images.

    Raises:
      ValueError: If the patch does not divide the image.
    """
    images = jax.ShapeDtypeStruct((1, *sides_of(image_size), channels), "float32")
    params = jax.eval_shape(ViT(model).init, jax.random.key(0), images)["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}


def size_fields(*, width: int, depth: int, mlp_dim: int, num_heads: int, patch: int) -> dict[str, Any]:
    """The fields of a `ModelConfig` with these sizes: a named variant where there is one, else overrides of B.

    Raises:
      ValueError: No encoder is as deep as that.
    """
    if not 0 < depth <= MAX_DEPTH:
        raise ValueError(f"{depth=}, by the numbers of its blocks, must be from 1 to {MAX_DEPTH}")
    dims = Variant(width, depth, mlp_dim, num_heads, patch)
    for size in SIZES:
        if decode(f"{size}/{patch}") == dims:
            return {"variant": f"{size}/{patch}"}
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}
    return {"variant": f"B/{patch}"} | sizes
