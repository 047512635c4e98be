"""The parts of a Vision Transformer around its attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.models.config import ModelConfig

ACTIVATIONS = {
    "gelu": nn.gelu,
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


def layer_norm(config: ModelConfig, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm in float32: with no dtype of its own it takes the wider one of its input and its parameters."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, name=name)


def sincos2d(height: int, width: int, features: int, temperature: float = 10_000.0) -> Float[Array, "1 S C"]:
    """Fixed position embeddings: a quarter each of sines and cosines of the column, then of the row.

    Frequencies fall geometrically from 1 to 1 / `temperature` (Chen et al., arXiv 2104.02057).

    Args:
      height: Rows of the grid.
      width: Columns of the grid.
      features: Width of an embedding, a multiple of 4.
      temperature: Slowest wavelength over the fastest.

    Returns:
      Embeddings in row-major order.
    """
    rows, columns = jnp.mgrid[:height, :width].reshape(2, -1, 1)
    frequencies = temperature ** -jnp.linspace(0.0, 1.0, features // 4)
    angles = [columns * frequencies, rows * frequencies]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1)[None]


class MlpBlock(nn.Module):
    """Two dense layers with an activation between them; "swiglu" gates (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: str = "float32"
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        def dense(features: int) -> nn.Dense:
            inits = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
            return nn.Dense(features, dtype=self.dtype, **inits)

        hidden_dim, activation = self.config.dims.mlp_dim, self.config.activation
        if activation == "swiglu":
            gate, hidden = jnp.split(dense(2 * hidden_dim)(x), 2, axis=-1)
            hidden *= nn.silu(gate)
        else:
            hidden = ACTIVATIONS[activation](dense(hidden_dim)(x))
        hidden = nn.Dropout(self.config.dropout, deterministic=not self.train)(hidden)
        return dense(x.shape[-1])(hidden)


class LayerScale(nn.Module):
    """A learned factor for each feature (Touvron et al., arXiv 2103.17239)."""

    init_value: float

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        scale = self.param("scale", nn.initializers.constant(self.init_value), x.shape[-1:])
        return x * scale.astype(x.dtype)


class StochasticDepth(nn.Module):
    """Zeroes a residual branch for some images and scales the others up, so that its mean stays.

    Huang et al., arXiv 1603.09382. Draws from the `dropout` stream; the identity unless training.
    """

    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], rate: float | Float[Array, ""]) -> Float[Array, "B S C"]:
        if not self.train:
            return x
        keep_prob = 1.0 - rate
        keep = jax.random.bernoulli(self.make_rng("dropout"), keep_prob, (x.shape[0], 1, 1))
        return jnp.where(keep, x / jnp.asarray(keep_prob, x.dtype), 0)


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned probe attends densely to all tokens (Zhai et al., arXiv 2106.04560)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], mask: Bool[Array, "B S"] | None = None) -> Float[Array, "B C"]:
        batch, _, width = x.shape
        xavier_uniform = nn.initializers.xavier_uniform()
        probe = self.param("probe", xavier_uniform, (1, 1, width))
        pooled = nn.MultiHeadDotProductAttention(
            num_heads=self.config.dims.num_heads,
            kernel_init=xavier_uniform,
            use_bias=self.config.qkv_bias,
        )(jnp.tile(probe, (batch, 1, 1)), x, mask=attention_mask(mask))
        pooled += MlpBlock(self.config)(layer_norm(self.config)(pooled))
        return pooled[:, 0]


def masked_mean(x: Float[Array, "B S C"], mask: Bool[Array, "B S"] | None) -> Float[Array, "B C"]:
    """Mean of the valid tokens of each image; zeros where none is valid."""
    if mask is None:
        return x.mean(axis=1)
    total = jnp.where(mask[..., None], x, 0).sum(axis=1)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def attention_mask(mask: Bool[Array, "B S"] | None) -> Bool[Array, "B 1 1 S"] | None:
    """A mask of keys in the layout that Flax attention takes."""
    return None if mask is None else mask[:, None, None, :]
