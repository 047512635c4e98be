"""PyTorch's attention on a CUDA device, on the very arrays that JAX drew. PyTorch is imported when asked for."""

import contextlib
import importlib.util
import time
from collections.abc import Sequence

import jax
import numpy as np

from levattn.bench.timing import Budget, Timing, sample


def why_not() -> str | None:
    """Why PyTorch cannot run on a CUDA device here; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


class TorchProgram:
    """`scaled_dot_product_attention`, with or without its gradients.

    Args:
      backend: A name in `torch.nn.attention.SDPBackend`, or None for PyTorch's own choice.
      inputs: Queries, keys, values and the cotangent, `B T H D`. They are shared, not copied.
      backward: Whether to compute the gradients too.
    """

    def __init__(self, backend: str | None, inputs: tuple[jax.Array, ...], backward: bool):
        import torch

        # PyTorch's axes are B H T D; the memory stays as it is.
        views = [torch.from_dlpack(x).transpose(1, 2) for x in jax.block_until_ready(inputs)]
        self._query_key_value = [x.detach().requires_grad_(backward) for x in views[:3]]
        self._cotangent = views[3]
        self._backend, self._backward = backend, backward
        self._on_cuda = views[0].is_cuda
        self.peak_bytes: int | None = None
        start = time.perf_counter()
        if self._on_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._call()
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated() - before
        else:
            self._call()
        self.compile_seconds = time.perf_counter() - start

    def _call(self):
        import torch

        kernel = contextlib.nullcontext()
        if self._backend is not None:
            kernel = torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, self._backend))
        with kernel:
            out = torch.nn.functional.scaled_dot_product_attention(*self._query_key_value)
            if not self._backward:
                return (out,)
            return (out, *torch.autograd.grad(out, self._query_key_value, self._cotangent))

    def heads(self, places: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, ...]]:
        outputs = self._call()
        return [
            tuple(x[batch, head].detach().float().cpu().numpy().astype(np.float64) for x in outputs)
            for batch, head in places
        ]

    def time(self, budget: Budget) -> Timing:
        """Times replays of a CUDA graph of many calls: launching them one by one would take longer than they do."""
        import torch

        aside = torch.cuda.Stream()  # capturing needs a warm-up on a stream of its own
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                aside.synchronize()
                start = time.perf_counter()
                self._call()
                aside.synchronize()
                seconds = time.perf_counter() - start
        torch.cuda.current_stream().wait_stream(aside)
        num_calls, num_repeats = budget.plan(seconds)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(num_calls):
                self._call()

        def run() -> None:
            graph.replay()
            torch.cuda.synchronize()

        timing = sample(run, num_calls, num_repeats)
        del graph
        torch.cuda.empty_cache()  # for JAX, in the same process
        return timing
