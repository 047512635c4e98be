"""What Hugging Face keeps in JSON beside the weights, in the terms of this project."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from levattn.models.pretrained.layout import Content, Preprocess

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "quick_gelu": "quick_gelu",
}
# Repositories whose models are what the defaults of the layouts say; OpenAI's alone among those of CLIP.
_PUBLISHED = re.compile(
    r"^(vit|deit)-\w+(-distilled)?-patch\d+|^clip-vit-(base|large)-patch\d+|^siglip2?-\w+-patch\d+|^vit-mae-|^dino-vit"
)
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


def vision_config(content: Content) -> Mapping[str, Any]:
    """The `config.json` of the image tower; empty if there is none."""
    config = content.metadata.get("config", {})
    return config.get("vision_config") or config


def guesses(content: Content, *, is_size_told: bool, preprocessing: bool = True) -> list[str]:
    """What neither the config nor the name of the repository tells, in the terms of `Pretrained.guessed`.

    Args:
      content: Of the checkpoint.
      is_size_told: Of the encoder.
      preprocessing: Whether models of this layout differ in mean, std and resize.
    """
    if is_published(content):
        return []
    config, missing = vision_config(content), []
    # In a config as the library saves it what is missing is as the library has it by default.
    if not {"model_type", "architectures"} & content.metadata.get("config", {}).keys():
        told = {"heads": "num_attention_heads", "activation": "hidden_act"}
        missing = [what for what, key in told.items() if key not in config]
        missing += [] if is_size_told else ["shape of images"]
    if preprocessing and "preprocessor" not in content.metadata:
        missing += ["mean and std", "resize"]
    return missing


def is_published(content: Content) -> bool:
    """Whether the name of the repository tells what the config does not."""
    return bool(_PUBLISHED.search(content.hint.lower()))


def refuse_others(content: Content, known: Collection[str]) -> None:
    """Refuses a model by its name whose tensors go by names that others have.

    Args:
      content: Of the checkpoint.
      known: The `model_type` of what is read.

    Raises:
      ValueError: The config has another.
    """
    config = content.metadata.get("config", {})
    kind = vision_config(content).get("model_type") or config.get("model_type")
    if kind and kind not in known:
        names = config.get("architectures") or [f"model of type {kind}"]
        raise ValueError(
            f"{str(content.path)!r} is a {names[0]} of transformers (model_type={kind!r}), which is no plain Vision "
            f"Transformer on images: of those with such names {', '.join(sorted(known))} are read"
        )


def class_names(content: Content, num_classes: int) -> tuple[str, ...] | None:
    """What the config calls the outputs: "id2label" of transformers, "label_names" of timm. None: not told.

    Args:
      content: Of the checkpoint.
      num_classes: Outputs of the model.
    """
    config = content.metadata.get("config", {})
    found = config.get("label_names") or config.get("id2label") or ()
    if isinstance(found, Mapping):
        found = [found.get(str(number)) for number in range(len(found))]
    is_told = isinstance(found, list) and len(found) == num_classes and all(isinstance(name, str) for name in found)
    if not is_told or found[0].startswith("LABEL_"):  # the placeholders of transformers
        return None
    return tuple(found)


def untold_fields(content: Content, *, activation: str, eps: float) -> dict[str, Any]:
    """The fields of a `ModelConfig` that no tensor tells.

    Args:
      content: Of the checkpoint.
      activation: In the library's terms, if its config does not say.
      eps: Of LayerNorms, if its config does not say.

    Raises:
      ValueError: For an activation that this project's ViT does not have.
    """
    config = vision_config(content)
    activation = config.get("hidden_act", activation)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={activation!r} in the config is not one of {', '.join(_ACTIVATIONS)}")
    return {"activation": _ACTIVATIONS[activation], "layer_norm_eps": float(config.get("layer_norm_eps", eps))}


def read_preprocess(content: Content, default: Preprocess, patch: int) -> Preprocess:
    """The `preprocessor_config.json`, and `default` where that is silent.

    A processor that squeezes an image into a square is taken to cut that square out of it.

    Args:
      content: Of the checkpoint.
      default: Of the family; where its crop is no square, its sizes stay.
      patch: Side in pixels; what an image has beyond a multiple of it no patch would see, and is cut away.

    Raises:
      ValueError: For images that are not square.
    """
    found = content.metadata.get("preprocessor", {})
    resize, image_size = default.resize, None
    if isinstance(default.image_size, int):  # else the size is that of the positions
        resize = _side(found, "size", resize) if found.get("do_resize", True) else resize
        cuts = found.get("do_center_crop", "crop_size" in found)
        image_size = _side(found, "crop_size", default.image_size) if cuts else resize if "size" in found else None
    mean, std = found.get("image_mean", default.mean), found.get("image_std", default.std)
    if not found.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    return dataclasses.replace(
        default,
        image_size=image_size // patch * patch if image_size else default.image_size,
        resize=resize,
        interpolation=_INTERPOLATIONS.get(found.get("resample"), default.interpolation),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
    )


def _side(found: Mapping[str, Any], key: str, default: int) -> int:
    """Of a square; a number, or a record of its short side or of both sides."""
    size = found.get(key, default)
    if not isinstance(size, Mapping):
        return size
    sides = {size[name] for name in ("shortest_edge", "height", "width") if name in size}
    if len(sides) != 1:
        raise ValueError(f"{key}={dict(size)} in preprocessor_config.json is no square: only square images are read")
    return sides.pop()
