"""One row for each contender and pass: checked, then timed, or left out with the reason."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

import jax

from levattn.bench.cases import Case, draw_inputs
from levattn.bench.check import check
from levattn.bench.contenders import Contender, Inputs
from levattn.bench.floor import floor_bytes
from levattn.bench.timing import Budget, Program, Timing

FORWARD, BACKWARD = "forward", "forward+backward"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a contender in one pass over one case. None: not measured, or does not apply.

    Attributes:
      case: As `str(Case)`.
      name: Of the contender.
      is_dense: Whether it is dense attention.
      direction: "forward" or "forward+backward".
      ms: Median milliseconds a call.
      fastest_ms: Of the samples.
      slowest_ms: Of the samples.
      num_calls: Calls in each sample.
      num_repeats: Samples.
      estimated_ms: In place of `ms` where it would have taken too long, from the case before.
      floor_ratio: `ms` over the time in which the device could read the inputs and write the outputs.
      dense_ratio: `ms` over that of the fastest dense contender, or over its estimate if none was timed.
      dense_is_estimated: Whether it was the estimate.
      peak_bytes: Temporary buffers and outputs of one call.
      compile_seconds: Of one call. PyTorch compiles nothing: its first call.
      error: Relative error of the output, see `check`.
      gradient_error: Of the gradients.
      recall: Of the keys of highest score.
      why_not: Why it was not timed.
    """

    case: str
    name: str
    is_dense: bool
    direction: str
    ms: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    num_calls: int | None = None
    num_repeats: int | None = None
    estimated_ms: float | None = None
    floor_ratio: float | None = None
    dense_ratio: float | None = None
    dense_is_estimated: bool | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    recall: float | None = None
    why_not: str | None = None


@dataclasses.dataclass
class Benchmark:
    """Settings, and what earlier cases taught about the time that later ones will take.

    Attributes:
      bandwidth: Bytes a second, for the floor.
      head_dim: Head width.
      dtype: Of the inputs.
      budget: Time for the timing of a row.
      max_seconds: A row whose calls would take longer, by the case before, is not started.
      max_bytes: A program that needs more memory is not run.
      seed: Of the inputs.
    """

    bandwidth: float
    head_dim: int = 64
    dtype: str = "float32"
    budget: Budget = dataclasses.field(default_factory=Budget)
    max_seconds: float = 30.0
    max_bytes: int = dataclasses.field(default_factory=lambda: device_bytes())
    seed: int = 0

    def __post_init__(self):
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}  # pairs and milliseconds of the case before

    def run(self, case: Case, contenders: Sequence[Contender]) -> Iterator[Row]:
        """Yields the rows of a case as they are done, without ratios to dense; see `with_dense_ratios`."""
        inputs = jax.block_until_ready(draw_inputs(case, self.head_dim, self.dtype, self.seed))
        for contender in contenders:
            for direction in (FORWARD, BACKWARD):
                yield self._row(case, contender, direction, inputs)

    def _row(self, case: Case, contender: Contender, direction: str, inputs: Inputs) -> Row:
        row = Row(str(case), contender.name, contender.spec is None, direction)
        if contender.why_not:
            return dataclasses.replace(row, why_not=contender.why_not)
        seen = (contender.name, direction)
        if seen in self._seen:
            pairs, ms = self._seen[seen]
            estimate = ms * contender.num_pairs(case) / pairs
            _, num_repeats = self.budget.plan(estimate / 1000)
            seconds = (num_repeats + 2) * estimate / 1000  # the check and the warm-up are calls, too
            if seconds > self.max_seconds:
                self._seen[seen] = (contender.num_pairs(case), estimate)
                why_not = f"would take some {seconds:.0f} s, more than {self.max_seconds:g}"
                return dataclasses.replace(row, estimated_ms=estimate, why_not=why_not)
        if contender.logits_bytes(case) > self.max_bytes:
            return dataclasses.replace(row, why_not=self._too_large(contender.logits_bytes(case)))
        try:
            program = contender.build_fn(inputs, direction == BACKWARD)
            row = dataclasses.replace(
                row, peak_bytes=program.peak_bytes, compile_seconds=round(program.compile_seconds, 3)
            )
            if (program.peak_bytes or 0) > self.max_bytes:
                return dataclasses.replace(row, why_not=self._too_large(program.peak_bytes))
            return self._checked_and_timed(row, case, contender, inputs, program)
        except Exception as error:  # one contender that does not run here must not end the others
            first = next(iter(str(error).splitlines()), "")
            return dataclasses.replace(row, why_not=f"{type(error).__name__}: {first[:200]}")

    def _checked_and_timed(self, row: Row, case: Case, contender: Contender, inputs: Inputs, program: Program) -> Row:
        backward = row.direction == BACKWARD
        verdict = check(contender, inputs, program, backward)
        row = dataclasses.replace(
            row, error=verdict.error, gradient_error=verdict.gradient_error, recall=verdict.recall
        )
        if verdict.complaint:
            return dataclasses.replace(row, why_not=f"wrong: {verdict.complaint}")
        timing: Timing = program.time(self.budget)
        self._seen[row.name, row.direction] = (contender.num_pairs(case), timing.ms)
        floor = 1000 * floor_bytes(case, self.head_dim, inputs[0].dtype.itemsize, backward) / self.bandwidth
        return dataclasses.replace(row, **dataclasses.asdict(timing), floor_ratio=timing.ms / floor)

    def _too_large(self, num_bytes: int) -> str:
        return f"needs {num_bytes / 2**30:.1f} GiB, more than {self.max_bytes / 2**30:.1f}"


def with_dense_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case with their ratios to the fastest dense contender of the same pass."""

    def best(direction: str, field: str) -> float:
        dense = [row for row in rows if row.is_dense and row.direction == direction]
        return min((getattr(row, field) for row in dense if getattr(row, field) is not None), default=math.inf)

    found = []
    for row in rows:
        measured = best(row.direction, "ms")
        dense = measured if measured < math.inf else best(row.direction, "estimated_ms")
        if row.ms is not None and dense < math.inf:
            row = dataclasses.replace(row, dense_ratio=row.ms / dense, dense_is_estimated=measured == math.inf)
        found.append(row)
    return found


def device_bytes() -> int:
    """Memory that a program may take: what JAX may allocate on the device, or half of the host's."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
