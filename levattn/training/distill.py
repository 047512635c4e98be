"""Learning other attention from one's own dense attention: a frozen teacher that is the model as it started."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from levattn.attention import AttentionSpec
from levattn.models import Features, ModelConfig, ViT
from levattn.training.attentions import with_attention
from levattn.training.config import DistillConfig
from levattn.training.features import embedding_of
from levattn.training.finetune import read_fitting


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A dense model whose parameters stay as they are.

    They are read from `init_from` at each start of a run and not saved with its state: every checkpoint would be larger
    by a copy that never changes. The checksum is saved instead, so that no run goes on with another teacher.

    Attributes:
      model: With dense attention.
      params: On the devices, laid out as those of the student.
      checksum: SHA-256 of the names and values of the parameters.
    """

    model: ViT
    params: PyTree
    checksum: str


def load_teacher(model: ModelConfig, plan: PyTree, path: str | os.PathLike, arch: str | None = None) -> Teacher:
    """Reads the teacher of a student.

    Args:
      model: Of the student.
      plan: Shapes and shardings of the student's parameters.
      path: As `TrainConfig.init_from`.
      arch: As `TrainConfig.init_arch`.

    Raises:
      FileNotFoundError, ValueError: As `read_fitting` does; and if there is no head there, which can teach nothing.
    """
    loaded, wanted = read_fitting(plan, path, model, arch), flatten_dict(plan, sep="/")
    if missing := sorted(wanted.keys() - loaded.keys()):
        raise ValueError(f"init_from={str(path)!r} cannot be a teacher: {', '.join(missing)} not there in this shape")
    arrays = {name: np.asarray(loaded[name], leaf.dtype) for name, leaf in sorted(wanted.items())}
    params = {name: jax.device_put(array, wanted[name].sharding) for name, array in arrays.items()}
    dense = with_attention(model, AttentionSpec("dense"))
    dense = dataclasses.replace(dense, dropout=0.0, stochastic_depth=0.0, remat="none")
    return Teacher(ViT(dense), unflatten_dict(params, sep="/"), _checksum(arrays))


def distill_losses(
    config: DistillConfig,
    student: tuple[Float[Array, "B N"], Features],
    teacher: tuple[Float[Array, "B N"], Features],
) -> dict[str, Float[Array, " B"]]:
    """The parts of the loss of each image that look at the teacher, not weighted; those of weight 0 are left out.

    All are 0 where the student's outputs are the teacher's.

    Args:
      config: What is computed.
      student: Output and features of the model that learns.
      teacher: Those of the frozen model on the same images; no gradient flows into them.
    """
    output, features = student
    teacher_output, teacher_features = jax.lax.stop_gradient(teacher)
    classifier = config.head == "classifier"
    parts = {}
    if config.weight_logits:
        logs = [jax.nn.log_softmax(x.astype(jnp.float32) / config.temperature) for x in (output, teacher_output)]
        parts["logits"] = config.temperature**2 * optax.losses.kl_divergence_with_log_targets(*logs)
    if config.weight_features:
        parts["features"] = 1 - optax.losses.cosine_similarity(
            embedding_of(output, features, classifier=classifier).astype(jnp.float32),
            embedding_of(teacher_output, teacher_features, classifier=classifier).astype(jnp.float32),
            epsilon=1e-6,
        )
    if config.weight_tokens:
        difference = jnp.square(features.tokens - teacher_features.tokens).sum(axis=(1, 2))
        parts["tokens"] = difference / jnp.square(teacher_features.tokens).sum(axis=(1, 2))
    return parts


def weighted_sum(config: DistillConfig, parts: Mapping[str, Any]) -> Any:
    """The loss from its parts, "labels" among them or not."""
    return sum(getattr(config, f"weight_{name}") * part for name, part in parts.items())


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
