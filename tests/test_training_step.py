"""One step is the same on any mesh and for any number of microbatches; evaluation counts what it should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import AttentionSpec
from levattn.data import DataConfig, open_source
from levattn.models import ModelConfig, ViT
from levattn.training.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from levattn.training.optim import make_optimizer
from levattn.training.sharding import check_batch_size, make_mesh, put_batch, state_sharding
from levattn.training.state import create_state, init_state, plan_state
from levattn.training.step import evaluate, make_eval_step, make_train_step

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, size=(32, 8, 8, 1), dtype=np.uint8),
    "label": RNG.integers(0, 10, size=32, dtype=np.int32),
}
SGD = OptimizerConfig(name="sgd", learning_rate=0.05, schedule="constant", momentum_dtype="float32")
CONFIG = TrainConfig(
    data=DataConfig(source="digits"),
    model=ModelConfig(
        variant="Ti/2", width=32, depth=1, num_heads=2, mlp_dim=64, num_classes=10, head_zero_init=False, dropout=0.1
    ),
    optimizer=SGD,
    loss=LossConfig(label_smoothing=0.1, mixup_alpha=0.5),
    mesh=MeshConfig(fsdp_min_size=100),
    batch_size=32,
    total_steps=10,
    ema_decay=0.9,
)


@functools.cache
def build(config, num_devices):
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    model = ViT(config.model)
    tx, schedule_fn = make_optimizer(config.optimizer, config.total_steps)
    ema = config.ema_decay is not None
    init_fn = functools.partial(init_state, model=model, image_shape=(8, 8, 1), tx=tx, ema=ema)
    plan = plan_state(init_fn, mesh, config.mesh.fsdp_min_size)
    state = jax.device_get(create_state(init_fn, plan, config.seed))
    return state, plan, make_train_step(config, model, tx, schedule_fn, plan), mesh


def start(config, num_devices=8):
    host_state, plan, step_fn, mesh = build(config, num_devices)
    state = jax.tree.map(lambda leaf, planned: jax.device_put(leaf, planned.sharding), host_state, plan)
    return state, step_fn, mesh


def take_steps(config, num_steps=2, num_devices=8):
    state, step_fn, mesh = start(config, num_devices)
    for _ in range(num_steps):
        state, metrics = step_fn(state, put_batch(BATCH, mesh))
    return jax.device_get((state, metrics))


def assert_close(ours, reference, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, reference)


@functools.cache
def on_one_device():
    return take_steps(CONFIG, num_devices=1)


@pytest.mark.parametrize("data, fsdp", [(8, 1), (4, 2), (1, 8)])
def test_a_step_on_eight_devices_is_a_step_on_one(data, fsdp):
    """Dropout and MixUp included: randomness depends on positions in the global batch, not on devices."""
    assert jax.device_count() == 8
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=data, fsdp=fsdp, fsdp_min_size=100))
    assert_close(take_steps(config), on_one_device())


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_with_more_state_run_sharded(name):
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, schedule="constant")
    config = dataclasses.replace(CONFIG, optimizer=optimizer, mesh=MeshConfig(fsdp=8, fsdp_min_size=100))
    state, metrics = take_steps(config, num_steps=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, metrics)))


def test_leverage_attention_trains_sharded():
    attention = AttentionSpec(method="leverage", k=8)
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, attention=attention), mesh=MeshConfig(fsdp=2)
    )
    reference = take_steps(config, num_devices=2)
    assert_close(take_steps(config), reference)


def test_large_parameters_and_their_moments_are_split_and_small_ones_are_not():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=8, fsdp_min_size=2000))
    state, _, _ = start(config)
    for tree in (state.params, state.ema_params, state.opt_state):
        sizes = {leaf.size: leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree)}
        assert sizes[32 * 64] == 32 * 64 // 8
        assert sizes[32] == 32


def test_the_largest_divisible_axis_is_split():
    mesh = make_mesh(MeshConfig(fsdp=8))
    shapes = {"a": (24, 32), "b": (64, 30), "c": (7, 9), "d": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: tuple(sharding.spec) for name, sharding in state_sharding(tree, mesh, 1).items()}
    assert specs == {"a": (None, "fsdp"), "b": ("fsdp",), "c": (), "d": ()}


def test_microbatches_give_the_step_of_the_whole_batch():
    whole = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.0))
    assert_close(take_steps(dataclasses.replace(whole, accumulate_steps=4)), take_steps(whole))


def test_an_update_that_overflows_from_a_finite_gradient_is_left_out():
    """The squares of the new parameters are past float32; loss and gradient are not."""
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(SGD, learning_rate=1e30), nonfinite="skip")
    before, _, _ = start(config, num_devices=1)
    before = jax.device_get(before)
    after, metrics = take_steps(config, num_steps=1, num_devices=1)
    assert metrics["nonfinite"]
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert not np.isfinite(metrics["param_norm"])
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_the_average_follows_its_closed_form():
    """After n steps it is d^n p_0 + (1 - d) sum_i d^(n - i) p_i."""
    state, step_fn, mesh = start(CONFIG)
    history = [jax.device_get(state.params)]
    for _ in range(4):
        state, _ = step_fn(state, put_batch(BATCH, mesh))
        history.append(jax.device_get(state.params))
    weights = [0.9**4, *(0.1 * 0.9 ** (4 - i) for i in range(1, 5))]
    expected = jax.tree.map(
        lambda *leaves: sum(w * np.float64(x) for w, x in zip(weights, leaves, strict=True)), *history
    )
    assert_close(jax.device_get(state.ema_params), expected)
    assert state.eval_params is state.ema_params


def test_randomness_is_a_function_of_seed_and_step():
    other_seed, _ = take_steps(dataclasses.replace(CONFIG, seed=1))
    assert not np.allclose(other_seed.params["head"]["kernel"], on_one_device()[0].params["head"]["kernel"])
    losses = []
    for step in (0, 1, 0):
        state, step_fn, mesh = start(CONFIG)
        state = state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
        losses.append(float(step_fn(state, put_batch(BATCH, mesh))[1]["loss"]))
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_evaluation_counts_every_example_once_and_matches_numpy():
    """360 test digits in batches of 32: the last batch is partly padding."""
    source = open_source(CONFIG.data, "test")
    state, _, mesh = start(CONFIG)
    model = ViT(CONFIG.model)
    metrics = evaluate(make_eval_step(CONFIG, model, mesh), state.params, source, CONFIG, mesh)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.array([source[i]["label"] for i in range(len(source))])
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    logits = model.apply({"params": params}, jnp.asarray((images / np.float32(255) - 0.5) / 0.5))
    logits = np.float64(logits)
    order = np.argsort(-logits, axis=-1)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert metrics["count"] == len(source) == 360
    np.testing.assert_allclose(metrics["top1"], (order[:, 0] == labels).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["top5"], (order[:, :5] == labels[:, None]).any(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -log_probs[np.arange(360), labels].mean(), rtol=1e-5)


def test_a_head_of_zeros_scores_chance():
    source = open_source(CONFIG.data, "test")
    state, _, mesh = start(CONFIG)
    params = state.params | {"head": jax.tree.map(jnp.zeros_like, state.params["head"])}
    metrics = evaluate(make_eval_step(CONFIG, ViT(CONFIG.model), mesh), params, source, CONFIG, mesh)
    assert metrics["top1"] < 0.15
    assert metrics["top5"] < 0.6


def test_batches_and_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"mesh.data=3 times mesh.fsdp=2 must give the 8 devices"):
        make_mesh(MeshConfig(data=3, fsdp=2))
    with pytest.raises(ValueError, match=r"batch_size=100 must be divisible by 16, .* try 96 or 112"):
        check_batch_size(100, make_mesh(MeshConfig()), accumulate_steps=2)
