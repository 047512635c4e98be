"""Times attention side by side on the same random inputs: this project's methods, and the dense attention of others.

    python scripts/bench_attention.py --cases paper --out results/attention/paper.json
    python scripts/bench_attention.py --cases cpu --dtype float32 --methods leverage       # two CPU cores
    python scripts/bench_attention.py --cases long,2x32768x8 --methods leverage,row_norm --max_seconds 60

Every contender is first compared with float64 definitions; what is wrong is not timed. Times are of calls
chained on the device, in milliseconds: the median over `--repeats` samples. "/ dense" is the ratio to the fastest dense
attention of the case, "/ floor" to the time in which the device could read the inputs and write the outputs once.
"""

import argparse
import dataclasses
import functools
import os
from pathlib import Path

# PyTorch and JAX share one device here: neither takes its memory ahead of need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from rich.console import Console

from levattn.attention import lev_attention
from levattn.bench import cases, contenders, floor, measure, parts, table, timing
from levattn.training.workdir import prepare_workdir, provenance, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="smoke", help=f"{', '.join(cases.CASES)} or BxTxH")
    parser.add_argument("--methods", default="leverage,row_norm,random,kmeans,groups,matched")
    parser.add_argument("--peers", default=",".join(contenders.PEERS), help="dense attention to compare with")
    parser.add_argument("--k", type=int, default=32, help="keys that a method keeps")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on timing a row")
    parser.add_argument("--repeats", type=int, default=7, help="samples of a row; three where a call takes long")
    parser.add_argument("--max_seconds", type=float, default=30.0, help="rows that would take longer are left out")
    parser.add_argument("--max_gib", type=float, help="programs that need more are left out; default: what there is")
    parser.add_argument("--bandwidth", type=float, help="of the memory, GB/s; default: measured by a copy")
    parser.add_argument(
        "--parts", action="store_true", help="also profile each method: the time of every kernel (GPUs)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file, after every row")
    args = parser.parse_args()
    try:
        shapes, budget = cases.parse_cases(args.cases), timing.Budget(args.seconds, args.repeats)
        # PyTorch first: what JAX has once taken of the device it keeps.
        entries = contenders.peers(args.peers, args.dtype, args.head_dim)
        entries = sorted(entries, key=lambda entry: not entry.name.startswith("torch"))
        entries += contenders.methods(args.methods, args.k)
        if args.out:
            prepare_workdir(args.out.parent, "out")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    on_cpu = jax.default_backend() == "cpu"
    bandwidth = 1e9 * args.bandwidth if args.bandwidth else floor.copy_bandwidth(2**28 if on_cpu else 2**31)
    console = Console(width=150)
    console.print(f"{jax.devices()[0].device_kind}, {args.dtype}, head width {args.head_dim}, k = {args.k}, ", end="")
    console.print(f"memory at {bandwidth / 1e9:,.0f} GB/s", highlight=False)
    benchmark = measure.Benchmark(
        bandwidth,
        args.head_dim,
        args.dtype,
        budget,
        args.max_seconds,
        int(args.max_gib * 2**30) if args.max_gib else measure.device_bytes(),
        args.seed,
    )
    settings = vars(args) | {"cases": [str(case) for case in shapes], "max_gib": benchmark.max_bytes / 2**30}
    record = {"provenance": provenance(), **settings, "out": None, "bandwidth": bandwidth, "rows": []}
    for case in shapes:
        rows = []
        for row in benchmark.run(case, entries):
            rows.append(row)
            if args.out:
                of_case = [dataclasses.asdict(row) for row in measure.with_dense_ratios(rows)]
                write_json(args.out, record | {"rows": record["rows"] + of_case})
        rows = measure.with_dense_ratios(rows)
        record["rows"] += [dataclasses.asdict(row) for row in rows]
        console.print(table.case_table(rows))
        if args.parts:
            record["kernels"] = record.get("kernels", []) + _profile(case, entries, args, console)
            if args.out:
                write_json(args.out, record)


def _profile(case, entries, args, console: Console) -> list[dict]:
    inputs = cases.draw_inputs(case, args.head_dim, args.dtype, args.seed)
    found = []
    for entry in entries:
        if entry.spec is not None:
            attend = contenders.with_gradients(functools.partial(lev_attention, spec=entry.spec))
            kernels = [dataclasses.asdict(part) for part in parts.kernel_times(attend, inputs)]
            found.append({"case": str(case), "name": entry.name, "direction": measure.BACKWARD, "kernels": kernels})
            for kernel in kernels:
                console.print(f"  {entry.name:<12} {kernel['us']:9.1f} us  {kernel['name']}", highlight=False)
    return found


if __name__ == "__main__":
    main()
