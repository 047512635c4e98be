"""Decoded pixels are PIL's, whatever the file; what is no image is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from levattn.data import ImageError, decode_image

_PIXELS = np.add.outer(np.arange(37) * 5, np.arange(53) * 2)[..., None] % 256 + np.arange(3) * 20
_PHOTO = np.clip(_PIXELS + np.random.default_rng(0).normal(0, 20, _PIXELS.shape), 0, 255).astype(np.uint8)


def encode(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pil(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"quality": 30}])
def test_jpeg_equals_pil_bit_for_bit(options):
    data = encode(Image.fromarray(_PHOTO), **options)
    np.testing.assert_array_equal(decode_image(data), pil(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpeg_become_the_rgb_of_pil(mode):
    data = encode(Image.fromarray(_PHOTO).convert(mode))
    np.testing.assert_array_equal(decode_image(data), pil(data))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_of_any_mode_becomes_the_rgb_of_pil(mode):
    data = encode(Image.fromarray(_PHOTO).convert(mode), "PNG")
    np.testing.assert_array_equal(decode_image(data), pil(data))


def test_one_channel_is_the_grey_of_pil():
    for data in (encode(Image.fromarray(_PHOTO)), encode(Image.fromarray(_PHOTO), "PNG")):
        np.testing.assert_array_equal(decode_image(data, num_channels=1)[:, :, 0], pil(data, "L"))


def test_sixteen_bit_grey_keeps_its_high_byte():
    values = (np.arange(37 * 53, dtype=np.uint16) * 33).reshape(37, 53)
    decoded = decode_image(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(decoded, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored lying on its left side: 90 degrees clockwise to show.
    data = encode(Image.fromarray(_PHOTO), exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.rot90(pil(data), -1))


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    data = encode(Image.fromarray(_PHOTO))
    np.testing.assert_array_equal(decode_image(data + b"trailing"), pil(data))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_truncated_file_is_refused(file_format):
    data = encode(Image.fromarray(_PHOTO), file_format)
    with pytest.raises(ImageError, match="not a readable image"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8", b"\xff\xd8\xff\xe0garbage"])
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(ImageError):
        decode_image(data)


def test_an_absurd_size_in_the_header_is_refused_before_anything_is_allocated():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="pixels"):
        decode_image(png)

    jpeg = bytearray(encode(Image.fromarray(_PHOTO)))
    start_of_frame = jpeg.index(b"\xff\xc0")
    jpeg[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", 50_000, 50_000)
    with pytest.raises(ImageError, match="50000 x 50000"):
        decode_image(bytes(jpeg))
