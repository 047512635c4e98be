"""What the attention of a trained model looks like, head by head, on a stream of images.

Every measure is taken of each image by itself; what is kept are its mean over the images and its spread. Memory is that
of one batch, whatever the number of images.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from levattn.analysis.captured import attention_by_key, captured, near_keys
from levattn.analysis.key_spectra import key_spectra
from levattn.analysis.moments import Moments
from levattn.analysis.overlap import chance_jaccard, jaccard, pairwise_jaccard
from levattn.analysis.views import VIEWS, paired_views, same_patches
from levattn.attention import AttentionSpec
from levattn.attention.layer import choose_coreset
from levattn.attention.local import Window
from levattn.attention.select import is_selected
from levattn.core import leverage_scores
from levattn.models import ModelConfig, ViT, patch_grid
from levattn.training.attentions import describe_options, scanned

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

_ATTENTION = "MultiHeadDotProductAttention_0"


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What to measure.

    Attributes:
      window: Local tokens around each query, as `AttentionSpec.local_window`.
      eps: Thresholds of heavy entries.
      views: Other views of each image in which the chosen keys are compared, of `levattn.analysis.views.VIEWS`.
      spectra_images: Images on which rank and condition of keys are taken, by an SVD on the host.
      seed: Of methods that draw at random.
    """

    window: Window | None = (3, 3)
    eps: tuple[float, ...] = (0.01, 0.1, 0.5)
    views: tuple[str, ...] = VIEWS
    spectra_images: int = 8
    seed: int = 0

    def __post_init__(self):
        if not self.eps or not all(0 < eps <= 1 for eps in self.eps):
            raise ValueError(f"eps={self.eps} must be thresholds in (0, 1]")
        if unknown := set(self.views) - set(VIEWS):
            raise ValueError(f"views={self.views}: {', '.join(sorted(unknown))} must be one of {', '.join(VIEWS)}")
        if self.spectra_images < 1:
            raise ValueError(f"spectra_images={self.spectra_images} must be at least 1")


class Model(NamedTuple):
    """A model to look into, with the attention that runs in it.

    Attributes:
      name: Of the checkpoint.
      config: Of the model.
      params: Its parameters.
    """

    name: str
    config: ModelConfig
    params: PyTree


@dataclasses.dataclass(frozen=True)
class Study:
    """What was found.

    Attributes:
      sets: One row for each set of keys (method, k and options), layer and head: see `SET_COLUMNS`.
      heads: One row for each layer and head: see `HEAD_COLUMNS`.
      summary: One row for each set of keys, over all layers and heads, with standard errors over images: heads of one
        image are not independent, so that images are what counts.
      layers: Of each set of keys the mean Jaccard index of the sets of all heads of one layer with those of another,
        or of other heads of the same layer.
      num_images: Images that were looked at.
    """

    sets: list[dict[str, Any]]
    heads: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    num_images: int


# What the columns of the rows mean. `_std` is the standard deviation over images of a column.
SET_COLUMNS = {
    "kept": "keys in the set",
    "prefix_kept": "share of the class token and its like that are in the set",
    "mass": "share of dense attention on the set, a mean over queries",
    "mass_with_local": "the same on the set and the window of each query",
    "covered_EPS": "share of the heavy entries, those of at least EPS, that lie on the set; all images pooled",
    "covered_EPS_with_local": "the same on the set or in the window of the query",
    "same_heads": "mean Jaccard index of the set with those of the other heads of its layer",
    "same_flip, same_colour, same_crop": "Jaccard index of the sets of two views of one image",
    "same_NAME": "Jaccard index of the sets of the same head in another checkpoint, on the same image",
    "chance": "expected Jaccard index of two sets of as many patches, drawn at random",
}
HEAD_COLUMNS = {
    "local_mass": "share of dense attention in the window of each query",
    "local_covered_EPS": "share of the heavy entries that lie in it",
    "heavy_EPS": "heavy entries a query",
    "effective_keys": "1 / sum of squares of a query's attention, a mean over queries",
    "prefix_mass": "share of dense attention on the class token and its like",
    "score_qNN": "quantiles of the leverage scores of an image's keys",
    "prefix_score": "mean leverage score of the class token and its like",
    "universal_EPS": "keys of leverage score at least EPS",
    "rank, condition, scaled_condition, effective_rank": "of the keys, see key_spectra; conditions: geometric mean",
    "max_condition": "the largest of all images",
}


def study_attention(
    models: Sequence[Model],
    specs: Sequence[AttentionSpec],
    batches: Iterable[tuple[Float[Array, "B h w c"], int]],
    mean: Sequence[float],
    std: Sequence[float],
    options: StudyOptions = StudyOptions(),
) -> Study:
    """Looks at the attention of every layer and head of a model.

    Queries and keys are those that each layer has in the running model; attention is softmax (or the power of `specs`)
    over all keys. Sets of keys are those that the methods would keep. Overlaps are those of patches alone: a class
    token that is always kept would make any two sets alike.

    Args:
      models: Checkpoints of one model; the last is looked at, and the others' sets are compared with its own.
      specs: The sets of keys, by method and k.
      batches: Normalised images of one shape, and how many at the start of each batch count (the rest is padding).
      mean: Of the normalisation.
      std: Of the normalisation.
      options: What to measure.

    Returns:
      Tables over all images. Cost of an image: one forward pass of each model, two more for each view but three for
      crops; dense attention once more in float32; the choice of keys for each spec in each of these passes. Memory: the
      parameters of all models, and queries, keys and values of all layers for one batch.

    Raises:
      ValueError: No images or specs; models of different shapes; a method that merges keys, or more keys than there
        are; attention that is not finite.
    """
    if not specs or any(spec.method == "dense" for spec in specs):
        raise ValueError("specs must be methods that choose keys: dense attention keeps all of them")
    if len({spec.power for spec in specs}) > 1:
        raise ValueError("specs must agree on power: it says which attention is looked at")
    if len({(model.config.dims, model.config.num_prefix_tokens) for model in models}) != 1:
        raise ValueError("checkpoints must be of models of one shape: name those of one run, or of runs of one config")
    models = [Model(name, *scanned(config, params)) for name, config, params in models]
    collected, num_images, grid = _Collected(), 0, None
    for number, (images, count) in enumerate(batches):
        grid = patch_grid(models[-1].config, images.shape[1:])
        rng = jax.random.fold_in(jax.random.key(options.seed), number)
        remaining = max(0, options.spectra_images - num_images)
        found = _look(models, specs, images, grid, mean, std, options, rng, min(count, remaining))
        found = {name: x[:count] for name, x in found.items()}
        _check_finite(found, num_images)
        collected.add(found)
        num_images += count
    if not num_images:
        raise ValueError("there are no images: name a source or files that hold some")
    return _tables(models, specs, grid, options, collected, num_images)


class _Collected:
    """Moments of every measure, by name, and of its mean over layers and heads."""

    def __init__(self):
        self.each: dict[str, Moments] = {}
        self.overall: dict[str, Moments] = {}

    def add(self, found: Mapping[str, np.ndarray]) -> None:
        for name, x in found.items():
            self.each.setdefault(name, Moments()).add(x)
            if x.ndim > 2:  # images, layers, heads, and what there may be of sets and thresholds
                self.overall.setdefault(name, Moments()).add(np.mean(x, axis=(1, 2)))


def layer_inputs(
    model: ModelConfig, params: PyTree, images: Float[Array, "B h w c"], rng: Key[Array, ""] | None = None
) -> Iterator[tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Float[Array, "B S H D"]]]:
    """Queries, keys and values of each layer of a running model, first to last, under its own attention."""
    found = _capture(params, images, rng, model=model)
    for layer in range(model.dims.depth):
        if model.scan:
            yield tuple(x[layer] for x in found["encoderblock"])
        else:
            yield found[f"encoderblock_{layer}"]


@functools.partial(jax.jit, static_argnames="model")
def _capture(params, images, rng, *, model: ModelConfig):
    rngs = None if rng is None else {"selection": rng}
    _, state = ViT(model).apply({"params": params}, images, capture=True, mutable=["intermediates"], rngs=rngs)
    # Only what is asked for is computed: the rest of what the layers sow costs nothing.
    blocks = state["intermediates"]["Transformer"]
    return {name: tuple(sown[_ATTENTION][x][0] for x in ("queries", "keys", "values")) for name, sown in blocks.items()}


@functools.partial(jax.jit, static_argnames=("spec", "grid"))
def kept_keys(query, key, value, rng, *, spec: AttentionSpec, grid: tuple[int, int]) -> Bool[Array, "B H S"]:
    """The keys that a method keeps.

    Raises:
      ValueError: The method merges keys, or more are asked for than there are.
    """
    coreset = choose_coreset(query, key, value, spec, grid=grid, rng=rng)
    if coreset.assignment is not None:
        raise ValueError(
            f"method {spec.method!r} merges keys: there is no set of them to look at; how near its attention comes to "
            "dense attention is measured by eval.py --config configs/retrofit.py:probe=..."
        )
    return is_selected(coreset.indices, coreset.valid, key.shape[1])


def _look(models, specs, images, grid, mean, std, options, rng, spectra_images) -> dict[str, np.ndarray]:
    """All measures of a batch: images, layers, heads, then sets or thresholds."""
    model = models[-1]
    num_prefix = model.config.num_prefix_tokens
    num_tokens = grid[0] * grid[1] + num_prefix
    near = near_keys(num_tokens, options.window, num_prefix, grid)
    kept, layers = [], []
    for layer, (query, key, value) in enumerate(layer_inputs(model.config, model.params, images, rng)):
        layer_rng = jax.random.fold_in(rng, layer)
        sets = jnp.stack([kept_keys(query, key, value, layer_rng, spec=spec, grid=grid) for spec in specs])
        measures = _measure(query, key, sets, near, eps=options.eps, power=specs[0].power, num_prefix=num_prefix)
        spectra = _spectra_of(np.asarray(key[:spectra_images]), len(images))
        layers.append(jax.device_get(measures) | spectra)
        kept.append(sets)
    found = {name: np.stack([layer[name] for layer in layers], axis=1) for name in layers[0]}

    patches = jnp.stack(kept)[..., num_prefix:]  # layers, sets, images, heads, patches
    by_layer, by_head = jax.device_get(_among_heads(patches))
    found |= {"by_layer": by_layer}
    if by_head is not None:
        found["same_heads"] = by_head

    def sets_of(model, images, salt):
        return _patch_sets(model, images, specs, grid, jax.random.fold_in(rng, salt))

    for number, name in enumerate(options.views):
        first, second = paired_views(name, images, model.config.dims.patch, mean, std)
        first_sets = patches if first is None else sets_of(model, first, 1000 + 2 * number)
        second_sets = sets_of(model, second, 1001 + 2 * number)
        found[f"same_{name}"] = np.asarray(_same(first_sets, second_sets, *same_patches(name, grid)))
    every = np.arange(patches.shape[-1])
    for number, other in enumerate(models[:-1]):
        found[f"same_{other.name}"] = np.asarray(_same(patches, sets_of(other, images, 2000 + number), every, every))
    return found


def _patch_sets(model: Model, images, specs, grid, rng) -> Bool[Array, "L N B H P"]:
    sets = [
        jnp.stack([kept_keys(*inputs, jax.random.fold_in(rng, layer), spec=spec, grid=grid) for spec in specs])
        for layer, inputs in enumerate(layer_inputs(model.config, model.params, images, rng))
    ]
    return jnp.stack(sets)[..., model.config.num_prefix_tokens :]


@jax.jit
def _same(first, second, places_first, places_second) -> Float[Array, "B L H N"]:
    return jnp.moveaxis(jaccard(first[..., places_first], second[..., places_second]), (2, 0, 3, 1), (0, 1, 2, 3))


@functools.partial(jax.jit, static_argnames=("eps", "power", "num_prefix"))
def _measure(query, key, sets, near, *, eps, power, num_prefix) -> dict[str, Array]:
    """Measures of one layer: images, heads, then sets and thresholds."""
    found = attention_by_key(query, key, near, eps=eps, power=power)
    on_sets = captured(found, sets)
    scores = leverage_scores(key, method="refined")

    def last(x, leading):  # sets (and thresholds) go behind images and heads
        return jnp.moveaxis(x, range(leading), range(-leading, 0))

    measures = {
        "kept": last(jnp.sum(sets, axis=-1), 1),
        "kept_patches": last(jnp.sum(sets[..., num_prefix:], axis=-1), 1),
        "mass": last(on_sets.mass, 1),
        "mass_with_local": last(on_sets.mass_with_local, 1),
        "heavy_kept": last(on_sets.heavy, 2),
        "heavy_kept_with_local": last(on_sets.heavy_with_local, 2),
        "local_mass": jnp.sum(found.local_mass, axis=-1),
        "local_heavy": last(jnp.sum(found.local_heavy, axis=-1), 1),
        "heavy": last(jnp.sum(found.heavy, axis=-1), 1),
        "effective_keys": found.effective_keys,
        "scores": last(jnp.quantile(scores, jnp.asarray(QUANTILES), axis=-1), 1),
        "universal": jnp.stack([jnp.sum(scores >= e, axis=-1) for e in eps], axis=-1),
    }
    if num_prefix:
        measures["prefix_kept"] = last(jnp.mean(sets[..., :num_prefix], axis=-1), 1)
        measures["prefix_mass"] = jnp.sum(found.mass[..., :num_prefix], axis=-1)
        measures["prefix_score"] = jnp.mean(scores[..., :num_prefix], axis=-1)
    return measures


def _spectra_of(keys: np.ndarray, num_images: int) -> dict[str, np.ndarray]:
    """NaN, which does not count, for images that are not looked at."""
    spectra = key_spectra(np.moveaxis(keys.astype(np.float32), 2, 1))
    found = {
        "rank": spectra.rank,
        "log_condition": np.log(spectra.condition),
        "log_scaled_condition": np.log(spectra.scaled_condition),
        "effective_rank": spectra.effective_rank,
    }
    missing = ((0, num_images - len(keys)), (0, 0))
    return {name: np.pad(np.asarray(x, np.float64), missing, constant_values=np.nan) for name, x in found.items()}


@jax.jit
def _among_heads(patches: Bool[Array, "L N B H P"]) -> tuple[Array, Array | None]:
    """Mean Jaccard index of the heads of two layers, `B L L N`, and of a head with the others of its layer."""
    heads = patches.shape[3]
    by_set = jnp.moveaxis(patches, 0, 2)  # sets, images, layers, heads

    def with_layer(layer):  # one layer at a time: never all pairs of heads of the model
        return pairwise_jaccard(by_set, jnp.broadcast_to(layer[:, :, None], by_set.shape))

    pairs = jax.lax.map(lambda layer: jnp.mean(with_layer(layer), axis=(-2, -1)), jnp.moveaxis(by_set, 2, 0))
    own = pairwise_jaccard(by_set, by_set)
    others = (jnp.sum(own, axis=-1) - 1) / max(1, heads - 1)
    by_layer = jnp.moveaxis(pairs, (2, 0, 3, 1), (0, 1, 2, 3))
    apart = jnp.mean(jnp.moveaxis(others, (1, 2, 0, 3), (0, 1, 2, 3)), axis=-1)
    diagonal = jnp.eye(by_layer.shape[1], dtype=bool)[None, :, :, None]
    by_layer = jnp.where(diagonal, apart[:, :, None] if heads > 1 else 1.0, by_layer)
    return by_layer, jnp.moveaxis(others, (1, 2, 3, 0), (0, 1, 2, 3)) if heads > 1 else None


def _check_finite(found, num_before: int) -> None:
    damaged = np.flatnonzero(~np.isfinite(found["effective_keys"]).all(axis=(1, 2)))
    if damaged.size:
        raise ValueError(
            f"attention is not finite in image {num_before + damaged[0]}: the model, or that image, is damaged"
        )


def _tables(models, specs, grid, options, collected, num_images) -> Study:
    each, overall = collected.each, collected.overall
    eps = [f"{e:g}" for e in options.eps]
    depth, num_heads = each["local_mass"].mean.shape
    places = [(layer, head) for layer in range(depth) for head in range(num_heads)]
    same = [name for name in each if name.startswith("same_")]

    def share(part, whole):
        return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)

    covered = {
        "covered_{}": share(each["heavy_kept"].mean, each["heavy"].mean[:, :, None]),
        "covered_{}_with_local": share(each["heavy_kept_with_local"].mean, each["heavy"].mean[:, :, None]),
    }
    sets = []
    for number, spec in enumerate(specs):
        chances: dict[int, float] = {}
        for layer, head in places:
            at = (layer, head, number)
            size = round(each["kept_patches"].mean[at])
            chances.setdefault(size, chance_jaccard(size, size, grid[0] * grid[1]))
            row = _named(spec) | {"layer": layer, "head": head, "kept": each["kept"].mean[at]}
            if "prefix_kept" in each:
                row["prefix_kept"] = each["prefix_kept"].mean[at]
            for name in ("mass", "mass_with_local", *same):
                row |= {name: each[name].mean[at], f"{name}_std": each[name].std[at]}
            row |= {name.format(e): x[at][i] for name, x in covered.items() for i, e in enumerate(eps)}
            sets.append(_rounded(row | {"chance": chances[size]}))

    heads = []
    local_covered = share(each["local_heavy"].mean, each["heavy"].mean)
    for at in places:
        row = {"layer": at[0], "head": at[1]}
        for name in (
            "local_mass",
            "effective_keys",
            *(("prefix_mass", "prefix_score") if "prefix_mass" in each else ()),
        ):
            row |= {name: each[name].mean[at], f"{name}_std": each[name].std[at]}
        row |= {f"local_covered_{e}": local_covered[at][i] for i, e in enumerate(eps)}
        row |= {f"heavy_{e}": each["heavy"].mean[at][i] for i, e in enumerate(eps)}
        row |= {f"universal_{e}": each["universal"].mean[at][i] for i, e in enumerate(eps)}
        row |= {f"score_q{round(100 * q):02d}": each["scores"].mean[at][i] for i, q in enumerate(QUANTILES)}
        row |= {name: each[name].mean[at] for name in ("rank", "effective_rank")}
        row |= {name: np.exp(each[f"log_{name}"].mean[at]) for name in ("condition", "scaled_condition")}
        heads.append(_rounded(row | {"max_condition": np.exp(each["log_condition"].max[at])}))

    summary = []
    for number, spec in enumerate(specs):
        row = _named(spec) | {"kept": overall["kept"].mean[number]}
        for name in ("mass", "local_mass", "mass_with_local"):
            at = () if name == "local_mass" else number
            row |= {name: overall[name].mean[at], f"{name}_error": overall[name].standard_error[at]}
        for name, part in (("covered_{}", "heavy_kept"), ("covered_{}_with_local", "heavy_kept_with_local")):
            total = share(overall[part].mean[number], overall["heavy"].mean)
            row |= {name.format(e): total[i] for i, e in enumerate(eps)}
        for name in same:
            row |= {name: overall[name].mean[number], f"{name}_error": overall[name].standard_error[number]}
        size = round(overall["kept_patches"].mean[number])
        summary.append(_rounded(row | {"chance": chance_jaccard(size, size, grid[0] * grid[1])}))

    layers = [
        _named(spec) | {"jaccard": np.round(each["by_layer"].mean[..., number], 4).tolist()}
        for number, spec in enumerate(specs)
    ]
    return Study(sets, heads, summary, layers, num_images)


def _named(spec: AttentionSpec) -> dict[str, Any]:
    return {
        "attention": spec.method,
        "k": spec.k if spec.k_per_head is None else None,
        "options": describe_options(spec),
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Six significant digits; None for what there is nothing to say of."""

    def tidy(x):
        if not isinstance(x, float | np.floating):
            return x
        return float(f"{x:.6g}") if np.isfinite(x) else None

    return {name: tidy(x) for name, x in row.items()}
