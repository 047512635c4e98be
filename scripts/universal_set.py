"""Writes the universal set of a file of keys that may be larger than memory.

    python scripts/universal_set.py keys.npy --eps 0.01 --out set.npz
    python scripts/universal_set.py keys.array_record --width 64 --eps 0.05 --p 4 --passes 2 --out set.npz

A key is in the set if it can receive eps of the attention of some query, f(x) = |x|^p. `levattn.universal.load_set`
reads the result back: indices, scores, keys, what is guaranteed, and how it was made.

Exit codes: 0 when the set is written; 2 for bad input, in one line; 130 for Ctrl-C. But for 0, no file is written.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import rich.console
import rich.progress

from levattn.training.workdir import atomic_path, prepare_workdir, provenance
from levattn.universal.files import open_keys, save_set
from levattn.universal.passes import CHUNK_ROWS, file_universal_set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "keys", type=Path, help=".npy matrix of rows, or .array_record with the bytes of a row a record"
    )
    parser.add_argument("--eps", type=float, required=True, help="share of a query's attention, in (0, 1]")
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--p", type=float, default=2.0, help="power of f, from 0.1 to 100; 2 is fastest")
    parser.add_argument("--passes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--chunk", type=int, default=CHUNK_ROWS, help="keys that are worked on at a time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads, each with a part of the file")
    parser.add_argument("--width", type=int, default=None, help="refuse keys of another width")
    parser.add_argument(
        "--record_dtype", default=None, help="of the numbers in an .array_record file, unless --width tells it"
    )
    parser.add_argument("--precision", default="single", choices=("single", "double"), help="for p = 2; see guarantee")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", args.precision == "double")
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr, flush=True)
        os._exit(130)  # past the threads: one may be compiling, or at the end of a large chunk
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"error: out of memory ({error}): lower --chunk or --workers, or raise --eps", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    for name in ("chunk", "workers"):
        if (number := getattr(args, name)) < 1:
            raise ValueError(f"--{name} {number} must be at least 1")
    file = open_keys(args.keys, head_dim=args.width, record_dtype=args.record_dtype)
    if args.out.is_dir() or args.out.suffix != ".npz":
        raise ValueError(f"--out {str(args.out)!r} must be the name of an .npz file")
    prepare_workdir(args.out.parent, flag="out")  # before the work, not after it
    start = time.perf_counter()
    with Progress(file.num_keys, args.passes) as advance:
        universal = file_universal_set(
            file,
            args.eps,
            p=args.p,
            num_passes=args.passes,
            chunk_rows=args.chunk,
            num_workers=args.workers,
            dtype="float64" if args.precision == "double" else "float32",
            on_chunk=advance,
        )
    seconds = time.perf_counter() - start
    with atomic_path(args.out) as temporary:
        save_set(temporary, universal, provenance())
    print(
        f"{len(universal):,} of {file.num_keys:,} keys of width {file.head_dim} (at most {universal.size_bound:,.0f} "
        f"can pass eps={args.eps:g}) in {seconds:.1f} s, {args.passes * file.num_keys / seconds:,.0f} keys/s\n"
        f"{universal.guarantee}\nwritten to {args.out}"
    )


class Progress:
    """A bar on a terminal, elsewhere a line for every tenth of the way."""

    def __init__(self, num_keys: int, num_passes: int):
        self._num_keys, self._num_passes, self._tenths, self._start = num_keys, num_passes, 0, time.perf_counter()
        console = rich.console.Console(stderr=True)
        self._bar = rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            rich.progress.TextColumn("{task.fields[rate]:,.0f} keys/s"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("keys", total=num_keys * num_passes, rate=0.0)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def __call__(self, number: int, num_read: int) -> None:
        done = (number - 1) * self._num_keys + num_read
        rate = done / (time.perf_counter() - self._start)
        self._bar.update(self._task, completed=done, rate=rate)
        tenths = 10 * done // (self._num_keys * self._num_passes)
        if self._bar.disable and tenths > self._tenths:
            print(f"pass {number}: {num_read:,} keys, {rate:,.0f} keys/s", file=sys.stderr)
            self._tenths = tenths


if __name__ == "__main__":
    main()
