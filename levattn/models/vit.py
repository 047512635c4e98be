"""A Vision Transformer with any attention in any layer.

Parameter names, initialisation and numerics follow the `vit` model of google-research/big_vision, so that checkpoints
written for it load unchanged, whatever the attention: leverage attention has no parameters.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.attention import AttentionSpec, LevAttention
from levattn.core.finite import unchecked
from levattn.models.config import REMAT_POLICIES, ModelConfig, attention_specs, patch_grid
from levattn.models.layers import (
    LayerScale,
    MAPHead,
    MlpBlock,
    StochasticDepth,
    attention_mask,
    layer_norm,
    masked_mean,
    sincos2d,
)


class Features(NamedTuple):
    """What the model knows before its head, in float32.

    Attributes:
      tokens: All tokens after the last LayerNorm (before it with `final_norm="pooled"`), the class token first if there
        is one.
      pooled: The image by the model's pooling.
      pre_logits: What the head reads: `pooled`, or the tanh layer of `rep_size` on it.
    """

    tokens: Float[Array, "B S C"]
    pooled: Float[Array, "B P"]
    pre_logits: Float[Array, "B R"]


class EncoderBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and on a residual branch.

    Attributes:
      config: Of the model.
      spec: Of this block's attention.
      grid: Patches down and across.
      train: Turns dropout and stochastic depth on; they draw from the stream `dropout`.
      capture: Sows the attention's inputs and choices into `intermediates`.
    """

    config: ModelConfig
    spec: AttentionSpec
    grid: tuple[int, int]
    train: bool = False
    capture: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S C"],
        drop_rate: float | Float[Array, ""] = 0.0,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S C"]:
        config = self.config

        def branch(y: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
            y = nn.Dropout(config.dropout, deterministic=not self.train)(y)
            if config.layer_scale is not None:
                y = LayerScale(config.layer_scale)(y)
            if config.stochastic_depth:
                y = StochasticDepth(self.train)(y, drop_rate)
            return y

        rng = self.make_rng("selection") if self.has_rng("selection") else None
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.dims.num_heads,
            dtype=config.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            use_bias=config.qkv_bias,
            attention_fn=LevAttention(self.spec, grid=self.grid, rng=rng),
            name="MultiHeadDotProductAttention_0",
        )
        y = layer_norm(config, "LayerNorm_0")(x)
        x = x + branch(attention(y, mask=attention_mask(mask), sow_weights=self.capture))
        y = layer_norm(config, "LayerNorm_1")(x)
        return x + branch(MlpBlock(config, config.dtype, self.train, name="MlpBlock_0")(y))


class Encoder(nn.Module):
    """All blocks and, with `final_norm="tokens"`, a LayerNorm. Attributes as those of `EncoderBlock`."""

    config: ModelConfig
    grid: tuple[int, int]
    train: bool = False
    capture: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], mask: Bool[Array, "B S"] | None) -> Float[Array, "B S C"]:
        config, depth = self.config, self.config.dims.depth
        block_cls = EncoderBlock
        if config.remat != "none":
            # A scan already keeps the recomputation apart from the first pass; unrolled layers need the barrier.
            block_cls = nn.remat(EncoderBlock, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan)
        block_fn = functools.partial(block_cls, config, grid=self.grid, train=self.train, capture=self.capture)
        specs = attention_specs(config)
        drop_rates = jnp.linspace(0.0, config.stochastic_depth, depth)
        if config.scan:

            def apply_block(block, x, drop_rate):
                with unchecked():
                    return block(x, drop_rate, mask), None

            scan = nn.scan(
                apply_block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True, "selection": True},
                length=depth,
            )
            x, _ = scan(block_fn(spec=specs[0], name="encoderblock"), x, drop_rates)
        else:
            for layer in range(depth):
                block = block_fn(spec=specs[layer], name=f"encoderblock_{layer}")
                x = block(x, drop_rates[layer], mask)
        return layer_norm(config, "encoder_norm")(x) if config.final_norm == "tokens" else x.astype(jnp.float32)


class ViT(nn.Module):
    """Classifies images.

    With `capture=True` and `mutable=["intermediates"]` the second result of `apply` holds, for each layer, the queries,
    keys, selected indices, their validity and the attention mass:
    `["intermediates"]["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]["indices"][0]`. Scanned models
    hold one `encoderblock` whose arrays have a leading axis of layers.

    Attributes:
      config: Of the model.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B height width channels"],
        *,
        train: bool = False,
        mask: Bool[Array, "B S"] | None = None,
        capture: bool = False,
        return_features: bool = False,
    ) -> Float[Array, "B num_classes"] | tuple[Float[Array, "B num_classes"], Features]:
        """Logits of each image.

        Random streams: `dropout`, needed with `train` where a rate is not 0; `selection`, optional, for attention that
        draws at random (it falls back on the seed of its spec).

        Args:
          images: Pixels as the model was trained on, mostly in [-1, 1].
          train: Turns dropout and stochastic depth on.
          mask: False for tokens to leave out, those before the patches counted first. They are no keys in any layer,
            and are not pooled.
          capture: See above.
          return_features: Return a pair of the logits and the `Features`.

        Returns:
          Logits in float32; without a head (`num_classes=0`) the pre-logits in their place.

        Raises:
          ValueError: If the patch does not divide the sides of the images or the mask has the wrong number of tokens.
        """
        config, dims = self.config, self.config.dims
        grid = patch_grid(config, images.shape[1:])
        patch = (dims.patch, dims.patch)
        x = nn.Conv(dims.width, patch, strides=patch, padding="VALID", dtype=config.dtype, name="embedding")(images)
        x = x.reshape(x.shape[0], -1, dims.width)
        # Cast, so that the residual stream keeps the compute dtype beside float32 parameters.
        x = x + self._position_embeddings(grid).astype(x.dtype)
        prefix = [jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)) for token in self._prefix_tokens()]
        x = jnp.concatenate([*prefix, x], axis=1)
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask of shape {mask.shape} must be {x.shape[:2]}: one entry a token, class token first")
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        if config.pre_norm:
            x = layer_norm(config, "pre_norm")(x).astype(x.dtype)

        tokens = Encoder(config, grid, train, capture, name="Transformer")(x, mask)
        pooled = self._pool(tokens, mask)
        if config.final_norm == "pooled":
            pooled = layer_norm(config, "fc_norm")(pooled)
        pre_logits = pooled
        if config.rep_size:
            rep_size = dims.width if config.rep_size is True else config.rep_size
            pre_logits = nn.tanh(nn.Dense(rep_size, name="pre_logits")(pooled))
        logits = pre_logits
        if config.num_classes:
            logits = self._head("head")(pre_logits)
            if config.distilled:
                logits = (logits + self._head("head_dist")(tokens[:, 1])) / 2
        return (logits, Features(tokens, pooled, pre_logits)) if return_features else logits

    def _position_embeddings(self, grid: tuple[int, int]) -> Float[Array, "1 S C"]:
        width = self.config.dims.width
        if self.config.posemb == "sincos2d":
            return sincos2d(*grid, width)
        return self.param("pos_embedding", nn.initializers.normal(width**-0.5), (1, grid[0] * grid[1], width))

    def _prefix_tokens(self) -> list[Float[Array, "1 N C"]]:
        config, width = self.config, self.config.dims.width
        apart = nn.initializers.normal(0.02)  # tokens that start out alike would stay alike
        tokens = []
        if config.has_class_token:
            tokens.append(self.param("cls", nn.initializers.zeros, (1, 1, width)))
        if config.distilled:
            tokens.append(self.param("dist", apart, (1, 1, width)))
        if config.num_registers:
            tokens.append(self.param("registers", apart, (1, config.num_registers, width)))
        return tokens

    def _pool(self, tokens: Float[Array, "B S C"], mask: Bool[Array, "B S"] | None) -> Float[Array, "B P"]:
        prefix = self.config.num_prefix_tokens
        patches, mask = tokens[:, prefix:], None if mask is None else mask[:, prefix:]
        match self.config.pool:
            case "cls":
                return tokens[:, 0]
            case "gap":
                return masked_mean(patches, mask)
            case "map":
                return MAPHead(self.config, name="MAPHead_0")(patches, mask)
            case "cls_gap":
                return jnp.concatenate([tokens[:, 0], masked_mean(patches, mask)], axis=-1)

    def _head(self, name: str) -> nn.Dense:
        config = self.config
        kernel_init = nn.initializers.zeros if config.head_zero_init else nn.initializers.lecun_normal()
        return nn.Dense(config.num_classes, config.head_bias, kernel_init=kernel_init, name=name)
