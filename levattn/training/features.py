"""What a frozen model makes of every image of a source, under several attentions at once."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, PyTree

from levattn.data import Source, normalize
from levattn.models import Features, ModelConfig, ViT
from levattn.training.config import MeshConfig, TrainConfig
from levattn.training.passes import timed_passes
from levattn.training.sharding import make_mesh, replicated


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one attention gives.

    Attributes:
      embedding: One vector an image, see `embedding_of`.
      predicted: The most likely class; None of a model without a classifier.
      seconds: Of the computation, without compilation.
    """

    embedding: Float32[np.ndarray, "N R"]
    predicted: Int[np.ndarray, " N"] | None
    seconds: float


def embedding_of(output: Float[Array, "B N"], features: Features, *, classifier: bool) -> Float[Array, "B R"]:
    """The vector that stands for an image: what the head reads of a classifier, of other models their output.

    Args:
      output: Of the model.
      features: Of the model, with `return_features=True`.
      classifier: Whether the output is logits.
    """
    return features.pre_logits if classifier else output


def embed(
    config: TrainConfig,
    params: PyTree,
    models: Sequence[ModelConfig],
    source: Source,
    *,
    classifier: bool,
    batch_size: int,
) -> tuple[list[Outputs], Int[np.ndarray, " N"]]:
    """Runs a source through the same parameters under several attentions.

    Args:
      config: Of the data and the seed.
      params: That fit all the models.
      models: As `levattn.training.evaluate.prepare` gives them.
      source: The images; each is run once.
      classifier: Whether the output of the models is logits.
      batch_size: Images at a time.

    Returns:
      The outputs of each model, and the labels in the same order of images. Held in memory: 4 N R bytes a model.
    """
    mesh = make_mesh(MeshConfig())
    params = jax.device_put(params, replicated(mesh))
    steps = [_make_step(config, ViT(model), mesh, classifier) for model in models]
    parts, seconds = [[] for _ in models], [0.0] * len(models)
    for results in timed_passes(steps, params, source, config.data, mesh, batch_size):
        for i, (part, elapsed) in enumerate(results):
            real = part.pop("mask") > 0
            parts[i].append({name: rows[real] for name, rows in part.items()})
            seconds[i] += elapsed
    joined = [{name: np.concatenate([part[name] for part in each]) for name in each[0]} for each in parts]
    outputs = [
        Outputs(found["embedding"], found.get("predicted"), elapsed)
        for found, elapsed in zip(joined, seconds, strict=True)
    ]
    return outputs, joined[0]["label"]


def _make_step(config: TrainConfig, model: nn.Module, mesh: Mesh, classifier: bool) -> Callable:
    def step(params, batch):
        rngs = {"selection": jax.random.key(config.seed)}
        images = normalize(batch["image"], config.data)
        output, features = model.apply({"params": params}, images, rngs=rngs, return_features=True)
        embedding = embedding_of(output, features, classifier=classifier).astype(jnp.float32)
        found = {"embedding": embedding, "label": batch["label"], "mask": batch["mask"]}
        return found | ({"predicted": output.argmax(-1)} if classifier else {})

    return jax.jit(step, out_shardings=replicated(mesh))
