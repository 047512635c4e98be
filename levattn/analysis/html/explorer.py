"""What the explorer needs of a model: images, what every head sees of them, and what every method would keep."""

import base64
import bisect
import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from levattn.analysis.html.blob import Layout, layout_of, pack
from levattn.analysis.html.choices import WEIGHT_STEPS, check_explorable, choices, method_facts
from levattn.analysis.html.logits import Factors, Rounded, attention_error, factorise, round_factors
from levattn.attention import AttentionSpec, get_method
from levattn.core import leverage_scores
from levattn.data import Source, eval_batches, normalize, open_source
from levattn.models import ModelConfig, ViT, patch_grid
from levattn.training.attentions import attention_of, describe, unrolled
from levattn.training.loaded import LoadedModel

METHODS = ("leverage", "row_norm", "oracle", "groups", "matched")
SIZES = (8, 16, 32, 64)
# Steps of the rounded logits, the finest first. The finest one is exact to what a screen shows.
_STEPS = tuple(0.0125 * 2 ** (i / 4) for i in range(41))
_SAMPLE = 5  # The search for a step looks at one of so many images and layers.


def explorer_payload(
    trained: LoadedModel,
    *,
    num_images: int = 4,
    methods: Sequence[str] = METHODS,
    ks: Sequence[int] = SIZES,
    options: AttentionSpec | None = None,
    max_bytes: int = 4_000_000,
) -> dict[str, Any]:
    """Runs a model on images at even distances in its evaluation split and packs what a page needs to explore them.

    Queries, keys and values are those of the model with the attention it has; each method is shown what it would keep
    of them in that layer. Attention is not stored, but its logits are, see `levattn.analysis.html.logits`: with the
    finest step with which everything fits.

    Args:
      trained: The model.
      num_images: Images.
      methods: To choose from on the page.
      ks: Numbers of keys; those above the number of tokens are left out.
      options: Those of all methods; their k does not count. None: class tokens and registers are kept.
      max_bytes: Of the text, pictures included.

    Returns:
      What explorer.js reads, JSON serialisable. `exactness` says how far the attention on the page is off.

    Raises:
      ValueError: There are not so many images, or an option cannot be explored, or nothing fits into `max_bytes`.
    """
    data, source = trained.config.data, open_source(trained.config.data, trained.config.data.eval_split)
    batch = _pick(source, trained, num_images)
    pixels = batch["image"]
    grid, prefix = patch_grid(trained.config.model, pixels.shape[1:]), trained.config.model.num_prefix_tokens
    options = AttentionSpec(keep_prefix=prefix) if options is None else options
    check_explorable(options)
    num_tokens = grid[0] * grid[1] + prefix
    ks = sorted({k for k in ks if options.keep_prefix < k <= num_tokens})
    if not ks:
        raise ValueError(f"{ks=} must hold a number in [{options.keep_prefix + 1}, {num_tokens}], the number of tokens")
    if not methods:
        raise ValueError("methods must not be empty: there is nothing to explore")
    specs = [dataclasses.replace(options, method=name, k=max(ks)) for name in methods]
    for spec in specs:
        get_method(spec.method)
    logits, layers = run_captured(trained.config.model, trained.params, normalize(pixels, data))

    heads = list(_of_layers(layers, specs, ks, grid, trained.config.seed))
    pictures = [_data_uri(image) for image in pixels]
    room = max_bytes - sum(map(len, pictures))
    rounded, step, texts, layout = _fit([x.factors for x in heads], [x.choices for x in heads], room)
    errors = [attention_error(x.query, x.key, found) for x, found in zip(heads, rounded, strict=True)]
    model = trained.config.model
    return {
        "model": trained.name,
        "attention": describe(attention_of(model)),
        "source": f"{source.name}, {source.split}",
        "tokens": num_tokens,
        "prefix": prefix,
        "grid": list(grid),
        "layers": model.dims.depth,
        "heads": model.dims.num_heads,
        "full_rank": model.dims.width // model.dims.num_heads,
        "ks": ks,
        "methods": [method_facts(spec, ks, num_tokens, grid) for spec in specs],
        "weight_steps": WEIGHT_STEPS,
        "images": _describe_images(trained, source, batch, logits, pictures),
        "layout": layout,
        "blobs": [
            [texts[layer * num_images + image] for layer in range(model.dims.depth)] for image in range(num_images)
        ],
        "exactness": {
            "step": step,
            "rank": float(np.mean([np.mean((x.scale > 0).sum(axis=0)) for x in rounded])),
            "mean_error": float(np.mean(errors)),
            "largest_error": float(np.max(errors)),
        },
    }


class _Heads(NamedTuple):
    """All heads of one layer on one image."""

    query: Float[np.ndarray, "S H D"]
    key: Float[np.ndarray, "S H D"]
    factors: Factors
    choices: dict[str, np.ndarray]


def _of_layers(layers, specs: Sequence[AttentionSpec], ks, grid, seed) -> Iterator[_Heads]:
    """Layer after layer, in each image after image."""
    for layer, (query, key, value) in enumerate(layers):
        rng, first = jax.random.fold_in(jax.random.key(seed), layer), specs[0]
        scores = leverage_scores(key, method=first.score_method, centre=first.centre, ridge=first.ridge)
        found = _in_bytes("leverage", np.asarray(scores))
        for spec in specs:
            chosen = choices(query, key, value, spec, ks, grid=grid, rng=rng)
            found |= {f"{spec.method}.{part}": x for part, x in chosen.items()}
        for image, inputs in enumerate(zip(*(np.asarray(x, np.float32) for x in (query, key)), strict=True)):
            yield _Heads(*inputs, factorise(*inputs), {name: x[image] for name, x in found.items()})


def run_captured(
    model: ModelConfig, params: Any, images: Float[np.ndarray, "B h w c"]
) -> tuple[Float[np.ndarray, "B N"], Iterator[tuple[Float[Array, "B S H D"], ...]]]:
    """The output of a model, and queries, keys and values of each of its layers, with the attention it has."""
    model, params = unrolled(model, jax.tree.map(jnp.asarray, params))
    output, sown = _apply(params, images, model=model)
    return np.asarray(output), iter(sown)


@functools.partial(jax.jit, static_argnames="model")
def _apply(params, images, *, model: ModelConfig):
    output, state = ViT(model).apply({"params": params}, images, capture=True, mutable=["intermediates"])
    blocks = state["intermediates"]["Transformer"]
    layers = (blocks[f"encoderblock_{i}"]["MultiHeadDotProductAttention_0"] for i in range(model.dims.depth))
    # Only what is asked for is computed: the rest of what layers sow costs nothing.
    return output, [tuple(layer[name][0] for name in ("queries", "keys", "values")) for layer in layers]


def _pick(source: Source, trained: LoadedModel, num_images: int) -> dict[str, np.ndarray]:
    if not 1 <= num_images <= len(source):
        raise ValueError(f"{num_images=} must be in [1, {len(source)}]: there are no more in {source.name}")
    stride = len(source) // num_images
    stream = eval_batches(source, trained.config.data, batch_size=num_images, num_shards=stride)
    with contextlib.closing(stream):
        return next(iter(stream))


def _in_bytes(name: str, scores: Float[np.ndarray, "B H S"]) -> dict[str, np.ndarray]:
    """Square roots in a byte each, relative to the largest of a head: small scores keep their leading digit."""
    largest = np.maximum(scores.max(axis=-1, keepdims=True), 1e-30)
    steps = np.rint(255 * np.sqrt(np.maximum(scores, 0) / largest)).astype(np.uint8)
    return {name: steps, f"{name}.largest": largest[..., 0].astype(np.float32)}


def _fit(
    factors: Sequence[Factors], arrays: Sequence[dict[str, np.ndarray]], max_bytes: int
) -> tuple[list[Rounded], float, list[str], Layout]:
    """The finest step whose texts have at most `max_bytes` together."""

    def packed(step, some=slice(None)):
        rounded = [round_factors(x, step) for x in factors[some]]
        rank = max(len(x.scale) for x in rounded)
        named = [_padded(x, rank) | more for x, more in zip(rounded, arrays[some], strict=True)]
        return rounded, [pack(x) for x in named], layout_of(named[0])

    def fits(step):
        texts = packed(step, slice(None, None, _SAMPLE))[1]
        return sum(map(len, texts)) * len(factors) <= max_bytes * len(texts)

    first = bisect.bisect_left(_STEPS[:-1], True, key=fits)
    for step in _STEPS[first:]:
        rounded, texts, layout = packed(step)
        if (size := sum(map(len, texts))) <= max_bytes:
            return rounded, step, texts, layout
    raise ValueError(f"{max_bytes=} must be at least {size}: explore fewer images, methods or numbers of keys")


def _padded(rounded: Rounded, rank: int) -> dict[str, np.ndarray]:
    """With components of zeros up to `rank`."""
    more = [(0, rank - len(rounded.scale)), (0, 0)]
    left, right = (np.pad(x, [*more, (0, 0)]) for x in (rounded.left, rounded.right))
    return rounded._replace(left=left, right=right, scale=np.pad(rounded.scale, more))._asdict()


def _data_uri(image: UInt8[np.ndarray, "h w c"]) -> str:
    """Photographs as JPEG; small ones, whose pixels are seen one by one, as PNG."""
    kind = "PNG" if max(image.shape[:2]) <= 64 else "JPEG"
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _describe_images(trained: LoadedModel, source: Source, batch, logits, pictures) -> list[dict[str, Any]]:
    names = trained.class_names or source.class_names
    images = []
    for row, picture in enumerate(pictures):
        label = int(batch["label"][row])
        image = {"uri": picture, "index": int(batch["index"][row]), "label": source.class_names[label]}
        if trained.is_classifier:
            probs = np.asarray(jax.nn.softmax(logits[row]))
            best = int(probs.argmax())
            image |= {"predicted": names[best] if best < len(names) else str(best), "confidence": float(probs[best])}
        images.append(image)
    return images
