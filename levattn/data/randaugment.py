"""RandAugment (Cubuk et al., 2019) on one uint8 image, with PIL's operations.

The fifteen operations are the usual list without Cutout. Each chosen operation is always applied, at the
magnitude given on the scale 0 to 10; rotations, shears and shifts take a random sign and fill with grey 128, and the
four enhancements move away from 1 in a random direction. At magnitude 10: rotation 30 degrees, shear 0.3, shift 0.45
of the side, enhancement 1 - 0.9 or 1 + 0.9, posterize to 4 bits, solarize above 0 (the negative), solarize-add 110.
"""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

_GREY = {"L": 128, "RGB": (128, 128, 128)}
_SOLARIZE_THRESHOLD = 128


def randaugment(
    image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator, *, num_layers: int, magnitude: int
) -> UInt8[np.ndarray, "h w c"]:
    """Applies `num_layers` operations, drawn with replacement.

    Args:
      image: RGB or grey.
      rng: source of randomness.
      num_layers: how many operations.
      magnitude: strength, from 0 to 10.

    Returns:
      An image of the same shape.
    """
    pil = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    for name in rng.choice(list(OPERATIONS), size=num_layers):
        sign = 1 if rng.random() < 0.5 else -1
        pil = OPERATIONS[name](pil, magnitude / 10, sign)
    return np.asarray(pil).reshape(image.shape)


def _affine(image: Image.Image, matrix: tuple[float | int, ...]) -> Image.Image:
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, affine, matrix, bilinear, fillcolor=_GREY[image.mode])


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_GREY[image.mode])


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    table = [min(255, value + amount) if value < _SOLARIZE_THRESHOLD else value for value in range(256)]
    return image.point(table * len(image.getbands()))


# Each takes an image, a strength in [0, 1] and a sign of +1 or -1.
OPERATIONS = {
    "AutoContrast": lambda im, s, sign: ImageOps.autocontrast(im),
    "Equalize": lambda im, s, sign: ImageOps.equalize(im),
    "Invert": lambda im, s, sign: ImageOps.invert(im),
    "Rotate": lambda im, s, sign: _rotate(im, sign * 30 * s),
    "Posterize": lambda im, s, sign: ImageOps.posterize(im, 8 - math.floor(4 * s)),
    "Solarize": lambda im, s, sign: ImageOps.solarize(im, 256 - round(256 * s)),
    "SolarizeAdd": lambda im, s, sign: _solarize_add(im, round(110 * s)),
    "Color": lambda im, s, sign: ImageEnhance.Color(im).enhance(1 + sign * 0.9 * s),
    "Contrast": lambda im, s, sign: ImageEnhance.Contrast(im).enhance(1 + sign * 0.9 * s),
    "Brightness": lambda im, s, sign: ImageEnhance.Brightness(im).enhance(1 + sign * 0.9 * s),
    "Sharpness": lambda im, s, sign: ImageEnhance.Sharpness(im).enhance(1 + sign * 0.9 * s),
    "ShearX": lambda im, s, sign: _affine(im, (1, sign * 0.3 * s, 0, 0, 1, 0)),
    "ShearY": lambda im, s, sign: _affine(im, (1, 0, 0, sign * 0.3 * s, 1, 0)),
    "TranslateX": lambda im, s, sign: _affine(im, (1, 0, sign * 0.45 * s * im.width, 0, 1, 0)),
    "TranslateY": lambda im, s, sign: _affine(im, (1, 0, 0, 0, 1, sign * 0.45 * s * im.height)),
}
