"""What a run needs to know about its images."""

from dataclasses import dataclass

from levattn.data.errors import unknown_name
from levattn.data.splits import parse_split

SOURCE_KINDS = ("digits", "fashion_mnist", "stamps", "folder", "tfds", "fake")
CROPS = ("none", "random_resized", "pad")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are cropped and augmented, and how they are normalised.

    Attributes:
      source: "digits", "fashion_mnist", "stamps", "folder:PATH", "tfds:NAME" or
        "fake:num_classes=10,size=32,examples=256".
      train_split: split to train on; every source takes slices such as "train[:90%]" and "train[-5000:]".
      eval_split: split to evaluate on.
      image_size: side in pixels of the square images that reach the model; None keeps the source's own size.
      mean: subtracted from pixels in [0, 1]; one value, or one a channel.
      std: divides after the mean is subtracted; one value, or one a channel.
      crop: training crop. "random_resized" takes a random area and aspect ratio, "pad" shifts by up to
        `crop_padding` pixels over zeros (for small images), "none" uses the evaluation geometry.
      crop_area_min: smallest fraction of the image's area that "random_resized" takes.
      crop_padding: largest shift of "pad", in pixels.
      flip: mirror half of the training images left to right.
      randaugment_layers: RandAugment operations for each training image; 0 turns it off.
      randaugment_magnitude: strength of each operation, from 0 to 10.
      eval_resize: short side in pixels before the centre crop; None means `image_size`, which cuts the long side only.
      interpolation: antialiased filter of the evaluation resize, "bicubic" or "bilinear".
      max_damaged: share of the training images that may turn out to be damaged. Each is logged and left out of the
        loss; one more and the run stops. Evaluation takes none.
      num_workers: processes that load training and evaluation batches; 0 uses threads of this process.
        The stream of batches does not depend on it.

    Raises:
      ValueError: naming the field that is out of range.
    """

    source: str = "digits"
    train_split: str = "train"
    eval_split: str = "test"
    image_size: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    crop: str = "none"
    crop_area_min: float = 0.05
    crop_padding: int = 2
    flip: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: int = 10
    eval_resize: int | None = None
    interpolation: str = "bicubic"
    max_damaged: float = 0.001
    num_workers: int = 0

    def __post_init__(self) -> None:
        kind = self.source.partition(":")[0]
        if kind not in SOURCE_KINDS:
            raise unknown_name("source", kind, SOURCE_KINDS)
        for field, choices in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, field) not in choices:
                raise unknown_name(field, getattr(self, field), choices)
        parse_split(self.train_split, field="train_split")
        parse_split(self.eval_split, field="eval_split")
        for field in ("image_size", "eval_resize"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be a number of pixels, at least 1, or None")
        if self.eval_resize is not None and self.image_size is None:
            raise ValueError(f"eval_resize={self.eval_resize!r} needs image_size, the side of the crop that follows it")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"eval_resize={self.eval_resize} must be at least image_size={self.image_size}, cut from it"
            )
        if len(self.mean) == 0 or len(self.mean) != len(self.std):
            raise ValueError(f"mean={self.mean} and std={self.std} need the same length: one value, or one a channel")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std!r} must be positive: pixels are divided by it")
        if not 0 < self.crop_area_min <= 1:
            raise ValueError(f"crop_area_min={self.crop_area_min!r} must be a fraction of the image's area in (0, 1]")
        if not 0 <= self.max_damaged < 1:
            raise ValueError(f"max_damaged={self.max_damaged!r} must be a share of the training images in [0, 1)")
        for field in ("crop_padding", "randaugment_layers", "num_workers"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise ValueError(f"randaugment_magnitude={self.randaugment_magnitude!r} must be in [0, 10]")
