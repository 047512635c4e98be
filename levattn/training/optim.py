"""Optimisers and learning-rate schedules, composed from optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from levattn.training.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser: clip, find a direction, add the decay of kernels, scale by the schedule.

    All four directions therefore share what "weight decay" and "learning rate" mean.

    Args:
      config: What to build.
      total_steps: Length of the run, for schedules that end.

    Returns:
      The gradient transformation, and the schedule by itself, for logging.
    """
    schedule_fn = make_schedule(config, total_steps)
    clip = optax.identity() if config.grad_clip_norm is None else optax.clip_by_global_norm(config.grad_clip_norm)
    tx = optax.chain(
        clip,
        _DIRECTIONS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule_fn),
    )
    return tx, schedule_fn


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step; step 0 has rate 0 if there is a warm-up.

    Args:
      config: Shape, peak, warm-up and cool-down.
      total_steps: Step at which "cosine", "linear" and the cool-down reach 0.

    Returns:
      A jittable function from step to learning rate.

    Raises:
      ValueError: The warm-up and cool-down do not fit in the run.
    """
    warmup_steps = config.warmup_steps or round(config.warmup_fraction * total_steps)
    if warmup_steps + config.cooldown_steps > total_steps:
        raise ValueError(f"{warmup_steps=} and cooldown_steps={config.cooldown_steps} must fit in {total_steps=}")

    def schedule_fn(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after_warmup = jnp.maximum(step - warmup_steps, 0.0)
        progress = jnp.minimum(after_warmup / max(1, total_steps - warmup_steps), 1.0)
        match config.schedule:
            case "cosine":
                factor = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case "linear":
                factor = 1 - progress
            case "rsqrt":
                factor = jax.lax.rsqrt(1 + after_warmup / config.rsqrt_timescale)
            case "constant":
                factor = jnp.ones(())
        if warmup_steps:
            factor *= jnp.minimum(step / warmup_steps, 1.0)
        if config.cooldown_steps:
            factor *= jnp.clip((total_steps - step) / config.cooldown_steps, 0.0, 1.0)
        return config.learning_rate * factor

    return schedule_fn


def decay_mask(params: optax.Params) -> optax.Params:
    """True for kernels, which are decayed; False for biases, norms, class token, positions and probe.

    The rule of the ViT literature (Beyer et al., 2022, "Better plain ViT baselines", and the code beside it).
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.momentum_dtype)


def _sgd(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.trace(config.b1, accumulator_dtype=config.momentum_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor as Zhai et al. (2021, "Scaling Vision Transformers") use it: with momentum, a capped decay of second
    moments, and no scaling by the norm of the parameters.
    """

    def capped_decay(step, rate):
        return jnp.minimum(config.b2, 1 - (step + 1.0) ** -rate)

    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32, decay_rate_fn=capped_decay),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=False, accumulator_dtype=config.momentum_dtype),
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for the kernels inside the blocks, Adam for the rest. `consistent_rms` gives its updates the size of
    Adam's (Liu et al., 2025, "Muon is scalable for LLM training"), so that one learning rate serves both.
    """
    muon = optax.contrib.muon(
        learning_rate=1.0,
        beta=config.b1,
        eps=config.eps,
        mu_dtype=config.momentum_dtype,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=muon_dimension_numbers,
        consistent_rms=0.2,
    )
    return optax.chain(muon, optax.scale(-1.0))  # muon turns to descent itself; here the schedule does that


def muon_dimension_numbers(params: optax.Params) -> optax.Params:
    """How each kernel of a ViT is a matrix: query, key and value map C to (H, D), `out` maps (H, D) to C, and the
    MLP maps in to out. A leading axis of scanned layers is left over, as a batch. None: not a matter for Muon.
    """
    matrix = optax.contrib.MuonDimensionNumbers
    by_module = {name: matrix(-3, (-2, -1)) for name in ("query", "key", "value")}
    by_module |= {"out": matrix((-3, -2), -1), "Dense_0": matrix(-2, -1), "Dense_1": matrix(-2, -1)}

    def numbers(path, _):
        return by_module.get(path[-2].key) if len(path) > 1 and path[-1].key == "kernel" else None

    return jax.tree_util.tree_map_with_path(numbers, params)


_DIRECTIONS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
}
