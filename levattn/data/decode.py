"""Encoded bytes to pixels, equal to PIL's pixel for pixel.

simplejpeg decodes JPEG files: as fast as opencv with exact pixels at its default flags, and unlike opencv it
reports damage instead of filling in grey. PIL takes what is left: other formats, CMYK, EXIF rotation, and the files
that simplejpeg is too strict for.
"""

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from levattn.data.errors import ImageError

MAX_PIXELS = 178_956_970  # 512 MiB of RGB; PIL refuses the same.
_EXIF_WITHIN = 4096  # Bytes; the EXIF segment comes first, or just after the JFIF one.


def decode_image(data: bytes, num_channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes one image file.

    EXIF rotation is applied, CMYK, grey and palette images are converted, 16-bit grey keeps its high byte and alpha
    is dropped.

    Args:
      data: the file's bytes: JPEG, PNG, WebP, BMP, TIFF or GIF (first frame).
      num_channels: 3 for RGB or 1 for grey.

    Returns:
      The pixels.

    Raises:
      ImageError: when the bytes are no image, are damaged, or hold more than `MAX_PIXELS` pixels (found in the
        header, before anything is allocated).
    """
    if data[:2] == b"\xff\xd8" and num_channels == 3 and data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height)
            if colorspace in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(data)
        except ImageError:
            raise
        except ValueError:
            pass  # PIL says what is wrong, or reads it: simplejpeg refuses harmless oddities too.
    return _decode_with_pil(data, num_channels)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")


def _decode_with_pil(data: bytes, num_channels: int) -> UInt8[np.ndarray, "h w c"]:
    try:
        image = Image.open(io.BytesIO(data))
        _check_size(*image.size)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ImageError(f"pixels of more than 16 bits (mode {image.mode!r}) have no known range")
        pixels = np.asarray(image.convert("RGB" if num_channels == 3 else "L"))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for damaged files.
        raise ImageError(f"not a readable image ({len(data):,} bytes): {error}") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
