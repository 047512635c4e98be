"""What a Vision Transformer may be asked for: one frozen, hashable record, and how its rules resolve."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

import jax

from levattn.attention import AttentionSpec, get_method
from levattn.attention.budgets import heads_by_budget
from levattn.models.variants import Variant, decode

POOLS = ("cls", "gap", "map", "cls_gap")
POSEMBS = ("learned", "sincos2d")
ACTIVATIONS = ("gelu", "gelu_exact", "quick_gelu", "swiglu")
FINAL_NORMS = ("tokens", "pooled")
DTYPES = ("float32", "bfloat16")

# What the backward pass may keep of a block. "dots" keeps the outputs of the dense layers, so that only attention
# and elementwise work is done twice.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}


MAX_WIDTH = 2**20  # Of any layer but the head, and tokens before the patches.
MAX_DEPTH = 1000  # Published encoders have 64 layers at most: more is a slip, or a file that was made up.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Vision Transformer and the attention of each of its layers.

    Args:
      variant: Sizes by name, see `levattn.models.variants.decode`.
      num_classes: Width of the head; 0 leaves the head out, the model then returns what it would have read.
      width: In place of the variant's; likewise `depth`, `mlp_dim` and `num_heads`.
      pool: "cls" prepends a class token and reads it, "gap" averages the patches, "map" attends to them from a learned
        probe (always densely), "cls_gap" joins the class token and the average (linear heads of DINOv2).
      posemb: "learned" position embeddings, or "sincos2d": fixed sines and cosines of both coordinates.
      rep_size: Width of a tanh layer before the head; True: the model's width, False: none.
      head_zero_init: Start the head at zero: all logits are 0 at first.
      dropout: Rate after the embedding, in the MLPs and on each residual branch.
      stochastic_depth: Rate at which the last block's branches are skipped, per image; grows linearly from 0 at the
        first block.
      remat: What the backward pass recomputes: "none", "full", "dots" or a name in `REMAT_POLICIES`.
      scan: One traced block scanned over stacked parameters: compiles faster, every layer has the same attention.
      dtype: Of the computation, "float32" or "bfloat16". Parameters, LayerNorms, softmax and logits stay float32.
      attention: Of every layer that no rule below names.
      attention_by_layer: Pairs of a rule and a spec; the last rule that names a layer wins. A rule is a comma-separated
        list of layers "3", layers from the end "-1", inclusive ranges "0-2" or "-3--1", "even" and "odd".
      activation: Of the MLPs: "gelu" (by its tanh approximation), "gelu_exact", "quick_gelu", x sigmoid(1.702 x), or
        "swiglu": silu of one half of the hidden features times the other, which makes the first layer twice as wide.
      layer_norm_eps: Added to the variance in every LayerNorm.
      qkv_bias: False leaves the biases out of the attention projections, the output's included (Flax has one switch).
      pre_norm: LayerNorm before the first block, as in CLIP.
      layer_scale: Initial value of a learned scale on each residual branch; None: no such scale.
      class_token: Prepend one even where `pool` does not read it; None: only where it does.
      num_registers: Learned tokens after the class token that stand for no patch and are never pooled (Darcet et al.,
        arXiv 2309.16588).
      distilled: One more such token, right after the class token, with a head of its own; the logits are the mean of
        the two heads' (DeiT: Touvron et al., arXiv 2012.12877).
      final_norm: The last LayerNorm acts on all "tokens", or on what was "pooled" from them.
      head_bias: False leaves the bias out of the head, as in CLIP's projection.

    Raises:
      ValueError: Naming the field that is out of its range.
    """

    variant: str = "S/16"
    num_classes: int = 1000
    width: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    pool: str = "gap"
    posemb: str = "learned"
    rep_size: bool | int = False
    head_zero_init: bool = True
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    remat: str = "none"
    scan: bool = False
    dtype: str = "float32"
    attention: AttentionSpec = dataclasses.field(default_factory=AttentionSpec)
    attention_by_layer: tuple[tuple[str, AttentionSpec], ...] = ()
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    pre_norm: bool = False
    layer_scale: float | None = None
    class_token: bool | None = None
    num_registers: int = 0
    distilled: bool = False
    final_norm: str = "tokens"
    head_bias: bool = True

    def __post_init__(self):
        rules = tuple((rule, spec) for rule, spec in self.attention_by_layer)  # hashable, also after a JSON round trip
        object.__setattr__(self, "attention_by_layer", rules)
        _check_choice("pool", self.pool, POOLS)
        _check_choice("posemb", self.posemb, POSEMBS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("final_norm", self.final_norm, FINAL_NORMS)
        dims = self.dims
        for field in ("width", "depth", "mlp_dim", "num_heads"):
            if getattr(dims, field) < 1:
                raise ValueError(f"{field}={getattr(dims, field)} must be at least 1")
        for field in ("width", "mlp_dim"):
            if getattr(dims, field) > MAX_WIDTH:
                raise ValueError(f"{field}={getattr(dims, field)} must be at most {MAX_WIDTH}")
        if dims.depth > MAX_DEPTH:
            raise ValueError(f"depth={dims.depth} must be at most {MAX_DEPTH}: there is an attention for each layer")
        if dims.width % dims.num_heads:
            raise ValueError(f"width={dims.width} must be a multiple of num_heads={dims.num_heads}")
        if self.posemb == "sincos2d" and (dims.width % 4 or dims.width < 8):
            raise ValueError(f"width={dims.width} must be a multiple of 4, at least 8, for posemb='sincos2d'")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative")
        for field in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be in [0, 1)")
        for field in ("num_registers", "rep_size"):
            if not 0 <= getattr(self, field) <= MAX_WIDTH:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative, and at most {MAX_WIDTH}")
        if self.layer_norm_eps <= 0:
            raise ValueError(
                f"layer_norm_eps={self.layer_norm_eps} must be positive: a token of one value has variance 0"
            )
        if self.layer_scale is not None and self.layer_scale < 0:
            raise ValueError(f"layer_scale={self.layer_scale} must not be negative, or be None")
        if self.class_token is False and self.pool.startswith("cls"):
            raise ValueError(f"class_token=False must be None or True for pool={self.pool!r}, which reads it")
        if self.distilled and (self.pool != "cls" or self.rep_size or self.final_norm != "tokens"):
            raise ValueError(
                "distilled=True needs pool='cls', rep_size=False and final_norm='tokens': each head reads its own token"
            )
        specs = set(attention_specs(self))
        for spec in specs:
            get_method(spec.method)  # refuses an unknown name
            heads_by_budget(spec, dims.num_heads)  # and budgets of another number of heads
        if self.scan and len(specs) > 1:
            raise ValueError("scan=True needs the same attention in all layers: set scan=False for attention_by_layer")

    @property
    def dims(self) -> Variant:
        """The variant's sizes with the overrides in place."""
        fields = ("width", "depth", "mlp_dim", "num_heads")
        overrides = {field: value for field in fields if (value := getattr(self, field)) is not None}
        return dataclasses.replace(decode(self.variant), **overrides)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: the class token, that of distillation and the registers."""
        return self.has_class_token + self.distilled + self.num_registers

    @property
    def has_class_token(self) -> bool:
        """Whether the first token stands for the whole image."""
        return self.pool.startswith("cls") if self.class_token is None else self.class_token


def attention_specs(config: ModelConfig) -> tuple[AttentionSpec, ...]:
    """The attention of each layer, first to last.

    Raises:
      ValueError: For a rule that cannot be read or that names a layer the model does not have.
    """
    depth = config.dims.depth
    specs = [config.attention] * depth
    for rule, spec in config.attention_by_layer:
        for layer in _layers(rule, depth):
            specs[layer] = spec
    return tuple(specs)


def patch_grid(config: ModelConfig, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Patches down and across an image.

    Args:
      config: Of the model.
      image_shape: Height, width and channels of an image.

    Raises:
      ValueError: If the patch does not divide both sides.
    """
    height, width = image_shape[:2]
    patch = config.dims.patch
    if height % patch or width % patch or not height or not width:
        raise ValueError(
            f"image size {height}x{width} must be a multiple of the patch size {patch} of variant={config.variant!r}: "
            f"resize the images or choose another patch"
        )
    return height // patch, width // patch


def _layers(rule: str, depth: int) -> list[int]:
    layers = []
    for item in rule.split(","):
        item = item.strip()
        if item in ("even", "odd"):
            layers += range(item == "odd", depth, 2)
            continue
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", item)
        if not match:
            raise ValueError(
                f"attention_by_layer rule {rule!r}: {item!r} must look like '3', '-1', '0-2', 'even' or 'odd'"
            )
        ends = [int(end) for end in match.groups() if end is not None]
        if not all(-depth <= end < depth for end in ends):
            raise ValueError(f"attention_by_layer rule {rule!r}: {item!r} names a layer outside 0 to {depth - 1}")
        first, last = ends[0] % depth, ends[-1] % depth
        if first > last:
            raise ValueError(f"attention_by_layer rule {rule!r}: the range {item!r} runs backwards")
        layers += range(first, last + 1)
    return layers


def _check_choice(field: str, value: Any, allowed: Iterable[str]):
    allowed = list(allowed)
    if value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"{field}={value!r} must be one of {', '.join(map(repr, allowed))}{hint}")
