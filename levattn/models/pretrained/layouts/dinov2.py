"""DINOv2, with registers and without: as its authors publish it (`.pth`), and in the transformers library."""

import dataclasses

import numpy as np

from levattn.models.config import ModelConfig
from levattn.models.pretrained.encoder import Names, dense, read_encoder
from levattn.models.pretrained.hub_config import IMAGENET, read_preprocess, untold_fields, vision_config
from levattn.models.pretrained.layout import Content, Layout, Preprocess
from levattn.models.pretrained.tensors import Tensors

_AUTHORS = Names(
    patches="patch_embed.proj",
    class_token="cls_token",
    more_tokens=("register_tokens",),
    positions="pos_embed",
    layer="blocks.",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv.",),
    out="attn.proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("ls1.gamma", "ls2.gamma"),
    last_norm="norm",
)
_TRANSFORMERS = Names(
    patches="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    more_tokens=("embeddings.register_tokens",),
    positions="embeddings.position_embeddings",
    layer="encoder.layer.",
    norms=("norm1", "norm2"),
    qkv=tuple(f"attention.attention.{name}." for name in ("query", "key", "value")),
    out="attention.output.dense",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    last_norm="layernorm",
)
# Since its version 5 the library's modules have other names than the files it saves: those of exports to ONNX.
_MODULES = dataclasses.replace(
    _TRANSFORMERS, qkv=tuple(f"attention.{name}_proj." for name in "qkv"), out="attention.o_proj"
)
_GATED_MLPS = (("mlp.w12", "mlp.w3"), ("mlp.weights_in", "mlp.weights_out"))  # of the giant


def _find(content: Content) -> tuple[str, Names] | None:
    """What precedes all names of the encoder, and what these are."""
    if {"mask_token", "blocks.0.ls1.gamma", "blocks.0.attn.qkv.weight"} <= content.arrays.keys():
        return "", _AUTHORS  # timm's copies have no mask token
    mark = f"{_TRANSFORMERS.layer}0.{_TRANSFORMERS.scales[0]}"
    for name in content.arrays:
        if name.endswith(mark):
            at = name.removesuffix(mark)
            published = f"{at}{_TRANSFORMERS.layer}0.{_TRANSFORMERS.qkv[0]}weight" in content.arrays
            return at, _TRANSFORMERS if published else _MODULES
    return None


def _has_registers(content: Content) -> bool:
    return any(name.endswith("register_tokens") for name in content.arrays)


def convert(tensors: Tensors, content: Content) -> tuple[ModelConfig, dict[str, np.ndarray], Preprocess, str | None]:
    """See `Layout`. A classifier reads the class token beside the mean of the patches. Where the encoder is the
    "backbone" of a larger model, what was built on it is left out."""
    config = vision_config(content)
    at, names = _find(content)
    tensors.ignore("*mask_token")
    if at == "backbone.":
        tensors.ignore(*(name for name in content.arrays if not name.startswith(at)))
    gated = [mlp for mlp in _GATED_MLPS if f"{at}{names.layer}0.{mlp[0]}.weight" in tensors]
    if gated:
        names = dataclasses.replace(names, mlp=gated[0])
    told = {"num_heads": "num_attention_heads", "image_size": "image_size", "qkv_bias": "qkv_bias"}
    told = {ours: config.get(theirs) for ours, theirs in told.items()}
    encoder = read_encoder(tensors, names, at=at, swiglu=bool(gated), **told)

    fields = encoder.fields | untold_fields(content, activation="gelu", eps=1e-6) | {"pool": "cls", "num_classes": 0}
    params, head = dict(encoder.params), None
    if gated:
        fields["activation"] = "swiglu"
    for registers in encoder.tokens.values():
        fields["num_registers"], params["registers"] = registers.shape[1], registers
    if "classifier.weight" in tensors and at != "backbone.":
        head, classes = "classifier", tensors.shape("classifier.weight")[0]
        fields |= {"pool": "cls_gap", "num_classes": classes}
        params |= dense(tensors, "classifier", "head", 2 * encoder.width, classes)

    model = ModelConfig(**fields)
    patch = model.dims.patch
    default = Preprocess(224 // patch * patch, 256, "bicubic", **IMAGENET)  # positions are those of larger images
    if not isinstance(encoder.image_size, int):
        default = dataclasses.replace(default, image_size=encoder.image_size, resize=min(encoder.image_size))
    return model, params, read_preprocess(content, default, patch), head


# Those with registers were trained with another way of resizing position embeddings.
LAYOUTS = (
    Layout("DINOv2 with registers", lambda c: _find(c) is not None and _has_registers(c), convert, "bicubic_antialias"),
    Layout("DINOv2", lambda c: _find(c) is not None, convert),
)
