"""The route through the kernels of `levattn.kernels`, where they take what is asked for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.attention.registry import get_method
from levattn.attention.select import num_kept
from levattn.attention.spec import AttentionSpec
from levattn.kernels.attend import attend_selected
from levattn.kernels.leverage import top_leverage

_METHODS = ("leverage", "row_norm", "random", "kmeans", "oracle")  # they keep keys as they are, each with weight one
_MAX_KEPT = 128  # weights of so many keys fit the registers


def why_not(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    spec: AttentionSpec,
    mask: Bool[Array, "B S"] | None = None,
) -> str | None:
    """Why the kernels do not take these inputs, in words; None if they do."""
    head_dim = query.shape[-1]
    if spec.method not in _METHODS:
        return f"method {spec.method!r} is not one of {', '.join(_METHODS)}"
    for field, plain in (
        ("eps", None),
        ("local_window", None),
        ("power", None),
        ("k_per_head", None),
        ("causal", False),
    ):
        if getattr(spec, field) != plain:
            return f"{field}={getattr(spec, field)} is not {plain}"
    if mask is not None:
        return "there is a mask"
    if any(x.dtype != jnp.bfloat16 for x in (query, key, value)):
        return f"queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}, not bfloat16"
    if head_dim not in (16, 32, 64, 128):
        return f"the head width {head_dim} is not 16, 32, 64 or 128"
    if spec.k > _MAX_KEPT:
        return f"k={spec.k} is over {_MAX_KEPT}"
    return None


def takes(query, key, value, spec: AttentionSpec, mask=None) -> bool:
    """Whether `lev_attention` goes through the kernels.

    With implementation="auto" that is where they pay: on a single GPU. Over several devices a program is split by the
    compiler, which does not see into kernels.

    Raises:
      ValueError: With implementation="pallas", saying why it cannot be.
    """
    if spec.implementation == "xla":
        return False
    reason = why_not(query, key, value, spec, mask)
    if spec.implementation == "pallas" and reason is not None:
        raise ValueError(f"implementation='pallas' must be 'auto' or 'xla' here: {reason}")
    return reason is None and (
        spec.implementation == "pallas" or (jax.default_backend() == "gpu" and jax.device_count() == 1)
    )


def attend_fused(query, key, value, spec: AttentionSpec, *, grid=None, rng=None) -> Float[Array, "B T H D"]:
    """`lev_attention` by kernels: choosing in a few launches, attending in one, its gradients in two."""
    interpret = jax.default_backend() != "gpu"
    frozen = jax.lax.stop_gradient(key)
    if spec.method == "leverage" and spec.score_method == "gram" and not spec.centre and not spec.ridge:
        k = num_kept(spec, key.shape[1], key.shape[3])
        indices = top_leverage(frozen, k, keep_prefix=spec.keep_prefix, interpret=interpret)
    else:
        coreset = get_method(spec.method)(query, frozen, value, spec=spec, rng=rng, grid=grid)
        # The kernels' way of saying that there is no telling: no key has this index, and none is NaN.
        indices = jnp.where(jnp.isnan(coreset.log_weights), key.shape[1], coreset.indices)
    return attend_selected(query, key, value, indices, interpret)
