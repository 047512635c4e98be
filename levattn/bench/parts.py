"""What a program spends its time on, kernel by kernel, as the profiler of the device saw it."""

import collections
import dataclasses
import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from levattn.bench.timing import ArrayFn


@dataclasses.dataclass(frozen=True)
class Part:
    """A kernel: its name, its runs in a call, and the microseconds that these take together."""

    name: str
    runs: float
    us: float


def kernel_times(fn: ArrayFn, inputs: tuple[jax.Array, ...], num_calls: int = 10) -> list[Part]:
    """Runs a jitted function under the profiler.

    Unlike the times of a chain of calls these leave out what lies between kernels, and each kernel meets a device that
    has just run the others.

    Args:
      fn: From arrays to arrays.
      inputs: Its arguments.
      num_calls: Calls to average over, after two that are not looked at.

    Returns:
      The kernels, longest first; none on a device whose kernels the profiler does not list, such as a CPU.
    """
    call = jax.jit(fn).lower(*inputs).compile()
    for _ in range(2):
        jax.block_until_ready(call(*inputs))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(num_calls):
                out = call(*inputs)
            jax.block_until_ready(out)
        (path,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(path) as file:
            return read_parts(json.load(file)["traceEvents"], num_calls)


def read_parts(events: Sequence[dict[str, Any]], num_calls: int) -> list[Part]:
    """The kernels among the events of a trace (Chrome's format): what ran on a stream of a GPU.

    Args:
      events: Of the trace.
      num_calls: Calls that it holds.
    """
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"].get("name", "")
        for event in events
        if event.get("ph") == "M" and "args" in event
    }
    gpus = {pid for (kind, pid, _), name in names.items() if kind == "process_name" and "GPU" in name}
    totals = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        thread = names.get(("thread_name", event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and event["pid"] in gpus and "Stream" in thread:
            total = totals[event["name"]]
            total[0] += 1
            total[1] += event["dur"]
    parts = [Part(name, runs / num_calls, us / num_calls) for name, (runs, us) in totals.items()]
    return sorted(parts, key=lambda part: -part.us)
