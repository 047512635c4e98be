"""Encoded bytes to pixels, equal to PIL's pixel for pixel.

simplejpeg decodes JPEG files: as fast as opencv with exact pixels at its default flags, and unlike opencv it
reports damage instead of filling in grey. PIL takes what is left: other formats, CMYK, EXIF rotation, and the files
that simplejpeg is too strict for.
"""

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from levattn.data.errors import ImageError

# 256 MiB of RGB, about 9,459 x 9,459; from here on PIL warns. Decoding takes up to eleven bytes a pixel on the
# way, and of WebP, whose decoder keeps several copies with alpha, up to 27.
MAX_PIXELS = 89_478_485
# No others: PIL hands some formats on to other programs, and knows many that no data set is stored in.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
T = TypeVar("T")


def decode_image(data: bytes, num_channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes one image file.

    EXIF rotation is applied, CMYK, grey and palette images are converted, 16-bit grey keeps its high byte and alpha
    is dropped.

    Args:
      data: the file's bytes: JPEG, PNG, WebP, BMP, TIFF, PPM or GIF (first frame), told by what is in them.
      num_channels: 3 for RGB or 1 for grey.

    Returns:
      The pixels.

    Raises:
      ImageError: when the bytes are no image, are damaged, or hold more than `MAX_PIXELS` pixels (found in the
        header, before anything is allocated).
    """
    if data[:2] == b"\xff\xd8" and num_channels == 3 and not _may_be_rotated(data):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            check_size(width, height)
            if colorspace in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(data)
        except ImageError:
            raise
        except ValueError:
            pass  # PIL says what is wrong, or reads it: simplejpeg refuses harmless oddities too.
    return _decode_with_pil(data, num_channels)


def convert_image(data: bytes, convert_fn: Callable[[Image.Image], T]) -> T:
    """Opens an image file by PIL, lets `convert_fn` make something of it, and says of any failure that it is one.

    Raises:
      ImageError: as `decode_image` does.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        check_size(*image.size)
        return convert_fn(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_FORMATS)
        raise ImageError(f"not a readable image ({len(data):,} bytes): in none of the formats {formats}") from error
    except Exception as error:  # The decoders of damaged files fail in any way, by struct.error and KeyError too.
        raise ImageError(f"not a readable image ({len(data):,} bytes): {error}") from error


def check_size(width: int, height: int) -> None:
    """Raises an ImageError for an image of no pixels or of more than `MAX_PIXELS`."""
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}, or none")


def _may_be_rotated(data: bytes) -> bool:
    """Whether a JPEG file has EXIF or XMP data on its orientation, or segments that cannot be followed to the scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == _APP1:
            segment = data[at + 4 : at + 2 + length]
            if segment.startswith(b"Exif\0\0") or b"tiff:Orientation" in segment:
                return True
        at += 2 + length
    return data[at : at + 2] != bytes([0xFF, _START_OF_SCAN])


def _decode_with_pil(data: bytes, num_channels: int) -> UInt8[np.ndarray, "h w c"]:
    def to_pixels(image: Image.Image) -> np.ndarray:
        is_sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        image = ImageOps.exif_transpose(image)
        if is_sixteen_bit:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ImageError(f"pixels of more than 16 bits (mode {image.mode!r}) have no known range")
        return np.asarray(image.convert("RGB" if num_channels == 3 else "L"))

    pixels = convert_image(data, to_pixels)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
