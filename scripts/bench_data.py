"""Prints how fast the data pipeline feeds training: images decoded, cropped, flipped and batched a second.

    python scripts/bench_data.py                                             # 97 KB JPEG files made on the spot
    python scripts/bench_data.py --source fashion_mnist --crop pad --out bench.json
    python scripts/bench_data.py --source folder:/data/pets --image_size 224 --num_workers 4

With JPEG files made on the spot it also compares decoders, with their largest difference from PIL's pixels.
"""

import argparse
import io
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from levattn.data import DataConfig, decode_image, open_source, train_batches
from levattn.training.workdir import provenance, write_json

JPEG_BYTES = 97_000  # About what ImageNet's training files have; most are 500 x 375.
NUM_JPEGS = 128
DECODERS = {
    "PIL": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    "opencv": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
    "simplejpeg": simplejpeg.decode_jpeg,
    "simplejpeg fast": lambda data: simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True),
    "levattn": decode_image,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="jpeg", help="'jpeg', or a source as in the configs")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--image_size", type=int, default=None, help="pixels; 224 for JPEG files, else the source's own"
    )
    parser.add_argument("--crop", default=None, help="none, random_resized or pad")
    parser.add_argument("--no_flip", dest="flip", action="store_false")
    parser.add_argument("--randaugment_layers", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        result = {"source": args.source, "cpus": os.cpu_count()}
        if args.source == "jpeg":
            files = make_jpegs(Path(folder))
            result["jpeg_bytes"] = round(np.mean([len(file) for file in files]))
            result["decoders"] = compare_decoders(files, args.seconds / 4)
        result |= throughput(args, f"folder:{folder}" if args.source == "jpeg" else args.source)
    if args.out:
        write_json(args.out, {"provenance": provenance(), **result})


def throughput(args: argparse.Namespace, source_name: str) -> dict[str, float | int | str]:
    """Times the training stream after its first batch and prints one line."""
    encoded = source_name.startswith(("folder:", "tfds:"))
    config = DataConfig(
        source=source_name,
        image_size=args.image_size or (224 if encoded else None),
        crop=args.crop or ("random_resized" if encoded else "pad"),
        flip=args.flip,
        randaugment_layers=args.randaugment_layers,
        num_workers=args.num_workers,
    )
    source = open_source(config, args.split)
    batches = train_batches(source, config, global_batch_size=args.batch_size, seed=0)
    for _ in range(4):  # Fills the prefetch buffers, so that none of their work is counted.
        batch = next(batches)
    start, num_images = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < args.seconds:
        num_images += len(next(batches)["image"])
    batches.close()
    print(
        f"{args.source}: {num_images / seconds:,.0f} images/s of {batch['image'].shape[1:]}, crop={config.crop}, "
        f"flip={config.flip}, num_workers={config.num_workers}"
    )
    return {
        "images_per_second": num_images / seconds,
        "image_shape": batch["image"].shape[1:],
        "crop": config.crop,
        "flip": config.flip,
        "randaugment_layers": config.randaugment_layers,
        "num_workers": config.num_workers,
        "batch_size": args.batch_size,
    }


def compare_decoders(files: list[bytes], seconds: float) -> list[dict[str, float | int | str]]:
    """Times each decoder on all cores and prints a table."""
    reference = [DECODERS["PIL"](data).astype(np.int16) for data in files[:16]]
    rows = []
    print(f"{'decoder':<16} {'images/s':>9}  pixels")
    for name, decode in DECODERS.items():
        difference = max(
            int(np.abs(decode(data) - pixels).max()) for data, pixels in zip(files, reference, strict=False)
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            start, num_images = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                num_images += sum(1 for _ in pool.map(decode, files))
            rate = num_images / (time.perf_counter() - start)
        print(f"{name:<16} {rate:>9,.0f}  {'equal to PIL' if difference == 0 else f'off by up to {difference}'}")
        rows.append({"decoder": name, "images_per_second": rate, "largest_difference": difference})
    return rows


def make_jpegs(folder: Path) -> list[bytes]:
    """Writes 500 x 375 JPEG files of about 97 KB in two class folders: crops of scikit-learn's two photographs."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    files = []
    for number in range(NUM_JPEGS):
        photo = photos[number % len(photos)]
        left, top = rng.integers(0, (photo.width - 500, photo.height - 375), endpoint=True).tolist()
        crop = photo.crop((left, top, left + 500, top + 375))
        data = min((_encode(crop, quality) for quality in range(80, 100)), key=lambda data: abs(len(data) - JPEG_BYTES))
        path = folder / f"class_{number % len(photos)}" / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        files.append(data)
    return files


def _encode(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


if __name__ == "__main__":
    main()
