"""The shapes that benchmarks and their tests share, and the inputs drawn for them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Case:
    """Self-attention of `batch` sequences of `num_tokens` tokens in `num_heads` heads."""

    batch: int
    num_tokens: int
    num_heads: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.num_tokens}x{self.num_heads}"


CASES: dict[str, tuple[Case, ...]] = {
    # ViT-S/16, L/16 and L/8 at 224 pixels, the models of the paper.
    "paper": (Case(512, 197, 6), Case(64, 197, 16), Case(32, 785, 16)),
    # As many tokens in all, in fewer and longer sequences, then more of them.
    "long": (
        Case(8, 4096, 16),
        Case(2, 16384, 16),
        Case(1, 65536, 16),
        Case(1, 262_144, 16),
        Case(1, 1_048_576, 16),
    ),
    # For two CPU cores.
    "cpu": (Case(4, 197, 6), Case(1, 4096, 6), Case(1, 16384, 2)),
    # Does it run.
    "smoke": (Case(2, 80, 2), Case(1, 197, 3)),
}


def parse_cases(text: str) -> list[Case]:
    """Cases from names in `CASES` and shapes written as batch x tokens x heads: "paper,1x4096x8".

    Raises:
      ValueError: For a part that is neither.
    """
    found: list[Case] = []
    for part in text.split(","):
        if part in CASES:
            found += CASES[part]
            continue
        sizes = part.split("x")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            raise ValueError(f"case {part!r} must be one of {', '.join(CASES)} or batch x tokens x heads, as 8x4096x16")
        found.append(Case(*map(int, sizes)))
    return found


def draw_inputs(
    case: Case, head_dim: int = 64, dtype: jnp.dtype | str = "float32", seed: int = 0
) -> tuple[Float[Array, "B S H D"], ...]:
    """Standard normal queries, keys, values and a cotangent of the output, on the default device."""
    shape = (case.batch, case.num_tokens, case.num_heads, head_dim)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return tuple(draw(key, shape, jnp.dtype(dtype)) for key in jax.random.split(jax.random.key(seed), 4))
