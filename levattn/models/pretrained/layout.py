"""What a reader of checkpoints takes and gives: a file's content, and a model with its parameters and its input."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from levattn.models.config import ModelConfig
from levattn.models.pretrained.posemb import Resize
from levattn.models.pretrained.tensors import Tensors

_SUFFIX = re.compile(r"(\.(npz|safetensors|pth|pt|bin|ckpt|onnx|tar|index|json))+$")
_SAYS_NOTHING = {"", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model", "params", "checkpoint"}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The input that a model was trained on: resize the short side, cut the centre, normalise.

    Attributes:
      image_size: Side of the square crop, in pixels.
      resize: Short side before the crop, in pixels.
      interpolation: Of the resize, "bicubic" or "bilinear", antialiased.
      mean: Subtracted from pixels in [0, 1], one value a channel.
      std: Divides after that.

    It is a function as well, of one photograph: `images = preprocess(photograph)[None]`.
    """

    image_size: int = 224
    resize: int = 224
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, image: Any) -> Float32[np.ndarray, "side side channels"]:
        """One image as the model wants it, the same numbers as in evaluation.

        Args:
          image: uint8 of shape (height, width, 3), or (height, width) in grey; or an image of Pillow, of any mode.

        Raises:
          ValueError: An array of other numbers or another shape.
        """
        from PIL import Image, ImageOps  # only needed here

        channels = len(self.mean)
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
        else:
            array = np.asarray(image)
            array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
            if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,)) or array.ndim < 2:
                raise ValueError(
                    f"image is {array.dtype} of shape {array.shape}, and must be uint8 of (height, width, 3) or an "
                    "image of Pillow"
                )
            image = Image.fromarray(array)
        image = image.convert("RGB" if channels == 3 else "L")
        (width, height), size = image.size, self.image_size
        short = min(width, height)
        if short != self.resize:
            width, height = width * self.resize // short, height * self.resize // short
            image = image.resize((width, height), getattr(Image.Resampling, self.interpolation.upper()))
        top, left = round((height - size) / 2), round((width - size) / 2)
        pixels = np.asarray(image, np.float32).reshape(height, width, channels)[top : top + size, left : left + size]
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return (pixels / np.float32(255) - mean) / std


@dataclasses.dataclass(frozen=True)
class Content:
    """What lies in a checkpoint file and beside it.

    Attributes:
      path: The file.
      arrays: Names to arrays.
      metadata: JSON found in the file or beside it: a Hugging Face `config.json` under "config",
        `preprocessor_config.json` under "preprocessor", timm's `config.json` under "config" as well,
        `open_clip_config.json` under "open_clip"; and under "training" what a training script saved beside the
        weights, its model's name under "arch" and its options under "args".
      arch: Name of a published model, given by who loads it: it tells what tensors leave open.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]
    arch: str | None = None

    @property
    def hint(self) -> str:
        """The name that tells what tensors leave open: the one that is given, else the checkpoint's."""
        return self.arch or self.name

    @property
    def name(self) -> str:
        """Of the checkpoint, for tables and as a hint: the file's, or its folder's where files are all named alike.

        In a download cache of Hugging Face (`models--timm--NAME/snapshots/HASH/model.safetensors`) the repository's.
        """
        for path in (self.path, *self.path.absolute().parents):
            if path.name.startswith("models--"):
                return path.name.rpartition("--")[2]
            name = _SUFFIX.sub("", path.name)
            if name not in _SAYS_NOTHING and name != "snapshots" and not re.fullmatch("[0-9a-f]{40}", name):
                return name
        return "unnamed"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model, ready for any attention.

    Attributes:
      model: Its configuration, with the attention it was trained with: dense, for what others published.
      params: Its parameters, nested as `ViT(model)` wants them.
      preprocess: The input it expects.
      head: What the model's head gives: "classifier" (logits), "projection" (an embedding), or None (features).
      layout: What the file was recognised as, such as "timm".
      name: Of the checkpoint, for tables.
      guessed: What neither tensors, nor a config, nor the name of a published model told, of "heads", "activation",
        "mean and std", "resize" and "head": taken as most published models of the layout have it.
      notes: Sentences on what was chosen where the file leaves a choice.
    """

    model: ModelConfig
    params: Mapping[str, Any]
    preprocess: Preprocess
    head: Literal["classifier", "projection"] | None
    layout: str
    name: str
    guessed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """One family of checkpoints. A new one is one small file and one line in `LAYOUTS`.

    Attributes:
      name: For people.
      recognises: Whether a file is of this family, by the names of its tensors (and, where these leave it open, its
        metadata).
      convert: Takes every tensor by its name and gives the model's configuration, its parameters under this project's
        names joined by "/" (kernels as (in, out), patch kernels as (height, width, in, out)), its input, and what its
        head gives. Does not call `Tensors.finish`; the caller does.
      resize: How this family's own code resizes position embeddings to another grid.
      takes_arch: Whether `Content.arch` tells it anything.
    """

    name: str
    recognises: Callable[[Content], bool]
    convert: Callable[[Tensors, Content], tuple[ModelConfig, dict[str, np.ndarray], Preprocess, str | None]]
    resize: Resize = "bicubic"
    takes_arch: bool = False
