"""The named sizes of Vision Transformers: "S/16" is size S with patches of 16 by 16 pixels."""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of a Vision Transformer.

    Attributes:
      width: Features of a token, C.
      depth: Number of encoder blocks.
      mlp_dim: Hidden features of a block's MLP.
      num_heads: Attention heads; each is `width / num_heads` wide.
      patch: Side of the square patches in pixels.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int


# Width, depth, mlp_dim, num_heads. Zhai et al., "Scaling Vision Transformers" (arXiv 2106.04560), table 2;
# So400m from Alabdulmohsin et al., "Getting ViT in Shape" (arXiv 2305.13035).
SIZES = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
}


def decode(variant: str) -> Variant:
    """Sizes of the variant of this name.

    Args:
      variant: A name of `SIZES`, a slash and the side of a patch in pixels: "S/16", "L/8", "S/2".

    Returns:
      Its sizes.

    Raises:
      ValueError: For an unknown size (with the nearest known one) or a missing or non-positive patch.
    """
    size, _, patch = variant.partition("/")
    if size not in SIZES:
        by_lower = {name.lower(): name for name in SIZES}
        nearest = difflib.get_close_matches(size.lower(), by_lower, n=1, cutoff=0.5)
        hint = f"did you mean {by_lower[nearest[0]]!r}? " if nearest else ""
        raise ValueError(f"{variant=} is of unknown size {size!r}: {hint}Known sizes: {', '.join(SIZES)}")
    if not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"{variant=} needs a patch size in pixels after a slash, such as '{size}/16'")
    return Variant(*SIZES[size], patch=int(patch))
