"""How near other attention comes to dense attention: in each layer by itself, and at the end of the model."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PyTree

from levattn.attention import AttentionSpec, lev_attention
from levattn.data import DataConfig, Source, eval_batches, normalize
from levattn.models import ModelConfig, ViT, patch_grid
from levattn.training.attentions import Attention, unrolled, with_attention

_ATTENTION = "MultiHeadDotProductAttention_0"


def cosine_similarity(a: Float32[np.ndarray, "N R"], b: Float32[np.ndarray, "N R"]) -> Float[np.ndarray, " N"]:
    """Cosine of each row of `a` with that of `b`; 0 where one of them is zero."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.where(norms > 0, norms, 1)


def top1_agreement(a: Int[np.ndarray, " N"], b: Int[np.ndarray, " N"]) -> float:
    """Share of images that are given the same class, right or wrong."""
    return float(np.mean(a == b))


def first_images(
    source: Source, data: DataConfig, num_images: int, batch_size: int = 8
) -> list[Float[Array, "_ height width channels"]]:
    """The images at the start of a source, normalised, in batches small enough for the keys of all layers."""
    batches = []
    with contextlib.closing(eval_batches(source, data, batch_size=min(batch_size, num_images))) as stream:
        for batch in stream:
            missing = num_images - sum(map(len, batches))
            real = batch["image"][batch["mask"] > 0][:missing]
            batches.append(jnp.asarray(normalize(real, data)))
            if len(real) == missing:
                break
    return batches


def layer_errors(
    model: ModelConfig,
    params: PyTree,
    batches: Sequence[Float[Array, "_ height width channels"]],
    attentions: Sequence[Attention],
    *,
    by_head: bool = False,
    seed: int = 0,
) -> Float[np.ndarray, "A L"] | Float[np.ndarray, "A L H"]:
    """Squared error of each layer's attention against dense attention, relative to the squared norm of the latter.

    Every layer is handed the queries, keys and values that it has in the dense model, so that its error is its own.
    It is taken behind the output projection, which weighs the heads, without its bias; the root is the relative error
    in the Frobenius norm, of an image and on average.

    Args:
      model: Of any attention; dense attention takes its place.
      params: Of the model.
      batches: Normalised images.
      attentions: To compare.
      by_head: Split the squared error into that of each head by itself, behind its part of the output projection. The
        parts do not sum to the whole: errors of two heads may add up, or cancel.
      seed: Of methods that draw at random.

    Returns:
      Means over images, one row an attention. Memory: the queries, keys and values of all layers for one batch.
    """
    model, params = unrolled(model, jax.tree.map(jnp.asarray, params))
    kernels = [params["Transformer"][f"encoderblock_{i}"][_ATTENTION]["out"]["kernel"] for i in range(model.dims.depth)]
    shape = (len(attentions), model.dims.depth) + by_head * (model.dims.num_heads,)
    sums, count = np.zeros(shape), 0
    for images in batches:
        grid = patch_grid(model, images.shape[1:])
        for layer, inputs in enumerate(dense_inputs(model, params, images)):
            key = jax.random.fold_in(jax.random.key(seed), layer)
            for i, attention in enumerate(attentions):
                spec = attention[layer] if isinstance(attention, tuple) else attention
                errors = _relative_errors(*inputs, kernels[layer], key, spec=spec, grid=grid, by_head=by_head)
                sums[i, layer] += np.asarray(errors.sum(axis=0))
        count += len(images)
    return sums / count


def dense_inputs(
    model: ModelConfig, params: PyTree, images: Float[Array, "B height width channels"]
) -> Iterator[tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Float[Array, "B S H D"]]]:
    """Queries, keys and values of each layer of the dense model, in order; the model must not be scanned."""
    found = _capture(params, images, model=with_attention(model, AttentionSpec("dense")))
    for layer in range(model.dims.depth):
        sown = found[f"encoderblock_{layer}"][_ATTENTION]
        yield tuple(sown[name][0] for name in ("queries", "keys", "values"))


@functools.partial(jax.jit, static_argnames="model")
def _capture(params, images, *, model: ModelConfig):
    _, state = ViT(model).apply({"params": params}, images, capture=True, mutable=["intermediates"])
    # Only what is asked for is computed: the rest of what the layers sow costs nothing.
    wanted = ("queries", "keys", "values")
    blocks = state["intermediates"]["Transformer"]
    return {block: {_ATTENTION: {name: sown[_ATTENTION][name] for name in wanted}} for block, sown in blocks.items()}


@functools.partial(jax.jit, static_argnames=("spec", "grid", "by_head"))
def _relative_errors(query, key, value, kernel, rng, *, spec: AttentionSpec, grid: tuple[int, int], by_head: bool):
    """Of each image, and with `by_head` of each head; `kernel` is that of the output projection, `H D C`."""

    def attended(spec):
        return lev_attention(query, key, value, spec, grid=grid, rng=rng)

    def projected(out):
        return jnp.einsum("bthd,hdc->btc", out, kernel.astype(out.dtype), preferred_element_type=jnp.float32)

    exact, found = attended(AttentionSpec("dense")), attended(spec)
    norm = jnp.sum(jnp.square(projected(exact)), axis=(1, 2))
    norm = jnp.where(norm > 0, norm, 1)
    if not by_head:
        return jnp.sum(jnp.square(projected(found) - projected(exact)), axis=(1, 2)) / norm
    # |e W|^2 summed over tokens is the product of e^T e and W W^T: no output of C channels for each head.
    difference = (found - exact).astype(jnp.float32)
    second_moment = jnp.einsum("bthd,bthe->bhde", difference, difference, precision="highest")
    weight = jnp.einsum("hdc,hec->hde", kernel, kernel, precision="highest").astype(jnp.float32)
    return jnp.einsum("bhde,hde->bh", second_moment, weight) / norm[:, None]
