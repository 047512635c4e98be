"""Attention with tokens split over eight devices is attention on one: outputs, gradients, masks, ties."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from levattn.attention import AttentionSpec, lev_attention
from levattn.attention.sequence_parallel import communicated_bytes, sequence_parallel_attention

BATCH, TOKENS, HEADS, WIDTH = 2, 64, 2, 8
SPECS = {
    "k below a shard's share": AttentionSpec("leverage", k=6),
    "k above a shard's share": AttentionSpec("leverage", k=20),
    "all keys": AttentionSpec("leverage", k=TOKENS),
    "prefix over two shards": AttentionSpec("leverage", k=12, keep_prefix=10),
    "centred, with ridge": AttentionSpec("leverage", k=6, centre=True, ridge=0.1),
    "threshold": AttentionSpec("leverage", k=None, eps=0.2),
    "row norm": AttentionSpec("row_norm", k=6),
    "row norm, centred": AttentionSpec("row_norm", k=6, centre=True),
}


@functools.cache
def _mesh(batch=1):
    return jax.make_mesh((batch, 8 // batch), ("batch", "sequence"), axis_types=(AxisType.Auto,) * 2)


@functools.partial(jax.jit, static_argnames=("spec", "batch"))
def _parallel(query, key, value, spec, mask=None, batch=1):
    return sequence_parallel_attention(
        query, key, value, spec, mesh=_mesh(batch), batch_axis="batch" if batch > 1 else None, mask=mask
    )


_single = jax.jit(lev_attention, static_argnames="spec")


def _inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, TOKENS, HEADS, WIDTH)), dtype) for _ in range(3))


@pytest.mark.parametrize("name", SPECS)
def test_output_and_gradients_are_those_of_one_device(name):
    spec, inputs = SPECS[name], _inputs()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def run(attention):
        def loss(*arrays):
            out = attention(*arrays, spec)
            return jnp.sum(jnp.sin(out) * weights), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)

    (_, out), gradients = run(_parallel)
    (_, expected), expected_gradients = run(_single)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-5)


def test_masked_tokens_are_not_seen_wherever_they_lie():
    query, key, value = _inputs()
    mask = np.ones((BATCH, TOKENS), bool)
    mask[0, 40:] = False  # three whole shards
    mask[1, ::5] = False
    hidden = jnp.asarray(mask)[:, :, None, None]
    key, value = (jnp.where(hidden, x, jnp.nan) for x in (key, value))
    for spec in (SPECS["k above a shard's share"], SPECS["centred, with ridge"]):
        out = _parallel(query, key, value, spec, jnp.asarray(mask))
        np.testing.assert_allclose(out, _single(query, key, value, spec, mask=jnp.asarray(mask)), atol=2e-5)


def test_ties_go_to_the_lowest_place_as_on_one_device():
    query, key, value = _inputs()
    key = jnp.tile(key[:, :4], (1, TOKENS // 4, 1, 1))
    spec = AttentionSpec("row_norm", k=10)
    np.testing.assert_allclose(_parallel(query, key, value, spec), _single(query, key, value, spec), atol=2e-5)


def test_the_batch_may_be_split_over_another_axis():
    inputs, spec = _inputs(), SPECS["k below a shard's share"]
    out = _parallel(*inputs, spec, batch=2)
    np.testing.assert_allclose(out, _single(*inputs, spec), atol=2e-5)
    assert out.sharding.spec == PartitionSpec("batch", "sequence")


def test_bfloat16_gives_what_one_device_gives():
    inputs, spec = _inputs(dtype=jnp.bfloat16), SPECS["k below a shard's share"]
    out = _parallel(*inputs, spec)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32), _single(*inputs, spec).astype(jnp.float32), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("method", ["leverage", "row_norm"])
def test_a_key_that_is_not_finite_shows_on_every_shard(method):
    query, key, value = _inputs()
    out = _parallel(query, key.at[0, 37, 1, 3].set(jnp.nan), value, AttentionSpec(method, k=6))
    assert np.all(np.isnan(out[0, :, 1]))
    assert np.all(np.isfinite(out[1]))
    assert np.all(np.isfinite(out[0, :, 0]))


def _received_bytes(program: str, num_devices: int) -> float:
    sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
    total = 0.0
    for line in program.splitlines():
        if (call := re.search(r"= (.*?) (all-gather|all-reduce)(-start)?\(", line)) is not None:
            rounds = 1 if call.group(2) == "all-gather" else 2
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", call.group(1)):
                numbers = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
                total += rounds * int(numbers) * sizes[dtype] * (num_devices - 1) / num_devices
    return total


@pytest.mark.parametrize("name", ["k below a shard's share", "k above a shard's share", "row norm"])
def test_bytes_by_formula_are_those_of_the_compiled_program(name):
    spec = SPECS[name]
    inputs = [jax.device_put(x, NamedSharding(_mesh(), PartitionSpec(None, "sequence"))) for x in _inputs()]
    program = jax.jit(_parallel, static_argnames="spec").lower(*inputs, spec=spec).compile().as_text()
    expected = communicated_bytes(spec, batch=BATCH, num_tokens=TOKENS, num_heads=HEADS, head_dim=WIDTH, num_devices=8)
    assert _received_bytes(program, 8) == pytest.approx(expected.selected, abs=1)


def test_a_long_input_moves_a_small_part_of_what_ring_attention_moves():
    moved = communicated_bytes(
        AttentionSpec("leverage", k=128),
        batch=1,
        num_tokens=131_072,
        num_heads=16,
        head_dim=64,
        num_devices=8,
        bytes_per_number=2,
    )
    assert moved.ring == moved.gathered == 16 * 7 * 16_384 * 2 * 64 * 2
    assert moved.selected * 200 < moved.ring


@pytest.mark.parametrize(
    "change, named",
    [
        ({"axis": "model"}, "no axis 'model'"),
        ({"batch_axis": "data"}, "no axis 'data'"),
        ({"spec": AttentionSpec("kmeans", k=4)}, "method='kmeans'"),
        ({"spec": AttentionSpec("leverage", k=4, local_window=3)}, "local_window"),
        ({"spec": AttentionSpec("leverage", k=4, score_method="svd")}, "score_method='svd'"),
        ({"spec": AttentionSpec("leverage", k=4, causal=True)}, "causal"),
        ({"spec": AttentionSpec("leverage", k=TOKENS + 1)}, "must be in"),
        ({"query": jnp.zeros((BATCH, 60, HEADS, WIDTH))}, "60 queries do not divide among 8"),
    ],
)
def test_what_cannot_be_split_is_refused(change, named):
    query, key, value = _inputs()
    arguments = {"query": query, "key": key, "value": value, "spec": SPECS["all keys"], "mesh": _mesh()}
    with pytest.raises(ValueError, match=named):
        sequence_parallel_attention(**(arguments | change))
