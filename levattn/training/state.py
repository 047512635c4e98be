"""What changes while training. Randomness is a function of the seed and the step, so there is none to keep."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from levattn.training.sharding import state_sharding


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on. The leaves are arrays, or in a plan the shapes and shardings of arrays.

    Attributes:
      step: Steps taken, an int32; also the position in the data.
      params: Parameters in float32.
      opt_state: State of the optimiser.
      ema_params: Running average of the parameters; None if there is no `ema_decay`.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    ema_params: PyTree | None

    @property
    def eval_params(self) -> PyTree:
        """The parameters to evaluate and export: the average if there is one."""
        return self.params if self.ema_params is None else self.ema_params

    def apply_gradients(
        self, grads: PyTree, tx: optax.GradientTransformation, ema_decay: float | None = None
    ) -> "TrainState":
        """One step of the optimiser and of the average, ema <- decay ema + (1 - decay) params."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema_params = self.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        return TrainState(self.step + 1, params, opt_state, ema_params)


def init_state(
    key: Key[Array, ""], model: nn.Module, image_shape: tuple[int, ...], tx: optax.GradientTransformation, ema: bool
) -> TrainState:
    """The state at step 0; the average, if there is to be one, starts at the parameters.

    Args:
      key: Of the parameters.
      model: Whose parameters.
      image_shape: Height, width and channels of an image.
      tx: The optimiser.
      ema: Whether to keep an average.
    """
    params = model.init(key, jnp.zeros((1, *image_shape)))["params"]
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema_params)


def plan_state(init_fn: Callable[[jax.Array], TrainState], mesh: Mesh, fsdp_min_size: int = 0) -> TrainState:
    """Shapes, dtypes and shardings of the state, at no cost: what a checkpoint is restored into.

    Args:
      init_fn: From a key to the state, such as a partial `init_state`.
      mesh: Over which the state is laid out.
      fsdp_min_size: See `MeshConfig`.

    Returns:
      A state of `jax.ShapeDtypeStruct`s.
    """
    shapes = jax.eval_shape(init_fn, jax.random.key(0))
    shardings = state_sharding(shapes, mesh, fsdp_min_size)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def create_state(init_fn: Callable[[jax.Array], TrainState], plan: TrainState, seed: int) -> TrainState:
    """Initialises the state where the plan puts it: every device computes only the shards it holds.

    Args:
      init_fn: As for `plan_state`.
      plan: From `plan_state`.
      seed: Of the parameters; they do not depend on the mesh.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan)
    return jax.jit(init_fn, out_shardings=shardings)(jax.random.key(seed))
