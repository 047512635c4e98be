"""Times whole ViTs, forward and the step of training, under dense and other attention; the weights are random.

    python scripts/bench_model.py --cases paper --attention dense,leverage --timm --out results/model/paper.json
    python scripts/bench_model.py --cases S/14:32:518 --passes forward --attention dense,matched,leverage --k 32,64

A case is variant:batch[:pixels]. Dense attention is the fastest that JAX has on the device: cuDNN's fused kernel on
GPUs in bfloat16, else XLA's. "/ dense" is the ratio of the times to it. `--timm` adds timm's model, compiled by
PyTorch.
"""

import argparse
import dataclasses
import os
from pathlib import Path

# PyTorch and JAX share one device here: neither takes its memory ahead of need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from rich.table import Table

from levattn.analysis.tables import new_console
from levattn.bench import models
from levattn.models import ModelConfig
from levattn.training.attentions import describe, expand, with_attention
from levattn.training.cli import read_literal
from levattn.training.workdir import prepare_workdir, provenance, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="Ti/16:4", help=f"{', '.join(models.CASES)} or variant:batch[:pixels]")
    parser.add_argument("--passes", default="forward,train")
    parser.add_argument("--attention", default="dense,leverage")
    parser.add_argument("--k", default="32")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of AttentionSpec")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scan", action="store_true", help="scanned layers: compile faster, run slower")
    parser.add_argument("--timm", action="store_true", help="also time timm's model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file, after every row")
    args = parser.parse_args()
    passes = args.passes.split(",")
    try:
        cases = models.parse_cases(args.cases)
        if unknown := set(passes) - {"forward", "train"}:
            raise ValueError(f"passes={sorted(unknown)} must be forward or train")
        options = {name: read_literal(value) for name, _, value in (option.partition("=") for option in args.option)}
        base = dataclasses.replace(ModelConfig().attention, **options)
        specs = list(expand(base, args.attention.split(","), [int(k) for k in args.k.split(",")]))
        if args.out:
            prepare_workdir(args.out.parent, "out")
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))

    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    record = {"provenance": provenance(), **vars(args), "out": None, "rows": []}
    for case in cases:
        rows = []
        for name in passes:
            for row in time_case(case, name, specs, args):
                rows.append(row)
                record["rows"].append(row)
                if args.out:
                    write_json(args.out, record)
        new_console().print(_table(case, rows))


def time_case(case: models.Case, name: str, specs, args: argparse.Namespace):
    """Yields a row for each attention, and for timm."""
    fixed = {**dataclasses.asdict(case), "pass": name}
    model = ModelConfig(case.variant, pool="cls", posemb="sincos2d", dtype=args.dtype, scan=args.scan)
    time_fn = models.time_forward if name == "forward" else models.time_train_step
    dense_ms = None
    for spec in specs:
        result = time_fn(with_attention(model, spec), case, repeats=args.repeats)
        dense_ms = result.ms if spec.method == "dense" else dense_ms
        yield fixed | _columns(describe(spec), result, case, dense_ms)
    if args.timm:
        reason = models.why_no_timm(case)
        try:
            result = None if reason else models.time_timm(case, train=name == "train", repeats=args.repeats)
        except Exception as error:  # a peer that does not run here must not end the others
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        yield fixed | ({"attention": "timm", "why_not": reason} if reason else _columns("timm", result, case, dense_ms))


def _columns(attention: str, result: models.Result, case: models.Case, dense_ms: float | None) -> dict:
    row = {"attention": attention, "images_per_second": 1000 * case.batch_size / result.ms}
    if dense_ms is not None:
        row["dense_ratio"] = result.ms / dense_ms
    return row | dataclasses.asdict(result)


def _table(case: models.Case, rows: list[dict]) -> Table:
    title = f"{case.variant}, batch {case.batch_size}, {case.image_size} pixels"
    table = Table(title=title, title_justify="left")
    for heading in ("pass", "attention"):
        table.add_column(heading)
    for heading in ("ms", "/ dense", "images/s", "peak MiB", "compile s"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "why_not" in row:
            table.add_row(row["pass"], row["attention"], row["why_not"])
            continue
        peak = row["peak_bytes"]
        table.add_row(
            row["pass"],
            row["attention"],
            f"{row['ms']:,.1f}",
            f"{row['dense_ratio']:.2f}" if "dense_ratio" in row else "",
            f"{row['images_per_second']:,.0f}",
            "" if peak is None else f"{peak / 2**20:,.0f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
