"""ViT, DeiT, ViT-MAE, ViT-MSN and I-JEPA in the transformers library, and what was fine-tuned from them."""

import dataclasses
import re

import numpy as np

from levattn.models.config import ModelConfig
from levattn.models.pretrained.encoder import Names, dense, read_encoder
from levattn.models.pretrained.hub_config import (
    IMAGENET,
    guesses,
    is_published,
    read_preprocess,
    refuse_others,
    untold_fields,
    vision_config,
)
from levattn.models.pretrained.layout import Content, Layout, Preprocess, sides_of
from levattn.models.pretrained.tensors import Tensors

_KINDS = ("vit", "deit", "vit_msn", "vit_mae", "ijepa")
_DISTILLATION_TOKEN = "embeddings.distillation_token"
_NAMES = Names(
    patches="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    more_tokens=(_DISTILLATION_TOKEN,),
    positions="embeddings.position_embeddings",
    layer="encoder.layer.",
    norms=("layernorm_before", "layernorm_after"),
    qkv=tuple(f"attention.attention.{name}." for name in ("query", "key", "value")),
    out="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    last_norm="layernorm",
)
# Since its version 5 the library's modules have other names than the files it saves: those of exports to ONNX.
_MODULES = dataclasses.replace(
    _NAMES,
    layer="layers.",
    qkv=tuple(f"attention.{name}_proj." for name in "qkv"),
    out="attention.o_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
)


def _find(content: Content) -> tuple[str, Names] | None:
    """What precedes all names of the encoder, and what these are."""
    for names in (_NAMES, _MODULES):
        mark = f"{names.layer}0.{names.norms[0]}.weight"
        for name in content.arrays:
            if name.endswith(mark) and not name.startswith("decoder."):  # of MAE, whose decoder is no encoder
                return name.removesuffix(mark), names
    return None


def convert(tensors: Tensors, content: Content) -> tuple[ModelConfig, dict[str, np.ndarray], Preprocess, str | None]:
    """See `Layout`. The head is the classifier; both of a distilled DeiT; else the tanh layer of a pooler."""
    config = vision_config(content)
    refuse_others(content, _KINDS)
    at, names = _find(content)
    if not at and f"vit.{names.patches}.weight" in tensors:  # ViT-MSN: the blocks alone go without a prefix
        outside = ("patches", "class_token", "positions", "last_norm")
        names = dataclasses.replace(names, **{field: f"vit.{getattr(names, field)}" for field in outside})
    if f"{at}{names.class_token}" not in tensors:  # I-JEPA
        names = dataclasses.replace(names, class_token=None)
    told = {"num_heads": "num_attention_heads", "image_size": "image_size", "qkv_bias": "qkv_bias"}
    told = {ours: config.get(theirs) for ours, theirs in told.items()}
    sizes = () if is_published(content) else (content.options.rectangle,)
    encoder = read_encoder(tensors, names, at=at, possible_sizes=sizes, **told)
    marks = f"{at} {config.get('model_type')} {content.hint.lower()}"
    tensors.guess(*guesses(content, is_size_told=encoder.is_told))
    tensors.ignore("*.mask_token", "decoder.*")  # of pretraining by masked patches

    fields = encoder.fields | untold_fields(content, activation="gelu", eps=1e-12) | {"num_classes": 0}
    params, head = dict(encoder.params), None
    width, pooler = encoder.width, f"{at}pooler.dense"
    heads = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
    for source, target in heads.items():
        if f"{source}.weight" in tensors:
            head, fields["num_classes"] = "classifier", tensors.shape(f"{source}.weight")[0]
            params |= dense(tensors, source, target, width, fields["num_classes"])
    if head is None and f"{pooler}.weight" in tensors:
        if config.get("pooler_act", "tanh") != "tanh":
            raise ValueError(f"pooler_act={config['pooler_act']!r} in the config: only 'tanh' is read")
        fields["rep_size"] = tensors.shape(f"{pooler}.weight")[0]
        params |= dense(tensors, pooler, "pre_logits", width, fields["rep_size"])
    if _DISTILLATION_TOKEN in encoder.tokens:
        # Without a head of its own the token is one that others attend to, and no more.
        fields |= {"distilled": True} if "head_dist/kernel" in params else {"num_registers": 1}
        params["dist" if "head_dist/kernel" in params else "registers"] = encoder.tokens[_DISTILLATION_TOKEN]

    model = ModelConfig(pool="cls" if names.class_token else "gap", **fields)
    size, side = encoder.image_size, min(sides_of(encoder.image_size))
    default = Preprocess(size, side, "bilinear")
    if re.search("deit|vit[-_](mae|msn)|dino-vit|jepa", marks):
        default = Preprocess(size, side * 8 // 7, "bicubic", **IMAGENET)
    return model, params, read_preprocess(content, default, model.dims.patch), head


LAYOUT = Layout("transformers ViT", lambda content: _find(content) is not None, convert, takes_arch=True)
