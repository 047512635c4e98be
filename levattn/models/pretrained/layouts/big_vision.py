"""Checkpoints of google-research/big_vision, and of vision_transformer with its "AugReg" models: `.npz` by Flax names.

Both name parameters as this project does. The older vision_transformer counts the submodules of a block through
(`LayerNorm_2`, `MlpBlock_3`) and has a position embedding for the class token too.
"""

import dataclasses
import math
import re

import numpy as np

from levattn.models.config import ModelConfig
from levattn.models.pretrained.layout import Content, Layout, Preprocess
from levattn.models.pretrained.shapes import param_shapes, size_fields
from levattn.models.pretrained.tensors import Tensors

# Where the image model lies in a file: beside a text tower (LiT, SigLIP), beside optimizer state, or alone.
_PREFIXES = ("params/img/", "img/", "params/", "opt/target/", "")
_OLD_NAMES = {
    "pos_embedding": "Transformer/posembed_input/pos_embedding",
    "/LayerNorm_1/": "/LayerNorm_2/",
    "/MlpBlock_0/": "/MlpBlock_3/",
    "/MultiHeadDotProductAttention_0/": "/MultiHeadDotProductAttention_1/",
}
_BLOCK, _STACK = "Transformer/encoderblock_0/", "Transformer/encoderblock/"


@dataclasses.dataclass(frozen=True)
class _Naming:
    """How a file names what this project calls `Transformer/encoderblock_0/LayerNorm_1/scale`.

    Attributes:
      prefix: Before every name of the image model.
      old: As vision_transformer does.
      stacked: One array holds a parameter of all blocks.
    """

    prefix: str
    old: bool
    stacked: bool

    def __call__(self, name: str) -> str:
        for new, old in _OLD_NAMES.items() if self.old else ():
            name = name.replace(new, old)
        return self.prefix + (re.sub(r"encoderblock_\d+", "encoderblock", name) if self.stacked else name)


def _naming(content: Content) -> _Naming | None:
    """None: the file is of another family."""
    names = content.arrays
    for prefix in _PREFIXES:
        if f"{prefix}embedding/kernel" not in names:
            continue
        if any(name.startswith(f"{prefix}Transformer/encoderblock") for name in names):
            old = any("/MlpBlock_3/" in name for name in names)
            return _Naming(prefix, old, any(name.startswith(prefix + _STACK) for name in names))
    return None


def convert(tensors: Tensors, content: Content) -> tuple[ModelConfig, dict[str, np.ndarray], Preprocess, str | None]:
    """See `Layout`. What lies outside of the image model's subtree is another tower's or the optimizer's."""
    naming = _naming(content)
    outside = [name for name in content.arrays if not name.startswith(naming.prefix)]
    tensors.ignore(*{"/".join(name.split("/")[:2]) + "*" for name in outside})
    _refuse(tensors, naming, content)

    model, image_size = _model(tensors, naming)
    shapes = param_shapes(model, image_size, tensors.shape(naming("embedding/kernel"))[2])
    if naming.old:  # positions of the class token too
        _, patches, width = shapes["pos_embedding"]
        shapes["pos_embedding"] = (1, model.num_prefix_tokens + patches, width)
    params = _take_all(tensors, naming, shapes, model.dims.depth)
    if naming.old and model.num_prefix_tokens:
        params["cls"] = params["cls"] + params["pos_embedding"][:, :1]
        params["pos_embedding"] = params["pos_embedding"][:, 1:]

    # Two towers and fine-tuning in vision_transformer see the whole image; in big_vision's own classification the
    # crop is 7/8 of the short side.
    two_towers = naming.prefix.endswith("img/")
    whole = naming.old or two_towers or not model.num_classes
    preprocess = Preprocess(image_size, image_size if whole else round(image_size * 8 / 7), "bilinear")
    head = None if not model.num_classes else "projection" if two_towers else "classifier"
    return model, params, preprocess, head


def _refuse(tensors: Tensors, naming: _Naming, content: Content) -> None:
    refused = []
    if naming("conv_root/kernel") in tensors:
        refused.append("a ResNet before its blocks (an R+ViT hybrid)")
    if len(tensors.shape(naming("embedding/kernel"))) != 4:
        refused.append("patches embedded by a dense layer (NaFlex)")
    if tensors.names(f"{naming.prefix}Transformer/*/Moe*"):
        refused.append("mixtures of experts")
    if refused:
        raise ValueError(f"{str(content.path)!r} has {' and '.join(refused)}, which this project's ViT does not")


def _model(tensors: Tensors, naming: _Naming) -> tuple[ModelConfig, int]:
    """What names and shapes say of the model, and the side of its images in pixels."""
    patch, _, _, width = tensors.shape(naming("embedding/kernel"))
    block = naming(_BLOCK)
    if naming.stacked:
        depth = tensors.shape(f"{block}LayerNorm_0/scale")[0]
    else:
        blocks = [re.search(r"/encoderblock_(\d+)/", name) for name in tensors.names(f"{naming.prefix}Transformer/*")]
        depth = 1 + max(int(found[1]) for found in blocks if found)
    query = naming(f"{_BLOCK}MultiHeadDotProductAttention_0/query/")
    has_cls, positions = naming("cls") in tensors, naming("pos_embedding")
    image_size = 224 // patch * patch  # sines and cosines fit any
    if positions in tensors:
        image_size = patch * math.isqrt(tensors.shape(positions)[1] - (naming.old and has_cls))
    head, rep = naming("head/kernel"), naming("pre_logits/kernel")
    model = ModelConfig(
        **size_fields(
            width=width,
            depth=depth,
            mlp_dim=tensors.shape(naming(f"{_BLOCK}MlpBlock_0/Dense_0/kernel"))[-1],
            num_heads=tensors.shape(f"{query}kernel")[-2],
            patch=patch,
        ),
        num_classes=tensors.shape(head)[1] if head in tensors else 0,
        pool="map" if naming("MAPHead_0/probe") in tensors else "cls" if has_cls else "gap",
        class_token=has_cls,
        posemb="learned" if positions in tensors else "sincos2d",
        rep_size=tensors.shape(rep)[1] if rep in tensors else False,
        qkv_bias=f"{query}bias" in tensors,
        head_bias=head not in tensors or naming("head/bias") in tensors,
    )
    return model, image_size


def _take_all(
    tensors: Tensors, naming: _Naming, shapes: dict[str, tuple[int, ...]], depth: int
) -> dict[str, np.ndarray]:
    params, stacks = {}, {}
    for name, shape in shapes.items():
        block = re.match(r"Transformer/encoderblock_(\d+)/", name)
        source = naming(name)
        if block and naming.stacked:
            if source not in stacks:
                stacks[source] = tensors.take(source, (depth, *shape))
            params[name] = stacks[source][int(block[1])]
        else:
            params[name] = tensors.take(source, shape)
    return params


LAYOUT = Layout("big_vision", lambda content: _naming(content) is not None, convert, resize="bilinear_corners")
