"""Whole ViTs: the forward pass and the step of training, this project's and timm's."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from levattn.bench.timing import sample
from levattn.data import DataConfig
from levattn.models import ModelConfig, ViT
from levattn.training.config import MeshConfig, OptimizerConfig, TrainConfig
from levattn.training.optim import make_optimizer
from levattn.training.sharding import make_mesh, put_batch
from levattn.training.state import init_state, plan_state
from levattn.training.step import make_train_step

# timm's name for a variant, at whatever image size.
_TIMM = {"Ti": "vit_tiny", "S": "vit_small", "B": "vit_base", "L": "vit_large"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant such as "S/16", images in a batch, and their side in pixels."""

    variant: str
    batch_size: int
    image_size: int = 224


# The models of the paper, at the batch sizes that fill one GPU.
CASES = {"paper": (Case("S/16", 512), Case("L/16", 64), Case("L/8", 16))}


def parse_cases(text: str) -> list[Case]:
    """Cases from names in `CASES` and from variant:batch or variant:batch:pixels, comma separated.

    Raises:
      ValueError: For a part that is neither.
    """
    found: list[Case] = []
    for part in text.split(","):
        variant, *sizes = part.split(":")
        if part in CASES:
            found += CASES[part]
        elif 1 <= len(sizes) <= 2 and all(size.isdigit() and int(size) for size in sizes):
            found.append(Case(variant, *map(int, sizes)))
        else:
            raise ValueError(f"case {part!r} must be one of {', '.join(CASES)} or variant:batch[:pixels], as S/16:512")
    return found


@dataclasses.dataclass(frozen=True)
class Result:
    """Milliseconds a batch (median, fastest, slowest), bytes of the device in use at most, seconds to compile."""

    ms: float
    fastest_ms: float
    slowest_ms: float
    peak_bytes: int | None
    compile_seconds: float


def time_forward(model: ModelConfig, case: Case, *, repeats: int = 7, calls: int = 5) -> Result:
    """The forward pass on random images, with random weights."""
    images = _images(case).astype(jnp.float32)
    params = jax.jit(ViT(model).init)(jax.random.key(1), images[:1])["params"]
    forward, compiling = _compile(lambda params, images: ViT(model).apply({"params": params}, images), params, images)

    def run():
        for _ in range(calls):
            out = forward(params, images)
        jax.block_until_ready(out)

    return _result(run, repeats, calls, lambda: _peak(forward), compiling)


def time_train_step(model: ModelConfig, case: Case, *, repeats: int = 7, calls: int = 5) -> Result:
    """The step of `train.py` with AdamW on random images, on all devices."""
    data = DataConfig(source=f"fake:num_classes={model.num_classes},size={case.image_size}")
    optimizer = OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05)
    config = TrainConfig(model=model, data=data, optimizer=optimizer, batch_size=case.batch_size, total_steps=1000)
    vit, mesh = ViT(model), make_mesh(MeshConfig())
    tx, schedule_fn = make_optimizer(optimizer, 1000)
    init_fn = partial(init_state, model=vit, image_shape=(case.image_size, case.image_size, 3), tx=tx, ema=False)
    plan = plan_state(init_fn, mesh)
    state = jax.jit(init_fn, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, plan))(jax.random.key(0))
    labels = np.arange(case.batch_size) % model.num_classes
    batch = put_batch({"image": np.asarray(_images(case)), "label": labels}, mesh)
    step_fn = make_train_step(config, vit, tx, schedule_fn, plan)
    start = time.perf_counter()
    state, metrics = step_fn(state, batch)
    jax.block_until_ready(metrics)
    compiling = time.perf_counter() - start
    kept = [state]

    def run():
        for _ in range(calls):
            kept[0], metrics = step_fn(kept[0], batch)
        jax.block_until_ready(metrics)

    def peak():
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    return _result(run, repeats, calls, peak, compiling)


def why_no_timm(case: Case) -> str | None:
    """Why timm's model of this variant cannot run here; None if it can."""
    for package in ("torch", "timm"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None if case.variant.split("/")[0] in _TIMM else f"timm has no {case.variant}"


def time_timm(case: Case, *, train: bool, num_classes: int = 1000, repeats: int = 7, calls: int = 5) -> Result:
    """timm's model of the same variant in bfloat16: compiled where there is a GPU, with PyTorch's fused attention."""
    import timm
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, patch = case.variant.split("/")
    model = timm.create_model(
        f"{_TIMM[size]}_patch16_224", img_size=case.image_size, patch_size=int(patch), num_classes=num_classes
    )
    model = model.to(device).train(train)
    run_model = torch.compile(model) if device == "cuda" else model
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
    labels = torch.arange(case.batch_size, device=device) % num_classes
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=device == "cuda")

    def call():
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(train):
            out = run_model(images)
            if not train:
                return
            loss = torch.nn.functional.cross_entropy(out, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run():
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    compiling = time.perf_counter() - start
    return _result(
        run, repeats, calls, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None, compiling
    )


def _images(case: Case) -> jax.Array:
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    return jax.random.randint(jax.random.key(0), shape, 0, 256, jnp.uint8)


def _compile(fn: Callable, *args: Any) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled, time.perf_counter() - start


def _peak(compiled: jax.stages.Compiled) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes


def _result(run: Callable[[], None], repeats: int, calls: int, peak_fn: Callable[[], int | None], compiling: float):
    """Times `run`, and looks at the memory after it."""
    timing = sample(run, calls, repeats)
    return Result(timing.ms, timing.fastest_ms, timing.slowest_ms, peak_fn(), compiling)
