"""A stream's universal set is the offline one: for any order, any chunks, any split over machines, any conditioning."""

import io
import itertools
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.universal import LewisStream, chunks, counts, running_gram, streaming
from levattn.universal.passes import stream_universal_set
from levattn.universal.streaming import OnePassStream

CHUNK, WIDTH, EPS = 32, 6, 0.1
STREAM = OnePassStream(WIDTH, EPS)
update = jax.jit(OnePassStream.update, static_argnums=0)
merge = jax.jit(OnePassStream.merge, static_argnums=0)


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _exact_scores(keys):
    """Leverage scores with no rank cut beyond float64's own; by QR, so that the condition number is not squared."""
    keys = np.asarray(keys, np.float64)
    keys = keys / np.where((norms := np.linalg.norm(keys, axis=0)) > 0, norms, 1)
    left, singular, _ = np.linalg.svd(keys, full_matrices=False)
    return np.sum(left[:, singular > 1e-13 * singular[0]] ** 2, axis=1)


def _run(keys, sizes, stream=STREAM, start=0, state=None):
    """Feeds `keys` in pieces of the given sizes, each padded to CHUNK."""
    state = stream.init(start) if state is None else state
    first = 0
    while first < len(keys):
        for size in sizes:
            piece = keys[first : first + size]
            padding = np.full((CHUNK - len(piece), stream.head_dim), np.nan, np.float32)  # must not be looked at
            state = update(stream, state, np.concatenate([piece, padding]), len(piece))
            first += size
    return state


def _check(found, keys, eps=EPS, extra=1.01):
    """All keys at or above eps, and none that is clearly below."""
    scores = _exact_scores(keys)
    missed = set(np.flatnonzero(scores >= eps)) - set(found.indices)
    assert not missed, f"heavy keys were lost: {sorted(missed)}, of scores {scores[sorted(missed)]}"
    assert np.all(scores[found.indices] * extra >= eps)
    assert np.all(found.scores >= scores[found.indices] * (1 - 1e-5))
    assert np.all(np.diff(found.indices) > 0)
    np.testing.assert_array_equal(found.keys, keys[found.indices])
    assert len(found) <= found.size_bound


CASES = {
    "gaussian": _random(0, 500, WIDTH),
    "few keys": _random(1, 4, WIDTH),
    "a single key": _random(2, 1, WIDTH),
    "rank 2": np.round(8 * _random(3, 500, 2)) @ np.round(8 * _random(4, 2, WIDTH)),
    "two keys, repeated": np.repeat(_random(5, 2, WIDTH), 6, axis=0),
    "all zero": np.zeros((40, WIDTH), np.float32),
    "zero keys between": _random(6, 300, WIDTH) * (np.arange(300) % 3 == 0)[:, None],
    "a column that comes late": _random(7, 300, WIDTH) * ~((np.arange(300) < 290)[:, None] & (np.arange(WIDTH) == 2)),
    "a tiny column that comes late": np.where(
        np.arange(WIDTH) == 2, 1e-9 * (np.arange(300) == 270)[:, None], _random(8, 300, WIDTH)
    ),
    "columns over twenty decades": _random(9, 300, WIDTH) * np.logspace(-10, 10, WIDTH),
    "heavy tails": np.random.default_rng(10).standard_cauchy((800, WIDTH)),
    "one huge key in the middle": np.concatenate([_random(11, 200, WIDTH), 1e3 * _random(12, 1, WIDTH)] * 2)[:-1],
    "growing": _random(13, 300, WIDTH) * 1.1 ** np.arange(300)[:, None],
    "growing fast, then never again": np.concatenate([_random(14, 60, WIDTH) * 2.0 ** np.arange(60)[:, None]]),
    "shrinking": _random(15, 300, WIDTH) * 0.9 ** np.arange(300)[:, None],
    "one axis at a time": np.eye(WIDTH)[np.arange(300) * WIDTH // 300],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [(CHUNK,), (1, 7, 20), (3,)])
def test_one_pass_gives_the_offline_set(name, sizes):
    keys = CASES[name].astype(np.float32)
    _check(STREAM.finish(_run(keys, sizes)), keys)


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_passes_over_chunks_of_any_size_give_the_offline_set(name, num_passes):
    keys = CASES[name].astype(np.float32)
    pieces = np.array_split(keys, [1, 2, 40, 40, 150, 151])
    found = stream_universal_set(lambda: iter(pieces), WIDTH, EPS, num_passes=num_passes, chunk_rows=CHUNK)
    _check(found, keys)


@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, WIDTH),
    num_keys=st.integers(1, 150),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    sizes=st.lists(st.integers(1, CHUNK), min_size=1, max_size=4),
    num_parts=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_stream_cut_anywhere_and_merged_gives_the_offline_set(seed, rank, num_keys, spread, sizes, num_parts):
    rng = np.random.default_rng(seed)
    # Small integers, so that a rank below the width is exact.
    keys = rng.integers(-4, 5, (num_keys, rank)) @ rng.integers(-4, 5, (rank, WIDTH))
    keys = (keys * 2.0 ** np.round(spread * rng.standard_normal(num_keys))[:, None]).astype(np.float32)
    parts = np.array_split(np.arange(num_keys), num_parts)
    states = [_run(keys[part], sizes, start=int(part[0])) for part in parts if len(part)]
    state = states.pop(rng.integers(len(states)))
    while states:
        state = merge(STREAM, state, states.pop(rng.integers(len(states))))
    # Keys of very different length are ill-conditioned: the set may then hold more, but lacks nothing.
    _check(STREAM.finish(state), keys, extra=1.01 if spread <= 1 else np.inf)


def _ill_conditioned(seed, condition):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_t(2, (400, WIDTH)))
    right, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    return (left * np.geomspace(1, 1 / condition, WIDTH)) @ right


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_no_heavy_key_is_lost_to_rounding_on_ill_conditioned_keys(condition):
    num_refused = 0
    for seed in range(8):
        keys = _ill_conditioned(seed, condition).astype(np.float32)
        state = _run(keys, (CHUNK,))
        if int(state.num_lost):  # at 1e6 a key in doubt is kept, and more may be than there is room for
            num_refused += 1
            continue
        # What rounding may inflate is said in the guarantee; up to 1e3 it is a per cent.
        _check(STREAM.finish(state), keys, extra=1.02 if condition <= 1e3 else np.inf)
    assert num_refused <= (2 if condition == 1e6 else 0)


def test_float64_resolves_what_float32_does_not():
    with jax.enable_x64(True):
        stream = OnePassStream(WIDTH, EPS, dtype=jnp.float64)
        keys = _ill_conditioned(0, 1e9)
        state = stream.init()
        for first in range(0, 400, 100):
            state = update(stream, state, keys[first : first + 100])
        found = stream.finish(state)
        np.testing.assert_array_equal(found.indices, np.flatnonzero(_exact_scores(keys) >= EPS))


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_one_enormous_key_hides_no_other(size):
    for seed in range(8):
        keys = _random(seed, 60, WIDTH)
        keys[20 + seed] *= size
        _check(STREAM.finish(_run(keys, (CHUNK,))), keys, extra=1.02 if size <= 1e3 else np.inf)


def test_no_more_keys_wait_than_there_is_room_for_even_when_every_key_is_heavy_as_it_comes():
    keys = (_random(0, 900, WIDTH) * 1.05 ** np.arange(900)[:, None]).astype(np.float32)
    state = STREAM.init()
    for first in range(0, 900, 30):
        state = _run(keys[first : first + 30], (30,), state=state)
        scores = _exact_scores(keys[: first + 30])
        waiting = set(np.asarray(state.positions)[: int(state.num_kept), 1].tolist())
        assert set(np.flatnonzero(scores >= EPS)) <= waiting
        assert int(state.num_kept) <= len(state.keys) == 2 * WIDTH / EPS
        assert int(state.num_lost) == 0


def test_too_small_a_room_is_refused_not_passed_over():
    stream = OnePassStream(WIDTH, 0.01, capacity=5)
    with pytest.raises(ValueError, match="found capacity=5 full"):
        stream.finish(_run(_random(0, 60, WIDTH), (CHUNK,), stream))


def test_a_state_goes_through_a_file_and_on_bit_for_bit():
    keys = CASES["heavy tails"].astype(np.float32)
    whole = _run(keys, (CHUNK,))
    leaves, tree = jax.tree.flatten(_run(keys[: 10 * CHUNK], (CHUNK,)))
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        restored = jax.tree.unflatten(tree, [jnp.asarray(saved[name]) for name in saved.files])
    resumed = _run(keys[10 * CHUNK :], (CHUNK,), state=restored)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_positions_count_beyond_32_bits():
    start = (1 << 33) - 10
    keys = _random(0, 40, WIDTH)
    found = STREAM.finish(_run(keys, (CHUNK,), start=start))
    np.testing.assert_array_equal(found.indices, start + np.flatnonzero(_exact_scores(keys) >= EPS))
    assert counts.to_int(counts.add_small(counts.to_count((2 << 32) - 1), 3)) == (2 << 32) + 2
    assert counts.to_int(counts.add(counts.to_count((2 << 32) - 1), counts.to_count(start))) == (2 << 32) - 1 + start
    assert bool(counts.at_least(counts.to_count(1 << 32), counts.to_count(7)))


def test_the_gram_matrix_of_millions_of_keys_is_summed_to_the_last_bits_of_float32():
    """A plain float32 sum of as many chunks drifts by more than this."""
    chunk = np.abs(_random(0, 256, 4)) + 1
    num_chunks = 8192

    @jax.jit
    def many(gram):
        return jax.lax.scan(lambda g, _: (running_gram.add_keys(g, chunk, 256)[0], None), gram, length=num_chunks)[0]

    factor = np.asarray(running_gram.triangular_factor(many(running_gram.init_gram(4))), np.float64)
    expected = num_chunks * chunk.astype(np.float64).T @ chunk.astype(np.float64)
    np.testing.assert_allclose(factor.T @ factor, expected, rtol=3e-6)


def test_scores_so_far_are_never_below_the_final_ones():
    keys = CASES["heavy tails"].astype(np.float32)
    gram, seen = running_gram.init_gram(WIDTH), []
    add = jax.jit(running_gram.add_keys)
    for first in range(0, len(keys), CHUNK):
        gram, scores = add(gram, keys[first : first + CHUNK], CHUNK)
        exact = _exact_scores(keys[: first + CHUNK])[first:]
        assert np.all(scores * 1.002 >= exact)
        seen.append(scores)
    assert np.all(np.concatenate(seen) * 1.002 >= _exact_scores(keys))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_a_key_that_is_not_finite_is_named(value, num_passes):
    keys = _random(0, 200, WIDTH)
    keys[[77, 150], 3] = value
    with pytest.raises(ValueError, match="first at position 77"):
        stream_universal_set(lambda: [keys], WIDTH, EPS, num_passes=num_passes, chunk_rows=CHUNK)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"eps": 0.0}, "eps"),
        ({"eps": 1.5}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"head_dim": WIDTH + 1}, r"chunk 0 has shape \(10, 6\)"),
        ({"num_passes": 3}, "num_passes"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"dtype": jnp.float64}, "jax_enable_x64"),
        ({"open_chunks": list}, "no keys"),
        ({"open_chunks": lambda: [np.ones((3, WIDTH), int)]}, "int64"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {"open_chunks": lambda: [_random(0, 10, WIDTH)], "head_dim": WIDTH, "eps": EPS, "chunk_rows": CHUNK}
    with pytest.raises(ValueError, match=named):
        stream_universal_set(**(arguments | change))


@pytest.mark.parametrize("length", [0, 49, 51, 150])
def test_a_second_pass_over_something_else_is_refused(length):
    lengths = iter([50, length])
    with pytest.raises(ValueError, match=f"second pass gave {length} keys, the first 50"):
        stream_universal_set(lambda: [_random(0, next(lengths), WIDTH)], WIDTH, EPS, num_passes=2, chunk_rows=CHUNK)


def test_an_error_in_the_reading_thread_comes_out_and_the_thread_ends():
    def broken():
        yield _random(0, CHUNK, WIDTH)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        stream_universal_set(broken, WIDTH, EPS, chunk_rows=CHUNK)
    items = chunks.prefetched(iter(range(100)))
    assert next(items) == 0
    items.close()


def test_merging_nothing_changes_nothing():
    keys = CASES["gaussian"]
    state = _run(keys, (CHUNK,))
    _check(STREAM.finish(merge(STREAM, state, STREAM.init(start=500))), keys)
    _check(STREAM.finish(merge(STREAM, STREAM.init(), state)), keys)


@pytest.mark.parametrize("num_passes", [1, 2])
def test_bfloat16_and_float64_keys_are_taken(num_passes):
    keys = _random(0, 100, WIDTH)
    for given_as in (keys.astype(jnp.bfloat16), keys.astype(np.float64), keys.astype(np.float16)):
        found = stream_universal_set(
            lambda given_as=given_as: [given_as], WIDTH, EPS, num_passes=num_passes, chunk_rows=CHUNK
        )
        _check(found, given_as.astype(np.float32))


def test_finish_is_refused_before_the_first_key():
    with pytest.raises(ValueError, match="no keys"):
        STREAM.finish(STREAM.init())
    assert streaming.OnePassStream(3, 1.0).init().keys.shape == (6, 3)


def test_a_chunk_of_no_rows_changes_nothing():
    state = _run(CASES["gaussian"], (CHUNK,))
    jax.tree.map(np.testing.assert_array_equal, STREAM.update(state, np.zeros((0, WIDTH), np.float32)), state)


@pytest.mark.parametrize(
    "keys, num_valid, said",
    [
        (np.ones((3, WIDTH + 1), np.float32), None, r"shape \(3, 7\): it must be \(keys, 6\)"),
        (np.ones((3, 1), np.float32), None, "must be"),
        (np.ones((3, WIDTH), np.float32), 4, r"num_valid=4 must be in \[0, 3\]"),
        (np.ones((3, WIDTH), np.float32), -1, "num_valid=-1"),
        (np.full((3, WIDTH), 1e50), None, "size 1e[+]50 is beyond the range of float32"),
        (np.full((3, WIDTH), 1e-170), None, "size 1e-170 is beyond the range of float32"),
    ],
)
def test_a_chunk_that_cannot_be_added_is_named(keys, num_valid, said):
    with pytest.raises(ValueError, match=said):
        STREAM.update(STREAM.init(), keys, num_valid)
    if "float32" not in said:  # which the other computes in float64
        with pytest.raises(ValueError, match=said):
            LewisStream(WIDTH, EPS, 3.0).update(LewisStream(WIDTH, EPS, 3.0).init(), keys, num_valid)


def test_a_traced_number_of_valid_rows_counts_no_row_that_is_not_there():
    keys = CASES["gaussian"][:CHUNK].astype(np.float32)
    assert counts.to_int(update(STREAM, STREAM.init(), keys, CHUNK + 5).gram.num_keys) == CHUNK


def test_a_state_that_is_merged_with_itself_is_refused_not_emptied():
    keys = CASES["heavy tails"].astype(np.float32)
    state = _run(keys, (CHUNK,))
    with pytest.raises(ValueError, match="merged twice"):
        STREAM.finish(merge(STREAM, state, state))
    with pytest.raises(ValueError, match="merged twice"):
        STREAM.finish(merge(STREAM, merge(STREAM, state, _run(keys[:9], (CHUNK,), start=len(keys))), state))
    stream = LewisStream(WIDTH, EPS, 1.0)
    with pytest.raises(ValueError, match="waits in both"):
        stream.merge(*[stream.update(stream.init(), keys)] * 2)


def test_keys_that_float32_takes_for_zero_are_counted_and_refused():
    keys = CASES["gaussian"].astype(np.float32)
    keys[123] *= np.float32(1e-40)
    with pytest.raises(ValueError, match="1 keys are not 0, but below"):
        STREAM.finish(_run(keys, (CHUNK,)))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_keys_whose_squares_float32_does_not_hold_are_scored_as_sharply_as_others(size):
    keys = CASES["heavy tails"].astype(np.float32)
    found = STREAM.finish(_run(keys * np.float32(size), (CHUNK,)))
    np.testing.assert_array_equal(found.indices, np.flatnonzero(_exact_scores(keys) >= EPS))


def test_the_guarantee_says_how_many_roundings_it_allows_for():
    found = STREAM.finish(_run(CASES["gaussian"], (CHUNK,)))
    assert "32 roundings of float32, 4e-06 of their parts" in found.guarantee


def test_a_chunk_may_be_written_over_once_the_next_is_asked_for():
    keys, buffer = CASES["heavy tails"].astype(np.float32), np.empty((100, WIDTH), np.float32)

    def refilled():
        for first in range(0, len(keys), 100):
            buffer[:] = keys[first : first + 100]
            yield buffer

    for num_passes in (1, 2):
        _check(stream_universal_set(refilled, WIDTH, EPS, num_passes=num_passes, chunk_rows=CHUNK), keys)


def test_so_small_an_eps_that_nothing_would_be_dropped_is_refused():
    for eps, said in ((1e-30, "at least 1e-20"), (1e-19, "keys wait")):
        with pytest.raises(ValueError, match=said):
            OnePassStream(WIDTH, eps).init()


@pytest.mark.parametrize("num_passes", [1, 2])
def test_an_interrupt_ends_every_thread_within_a_chunk(num_passes):
    main, piece = threading.main_thread().ident, _random(0, CHUNK, WIDTH)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        stream_universal_set(
            lambda: itertools.repeat(piece, 50_000),
            WIDTH,
            EPS,
            num_passes=num_passes,
            chunk_rows=CHUNK,
            on_chunk=lambda _, num_read: num_read == 20 * CHUNK and signal.pthread_kill(main, signal.SIGINT),
        )
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
