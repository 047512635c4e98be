"""One step of training, and evaluation. The same code runs on one device, on many, and in several processes."""

import collections
import contextlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from levattn.data import Source, eval_batches, normalize
from levattn.training.config import TrainConfig
from levattn.training.losses import cross_entropy, mixup, smooth_targets
from levattn.training.sharding import BATCH_AXES, batch_sharding, put_batch, replicated
from levattn.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    config: TrainConfig,
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule_fn: optax.Schedule,
    plan: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted step: normalise, MixUp, forward, loss, gradients, clip, update, average.

    The batch is global, so a mean over it is already the mean over devices and processes; the compiler adds the
    communication. Gradients are accumulated over `config.accumulate_steps` microbatches of equal size, so their mean
    is that of the whole batch.

    Args:
      config: The run.
      model: Called as `model.apply({"params": ...}, images, train=True, rngs=...)`.
      tx: From `make_optimizer`.
      schedule_fn: From `make_optimizer`, for the metrics.
      plan: From `plan_state`; the step keeps its shardings.

    Returns:
      A function from the state, which it consumes, and a batch of `put_batch` to the new state and the metrics:
      loss, accuracy (against the unmixed labels), grad_norm (before clipping), param_norm and learning_rate.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan)
    mesh = plan.step.sharding.mesh
    num_micro = config.accumulate_steps
    num_classes = config.model.num_classes
    seed = config.seed

    def loss_fn(params, images, targets, labels, key):
        rngs = dict(zip(("dropout", "selection"), jax.random.split(key), strict=True))
        logits = model.apply({"params": params}, images, train=True, rngs=rngs)
        loss = cross_entropy(logits, targets, config.loss.kind).mean()
        return loss, {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def split(rows):
        # Microbatch i takes rows i, i + n, ...: every device keeps the rows it has.
        micro = rows.reshape(-1, num_micro, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(micro, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    def accumulate(params, key, *batch):
        if num_micro == 1:
            return grad_fn(params, *batch, key)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, grad_fn(params, *micro)), None

        micro = (*(split(rows) for rows in batch), jax.random.split(key, num_micro))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, *batch, key))
        total, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda x: x / num_micro, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mixup_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        labels = batch["label"]
        images = normalize(batch["image"], config.data)
        targets = smooth_targets(labels, num_classes, config.loss.label_smoothing)
        images, targets = mixup(mixup_key, images, targets, config.loss.mixup_alpha)
        grads, metrics = accumulate(state.params, model_key, images, targets, labels)
        new_state = state.apply_gradients(grads, tx, config.ema_decay)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(new_state.params),
            "learning_rate": schedule_fn(state.step),
        }
        return new_state, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def make_eval_step(config: TrainConfig, model: nn.Module, mesh: Mesh) -> Callable[..., Metrics]:
    """Builds the jitted evaluation of one batch.

    Args:
      config: The run; its loss is taken without label smoothing.
      model: As for `make_train_step`, called with `train=False`.
      mesh: Over which the batches are split.

    Returns:
      A function from parameters and a batch to the sums of loss, top1, top5 and count over the rows whose mask is 1.
      Ties among logits go to the lower class, so an untrained head of zeros scores chance.
    """
    num_classes = config.model.num_classes

    def eval_step(params, batch: Batch) -> Metrics:
        # Methods that draw at random get a stream: without one every layer would draw the same keys.
        rngs = {"selection": jax.random.key(config.seed)}
        logits = model.apply({"params": params}, normalize(batch["image"], config.data), train=False, rngs=rngs)
        labels, mask = batch["label"], batch["mask"]
        _, ranked = jax.lax.top_k(logits.astype(jnp.float32), min(5, num_classes))
        hits = ranked == labels[:, None]
        loss = cross_entropy(logits, smooth_targets(labels, num_classes), config.loss.kind)
        per_example = {"loss": loss, "top1": hits[:, 0], "top5": hits.any(axis=1), "count": jnp.ones_like(loss)}
        return {name: jnp.where(mask > 0, value, 0).sum(dtype=jnp.float32) for name, value in per_example.items()}

    return jax.jit(eval_step, out_shardings=replicated(mesh))


def evaluate(
    eval_step: Callable[..., Metrics], params: PyTree, source: Source, config: TrainConfig, mesh: Mesh
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 over every example of a source, each counted once.

    Args:
      eval_step: From `make_eval_step`.
      params: Of the model, global arrays.
      source: What to evaluate on.
      config: Of the data and the batch size: that of a microbatch, as its memory is known to suffice.
      mesh: Over which batches are split.

    Returns:
      The means, and `count`, the number of examples: that of the source.
    """
    shards = {"shard_index": jax.process_index(), "num_shards": jax.process_count()}
    batch_size = config.batch_size // config.accumulate_steps // jax.process_count()
    batches = eval_batches(source, config.data, batch_size=batch_size, **shards)
    totals = collections.Counter()
    with contextlib.closing(batches):
        for batch in batches:
            totals.update(jax.device_get(eval_step(params, put_batch(batch, mesh))))
    count = totals.pop("count")
    return {name: float(total / count) for name, total in totals.items()} | {"count": int(count)}
