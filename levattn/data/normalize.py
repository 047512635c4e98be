"""Pixels to model input. Batches travel as uint8, a quarter of the bytes; this runs on the device."""

import numpy as np
from jaxtyping import Array, Float32, UInt8

from levattn.data.config import DataConfig


def normalize(
    images: UInt8[Array, "b h w c"] | UInt8[np.ndarray, "b h w c"], config: DataConfig
) -> Float32[Array, "b h w c"] | Float32[np.ndarray, "b h w c"]:
    """Maps pixels to `(pixel / 255 - mean) / std` in float32.

    Args:
      images: pixels of numpy or JAX, traced or not.
      config: holds `mean` and `std`, of length 1 or the number of channels.

    Returns:
      The same kind of array, in float32.

    Raises:
      ValueError: when `mean` does not fit the channels.
    """
    num_channels = images.shape[-1]
    if len(config.mean) not in (1, num_channels):
        raise ValueError(f"{config.mean=} must have length 1 or {num_channels}, the number of channels")
    mean = np.asarray(config.mean, np.float32).reshape(1, 1, 1, -1)
    std = np.asarray(config.std, np.float32).reshape(1, 1, 1, -1)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
