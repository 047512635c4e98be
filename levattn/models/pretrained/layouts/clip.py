"""The image towers of CLIP (transformers, open_clip, OpenAI's own files) and of SigLIP (transformers)."""

import re
from typing import Any

import numpy as np

from levattn.models.config import ModelConfig
from levattn.models.pretrained.encoder import Names, attention, dense, layer_norm, mlp, read_encoder
from levattn.models.pretrained.hub_config import (
    CLIP,
    guesses,
    is_published,
    read_preprocess,
    refuse_others,
    untold_fields,
    vision_config,
)
from levattn.models.pretrained.layout import Content, ImageSize, Layout, Preprocess, sides_of
from levattn.models.pretrained.tensors import Tensors

Converted = tuple[ModelConfig, dict[str, np.ndarray], Preprocess, str | None]

_BLOCK_IN_TRANSFORMERS = {
    "patches": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "layer": "encoder.layers.",
    "norms": ("layer_norm1", "layer_norm2"),
    "qkv": tuple(f"self_attn.{name}_proj." for name in "qkv"),
    "out": "self_attn.out_proj",
    "mlp": ("mlp.fc1", "mlp.fc2"),
    "last_norm": "post_layernorm",
}
_SIGLIP = Names(class_token=None, **_BLOCK_IN_TRANSFORMERS)
_TRANSFORMERS = Names(
    class_token="embeddings.class_embedding",
    pre_norm="pre_layrnorm",  # so spelt
    **_BLOCK_IN_TRANSFORMERS,
)
_OPEN_CLIP = Names(
    patches="conv1",
    class_token="class_embedding",
    positions="positional_embedding",
    pre_norm="ln_pre",
    layer="transformer.resblocks.",
    norms=("ln_1", "ln_2"),
    qkv=("attn.in_proj_",),
    out="attn.out_proj",
    mlp=("mlp.c_fc", "mlp.c_proj"),
    scales=("ls_1.gamma", "ls_2.gamma"),
    last_norm="ln_post",
)
_OF_OTHER_TOWERS = ("text_model.*", "text_projection.*", "logit_scale", "logit_bias", "*.position_ids")
# The tags of open_clip whose weights were trained with quick GELU: OpenAI's and what continues them.
_QUICK_GELU = re.compile(
    r"quickgelu|openai|metaclip_(400m|fullcc|2pt5b)|dfn[25]b(?!.*39b)|b[-_]32.*laion400m", re.IGNORECASE
)


_OPEN_CLIP_TAG = re.compile(r"laion|datacomp|commonpool|metaclip|dfn|webli|yfcc|cc12m|mobileclip", re.IGNORECASE)


def _told(content: Content) -> dict[str, Any]:
    config = vision_config(content)
    return {
        "num_heads": config.get("num_attention_heads"),
        "image_size": config.get("image_size"),
        "possible_sizes": () if is_published(content) else (content.options.rectangle,),
    }


def _prefix(content: Content, mark: str) -> str | None:
    """What precedes `mark` in the file: a tower stands alone or in a model of two."""
    return next((at for at in ("vision_model.", "visual.", "") if at + mark in content.arrays), None)


def is_clip(content: Content) -> bool:
    """See `Layout`."""
    return _prefix(content, "pre_layrnorm.weight") is not None


def convert_clip(tensors: Tensors, content: Content) -> Converted:
    """See `Layout`. The head is the projection into the space that images and texts share, where the file has it."""
    at = _prefix(content, "pre_layrnorm.weight")
    tensors.ignore(*_OF_OTHER_TOWERS)
    if "classifier.weight" in tensors:
        raise ValueError(
            f"{str(content.path)!r} is a CLIPForImageClassification, which averages patches that went through no last "
            "LayerNorm, as no model of this project does: for the features of its encoder take the tensors of its "
            "vision_model alone"
        )
    encoder = read_encoder(tensors, _TRANSFORMERS, at=at, **_told(content))
    tensors.guess(*guesses(content, is_size_told=encoder.is_told, preprocessing=False))
    fields = encoder.fields | untold_fields(content, activation="quick_gelu", eps=1e-5)
    params, classes = dict(encoder.params), 0
    if "visual_projection.weight" in tensors:
        classes = tensors.shape("visual_projection.weight")[0]
        params["head/kernel"] = tensors.take("visual_projection.weight", (classes, encoder.width)).T
    return _clip(content, fields, params, classes, encoder.image_size)


def is_open_clip(content: Content) -> bool:
    """See `Layout`."""
    return _prefix(content, "transformer.resblocks.0.attn.in_proj_weight") == "visual."


def convert_open_clip(tensors: Tensors, content: Content) -> Converted:
    """See `Layout`. What the activation is no tensor tells: keep `open_clip_config.json` beside the file, or the name
    that it was published by."""
    config = content.metadata.get("open_clip", {}).get("model_cfg", {})
    tower = config.get("vision_cfg", {})
    tensors.ignore(*(name for name in content.arrays if not name.startswith("visual.")))
    num_heads = tower["width"] // tower.get("head_width", 64) if "width" in tower else None
    is_tagged = _OPEN_CLIP_TAG.search(content.hint)
    sizes = {
        "image_size": tower.get("image_size"),
        "possible_sizes": () if is_tagged else (content.options.rectangle,),
    }
    encoder = read_encoder(tensors, _OPEN_CLIP, at="visual.", num_heads=num_heads, **sizes)
    # OpenAI's own files go by names that tell nothing, but hold the size of images as a number.
    quick = "input_resolution" in tensors or _QUICK_GELU.search(content.hint)
    if config:
        quick = config.get("quick_gelu")
    elif not quick and not is_tagged:
        tensors.guess("heads", "activation", *([] if encoder.is_told else ["shape of images"]))
    fields = encoder.fields | {"activation": "quick_gelu" if quick else "gelu_exact", "layer_norm_eps": 1e-5}
    params, classes = dict(encoder.params), 0
    if "visual.proj" in tensors:
        classes = tensors.shape("visual.proj")[-1]
        params["head/kernel"] = tensors.take("visual.proj", (encoder.width, classes))
    return _clip(content, fields, params, classes, encoder.image_size)


def _clip(content: Content, fields: dict, params: dict[str, np.ndarray], classes: int, size: ImageSize) -> Converted:
    model = ModelConfig(pool="cls", num_classes=classes, head_bias=False, **fields)
    found = content.metadata.get("open_clip", {}).get("preprocess_cfg", {})
    normalisation = {name: tuple(map(float, found[name])) for name in ("mean", "std") if name in found}
    default = Preprocess(size, min(sides_of(size)), "bicubic", **CLIP | normalisation)
    return model, params, read_preprocess(content, default, model.dims.patch), "projection" if classes else None


def is_siglip(content: Content) -> bool:
    """See `Layout`."""
    return _prefix(content, "head.probe") is not None and not is_clip(content)


def convert_siglip(tensors: Tensors, content: Content) -> Converted:
    """See `Layout`. Its features, pooled by attention, are what it compares with those of texts. A classifier reads the
    mean of its patches."""
    refuse_others(content, ("siglip", "siglip_vision_model"))
    at = _prefix(content, "head.probe")
    tensors.ignore(*_OF_OTHER_TOWERS)
    encoder = read_encoder(tensors, _SIGLIP, at=at, **_told(content))
    tensors.guess(*guesses(content, is_size_told=encoder.is_told, preprocessing=False))
    fields = encoder.fields | untold_fields(content, activation="gelu_pytorch_tanh", eps=1e-6)
    default = Preprocess(encoder.image_size, min(sides_of(encoder.image_size)), "bicubic")
    preprocess = read_preprocess(content, default, encoder.patch)
    width, source, target = encoder.width, f"{at}head.", "MAPHead_0/"
    if "classifier.weight" in tensors:
        classes = tensors.shape("classifier.weight")[0]
        tensors.ignore(f"{source}*")
        params = encoder.params | dense(tensors, "classifier", "head", width, classes)
        return ModelConfig(pool="gap", num_classes=classes, **fields), params, preprocess, "classifier"
    params = encoder.params | {f"{target}probe": tensors.take(f"{source}probe", (1, 1, width))}
    attention_names = [f"{source}attention.in_proj_"], f"{source}attention.out_proj"
    params |= attention(tensors, *attention_names, f"{target}MultiHeadDotProductAttention_0", width, encoder.num_heads)
    params |= layer_norm(tensors, f"{source}layernorm", f"{target}LayerNorm_0", width)
    layers = [f"{source}mlp.fc1", f"{source}mlp.fc2"]
    params |= mlp(tensors, layers, f"{target}MlpBlock_0", width, encoder.mlp_dim)
    return ModelConfig(pool="map", num_classes=0, **fields), params, preprocess, None


LAYOUTS = (
    Layout("transformers CLIP", is_clip, convert_clip),
    Layout("open_clip", is_open_clip, convert_open_clip, "bicubic_antialias", takes_arch=True),
    Layout("transformers SigLIP", is_siglip, convert_siglip),
)
