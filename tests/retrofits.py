"""A tiny model of the digits whose attention matters, without training it: what tests of retrofits share."""

import dataclasses

import jax
import jax.numpy as jnp

from levattn.data import DataConfig
from levattn.models import ModelConfig, ViT
from levattn.training.config import TrainConfig
from levattn.training.loaded import LoadedModel

TOKENS = 17
MODEL = ModelConfig(
    "mu/2", width=32, depth=3, num_heads=2, mlp_dim=32, num_classes=10, pool="cls", head_zero_init=False
)
CONFIG = TrainConfig(
    data=DataConfig(source="digits", eval_split="test[:80]"), model=MODEL, batch_size=40, total_steps=1
)


def tiny_model(model: ModelConfig = MODEL, head: str | None = "classifier") -> LoadedModel:
    """As initialised, but for keys and queries three times as large, so that softmax picks some keys out."""
    params = jax.jit(ViT(model).init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]

    def enlarge(path, leaf):
        names = {key.key for key in path}
        return 3 * leaf if names & {"query", "key"} and "kernel" in names else leaf

    params = jax.tree_util.tree_map_with_path(enlarge, params)
    return LoadedModel(dataclasses.replace(CONFIG, model=model), params, head, "tiny")
