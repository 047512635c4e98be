"""One picture of what the heads of a layer keep of an image, and of where dense attention would have looked."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from levattn.analysis.style import FAINT, INK, METHOD_STYLES, MUTED, new_figure
from levattn.attention.scored import dense_probabilities
from levattn.attention.select import is_selected
from levattn.core import leverage_scores
from levattn.data import DataConfig, normalize
from levattn.models import ModelConfig, ViT, attention_specs, patch_grid

_MARK = METHOD_STYLES["leverage"][0]
_TINT = (0.84, 0.37, 0.0, 0.13)  # the same colour, almost clear


class LayerView(NamedTuple):
    """What one layer does with one image; the class token, if there is one, is the first of the S keys.

    Attributes:
      scores: Leverage score of each key.
      kept: Which keys the layer's method keeps.
      attention: Dense softmax attention on each key: of the class token, or the mean over all queries without one.
    """

    scores: Float[np.ndarray, "H S"]
    kept: Bool[np.ndarray, "H S"]
    attention: Float[np.ndarray, "H S"]


def view_layer(
    model_config: ModelConfig,
    params: Mapping[str, Any],
    image: UInt8[np.ndarray, "height width channels"],
    *,
    layer: int = -1,
    data_config: DataConfig | None = None,
) -> LayerView:
    """Runs the model on an image and looks into one layer.

    Args:
      model_config: Of the model, with the attention to look at in place. Attention has no parameters: to see what a
        densely trained model would keep, put another method into its config.
      params: Its parameters.
      image: Pixels as the data pipeline returns them.
      layer: Counted from 0, or from the end.
      data_config: How pixels are normalised; None: the default.

    Raises:
      ValueError: There is no such layer, or it attends densely and so keeps everything.
    """
    specs = attention_specs(model_config)
    if not -len(specs) <= layer < len(specs):
        raise ValueError(f"{layer=} must be in [{-len(specs)}, {len(specs) - 1}]: the model has {len(specs)} layers")
    spec = specs[layer]
    if spec.method == "dense":
        raise ValueError(f"layer {layer} attends densely: set model_config.attention to a method that selects keys")
    images = normalize(np.asarray(image)[None], data_config or DataConfig())
    capture_fn = partial(ViT(model_config).apply, capture=True, mutable=["intermediates"])
    blocks = jax.jit(capture_fn)({"params": params}, images)[1]["intermediates"]["Transformer"]
    if model_config.scan:
        sown = jax.tree.map(lambda x: x[layer], blocks["encoderblock"])
    else:
        sown = blocks[f"encoderblock_{layer % len(specs)}"]
    sown = {name: x[0] for name, x in sown["MultiHeadDotProductAttention_0"].items()}

    keys, probabilities = sown["keys"], dense_probabilities(sown["queries"], sown["keys"])
    reads_class_token = model_config.pool == "cls"
    view = LayerView(
        scores=leverage_scores(keys, method=spec.score_method, centre=spec.centre, ridge=spec.ridge),
        kept=is_selected(sown["indices"], sown["valid"], keys.shape[1]),
        attention=probabilities[:, :, 0] if reads_class_token else jnp.mean(probabilities, axis=2),
    )
    return LayerView(*(np.asarray(x[0]) for x in view))


def kept_patches(
    kept: Bool[np.ndarray, "H S"], grid: tuple[int, int], num_prefix: int
) -> Bool[np.ndarray, "H rows columns"]:
    """Which patches of the grid each head keeps: what the picture marks."""
    return kept[:, num_prefix:].reshape(-1, *grid)


def outline(mask: Bool[np.ndarray, "rows columns"]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The sides, as pairs of (x, y) corners, on which a marked cell meets one that is not marked, or the border."""
    padded = np.pad(mask, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # between a cell and the one above
    down = padded[1:-1, 1:] != padded[1:-1, :-1]  # and the one to its left
    sides = [((x, y), (x + 1, y)) for y, x in np.argwhere(across).tolist()]
    return sides + [((x, y), (x, y + 1)) for y, x in np.argwhere(down).tolist()]


def plot_attention(
    model_config: ModelConfig,
    params: Mapping[str, Any],
    image: UInt8[np.ndarray, "height width channels"],
    path: str | os.PathLike,
    *,
    layer: int = -1,
    heads: Sequence[int] | None = None,
    data_config: DataConfig | None = None,
    title: str | None = None,
) -> None:
    """Draws an image, the patches that each head keeps of it, their leverage scores, and dense attention.

    One column a head. The first row fades what the head drops, the second shows the leverage score of every patch,
    the third the dense attention of the class token (without one, the mean over the queries) and its share that falls
    on kept keys. Kept patches are outlined.

    Args:
      model_config: See `view_layer`, as for the next three.
      params: Parameters.
      image: Pixels.
      path: Ends in .png or .svg.
      layer: Which.
      heads: Which; None: the first six.
      data_config: How pixels are normalised.
      title: Above the picture; None: layer, method and k.

    Raises:
      ValueError: See `view_layer`; for a head that does not exist; for another suffix.
    """
    view = view_layer(model_config, params, image, layer=layer, data_config=data_config)
    num_heads, num_tokens = view.kept.shape
    heads = tuple(range(min(6, num_heads))) if heads is None else tuple(heads)
    if not heads or not all(0 <= head < num_heads for head in heads):
        raise ValueError(f"{heads=} must be in [0, {num_heads - 1}]: the layer has {num_heads} heads")
    view = LayerView(*(x[list(heads)] for x in view))
    if title is None:
        spec, depth = attention_specs(model_config)[layer], model_config.dims.depth
        where = f"layer {layer % depth + 1} of {depth}"
        size = f"k = {spec.k} of" if spec.eps is None else f"eps = {spec.eps:g},"
        size = size if spec.k_per_head is None else "k by head, of"
        title = f"What {spec.method} attention keeps in {where} ({size} {num_tokens} tokens)"
        if len(heads) < num_heads:
            title += f", {len(heads)} of {num_heads} heads"

    grid, num_prefix = patch_grid(model_config, image.shape), model_config.num_prefix_tokens
    _draw(path, title, _to_rgb(image), heads, view, grid, num_prefix, model_config.pool == "cls")


def _to_rgb(image: UInt8[np.ndarray, "height width channels"]) -> Float[np.ndarray, "height width 3"]:
    return np.broadcast_to(image / 255, (*image.shape[:2], 3))


def _draw(path, title, image, heads, view: LayerView, grid, num_prefix, reads_class_token):
    marks = kept_patches(view.kept, grid, num_prefix)
    shares = np.sum(view.attention, axis=1, where=view.kept)
    query = "of the class token" if reads_class_token else "mean over queries"
    cell = 1.75
    height = 3 * cell * grid[0] / grid[1] + 1.5
    with new_figure(path, width=cell * (len(heads) + 1) + 0.5, height=height, dpi=130) as figure:
        figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06, wspace=0.02, hspace=0.02)
        figure.suptitle(title, x=0.05 / figure.get_figwidth(), ha="left", fontweight="bold")
        axes = figure.subplots(3, len(heads) + 1, squeeze=False)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set(visible=True, color=FAINT, linewidth=0.8)
        extent = (0, grid[1], grid[0], 0)  # a patch is a unit square, in every panel
        axes[0, 0].imshow(image, extent=extent, interpolation="nearest")
        axes[0, 0].set_title("Input")
        for column, (head, mark) in enumerate(zip(heads, marks, strict=True)):
            ax = axes[0, column + 1]
            ax.imshow(_fade(image, mark), extent=extent, interpolation="nearest")
            _mark(ax, mark, linewidth=0.7)
            prefix = " + class token" if view.kept[column, :num_prefix].any() else ""
            ax.set_title(f"Head {head + 1}")
            ax.set_xlabel(f"keeps {mark.sum()} patches{prefix}", fontsize=8, color=MUTED)
            axes[2, column + 1].set_xlabel(f"{100 * shares[column]:.0f} % on kept keys", fontsize=8, color=MUTED)
        _draw_heat(axes[1], "Leverage score", view.scores, "Blues", marks, extent)
        _draw_heat(axes[2], f"Dense attention\n{query}", view.attention, "Greys", marks, extent, tint=True)


def _draw_heat(axes, name, values, colours, marks, extent, tint=False):
    """A row of heat maps on one scale, their name and colour bar to the left."""
    patches = values[:, -marks[0].size :].reshape(marks.shape)
    for ax, mark, patch_values in zip(axes[1:], marks, patches, strict=True):
        drawn = ax.imshow(patch_values, extent=extent, cmap=colours, vmin=0, vmax=patches.max())
        if tint:  # an outline alone does not say which side of it is kept
            ax.imshow(np.where(mark[..., None], _TINT, 0), extent=extent)
        _mark(ax, mark, linewidth=1.6 if max(mark.shape) <= 16 else 1.0)
    _draw_key(axes[0], name, drawn)


def _mark(ax, mark, linewidth):
    from matplotlib.collections import LineCollection

    style = {"colors": _MARK, "linewidths": linewidth, "capstyle": "projecting", "clip_on": False, "zorder": 3}
    ax.add_collection(LineCollection(outline(mark), **style), autolim=False)


def _draw_key(ax, name, drawn):
    ax.spines[:].set_visible(False)
    ax.text(0.02, 0.66, name, transform=ax.transAxes, va="center", linespacing=1.4, color=INK)
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes((0.02, 0.36, 0.8, 0.07)), orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = drawn.get_clim()
    bar.set_ticks([low, high], labels=["0", f"{high:.2g}"], fontsize=8)


def _fade(image, mark):
    """The image with the patches that are not marked almost white."""
    repeats = (image.shape[0] // mark.shape[0], image.shape[1] // mark.shape[1])
    visible = np.kron(mark, np.ones(repeats))[..., None]
    return image * visible + (0.82 + 0.18 * image) * (1 - visible)
