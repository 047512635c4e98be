"""Times universal sets and heavy entries of x^2-attention on the host: exact against sketched, and a million keys.

    python scripts/bench_heavy.py                              # a minute on two CPU cores
    python scripts/bench_heavy.py --full --out heavy.json      # more and wider keys: 4 GB of memory, some minutes

First all heavy entries of `--num_keys` queries and keys, and the memory that this took. Then universal sets by exact
leverage scores, from sparse embeddings, and from these screened along 32 directions, with the sizes of the sets for
`--eps`. Then the heavy entries of some rows: by evaluating all of the set, and by CountSketch.
Keys are Gaussian but for 300 long ones, which share most of the leverage; half of the queries point along long keys.
On a host that does other work too, set OPENBLAS_NUM_THREADS=1: threads that wait for each other cost ten times as much.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from levattn.core import countsketch_heavy_entries, heavy_entries, heavy_entries_blocks
from levattn.training.workdir import provenance, write_json
from levattn.universal import sketched_universal_set, universal_set

NUM_LONG = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more and wider keys")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--num_keys", type=int, default=1_000_000, help="queries and keys of the last table")
    parser.add_argument("--head_dim", type=int, default=64, help="their width")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()

    million = time_million(args.num_keys, args.head_dim, args.eps)
    show("All heavy entries, exactly", [million])
    nums = [2**power for power in ((14, 16, 18, 20, 22) if args.full else (14, 16, 18, 19))]
    widths = (16, 64, 128, 256) if args.full else (16, 64, 128)
    cases = [(num, width) for width in widths for num in nums if num * width <= 2**29]  # 2 GB
    scores = [time_scores(num, width, args.eps, args.repeats) for num, width in cases]
    show("Universal sets", scores)
    crossovers = {str(width): crossover([row for row in scores if row["head_dim"] == width]) for width in widths}
    for width, num in crossovers.items():
        where = f"from {num:,} keys on" if num else f"at no number of keys up to {nums[-1]:,}"
        print(f"width {width}: the sketch with directions is faster than exact scores {where}")
    rows = [time_rows(width, args.eps, args.repeats) for width in (64, 256, 1024)]
    show("Heavy entries of 1,000 queries, 20,000 keys", rows)
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        results = {"million": million, "scores": scores, "crossovers": crossovers, "rows": rows}
        write_json(args.out, {"provenance": provenance(), **settings, **results})


def planted(num_keys: int, head_dim: int, seed: int = 0) -> np.ndarray:
    """Gaussian keys, of which up to 300 are long enough to share most of the leverage. Float32."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((num_keys, head_dim), np.float32)
    keys[: min(NUM_LONG, num_keys // 10)] *= np.float32((num_keys / 20) ** 0.5)
    return keys


def queries_for(keys: np.ndarray, num_queries: int, seed: int = 1) -> np.ndarray:
    """Gaussian queries, every other one with a long key added at ten times the length."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((num_queries, keys.shape[1]), np.float32)
    long = keys[rng.integers(min(NUM_LONG, len(keys) // 10), size=len(queries[::2]))]
    queries[::2] += 10 * long / np.linalg.norm(long, axis=1, keepdims=True) * keys.shape[1] ** 0.5
    return queries


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median time of a call, and what it returned."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples), out


def time_scores(num_keys: int, head_dim: int, eps: float, repeats: int) -> dict[str, Any]:
    """Exact, sketched and screened universal sets of the same keys."""
    keys = planted(num_keys, head_dim)
    exact_s, exact = seconds(lambda: universal_set(keys, eps), repeats)
    sketch_s, sketched = seconds(lambda: sketched_universal_set(keys, eps, num_directions=None), repeats)
    screened_s, screened = seconds(lambda: sketched_universal_set(keys, eps, num_directions=32), repeats)
    return {
        "head_dim": head_dim,
        "num_keys": num_keys,
        "exact_s": exact_s,
        "sketch_s": sketch_s,
        "screened_s": screened_s,
        "exact_size": len(exact),
        "sketch_size": len(sketched),
        "screened_size": len(screened),
        "num_missed": len(set(exact.indices) - set(sketched.indices)) + len(set(exact.indices) - set(screened.indices)),
    }


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """The smallest number of keys from which on the screened sketch is always the faster."""
    faster = [row["num_keys"] for row in rows if row["screened_s"] < row["exact_s"]]
    slower = [row["num_keys"] for row in rows if row["screened_s"] >= row["exact_s"]]
    return next((num for num in faster if num > max(slower, default=0)), None)


def time_rows(head_dim: int, eps: float, repeats: int) -> dict[str, Any]:
    """Heavy entries by evaluating all of the universal set, and by CountSketch."""
    keys = planted(20_000, head_dim)
    queries, indices = queries_for(keys, 1000), universal_set(keys, eps).indices
    exact_s, exact = seconds(lambda: heavy_entries(queries, keys, eps, key_indices=indices), repeats)
    sketch_s, sketch = seconds(lambda: countsketch_heavy_entries(queries, keys, eps, key_indices=indices), repeats)
    sizes = {"set_size": len(indices), "num_entries": len(exact.values), "num_missed": len(exact.values)}
    sizes["num_missed"] -= len(sketch.values)
    return {"head_dim": head_dim, **sizes, "exact_s": exact_s, "countsketch_s": sketch_s}


def time_million(num_keys: int, head_dim: int, eps: float) -> dict[str, Any]:
    """All heavy entries of so many queries and keys; checked on 200 of the queries against the matrix itself."""
    keys = planted(num_keys, head_dim)
    queries = queries_for(keys, num_keys)
    forget_peak()
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    found = universal_set(keys, eps)
    set_s = time.perf_counter() - start
    num_entries, checked = 0, []
    for block in heavy_entries_blocks(queries, keys, eps, key_indices=found.indices):
        num_entries += len(block.values)
        few = block.query_indices < 200
        checked += zip(block.query_indices[few].tolist(), block.key_indices[few].tolist(), strict=True)
    total_s, after = time.perf_counter() - start, resident_mb("VmHWM")
    squares = (queries[:200].astype(np.float64) @ keys.T.astype(np.float64)) ** 2
    expected = set(zip(*(x.tolist() for x in np.nonzero(squares >= eps * squares.sum(1, keepdims=True))), strict=True))
    return {
        "num_keys": num_keys,
        "head_dim": head_dim,
        "set_size": len(found),
        "num_entries": num_entries,
        "set_s": set_s,
        "total_s": total_s,
        "num_missed_of_200_rows": len(expected - set(checked)),
        "num_checked": len(expected),
        "arrays_mb": (queries.nbytes + keys.nbytes) / 1e6,
        "resident_mb_before": before,
        "resident_mb_peak": after,
        "columns_of_the_set_mb": 8 * num_keys * len(found) / 1e6,
        "matrix_mb": 8 * num_keys**2 / 1e6,
    }


def resident_mb(kind: str) -> float:
    """Resident memory of this process, from Linux: now (VmRSS), or the most since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1e3


def forget_peak() -> None:
    """Starts the peak of resident memory anew: making the keys took more than what is to be measured."""
    Path("/proc/self/clear_refs").write_text("5")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table; a single one as a column of names and numbers."""
    columns = list(rows[0]) if len(rows) > 1 else ["", ""]
    table = Table(*columns, title=title, title_justify="left", show_header=len(rows) > 1)
    lines = [list(row.values()) for row in rows] if len(rows) > 1 else [[name, x] for name, x in rows[0].items()]
    for line in lines:
        table.add_row(*(x if isinstance(x, str) else f"{x:,.3f}" if isinstance(x, float) else f"{x:,}" for x in line))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


if __name__ == "__main__":
    main()
