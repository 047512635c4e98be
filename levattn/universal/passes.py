"""Takes the keys of a stream past a streaming algorithm, once or twice, and hands back the universal set."""

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from levattn.universal import counts
from levattn.universal.backlog import Backlog
from levattn.universal.chunks import Chunks, cast_keys, fixed_chunks, prefetched
from levattn.universal.files import KeyFile
from levattn.universal.merge_reduce import LewisStream, check_stream
from levattn.universal.running_gram import add_keys, init_gram, merge_grams
from levattn.universal.sets import UniversalSet, check_eps, passes
from levattn.universal.streaming import OnePassStream, finish_gram, score_bounds, select

# 1 MB at D = 64, float32: a chunk and its whitened rows stay in the caches of a core.
CHUNK_ROWS = 4096
# How often a pass waits for its device, to see whether it is in vain.
_CHECK_EVERY = 64
# Chunks of a second pass that are scored before the scores of the first of them are waited for.
_AHEAD = 8


class Part(NamedTuple):
    """Keys that follow each other in the stream.

    Attributes:
      start: Position of the first.
      open_chunks: Starts a pass over them: gives them in order, in arrays of any number of rows. Told which of the
        chunks of the last pass matter now (None: all): what it gives in place of others is not looked at.
      is_reused: Whether it may write a chunk over the last one.
    """

    start: int
    open_chunks: Callable[[Sequence[bool] | None], Chunks]
    is_reused: bool = False


def file_universal_set(
    file: KeyFile,
    eps: float,
    *,
    p: float = 2.0,
    num_passes: int = 1,
    chunk_rows: int = CHUNK_ROWS,
    num_workers: int = 1,
    dtype: Any = jnp.float32,
    on_chunk: Callable[[int, int], None] | None = None,
) -> UniversalSet:
    """The universal set of f(x) = |x|^p of the keys in a file.

        universal = file_universal_set(open_keys("keys.npy"), eps=0.01, num_workers=os.cpu_count())

    Args:
      file: From `open_keys`.
      num_workers: Threads, each with its own part of the file; what they found is merged. On CPU one for each core
        is fastest; on an accelerator one is enough. No more than there are chunks.

    The other arguments, what is returned and raised: see `stream_universal_set`.
    """
    if num_workers < 1:
        raise ValueError(f"{num_workers=} must be at least 1")
    chunk_rows = min(chunk_rows, file.num_keys)
    num_chunks = -(-file.num_keys // max(chunk_rows, 1))
    cuts = np.linspace(0, file.num_keys, min(num_workers, num_chunks) + 1).astype(int).tolist()
    parts = [
        Part(start, partial(file.chunks, max(chunk_rows, 1), start, stop)) for start, stop in itertools.pairwise(cuts)
    ]
    return _run(parts, file.head_dim, eps, p, num_passes, chunk_rows, dtype, on_chunk, num_keys=file.num_keys)


def stream_universal_set(
    open_chunks: Callable[[], Chunks],
    head_dim: int,
    eps: float,
    *,
    p: float = 2.0,
    num_passes: int = 1,
    chunk_rows: int = CHUNK_ROWS,
    dtype: Any = jnp.float32,
    on_chunk: Callable[[int, int], None] | None = None,
) -> UniversalSet:
    """The universal set of f(x) = |x|^p of keys too many to hold.

        keys = open_keys("keys.npy")
        universal = stream_universal_set(lambda: keys.chunks(4096), keys.head_dim, eps=0.01)

    Args:
      open_chunks: Starts a pass: gives the keys in order, in arrays of any number of rows. Called once for each pass.
      head_dim: Width of the keys, D.
      eps: The threshold, in (0, 1].
      p: The power. 2 runs on JAX's default device and is by far the fastest; others on the host.
      num_passes: 1: keys that may yet be in the set wait, at most 2 D / eps of them for p = 2. 2: none waits, and no
        sum of bounds is larger than that of the final ones. For p = 2 the second pass looks only at chunks in which the
        first could not rule out a key of the set, and of a file reads only these.
      chunk_rows: Keys that are worked on at a time.
      dtype: Of the work for p = 2; float64, for ill-conditioned keys, needs `jax_enable_x64`.
      on_chunk: Told the pass (from 1) and the number of keys read in it, after each chunk.

    Returns:
      The set, with its keys. It contains every key whose sensitivity is at least eps.

    Raises:
      ValueError: For an argument out of range, a chunk of another width, no keys at all, keys that are not finite or
        that `dtype` does not hold, or a second pass that differs in length from the first.

    An exception, Ctrl-C among them, ends the threads of the other parts after the chunk they are at.
    """
    part = Part(0, lambda wanted: open_chunks(), is_reused=True)
    return _run([part], head_dim, eps, p, num_passes, chunk_rows, dtype, on_chunk)


def _run(parts, head_dim, eps, p, num_passes, chunk_rows, dtype, on_chunk, num_keys=math.inf):
    check_eps(eps)
    if num_passes not in (1, 2):
        raise ValueError(f"{num_passes=} must be 1 or 2")
    if chunk_rows < 1:
        raise ValueError(f"{chunk_rows=} must be at least 1")
    lock, num_read, is_over = threading.Lock(), [0, 0, 0], threading.Event()

    def chunks(part, number, wanted=None):
        made = fixed_chunks(part.open_chunks(wanted), chunk_rows, head_dim, copy=part.is_reused)
        if p == 2:
            made = ((cast_keys(keys, dtype), num_valid) for keys, num_valid in made)
        with contextlib.closing(prefetched(made)) as ready:
            for keys, num_valid in ready:
                if is_over.is_set():
                    raise InterruptedError("another part of the stream has failed")
                yield keys, num_valid
                with lock:
                    num_read[number] += num_valid
                    if on_chunk is not None:
                        on_chunk(number, num_read[number])

    def each(work, *arguments):
        """`work` on every part and what goes with it, at the same time."""
        pool = ThreadPoolExecutor(len(parts))
        try:
            return list(pool.map(work, parts, *arguments))
        except BaseException:
            is_over.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    if p == 2:
        find = _one_pass if num_passes == 1 else _two_passes
        # Threads of BLAS would wait for each other, on matrices as small as these longer than they work.
        with threadpool_limits(1, "blas"):
            stream = OnePassStream(head_dim, eps, dtype=jnp.dtype(dtype))
            if num_keys < stream.num_slots:
                stream = dataclasses.replace(stream, capacity=num_keys)
            return find(each, chunks, stream)
    find = _one_lewis_pass if num_passes == 1 else _two_lewis_passes
    return find(each, chunks, LewisStream(head_dim, eps, float(p)))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(stream, state, keys, num_valid):
    return stream.update(state, keys, num_valid)


@partial(jax.jit, static_argnums=0)
def _merge(stream, first, second):
    return stream.merge(first, second)


def _one_pass(each, chunks, stream):
    def work(part):
        state = stream.init(part.start)
        backlog = Backlog(state.gram, stream.floor)
        for number, (keys, num_valid) in enumerate(chunks(part, 1)):
            if not backlog.takes(keys[:num_valid]):
                state = _update(stream, state._replace(gram=backlog.settle(state.gram)), keys, num_valid)
                backlog = Backlog(state.gram, stream.floor)
            if number % _CHECK_EVERY == 0 and int(state.gram.num_bad):
                break
        return state._replace(gram=backlog.settle(state.gram))

    return stream.finish(functools.reduce(partial(_merge, stream), each(work)))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(stream, gram, keys, num_valid):
    gram, scores = add_keys(gram, keys, num_valid, floor=stream.floor)
    return gram, jnp.any(scores >= stream.floor)


def _two_passes(each, chunks, stream):
    def work(part):
        gram, wanted, unread = init_gram(stream.head_dim, stream.dtype), [], []
        backlog = Backlog(gram, stream.floor)
        for number, (keys, num_valid) in enumerate(chunks(part, 1)):
            may_matter = False
            if not backlog.takes(keys[:num_valid]):
                gram, may_matter = _add(stream, backlog.settle(gram), keys, num_valid)
                backlog = Backlog(gram, stream.floor)
            unread.append(may_matter)
            if number % _CHECK_EVERY == 0:
                wanted += map(bool, jax.device_get(unread))
                unread.clear()
                if int(gram.num_bad):
                    break
        if int(gram.num_bad):
            finish_gram(gram, part.start)  # says where
        return backlog.settle(gram), wanted + [bool(x) for x in jax.device_get(unread)]

    grams, wanted = zip(*each(work), strict=True)
    gram = finish_gram(functools.reduce(jax.jit(merge_grams), grams))
    num_keys = counts.to_int(gram.num_keys)
    found, _ = _second_pass(each, chunks, partial(score_bounds, gram), stream, num_keys, wanted)
    return select(gram, *found, stream.eps)


def _one_lewis_pass(each, chunks, stream):
    def work(part):
        state = stream.init(part.start)
        for keys, num_valid in chunks(part, 1):
            state = stream.update(state, keys, num_valid)
            if state.first_bad >= 0:
                break
        return state

    return stream.finish(functools.reduce(stream.merge, each(work)))


def _two_lewis_passes(each, chunks, stream):
    def work(part):
        state = stream.init(part.start)
        for keys, num_valid in chunks(part, 1):
            state, _ = stream.summarise(state, keys, num_valid)
            if state.first_bad >= 0:
                break
        return state

    state = functools.reduce(stream.merge, each(work))
    check_stream(state)
    form = stream.form(state)
    found, total = _second_pass(each, chunks, partial(stream.bounds, form), stream, state.num_keys)
    positions, bounds, keys = found
    return stream.select(
        state._replace(positions=positions, bounds=bounds, keys=keys, dropped=total - float(np.sum(bounds)))
    )


def _second_pass(each, chunks, bounds_fn, stream, num_keys, *wanted):
    """Positions, bounds and keys of those that pass; and the sum of all bounds that were looked at.

    `wanted`, if given, says for each part which of its chunks may hold a key that passes.
    """

    def work(part, wanted=None):
        found, total, first, under_way = [], 0.0, part.start, deque()

        def take():
            nonlocal total
            first, keys, num_valid, bounds = under_way.popleft()
            bounds = np.asarray(bounds)[:num_valid]
            chosen = np.flatnonzero(passes(bounds, stream.eps))
            found.append((first + chosen, bounds[chosen], keys[chosen]))
            total += float(np.sum(bounds, dtype=np.float64))

        for number, (keys, num_valid) in enumerate(chunks(part, 2, wanted)):
            if wanted is None or any(wanted[number : number + 1]):
                under_way.append((first, keys, num_valid, bounds_fn(keys)))
            if len(under_way) > _AHEAD:
                take()
            first += num_valid
        while under_way:
            take()
        return found, total, first - part.start

    found, totals, lengths = zip(*each(work, *wanted), strict=True)
    if sum(lengths) != num_keys:
        raise ValueError(
            f"the second pass gave {sum(lengths)} keys, the first {num_keys}: open_chunks must start afresh"
        )
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, stream.head_dim), np.float32)
    columns = zip(nothing, *itertools.chain.from_iterable(found), strict=True)
    return tuple(np.concatenate(column) for column in columns), sum(totals)
