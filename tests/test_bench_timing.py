"""A chain of calls makes every one of them, on the device, and lets the compiler take none of the work out."""

import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import AttentionSpec, lev_attention
from levattn.bench.cases import Case, draw_inputs
from levattn.bench.floor import copy_bandwidth, floor_bytes
from levattn.bench.timing import Budget, JaxProgram, chain, sample


def test_a_chain_makes_exactly_the_calls_asked_for_each_after_the_last():
    seen = []

    def counted(x):
        seen.append(float(x))
        return np.float32(len(seen))

    def slow(x):
        y = jax.pure_callback(counted, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0, 0, 0])
        return (x + y,)

    (out,) = jax.jit(chain(slow, 7))(jnp.ones((1, 2, 3, 4)))
    np.testing.assert_array_equal(out, 8)  # ones, and the number of the last call
    assert seen == [1.0] * 7  # the feedback is lost in rounding: every call sees the same input


def test_a_chain_returns_what_one_call_does():
    inputs = draw_inputs(Case(2, 40, 2), 8)[:3]

    def fn(query, key, value):
        return (lev_attention(query, key, value, AttentionSpec("leverage", k=6)),)

    (once,), (often,) = jax.jit(fn)(*inputs), jax.jit(chain(fn, 3))(*inputs)
    assert once.dtype == often.dtype
    np.testing.assert_allclose(often, once, atol=1e-6)


@pytest.mark.parametrize("method", ["leverage", "row_norm"])
def test_what_depends_on_the_keys_alone_is_computed_in_every_call(method):
    inputs = draw_inputs(Case(1, 300, 2), 16)[:3]

    def fn(query, key, value):
        return (lev_attention(query, key, value, AttentionSpec(method, k=6)),)

    compiled = jax.jit(chain(fn, 3)).lower(*inputs).compile().as_text()
    assert _work_outside_of_the_loop(compiled) == set()
    # The same loop with the keys left as they are: the compiler takes their scores out, and this test can tell.
    careless = jax.jit(lambda q, k, v: chain(lambda q: fn(q, k, v), 3)(q)).lower(*inputs).compile().as_text()
    assert _work_outside_of_the_loop(careless) != set()


def _work_outside_of_the_loop(hlo: str) -> set[str]:
    """What the main computation does but for copying inputs and running the loop."""
    main = hlo[hlo.index("\nENTRY") :]
    main = main[: main.index("\n}")]
    operations = re.findall(r"= \S+(?: /\*.*?\*/\S+)* ([\w-]+)\(", re.sub(r"\([^()]*\) while", "T while", main))
    # Not what has no inputs, such as an identity matrix, nor a single number.
    fused = re.findall(r"= (?!\w+\[\] ).*? fusion\(%.*calls=%(\S+?)[,\s]", main)
    named = {name for name in fused if not re.match(r"(wrapped_)?(broadcast|copy|bitcast)", name)}
    harmless = {
        "parameter",
        "constant",
        "copy",
        "tuple",
        "while",
        "get-tuple-element",
        "fusion",
        "broadcast",
        "bitcast",
    }
    return set(operations) - harmless | named


def test_outputs_of_a_chain_are_written_in_row_major_order():
    inputs = draw_inputs(Case(1, 64, 2), 16)[:3]

    def fn(query, key, value):
        return (lev_attention(query, key, value, AttentionSpec("leverage", k=6)),)

    compiled = jax.jit(chain(fn, 3)).lower(*inputs).compile().as_text()
    main = compiled[compiled.index("\nENTRY") :]
    assert re.search(r"ROOT \S+ = f32\[1,64,2,16\]\{3,2,1,0\} get-tuple-element", main), main


def test_time_grows_with_the_number_of_calls():
    def slow(x):
        def wait(x):
            time.sleep(0.02)
            return x

        return (jax.pure_callback(wait, jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32), x),)

    def ms(num_calls):
        run_fn = jax.jit(chain(slow, num_calls))
        return sample(lambda: jax.block_until_ready(run_fn(jnp.ones((1, 1, 1, 1)))), 1, 3).fastest_ms

    few, many = ms(2), ms(10)
    assert few >= 40
    assert many >= 200


def test_a_timing_is_a_median_per_call_between_the_fastest_and_the_slowest_sample():
    waits = itertools.chain([0.2], itertools.cycle([0.02, 0.04, 0.06]))  # the first is the warm-up
    timing = sample(lambda: time.sleep(next(waits)), num_calls=2, num_repeats=3)
    assert 10 <= timing.fastest_ms < 20 <= timing.ms < 30 <= timing.slowest_ms < 60


@pytest.mark.parametrize(
    "seconds_per_call, expected",
    [(0.01, (14, 7)), (0.5, (1, 3)), (1e-7, (500, 7)), (0.14, (1, 7)), (100.0, (1, 3))],
)
def test_the_number_of_calls_fills_the_budget_and_long_calls_are_sampled_less(seconds_per_call, expected):
    assert Budget(seconds=1.0, repeats=7).plan(seconds_per_call) == expected


def test_peak_memory_counts_the_outputs_and_what_a_program_needs_on_the_way():
    inputs = (jnp.ones((1, 256, 1, 4)),)

    def fn(x):
        probs = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", x, x))
        return (jnp.einsum("bhts,bshd->bthd", probs, x),)

    assert JaxProgram(fn, inputs).peak_bytes >= inputs[0].nbytes + 4 * 256**2


def test_the_floor_is_four_arrays_forward_and_eight_with_gradients():
    case = Case(2, 10, 3)
    array = 2 * 10 * 3 * 64 * 2
    assert floor_bytes(case, 64, 2, backward=False) == 4 * array  # Q, K, V, O
    assert floor_bytes(case, 64, 2, backward=True) == 8 * array  # and the cotangents of all four


def test_a_copy_runs_at_a_speed_that_memory_can_have():
    assert 1e8 < copy_bandwidth(2**24, Budget(seconds=0.05, repeats=3)) < 1e13
