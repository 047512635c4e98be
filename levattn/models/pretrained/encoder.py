"""An encoder that PyTorch code has named and stored, under this project's names.

The families differ in what they call things; what there is to call is the same. A family is a table of `Names`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from levattn.models.pretrained.layout import ImageSize
from levattn.models.pretrained.shapes import size_fields
from levattn.models.pretrained.tensors import Tensors

# Widths at which published encoders have heads of another width than 64.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family calls its tensors, without the part that is the same for all of a file.

    Attributes:
      patches: The convolution that embeds patches.
      class_token: None: there is none.
      more_tokens: Other tokens before the patches, in order; each may be missing.
      positions: Position embeddings, of the patches and of the tokens before them that have one.
      layer: A block, up to its number.
      norms: In a block: LayerNorms before attention and before the MLP.
      qkv: In a block: projections to queries, keys and values, or the one that is all three, each up to the word
        "weight" or "bias".
      out: In a block: the projection after attention.
      mlp: In a block: the two layers of the MLP.
      scales: In a block: LayerScale after attention and after the MLP; may be missing.
      pre_norm: LayerNorm before the first block; None: there is none.
      last_norm: LayerNorm after the last.
      class_position: Whether the class token has a position in every model of the family.
    """

    patches: str
    class_token: str | None
    positions: str
    layer: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str]
    last_norm: str
    more_tokens: tuple[str, ...] = ()
    scales: tuple[str, str] | None = None
    pre_norm: str | None = None
    class_position: bool = True


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What `read_encoder` finds.

    Attributes:
      fields: Of a `ModelConfig`: sizes, `pre_norm`, `layer_scale`.
      params: Names, the path in the parameter tree joined by "/", to arrays.
      tokens: The tokens before the patches that are no class token, each with its position: `more_tokens` of `Names`.
      patch: Side in pixels.
      width: Of a token.
      num_heads: Of the attention.
      mlp_dim: Of the MLPs.
      image_size: Of the images whose patches have positions, in pixels.
      is_told: Whether it was given, and is no square by default.
    """

    fields: dict[str, Any]
    params: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    patch: int
    width: int
    num_heads: int
    mlp_dim: int
    image_size: ImageSize
    is_told: bool


def read_encoder(
    tensors: Tensors,
    names: Names,
    *,
    at: str = "",
    num_heads: int | None = None,
    image_size: int | Sequence[int] | None = None,
    possible_sizes: Sequence[int | Sequence[int] | None] = (),
    qkv_bias: bool | None = None,
    swiglu: bool = False,
) -> Encoder:
    """Takes all tensors of an encoder.

    Args:
      tensors: Of the file.
      names: What the family calls them.
      at: Before each of these names.
      num_heads: None: as models of this width are published, with heads 64 wide for most.
      image_size: In the config: the side of images in pixels, or height and width; None: by the number of positions.
      possible_sizes: Where there is no such config, what else may tell. The first that has as many patches as there are
        positions does; where none does, images are square.
      qkv_bias: Whether queries, keys and values have biases; None: if any block has.
      swiglu: The first layer of the MLPs is twice as wide, a gate and what it gates.

    Raises:
      ValueError: For an encoder that is no plain Vision Transformer on square images, or a file too incomplete to tell
        what it is of. Single tensors that are missing are left for `Tensors.finish`.
    """
    shape = tensors.shape(f"{at}{names.patches}.weight")
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(
            f"{at}{names.patches}.weight {shape} is no convolution over square patches: only those are read"
        )
    width, _, patch, _ = shape
    depth = num_layers(tensors, at + names.layer)
    mlp_out = tensors.shape(f"{at}{names.layer}0.{names.mlp[1]}.weight")
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_out[1], "patch": patch}
    sizes["num_heads"] = num_heads = num_heads or default_heads(width)
    if width % num_heads:
        raise ValueError(f"{num_heads=} in the config does not divide the width {width} of the encoder in the file")
    fields = size_fields(**sizes)

    params = patch_embedding(tensors, at + names.patches, "embedding", bias=names.pre_norm is None)
    told = [size for size in possible_sizes if size] if image_size is None else [image_size]
    grids = [tuple(side // patch for side in _sides(size)) for size in told]
    tokens, positions, grid = _tokens(tensors, names, at, width, grids, only=image_size is not None)
    height, width_in_pixels = (side * patch for side in grid)
    found = height if height == width_in_pixels else (height, width_in_pixels)
    if names.class_token:
        params["cls"] = tokens.pop(names.class_token)
    params["pos_embedding"] = positions
    if names.pre_norm:
        fields["pre_norm"] = True
        params |= layer_norm(tensors, at + names.pre_norm, "pre_norm", width)
    if names.scales and f"{at}{names.layer}0.{names.scales[0]}" in tensors:
        fields["layer_scale"] = 1.0
    if qkv_bias is None:
        qkv_bias = any(f"{at}{names.layer}{layer}.{names.qkv[0]}bias" in tensors for layer in range(depth))
    for layer in range(depth):
        source, target = f"{at}{names.layer}{layer}.", f"Transformer/encoderblock_{layer}/"
        for i, name in enumerate(names.norms):
            params |= layer_norm(tensors, source + name, f"{target}LayerNorm_{i}", width)
        params |= attention(
            tensors,
            [source + name for name in names.qkv],
            source + names.out,
            f"{target}MultiHeadDotProductAttention_0",
            width,
            num_heads,
            qkv_bias=qkv_bias,
        )
        mlp_source = [source + name for name in names.mlp]
        params |= mlp(tensors, mlp_source, f"{target}MlpBlock_0", width, sizes["mlp_dim"], swiglu=swiglu)
        for i, name in enumerate(names.scales if "layer_scale" in fields else ()):
            params[f"{target}LayerScale_{i}/scale"] = tensors.take(source + name, (width,))
    params |= layer_norm(tensors, at + names.last_norm, "Transformer/encoder_norm", width)
    return Encoder(fields, params, tokens, patch, width, num_heads, sizes["mlp_dim"], found, grid in grids)


def _sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a number in a config, or of two."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size={image_size} in the config is neither a side in pixels nor height and width")
    return sides


def _tokens(
    tensors: Tensors, names: Names, at: str, width: int, grids: Sequence[tuple[int, int]], *, only: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[int, int]]:
    """Tokens before the patches, positions of the patches, and their grid: the first that fits, or the one there is.

    A position that is counted for a token is added to it: one parameter does the work of both.
    """
    optional = [name for name in names.more_tokens if at + name in tensors]
    own = ([names.class_token] if names.class_token else []) + optional
    tokens = {name: _rows(tensors, at + name, width) for name in own}
    positions = _rows(tensors, at + names.positions, width)
    side = math.isqrt(positions.shape[1])
    ends = np.cumsum([0, *(token.shape[1] for token in tokens.values())])
    allowed = set(ends[1 if names.class_position and names.class_token else 0 :].tolist())
    possible = grids if only else [*grids, (side, side)]
    grid = next((grid for grid in possible if positions.shape[1] - math.prod(grid) in allowed), None)
    if grid is None:
        rows, columns = possible[0]
        what = f"{rows} x {columns} patches, as image_size in the config has it," if only else "a square of patches"
        raise ValueError(
            f"{at}{names.positions} has {positions.shape[1]} positions, which are not those of {what} and of the "
            f"tokens {own} before them: where images are not square, put the published config.json beside the file, "
            "or give image_size=(HEIGHT, WIDTH)"
        )
    num_before = positions.shape[1] - math.prod(grid)
    for name, start, end in zip(own, ends[:-1], ends[1:], strict=True):
        if end <= num_before:
            tokens[name] = tokens[name] + positions[:, start:end]
    return tokens, positions[:, num_before:], grid


def _rows(tensors: Tensors, name: str, width: int) -> np.ndarray:
    """Vectors of that width, stored with or without leading axes, as `1 N width`."""
    shape = tensors.shape(name) if name in tensors else ()
    return tensors.take(name, shape if shape[-1:] == (width,) else (1, 1, width)).reshape(1, -1, width)


def default_heads(width: int) -> int:
    """Heads of published encoders of this width.

    Raises:
      ValueError: No published encoder is that wide.
    """
    if width not in _HEADS and (width % 64 or width > 1536):
        raise ValueError(
            f"how many heads an encoder of width {width} has is not in its tensors: put the config.json that was "
            "published with it beside the file"
        )
    return _HEADS.get(width, width // 64)


def num_layers(tensors: Tensors, at: str) -> int:
    """One more than the largest number that follows `at`."""
    found = [re.match(re.escape(at) + r"(\d+)\.", name) for name in tensors.names()]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def patch_embedding(tensors: Tensors, source: str, target: str, *, bias: bool) -> dict[str, np.ndarray]:
    """A convolution over patches; one without a bias, as before a LayerNorm, gets zeros."""
    shape = tensors.shape(f"{source}.weight")
    return {
        f"{target}/kernel": tensors.take(f"{source}.weight", shape).transpose(2, 3, 1, 0),
        f"{target}/bias": tensors.take(f"{source}.bias", shape[:1]) if bias else np.zeros(shape[0], np.float32),
    }


def layer_norm(tensors: Tensors, source: str, target: str, width: int) -> dict[str, np.ndarray]:
    """Scale and bias of a LayerNorm."""
    return {
        f"{target}/scale": tensors.take(f"{source}.weight", (width,)),
        f"{target}/bias": tensors.take(f"{source}.bias", (width,)),
    }


def dense(tensors: Tensors, source: str, target: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """Kernel (in, out) and bias of a linear layer, whose weight PyTorch has as (out, in)."""
    return {
        f"{target}/kernel": tensors.take(f"{source}.weight", (outputs, inputs)).T,
        f"{target}/bias": tensors.take(f"{source}.bias", (outputs,)),
    }


def mlp(
    tensors: Tensors, sources: Sequence[str], target: str, width: int, mlp_dim: int, *, swiglu: bool = False
) -> dict[str, np.ndarray]:
    """The two layers of an MLP."""
    first, second = sources
    return dense(tensors, first, f"{target}/Dense_0", width, mlp_dim * (1 + swiglu)) | dense(
        tensors, second, f"{target}/Dense_1", mlp_dim, width
    )


def attention(
    tensors: Tensors,
    qkv: Sequence[str],
    out: str,
    target: str,
    width: int,
    num_heads: int,
    *,
    qkv_bias: bool = True,
) -> dict[str, np.ndarray]:
    """Projections of multi-head attention.

    Args:
      tensors: Of the file.
      qkv: One name each, or one for all three, or one for queries and one for keys and values; "weight" and "bias" are
        put right behind it.
      out: Name of the output's projection.
      target: Name here.
      width: Of a token.
      num_heads: Of which `width` is a multiple.
      qkv_bias: False: queries, keys and values have no biases, and get zeros, since the output has one.
    """
    parts = {1: (3,), 2: (1, 2), 3: (1, 1, 1)}[len(qkv)]
    rows = {name: part * width for name, part in zip(qkv, parts, strict=True)}
    weights = np.concatenate([tensors.take(f"{name}weight", (rows[name], width)) for name in qkv])
    biases = np.zeros(3 * width, np.float32)
    if qkv_bias:
        biases = np.concatenate([tensors.take(f"{name}bias", (rows[name],)) for name in qkv])
    heads = (num_heads, width // num_heads)
    params = {}
    for i, name in enumerate(("query", "key", "value")):
        part = slice(i * width, (i + 1) * width)
        params[f"{target}/{name}/kernel"] = weights[part].T.reshape(width, *heads)
        params[f"{target}/{name}/bias"] = biases[part].reshape(heads)
    last = dense(tensors, out, f"{target}/out", width, width)
    last[f"{target}/out/kernel"] = last[f"{target}/out/kernel"].reshape(*heads, width)
    return params | last
