"""Arrays that must be finite: refused where they are at hand, checked on request where they are traced."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float

_is_checking = contextvars.ContextVar("is_checking", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Traces without checks, for transformations that take no function with effects, such as Flax's scan."""
    token = _is_checking.set(False)
    try:
        yield
    finally:
        _is_checking.reset(token)


def check_finite(name: str, array: Float[Array, "B S *rest"], mask: Bool[Array, "B S"] | None = None) -> None:
    """Refuses an array with NaN or infinity among the tokens that exist.

    Outside of transformations the array is looked at, and waited for. Inside, nothing is done, at no cost, unless the
    function is run by `jax.experimental.checkify.checkify`, which then reports it (not from inside of `unchecked`).

    Args:
      name: Of the array, for the message.
      array: Any float dtype.
      mask: True for the tokens that exist.

    Raises:
      ValueError: With the place of the first such number.
    """
    finite = jnp.isfinite(array)
    if mask is not None:
        finite |= ~mask.reshape(mask.shape + (1,) * (array.ndim - 2))
    if isinstance(finite, jax.core.Tracer):
        if _is_checking.get():
            _check(name, jnp.all(finite))
    elif not (found := np.asarray(finite)).all():
        place = tuple(int(i) for i in np.argwhere(~found)[0])
        raise ValueError(
            f"{name} must be finite: found {array[place]} at {place}, {np.sum(~found)} such numbers in all"
        )


# Traced once for each name: a new check has a new number, which would stand in the program of every trace, and no
# program would be found in the persistent compilation cache that the process has traced a second time.
@functools.partial(jax.jit, static_argnums=0)
def _check(name: str, is_finite: Bool[Array, ""]) -> None:
    checkify.debug_check(is_finite, f"{name} must be finite: NaN or infinity among them")
