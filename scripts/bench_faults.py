"""What safety costs: the checks of every step, the blocking part of a save, and the hashing of checkpoints.

    python -m scripts.bench_faults --out results/faults/cost.json

Steps of a config are taken in blocks, in turn without and with everything that training adds to them against faults:
the device's look at whether they were finite and its choice between old and new state, the wait for its answer, signs
of life to the watchdog, the look for a signal and for a save that failed, the lock, and metrics to `metrics.jsonl` and
TensorBoard at the config's interval. Both loops keep as many steps in flight and take the same batches from memory, and
blocks of each come first as often. The ratio of a pair of blocks is free of slow changes in the load of the machine;
its quartiles show what is left. `host_us` is the time of the host's part alone, over thousands of repetitions: where
it is hidden behind the devices' work the ratio is smaller.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from rich.table import Table

from configs import fashion_mnist, quickstart
from levattn.analysis.tables import new_console
from levattn.models import ViT
from levattn.training import step as step_lib
from levattn.training.checkpoint import Checkpointer
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.manifest import verify_manifest, write_manifest
from levattn.training.metrics import MetricWriter
from levattn.training.optim import make_optimizer
from levattn.training.sharding import make_mesh, put_batch
from levattn.training.signals import StopSignal
from levattn.training.state import create_state, init_state, plan_state
from levattn.training.step import make_train_step
from levattn.training.watchdog import Watchdog
from levattn.training.workdir import locked_workdir, prepare_workdir, provenance, write_json

# Models of the configs. Smaller batches than theirs: the cost of safety is the same, and the share larger.
MODELS = {
    "quickstart": (quickstart.get_config("attention=leverage,k=16"), 64, (8, 8, 1)),
    "fashion_mnist": (fashion_mnist.get_config("attention=leverage,k=32,dtype=float32"), 4, (28, 28, 1)),
}
_STEPS_IN_FLIGHT = 2
_TOTAL_STEPS = 100_000


class Bench:
    """A model, its batch, and the two loops over it."""

    def __init__(self, name: str, workdir: Path):
        fields, batch_size, self.image_shape = MODELS[name]
        fields.batch_size, fields.total_steps = batch_size, _TOTAL_STEPS
        fields.model.scan = True  # compiles in a tenth of the time
        self.name = name
        self.config = from_config_dict(TrainConfig, fields)
        self.workdir = workdir
        rng = np.random.default_rng(0)
        self.batch = {
            "image": rng.integers(0, 256, (batch_size, *self.image_shape), dtype=np.uint8),
            "label": rng.integers(0, 10, batch_size, dtype=np.int32),
            "index": np.arange(batch_size),
        }
        self.mesh, model = make_mesh(self.config.mesh), ViT(self.config.model)
        tx, schedule_fn = make_optimizer(self.config.optimizer, _TOTAL_STEPS)
        ema = self.config.ema_decay is not None
        init_fn = functools.partial(init_state, model=model, image_shape=self.image_shape, tx=tx, ema=ema)
        self.plan = plan_state(init_fn, self.mesh)
        parts = (self.config, model, tx, schedule_fn, self.plan)
        self.safe_step, self.bare_step = make_train_step(*parts), make_train_step(*parts)
        self.states = {name: create_state(init_fn, self.plan, 0) for name in ("bare", "safe")}
        self.num_steps = 0
        # Traced here, without the choice between old and new state.
        with mock.patch.object(step_lib, "_guarded", lambda old, new, is_finite, mode: new):
            self.bare(1)

    def bare(self, num_steps: int) -> None:
        """Trains on without any of it."""
        in_flight = collections.deque()
        state = self.states["bare"]
        for _ in range(num_steps):
            state, metrics = self.bare_step(state, put_batch(self.batch, self.mesh))
            in_flight.append(metrics)
            if len(in_flight) > _STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        self.states["bare"] = jax.block_until_ready(state)

    @contextlib.contextmanager
    def guards(self) -> Iterator[Callable[[int, dict], None]]:
        """Yields what the host does in a step, as `levattn.training.loop` does it."""
        in_flight = collections.deque()
        with contextlib.ExitStack() as stack:
            watchdog = stack.enter_context(Watchdog(self.config.hang_timeout))
            stack.enter_context(locked_workdir(self.workdir))
            checkpointer = stack.enter_context(Checkpointer(self.workdir / "checkpoints"))
            writer = stack.enter_context(contextlib.closing(MetricWriter(self.workdir)))
            is_told_to_stop = stack.enter_context(StopSignal())

            def guard(step: int, metrics: dict) -> None:
                watchdog.beat("waiting for a batch", step)
                watchdog.beat("computing", step)
                metrics["nonfinite"].copy_to_host_async()
                in_flight.append((step, metrics, self.batch))
                is_logged = step % self.config.log_every_steps == 0
                while len(in_flight) > (0 if is_logged else _STEPS_IN_FLIGHT):
                    _, settled, _ = in_flight.popleft()
                    if settled["nonfinite"]:
                        raise FloatingPointError(f"step {step} is not finite: these figures are of no use")
                checkpointer.check()
                if is_logged:
                    shown = jax.device_get(metrics)
                    writer.write(step, {f"train/{name}": value for name, value in shown.items()})
                is_told_to_stop(step)

            yield guard

    def safe(self, num_steps: int, guard: Callable[[int, dict], None]) -> None:
        """Trains on with all of it."""
        state = self.states["safe"]
        for _ in range(num_steps):
            self.num_steps += 1
            state, metrics = self.safe_step(state, put_batch(self.batch, self.mesh))
            guard(self.num_steps, metrics)
        self.states["safe"] = jax.block_until_ready(state)


def measure_steps(bench: Bench, num_pairs: int, block_s: float) -> dict:
    """Step times without and with safety, in paired blocks."""
    with bench.guards() as guard:
        bench.safe(3, guard)
        bench.bare(3)
        start = time.perf_counter()
        bench.bare(3)
        num_steps = max(3, round(3 * block_s / (time.perf_counter() - start)))
        seconds = {"bare": [], "safe": []}
        runs = {"bare": bench.bare, "safe": functools.partial(bench.safe, guard=guard)}
        for pair in range(num_pairs):
            for kind in ("bare", "safe") if pair % 2 == 0 else ("safe", "bare"):
                start = time.perf_counter()
                runs[kind](num_steps)
                seconds[kind].append((time.perf_counter() - start) / num_steps)
        bench.states["safe"], metrics = bench.safe_step(bench.states["safe"], put_batch(bench.batch, bench.mesh))
        host_us = 1e6 * _median([time_host(guard, metrics, 1000) for _ in range(10)])
    ratios = np.array(seconds["safe"]) / np.array(seconds["bare"])
    quartiles = np.quantile(ratios, (0.25, 0.5, 0.75)) - 1
    return {
        "model": bench.name,
        "batch_size": bench.config.batch_size,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(bench.plan.params)),
        "steps": num_steps * num_pairs,
        "pairs": num_pairs,
        "step_ms": 1e3 * _median(seconds["bare"]),
        "overhead": quartiles[1],
        "overhead_quartiles": [quartiles[0], quartiles[2]],
        "host_us": host_us,
        "host_overhead": host_us / 1e6 / _median(seconds["bare"]),
    }


def time_host(guard: Callable[[int, dict], None], metrics: dict, num_steps: int) -> float:
    """Seconds of the host's part of a step, with answers of the device that it has not read before."""
    answers = jax.block_until_ready([jax.device_put(np.bool_(False)) for _ in range(num_steps)])
    start = time.perf_counter()
    for step, answer in enumerate(answers, start=1):
        guard(step, metrics | {"nonfinite": answer})
    return (time.perf_counter() - start) / num_steps


def measure_saves(bench: Bench, num_saves: int) -> dict:
    """How long a save holds training up, and how long it takes in the background, hashing included."""
    folder, state = bench.workdir, bench.states["safe"]
    blocking, whole = [], []
    with Checkpointer(folder / "saves", keep_last=1) as checkpointer:
        for step in range(1, num_saves + 2):  # the first one imports and compiles
            start = time.perf_counter()
            checkpointer.save(step, state, None, {})
            blocking.append(time.perf_counter() - start)
            checkpointer.wait()
            whole.append(time.perf_counter() - start)
    restores = []
    for _ in range(3):
        with Checkpointer(folder / "saves", read_only=True) as checkpointer:  # a new one compares with the manifest
            start = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(bench.plan))
            restores.append(time.perf_counter() - start)
    num_bytes = sum(path.stat().st_size for path in (folder / "saves").rglob("*") if path.is_file())
    return {
        "model": bench.name,
        "checkpoint_mb": num_bytes / 1e6,
        "blocking_ms": 1e3 * _median(blocking[1:]),
        "blocking_ms_most": 1e3 * max(blocking[1:]),
        "whole_ms": 1e3 * _median(whole[1:]),
        "restore_ms": 1e3 * _median(restores),
    }


def measure_hashing(folder: Path, megabytes: int) -> dict:
    """Rates of writing and of checking a manifest, from the page cache, over 8 files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        (folder / str(number)).write_bytes(rng.bytes(megabytes * 1_000_000 // 8))
    writes, checks = timed(lambda: write_manifest(folder), 3), timed(lambda: verify_manifest(folder), 5)
    problems = verify_manifest(folder)
    if problems:
        raise OSError(f"files changed while they were measured: {problems}")
    return {
        "megabytes": megabytes,
        "write_gb_per_s": megabytes / 1e3 / _median(writes),
        "verify_gb_per_s": megabytes / 1e3 / _median(checks),
    }


def timed(call: Callable[[], object], number: int) -> list[float]:
    """Seconds of each of some calls, behind one that is not counted."""
    call()
    seconds = []
    for _ in itertools.repeat(None, number):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _median(values: list[float]) -> float:
    return float(np.median(values))


def show(title: str, rows: list[dict]) -> None:
    """Prints rows of numbers."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(_text(name, value) for name, value in row.items()))
    new_console().print(table)


def _text(name: str, value: object) -> str:
    if isinstance(value, list):
        return " to ".join(_text(name, one) for one in value)
    if "overhead" in name:
        return f"{value:+.2%}"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--pairs", type=int, default=30, help="blocks without and with safety")
    parser.add_argument("--block_s", type=float, default=1.0, help="about how long a block takes, at least 3 steps")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1000, help="to hash")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.out:
        prepare_workdir(args.out.parent, flag="out")
    with tempfile.TemporaryDirectory(prefix="bench-faults-") as name:
        folder = Path(name)
        steps, saves = [], []
        for model in args.models:
            (folder / model).mkdir()
            bench = Bench(model, folder / model)
            steps.append(measure_steps(bench, args.pairs, args.block_s))
            saves.append(measure_saves(bench, args.saves))
        show("All that a step does against faults", steps)
        show("Saves", saves)
        hashing = measure_hashing(folder / "hashing", args.megabytes)
        show("SHA-256 manifests", [hashing])
    if args.out:
        figures = {"steps": steps, "saves": saves, "hashing": hashing}
        write_json(args.out, figures | {"arguments": vars(args) | {"out": None}, "provenance": provenance()})


if __name__ == "__main__":
    main()
