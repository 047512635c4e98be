"""Times of a function on the device: many calls inside one program, each waiting for the one before.

Launching a program costs more than a short attention takes. So the calls are a loop inside one compiled program. What
would make such a loop lie is kept out: every call depends on the outputs of the last, all inputs pass through the loop
(what depends on the keys alone would else be computed once, ahead of it), and every output is written out in
full, in row-major order, as a caller would find it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

ArrayFn = Callable[..., tuple[jax.Array, ...]]

_NUDGE = 1e-30  # Times an output, added to an input: lost in rounding, but the compiler cannot know.
_MAX_CALLS = 500
_MIN_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Budget:
    """Time to spend on timing one function.

    Args:
      seconds: For all repeats together, as long as one call is shorter than a share of it.
      repeats: Samples to take; where single calls exceed the time, three.

    Raises:
      ValueError: If either is not positive.
    """

    seconds: float = 1.0
    repeats: int = 7

    def __post_init__(self):
        if not self.seconds > 0 or self.repeats < 1:
            raise ValueError(f"seconds={self.seconds} and repeats={self.repeats} must be positive")

    def plan(self, seconds_per_call: float) -> tuple[int, int]:
        """Calls in each sample, and samples."""
        calls = int(self.seconds / self.repeats / max(seconds_per_call, 1e-9))
        fits = seconds_per_call * self.repeats <= self.seconds
        return min(max(calls, 1), _MAX_CALLS), self.repeats if fits else min(self.repeats, _MIN_REPEATS)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median over the samples, and the fastest and slowest of them."""

    ms: float
    fastest_ms: float
    slowest_ms: float
    num_calls: int
    num_repeats: int


@runtime_checkable
class Program(Protocol):
    """A compiled function with its inputs, of whichever framework."""

    compile_seconds: float
    peak_bytes: int | None  # temporary buffers and outputs; None where not known

    def heads(self, places: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, ...]]:
        """Runs it; of each output the `T D` part of each (batch element, head), in float64."""
        ...

    def time(self, budget: Budget) -> Timing: ...


def chain(fn: ArrayFn, num_calls: int) -> ArrayFn:
    """A function that calls `fn` `num_calls` times on the device, one after the other, and returns the last outputs.

    Args:
      fn: From arrays to a tuple of arrays.
      num_calls: Calls in the loop.
    """

    def first(x: jax.Array) -> jax.Array:
        return x[(0,) * x.ndim]

    def chained(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        firsts = [first(x) for x in inputs]

        def call(_, carry):
            inputs, outputs = carry
            nudge = _NUDGE * sum(first(x).astype(jnp.float32) for x in outputs)
            # One number of each input is rewritten: all that depends on the array waits for it. It is not read from the
            # array, or the compiler would copy that to write to it.
            inputs = tuple(
                jax.lax.dynamic_update_slice(x, (number + nudge.astype(x.dtype)).reshape((1,) * x.ndim), (0,) * x.ndim)
                for number, x in zip(firsts, inputs, strict=True)
            )
            outputs = tuple(with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in fn(*inputs))
            return inputs, outputs

        start = tuple(jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(fn, *inputs))
        return jax.lax.fori_loop(0, num_calls, call, (inputs, start))[1]

    return chained


def sample(run_fn: Callable[[], None], num_calls: int, num_repeats: int) -> Timing:
    """Times `run_fn`, which makes `num_calls` calls and waits for them, after running it once to warm up."""
    run_fn()
    samples = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        run_fn()
        samples.append(1000 * (time.perf_counter() - start) / num_calls)
    return Timing(statistics.median(samples), min(samples), max(samples), num_calls, num_repeats)


class JaxProgram:
    """A JAX function compiled for its inputs.

    Args:
      fn: From arrays to a tuple of arrays.
      inputs: Its arguments.
    """

    def __init__(self, fn: ArrayFn, inputs: tuple[jax.Array, ...]):
        start = time.perf_counter()
        self._compiled = jax.jit(fn).lower(*inputs).compile()
        self.compile_seconds = time.perf_counter() - start
        self._fn, self._inputs = fn, inputs
        memory = self._compiled.memory_analysis()
        self.peak_bytes = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes

    def heads(self, places: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, ...]]:
        outputs = self._compiled(*self._inputs)
        return [tuple(head(x, *place) for x in outputs) for place in places]

    def time(self, budget: Budget) -> Timing:
        """Times the function as a chain of calls that fills the budget."""
        run_fn = self._compiled
        jax.block_until_ready(run_fn(*self._inputs))
        start = time.perf_counter()
        jax.block_until_ready(run_fn(*self._inputs))
        num_calls, num_repeats = budget.plan(time.perf_counter() - start)
        if num_calls > 1:
            run_fn = jax.jit(chain(self._fn, num_calls)).lower(*self._inputs).compile()
        return sample(lambda: jax.block_until_ready(run_fn(*self._inputs)), num_calls, num_repeats)


def head(array: jax.Array, batch: int, head: int) -> np.ndarray:
    """One head of a `B T H D` array as `T D`, in float64 on the host."""
    return np.asarray(array[batch, :, head].astype(jnp.float32)).astype(np.float64)
