"""Times a whole ViT under dense and other attention, in milliseconds an image. The weights are random.

    python scripts/bench_retrofit.py --variant S/14 --image_size 518 --batch_size 32 --attention dense,matched --k 32
    python scripts/bench_retrofit.py --variant B/16 --image_size 224 --dtype float32 --out bench.json

Dense attention is the fastest there is on the device: cuDNN's fused kernel on GPUs in bfloat16, else XLA's.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from levattn.models import ModelConfig, ViT, patch_grid
from levattn.training.attentions import describe, expand, with_attention
from levattn.training.cli import read_literal
from levattn.training.workdir import provenance, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="S/14")
    parser.add_argument("--image_size", type=int, default=518, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="dense,leverage,groups,matched")
    parser.add_argument("--k", default="32")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of AttentionSpec")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()

    model = ModelConfig(args.variant, num_classes=0, pool="cls", dtype=args.dtype, scan=True)
    images = jax.random.normal(jax.random.key(0), (args.batch_size, args.image_size, args.image_size, 3))
    rows, columns = patch_grid(model, images.shape[1:])
    params = jax.jit(ViT(model).init)(jax.random.key(1), images[:1])["params"]
    print(f"{args.variant}, {rows * columns + 1} tokens, batch {args.batch_size}, {args.dtype}")
    options = {name: read_literal(value) for name, _, value in (option.partition("=") for option in args.option)}
    base = dataclasses.replace(model.attention, **options)
    results = []
    for spec in expand(base, args.attention.split(","), [int(k) for k in args.k.split(",")]):
        timed = time_forward(ViT(with_attention(model, spec)), params, images, args.repeats)
        results.append({"attention": describe(spec), **timed})
        print(f"{describe(spec):<24} {timed['ms_per_image']:8.3f} ms an image", flush=True)
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        write_json(args.out, {"provenance": provenance(), **settings, "results": results})


def time_forward(vit: ViT, params: Any, images: jax.Array, repeats: int) -> dict[str, float]:
    """Median over the repeats of the forward pass, each of several calls in a row, waited for once."""
    forward = jax.jit(lambda params, images: jnp.sum(vit.apply({"params": params}, images)))
    forward(params, images).block_until_ready()
    calls, samples = 5, []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = forward(params, images)
        out.block_until_ready()
        samples.append(1000 * (time.perf_counter() - start) / calls / len(images))
    return {"ms_per_image": statistics.median(samples), "fastest": min(samples), "slowest": max(samples)}


if __name__ == "__main__":
    main()
