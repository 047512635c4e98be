"""A backlog takes no chunk that may hold a heavy key, and what it took is in the Gram matrix as if added key by key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.universal import backlog, running_gram
from levattn.universal.backlog import Backlog
from levattn.universal.files import open_keys
from levattn.universal.passes import file_universal_set, stream_universal_set
from levattn.universal.streaming import OnePassStream

CHUNK, WIDTH, EPS = 64, 8, 0.05
FLOOR = OnePassStream(WIDTH, EPS).floor
add_keys = jax.jit(running_gram.add_keys, static_argnames="floor")
CONDITIONS = [1.0, 10.0, 1e2, 1e3]


def _random(seed, condition, num_keys):
    """Gaussian keys under a random map of the given condition number, columns of different lengths."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(2))
    shape = (left * np.geomspace(1, 1 / condition, WIDTH)) @ right
    return (rng.normal(size=(num_keys, WIDTH)) @ shape).astype(np.float32)


def _gram_of(keys, dtype=jnp.float32):
    gram = running_gram.init_gram(WIDTH, dtype)
    for first in range(0, len(keys), CHUNK):
        gram, _ = add_keys(gram, keys[first : first + CHUNK], CHUNK)
    return gram


def _scores(keys, among):
    """Leverage scores of keys among others, in float64 and by QR."""
    triangle = np.linalg.qr(np.asarray(among, np.float64), mode="r")
    return np.sum(np.square(np.linalg.solve(triangle.T, np.asarray(keys, np.float64).T)), axis=0)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_no_chunk_that_holds_a_heavy_key_is_taken(condition):
    num_taken = 0
    for seed in range(4):
        keys = _random(seed, condition, 16 * CHUNK)
        before, chunk = keys[: 12 * CHUNK], keys[12 * CHUNK : 13 * CHUNK]
        gram = _gram_of(before)
        for aim in np.linspace(0.5, 1.5, 100):
            planted = chunk.copy()
            place = int(100 * aim) % CHUNK
            planted[place] *= np.sqrt(aim * EPS / _scores(chunk[place : place + 1], before))
            # What the key will score among all keys up to its own chunk, which is what may still be heavy.
            score = _scores(planted, np.concatenate([before, planted])).max()
            taken = Backlog(gram, FLOOR).takes(planted)
            assert not (taken and score >= EPS)
            num_taken += taken
    assert num_taken >= 40  # and light chunks are taken


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("num_rows", [CHUNK, 300, 7])
def test_the_gram_matrix_with_a_backlog_is_that_of_all_keys(condition, num_rows):
    keys = _random(0, condition, 8 * CHUNK + 3 * num_rows)
    gram = _gram_of(keys[: 8 * CHUNK])
    pending = Backlog(gram, 0.9)
    taken = 8 * CHUNK
    while taken < len(keys) and pending.takes(keys[taken : taken + num_rows]):
        taken += num_rows
    assert taken >= 8 * CHUNK + num_rows
    settled = pending.settle(gram)
    # Relative to each direction of the keys, so that a small one counts as much as a large one.
    exact, factor = (np.asarray(rows, np.float64) for rows in (keys[:taken], running_gram.triangular_factor(settled)))
    inverse = np.linalg.inv(np.linalg.qr(exact, mode="r"))
    np.testing.assert_allclose((factor @ inverse).T @ (factor @ inverse), np.eye(WIDTH), atol=3e-6 * max(condition, 10))
    np.testing.assert_array_equal(np.asarray(settled.num_keys), [0, taken])


def test_a_backlog_ends_where_the_number_of_keys_has_doubled():
    keys = _random(0, 1, 4 * CHUNK)
    pending = Backlog(_gram_of(keys), 1.0)
    taken = [pending.takes(keys[:CHUNK] / 8) for _ in range(5)]
    assert taken == [True] * 3 + [False] * 2


@pytest.mark.parametrize("condition", [1.0, 1e2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e25])
def test_what_is_not_finite_or_nearly_so_is_refused(condition, value):
    keys = _random(0, condition, 16 * CHUNK)
    gram = _gram_of(keys)
    assert Backlog(gram, FLOOR).takes(keys[:CHUNK])
    keys[3, 2] = value
    assert not Backlog(gram, FLOOR).takes(keys[:CHUNK])


def test_nothing_is_taken_before_every_direction_is_known_or_where_squares_underflow():
    keys = _random(0, 1, 16 * CHUNK)
    assert not Backlog(running_gram.init_gram(WIDTH), 1.0).takes(keys[:CHUNK])
    flat = keys * (np.arange(WIDTH) != 2)
    assert not Backlog(_gram_of(flat), 1.0).takes(flat[:CHUNK])
    tiny = (keys * np.where(np.arange(WIDTH) == 2, 1e-25, 1)).astype(np.float32)
    assert not Backlog(_gram_of(tiny), 1.0).takes(tiny[:CHUNK])


def test_keys_that_grow_out_of_all_proportion_are_left_to_a_refresh():
    keys = _random(0, 1, 16 * CHUNK)
    pending = Backlog(_gram_of(keys), floor=100.0)
    assert pending.takes(keys[:CHUNK] * 4)  # a trace of 8
    assert not pending.takes(keys[:CHUNK] * 8)


def _counted(monkeypatch):
    """Chunks that backlogs refused and took."""
    counts, takes = [0, 0], Backlog.takes

    def counting(self, keys):
        taken = takes(self, keys)
        counts[taken] += 1
        return taken

    monkeypatch.setattr(Backlog, "takes", counting)
    return counts


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_long_stream_gives_the_offline_set_whether_or_not_backlogs_are_used(condition, num_passes, monkeypatch):
    counts = _counted(monkeypatch)
    for seed in range(3):
        keys = _random(seed, condition, 5000)
        heavy = np.random.default_rng(seed).choice(5000, 20, replace=False)
        keys[heavy] *= 20
        found = stream_universal_set(lambda keys=keys: [keys], WIDTH, EPS, num_passes=num_passes, chunk_rows=CHUNK)
        scores = _scores(keys, keys)
        np.testing.assert_array_equal(found.indices, np.flatnonzero(scores >= EPS))
        assert len(found)
        assert np.all(found.scores >= scores[found.indices] * (1 - 1e-5))
        np.testing.assert_allclose(found.scores, scores[found.indices], rtol=1e-2)
    assert counts[True] > counts[False] > 0

    monkeypatch.setattr(Backlog, "takes", lambda self, keys: False)
    alone = stream_universal_set(lambda: [keys], WIDTH, EPS, num_passes=num_passes, chunk_rows=CHUNK)
    np.testing.assert_array_equal(alone.indices, found.indices)
    np.testing.assert_allclose(alone.scores, found.scores, rtol=1e-3)


def test_a_backlog_works_in_float64_where_the_gram_matrix_does():
    keys = _random(0, 1e2, 13 * CHUNK).astype(np.float64) * np.where(np.arange(WIDTH) == 0, 1e-7, 1)
    with jax.enable_x64(True):
        gram = _gram_of(keys[: 8 * CHUNK], jnp.float64)
        pending = Backlog(gram, 0.9)
        assert pending.takes(keys[8 * CHUNK :])
        settled = running_gram.sharpen(pending.settle(gram))
        scores = np.asarray(running_gram.score(settled, keys))
    np.testing.assert_allclose(scores, _scores(keys, keys), rtol=1e-9)


def test_a_second_pass_reads_only_what_may_hold_a_heavy_key(tmp_path, monkeypatch):
    keys = _random(0, 1, 6400)
    keys[[3000, 6399]] *= 60
    np.save(tmp_path / "keys.npy", keys)
    file = open_keys(tmp_path / "keys.npy")
    wanted, chunks = [], type(file).chunks
    monkeypatch.setattr(type(file), "chunks", lambda self, *args: wanted.append(args[3:]) or chunks(self, *args))
    for num_workers in (1, 3):
        wanted.clear()
        found = file_universal_set(file, EPS, num_passes=2, chunk_rows=CHUNK, num_workers=num_workers)
        np.testing.assert_array_equal(found.indices, np.flatnonzero(_scores(keys, keys) >= EPS))
        np.testing.assert_array_equal(found.keys, keys[found.indices])
        second = [marks for (marks,) in wanted if marks is not None]
        assert len(second) == num_workers
        assert 2 <= sum(sum(marks) for marks in second) <= 40


def test_a_file_gives_zeros_for_chunks_that_are_not_wanted(tmp_path):
    keys = _random(0, 1, 100)
    np.save(tmp_path / "keys.npy", keys)
    marks = [False, True, True, False, True]
    given = list(open_keys(tmp_path / "keys.npy").chunks(20, 3, 95, marks))
    assert [len(chunk) for chunk in given] == [20, 20, 20, 20, 12]
    expected = np.where(np.repeat(marks, 20)[:92, None], keys[3:95], 0)
    np.testing.assert_array_equal(np.concatenate(given), expected)


def test_a_set_of_two_passes_may_be_empty():
    keys = _random(0, 1, 3000)
    found = stream_universal_set(lambda: [keys], WIDTH, 0.5, num_passes=2, chunk_rows=1000)
    assert (len(found), found.keys.shape) == (0, (0, WIDTH))


@pytest.mark.parametrize("num_rows", [1, 1023, 1024, 1025, 2500])
def test_block_sums_are_the_gram_matrix(num_rows):
    rows = _random(0, 1, num_rows)
    exact = rows.astype(np.float64).T @ rows
    np.testing.assert_allclose(backlog._block_gram(rows), exact, atol=3e-6 * num_rows)
