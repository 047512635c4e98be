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


ImageSize = int | tuple[int, int]  # the side of a square, or height and width, in pixels


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What whoever loads a checkpoint says of it, beside where it is.

    Attributes:
      image_size: Side in pixels of the images to come, or their height and width, if not as trained: position
        embeddings are resized as the family's own code does it, and the preprocessing in proportion. Of a file that
        does not tell, height and width that have as many patches as it has positions are what it was trained on.
      allow_zero_head: Take a published head that is all zeros, which there is where none was trained.
      arch: Name of the published model that tells heads, activation and preprocessing, such as
        "deit_small_patch16_224" for what was fine-tuned from it. It goes before a config and before the file's name.
    """

    image_size: ImageSize | None = None
    allow_zero_head: bool = False
    arch: str | None = None

    def __post_init__(self):
        if self.image_size is not None and min(sides_of(self.image_size)) < 1:
            raise ValueError(f"image_size={self.image_size} must be pixels: one number, or height and width")

    @property
    def rectangle(self) -> tuple[int, int] | None:
        """Height and width, where both are given."""
        return None if isinstance(self.image_size, int) else self.image_size


AS_PUBLISHED = LoadOptions()


def sides_of(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The input that a model was trained on: resize the short side, cut the centre, normalise.

    Attributes:
      image_size: Side of the square crop, in pixels; height and width of one that is no square.
      resize: Short side before the crop, in pixels. Where the crop is no square the image is resized to cover the crop
        times `resize / min(image_size)`.
      interpolation: Of the resize, "bicubic" or "bilinear", antialiased.
      mean: Subtracted from pixels in [0, 1], one value a channel.
      std: Divides after that.

    It is a function as well, of one photograph: `images = preprocess(photograph)[None]`.
    """

    image_size: ImageSize = 224
    resize: int = 224
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, image: Any) -> Float32[np.ndarray, "height width channels"]:
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
        (width, height), (rows, columns) = image.size, sides_of(self.image_size)
        if rows * width >= columns * height:  # the height fits, and the width is cut
            size = self.resize if rows <= columns else rows * self.resize // columns
            width, height = width * size // height, size
        else:
            size = self.resize if columns <= rows else columns * self.resize // rows
            width, height = size, height * size // width
        if (width, height) != image.size:
            image = image.resize((width, height), getattr(Image.Resampling, self.interpolation.upper()))
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        pixels = np.asarray(image, np.float32).reshape(height, width, channels)
        pixels = pixels[top : top + rows, left : left + columns]
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
      options: What whoever loads it says.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]
    options: LoadOptions = AS_PUBLISHED

    @property
    def hint(self) -> str:
        """The name that tells what tensors leave open: the one that is given, else the checkpoint's."""
        return self.options.arch or self.name

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
        "shape of images" (square), "mean and std", "resize" and "head": taken as most published models of the layout
        have it.
      notes: Sentences on what was chosen where the file leaves a choice.
      class_names: What its config calls the outputs of a classifier; None where it does not.
    """

    model: ModelConfig
    params: Mapping[str, Any]
    preprocess: Preprocess
    head: Literal["classifier", "projection"] | None
    layout: str
    name: str
    guessed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None


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
