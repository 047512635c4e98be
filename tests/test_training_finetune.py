"""What a run that starts from the parameters of another takes over, converts, leaves alone and refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from levattn.models import ModelConfig, ViT
from levattn.training.checkpoint import Checkpointer
from levattn.training.config import MeshConfig
from levattn.training.export import export_params
from levattn.training.finetune import CHECKPOINT_FOLDER, read_fitting, with_params_of
from levattn.training.sharding import make_mesh
from levattn.training.state import create_state, init_state, plan_state

TINY = ModelConfig("Ti/4", num_classes=5, width=16, depth=2, num_heads=2, mlp_dim=32, head_zero_init=False)
SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)


@functools.cache
def plan_of(model, ema=False):
    init_fn = functools.partial(init_state, model=ViT(model), image_shape=SHAPE, tx=optax.sgd(0.1), ema=ema)
    return init_fn, plan_state(init_fn, make_mesh(MeshConfig(fsdp=8)), fsdp_min_size=100)


def make_state(model, seed=1, ema=False):
    return create_state(*plan_of(model, ema), seed)


def logits(model, params):
    params = jax.tree.map(jnp.asarray, jax.device_get(params))
    return ViT(model).apply({"params": params}, jnp.asarray(IMAGES))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of an unrolled model with 5 classes, and its parameters."""
    path = tmp_path_factory.mktemp("run") / "params.safetensors"
    params = jax.device_get(make_state(TINY, seed=0).params)
    export_params(path, params, {})
    return path, params


def test_parameters_their_average_and_nothing_else_are_taken_over_where_the_state_puts_them(exported):
    path, params = exported
    state = make_state(TINY, ema=True)
    started, kept = with_params_of(state, path.parent)
    assert kept == []
    for tree in (started.params, started.ema_params):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), params)
    assert jax.tree.all(jax.tree.map(lambda new, old: new.sharding == old.sharding, started.params, state.params))
    assert not jax.tree.all(jax.tree.map(lambda leaf: leaf.is_fully_replicated, started.params))
    assert (started.step, started.opt_state) == (state.step, state.opt_state)


def test_a_head_of_other_classes_stays_as_initialised_and_is_named(exported):
    path, params = exported
    model = dataclasses.replace(TINY, num_classes=7)
    state = make_state(model)
    started, kept = with_params_of(state, path)
    assert kept == ["head/bias", "head/kernel"]
    jax.tree.map(np.testing.assert_array_equal, started.params["head"], state.params["head"])
    body = {name: tree for name, tree in jax.device_get(started.params).items() if name != "head"}
    jax.tree.map(np.testing.assert_array_equal, body, {name: params[name] for name in body})


def test_a_file_without_a_head_starts_all_else(exported, tmp_path):
    _, params = exported
    export_params(tmp_path / "body.npz", {name: params[name] for name in params if name != "head"}, {})
    started, kept = with_params_of(make_state(TINY), tmp_path / "body.npz")
    assert kept == ["head/bias", "head/kernel"]
    np.testing.assert_array_equal(started.params["pos_embedding"], params["pos_embedding"])
    headless = dataclasses.replace(TINY, num_classes=0)
    assert "head" not in plan_of(headless)[1].params
    assert "head/kernel" not in read_fitting(plan_of(headless)[1].params, exported[0])


@pytest.mark.parametrize("scan", [True, False])
def test_scanned_and_unrolled_layers_start_from_each_other_with_the_same_outputs(exported, tmp_path, scan):
    """Twice to and fro: the file of the unrolled model, and one that the scanned model exports."""
    path, params = exported
    scanned = dataclasses.replace(TINY, scan=True)
    model = scanned if scan else TINY
    if not scan:
        path = tmp_path / "scanned.safetensors"
        export_params(path, with_params_of(make_state(scanned), exported[0])[0].params, {})
    started, kept = with_params_of(make_state(model), path)
    assert kept == []
    assert ("encoderblock" in started.params["Transformer"]) == scan
    np.testing.assert_allclose(logits(model, started.params), logits(TINY, params), rtol=1e-5, atol=1e-6)


def test_everything_that_does_not_fit_is_listed(exported, tmp_path):
    """A plan is enough to find it, without a state. Only the head may differ."""
    path, _ = exported
    other = dataclasses.replace(TINY, depth=1, mlp_dim=48, pre_norm=True)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        read_fitting(plan_of(other)[1].params, path)
    message = str(error.value)
    dense = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
    assert f"{dense} is (16, 32) there, (16, 48) in the model" in message
    assert "Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel is not in the model" in message
    assert "is missing there" in message
    assert "head/" not in message


def test_what_cannot_be_read_is_refused_with_the_next_step(tmp_path):
    params = plan_of(TINY)[1].params
    with pytest.raises(FileNotFoundError, match="name a finished run's workdir or an exported file"):
        read_fitting(params, tmp_path)
    (tmp_path / "torn.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="cannot be read as"):
        read_fitting(params, tmp_path / "torn.safetensors")
    with Checkpointer(tmp_path / CHECKPOINT_FOLDER) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)}, None, {})
    with pytest.raises(FileNotFoundError, match="has not finished"):
        read_fitting(params, tmp_path)
