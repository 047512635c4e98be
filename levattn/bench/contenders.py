"""What runs side by side: this project's methods and the dense attention of JAX, tokamax and PyTorch."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from levattn.attention.dense import attend_dense
from levattn.attention.layer import lev_attention
from levattn.attention.registry import METHODS
from levattn.attention.spec import AttentionSpec
from levattn.bench import torch_program
from levattn.bench.cases import Case
from levattn.bench.timing import ArrayFn, JaxProgram, Program

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
PEERS = ("xla", "cudnn", "tokamax", "torch", "torch_flash")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
      name: Of the method, or of the implementation of dense attention.
      build_fn: Makes the program, from (queries, keys, values, cotangent) and whether to compute gradients.
      spec: Of a method; None for dense attention.
      has_logits: Whether all T x S logits stand in memory at once.
      why_not: Why it cannot run here; None if it can.
    """

    name: str
    build_fn: Callable[[Inputs, bool], Program]
    spec: AttentionSpec | None = None
    has_logits: bool = False
    why_not: str | None = None

    def num_pairs(self, case: Case) -> int:
        """What its time grows with: pairs of tokens for dense attention, else tokens."""
        is_quadratic = self.spec is None or self.spec.method == "oracle"
        return case.batch * case.num_heads * case.num_tokens ** (2 if is_quadratic else 1)

    def logits_bytes(self, case: Case) -> int:
        """Bytes of the float32 logits and probabilities, if they stand in memory."""
        return 2 * 4 * case.batch * case.num_heads * case.num_tokens**2 if self.has_logits else 0


def methods(names: str, k: int) -> list[Contender]:
    """This project's methods by name, comma separated.

    Raises:
      ValueError: For a name that is not in the registry.
    """
    found = []
    for name in names.split(",") if names else []:
        if name not in METHODS or name == "dense":
            known = ", ".join(known for known in METHODS if known != "dense")
            raise ValueError(f"method {name!r} must be one of {known}; dense attention is among the peers")
        spec = AttentionSpec(name, k=k)
        attend = functools.partial(lev_attention, spec=spec)
        found.append(Contender(name, _jax_builder(attend), spec, has_logits=name == "oracle"))
    return found


def peers(names: str, dtype: str, head_dim: int) -> list[Contender]:
    """Implementations of dense attention by name, comma separated; those that cannot run here say why.

    xla: `jax.nn.dot_product_attention` by matrix products. cudnn: the same by cuDNN's fused kernel, padded to a
    multiple of 64 with lengths where it needs that, see `levattn.attention.dense`. tokamax: its own choice of kernel.
    torch, torch_flash: PyTorch's own choice of kernel, and FlashAttention.

    Raises:
      ValueError: For an unknown name.
    """
    xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    of_torch = torch_program.why_not()
    known = {
        "xla": Contender("xla", _jax_builder(xla), has_logits=True),
        "cudnn": Contender("cudnn", _jax_builder(attend_dense), why_not=_why_no_cudnn(dtype, head_dim)),
        "tokamax": Contender(
            "tokamax",
            _jax_builder(_attend_tokamax),
            why_not=None if importlib.util.find_spec("tokamax") else "tokamax is not installed",
        ),
        "torch": Contender("torch", functools.partial(torch_program.TorchProgram, None), why_not=of_torch),
        "torch_flash": Contender(
            "torch_flash", functools.partial(torch_program.TorchProgram, "FLASH_ATTENTION"), why_not=of_torch
        ),
    }
    wanted = names.split(",") if names else []
    for name in wanted:
        if name not in known:
            raise ValueError(f"peer {name!r} must be one of {', '.join(known)}")
    return [known[name] for name in wanted]


def _jax_builder(attend_fn: Callable[..., jax.Array]) -> Callable[[Inputs, bool], Program]:
    def build(inputs: Inputs, backward: bool) -> Program:
        if backward:
            return JaxProgram(with_gradients(attend_fn), inputs)
        return JaxProgram(lambda *inputs: (attend_fn(*inputs),), inputs[:3])

    return build


def with_gradients(attend_fn: Callable[..., jax.Array]) -> ArrayFn:
    """(queries, keys, values, cotangent) to the output and its gradients by queries, keys and values."""

    def run(query, key, value, cotangent):
        out, backward_fn = jax.vjp(attend_fn, query, key, value)
        return (out, *backward_fn(cotangent))

    return run


def _why_no_cudnn(dtype: str, head_dim: int) -> str | None:
    if jax.default_backend() != "gpu":
        return "no GPU"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN has no {dtype}"
    return None if head_dim % 8 == 0 else f"cuDNN needs a head width that 8 divides, not {head_dim}"


def _attend_tokamax(query, key, value):
    import tokamax

    return tokamax.dot_product_attention(query, key, value)
