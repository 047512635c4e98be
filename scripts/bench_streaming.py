"""Times a universal set of a file of keys, beside NumPy's `K.T @ K` over the same chunks of the same file.

    python scripts/bench_streaming.py                            # one million keys of width 64, 256 MB in --scratch
    python scripts/bench_streaming.py --full --out bench.json    # ten million, 2.6 GB, removed afterwards
    python scripts/bench_streaming.py --full --condition 100     # keys that have to be whitened one by one

NumPy runs in two ways, with the threads of its BLAS and with one thread for each part of the file as the streams have;
"of numpy" is relative to the faster. Repetitions take turns after a short run of each that compiles, and the table
shows medians; on a machine that others use, CPU seconds are the steadier measure. Of two passes the second reads only
chunks that the first could not rule out. Memory is what the process holds after a tenth of the keys and at the end.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from levattn.training.workdir import provenance, write_json
from levattn.universal.chunks import prefetched
from levattn.universal.files import KeyFile, open_keys
from levattn.universal.passes import CHUNK_ROWS, file_universal_set

NUM_HEAVY = 20  # Keys that are made long, so that there is something to find.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_keys", type=int, default=1_000_000)
    parser.add_argument("--full", action="store_true", help="ten million keys")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--condition", type=float, default=1.0, help="condition number of the keys")
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument("--chunk", type=int, default=CHUNK_ROWS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the file of keys; None: the system's")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()
    num_keys = 10_000_000 if args.full else args.num_keys

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        heavy = make_keys(Path(folder) / "keys.npy", num_keys, args.head_dim, args.condition)
        file = open_keys(Path(folder) / "keys.npy")
        runs = {
            "numpy K.T @ K": gram_by_numpy,
            "numpy, by parts": grams_by_numpy,
            "one pass": partial(find, num_passes=1),
            "two passes": partial(find, num_passes=2),
        }
        short = dataclasses.replace(file, num_keys=min(num_keys, 64 * args.chunk))
        compile_seconds = sum(timed(run, short, args)["seconds"] for run in runs.values())
        measured = {name: [] for name in runs}
        for _ in range(args.repeat):
            for name, run in runs.items():
                measured[name].append(timed(run, file, args))

    print(
        f"{num_keys:,} keys of width {args.head_dim}, condition number {args.condition:g}, float32, "
        f"chunks of {args.chunk:,}, eps={args.eps:g}"
    )
    print(f"{'':<15} {'keys/s':>12} {'of numpy':>9} {'CPU s':>7} {'in set':>7} {'MB at 1/10':>11} {'MB at end':>10}")
    rates = {name: num_keys / statistics.median(r["seconds"] for r in results) for name, results in measured.items()}
    rows, baseline = [], max(rate for name, rate in rates.items() if name.startswith("numpy"))
    for name, results in measured.items():
        rate = rates[name]
        found = results[0]["found"]
        cpu_seconds = statistics.median(r["cpu_seconds"] for r in results)
        early, late = (max(r[when] for r in results) for when in ("early_mb", "late_mb"))
        size = "" if found is None else len(found)
        speed = f"{rate:>12,.0f} {rate / baseline:>9.2f} {cpu_seconds:>7.2f}"
        print(f"{name:<15} {speed} {size:>7} {early:>11.0f} {late:>10.0f}")
        if found is not None and not set(heavy) <= set(found):
            raise RuntimeError(f"{name}: keys {sorted(set(heavy) - set(found))} were made heavy and are not in the set")
        rows.append({"name": name, "keys_per_second": rate, "of_numpy": rate / baseline, "resident_mb": [early, late]})
        rows[-1] |= {name: [r[name] for r in results] for name in ("seconds", "cpu_seconds")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"compiling took {compile_seconds:.1f} s, not counted above; peak resident memory {peak:.0f} MB")
    if args.out:
        setting = {
            "num_keys": num_keys,
            "head_dim": args.head_dim,
            "condition": args.condition,
            "eps": args.eps,
            "chunk": args.chunk,
            "workers": args.workers,
        }
        write_json(
            args.out,
            {
                "provenance": provenance(),
                **setting,
                "peak_resident_mb": peak,
                "compile_seconds": compile_seconds,
                "rows": rows,
            },
        )


def make_keys(path: Path, num_keys: int, head_dim: int, condition: float) -> list[int]:
    """Writes Gaussian keys, a few of them made long; says which."""
    rng = np.random.default_rng(0)
    heavy = np.sort(rng.choice(num_keys, NUM_HEAVY, replace=False))
    rotation, _ = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
    shape = (np.geomspace(1, 1 / condition, head_dim)[:, None] * rotation).astype(np.float32)
    with path.open("wb") as file:  # no memory map: its pages would count as memory of the process
        header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (num_keys, head_dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, num_keys, 1 << 16):
            block = rng.standard_normal((min(1 << 16, num_keys - start), head_dim), np.float32)
            inside = heavy[(heavy >= start) & (heavy < start + len(block))] - start
            block[inside] *= np.sqrt(num_keys / head_dim)
            (block @ shape).tofile(file)
    return heavy.tolist()


def gram_by_numpy(
    file: KeyFile, args: argparse.Namespace, tell: Callable[[int, int], None], start: int = 0, stop: int | None = None
) -> None:
    gram, num_keys = np.zeros((file.head_dim,) * 2, np.float32), 0
    with contextlib.closing(prefetched(file.chunks(args.chunk, start, stop))) as chunks:
        for keys in chunks:
            gram += keys.T @ keys
            num_keys += len(keys)
            tell(1, num_keys)


def grams_by_numpy(file: KeyFile, args: argparse.Namespace, tell: Callable[[int, int], None]) -> None:
    cuts = np.linspace(0, file.num_keys, args.workers + 1).astype(int).tolist()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda part: gram_by_numpy(file, args, tell, *part), itertools.pairwise(cuts)))


def find(file: KeyFile, args: argparse.Namespace, tell: Callable[[int, int], None], num_passes: int) -> list[int]:
    return file_universal_set(
        file, args.eps, num_passes=num_passes, chunk_rows=args.chunk, num_workers=args.workers, on_chunk=tell
    ).indices.tolist()


def timed(run: Callable, file: KeyFile, args: argparse.Namespace) -> dict:
    """Runs once; wall time, CPU time of all threads, and memory on the way."""
    early = 0.0

    def tell(number, num_read):
        nonlocal early
        if not early and num_read >= file.num_keys / 10:
            early = resident_mb()

    start, cpu_start = time.perf_counter(), time.process_time()
    found = run(file, args, tell)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "found": found,
        "early_mb": early,
        "late_mb": resident_mb(),
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
