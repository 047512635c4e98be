"""Images that cannot be used: training leaves them out, says so and stops above a rate; evaluation does not go on."""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

from levattn.data import DataConfig, ImageError, decode_image, eval_batches, open_source, train_batches
from levattn.data.decode import MAX_PIXELS
from levattn.data.transforms import resize_short_and_centre_crop
from levattn.models import ModelConfig
from levattn.training.config import LossConfig, OptimizerConfig, TrainConfig
from levattn.training.loop import train
from levattn.training.optim import make_optimizer
from levattn.training.sharding import make_mesh, put_batch
from levattn.training.state import create_state, init_state, plan_state
from levattn.training.step import make_train_step

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encode(image, file_format="JPEG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, file_format, **options)
    return file.getvalue()


def png_header(width, height, depth=8, kind=2):
    """A PNG file that claims to be of that size, and has a few bytes of pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def jpeg_header(width, height):
    data = bytearray(encode(PIXELS))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bomb(width, height):
    """A sound grey PNG of that size, in few bytes."""
    return encode(Image.new("1", (width, height)), "PNG")


DAMAGED = {
    "truncated": encode(PIXELS)[:300],
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text": b"oops",
    "zeros": bytes(1000),
    "a script for another program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "enormous png": png_header(50_000, 50_000),
    "enormous jpeg": jpeg_header(50_000, 50_000),
    "no pixels": png_header(0, 5),
    "too thin to be resized": bomb(60_000, 1),
}


@pytest.fixture
def folder(tmp_path):
    """40 photographs of two classes. Those in the class "good" have names of their numbers."""
    for number in range(40):
        path = tmp_path / ("good", "odd")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(np.full((10, 14, 3), number * 6, np.uint8)))
    return tmp_path


def config_of(folder, **fields):
    return DataConfig(**{"source": f"folder:{folder}", "image_size": 8, "eval_split": "train"} | fields)


def batches_of(config, num_steps, **options):
    stream = train_batches(open_source(config, "train"), config, **{"global_batch_size": 8, "seed": 0} | options)
    try:
        return list(itertools.islice(stream, num_steps)), dict(stream.damaged)
    finally:
        stream.close()


# Pictures of all kinds


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_usable_image_is_an_image_error_and_takes_no_time(what):
    start = time.perf_counter()
    with pytest.raises(ImageError):
        resize_short_and_centre_crop(decode_image(DAMAGED[what]), 224)
    assert time.perf_counter() - start < 2


def test_the_pixel_limit_is_exact_and_found_in_the_header():
    side = int(MAX_PIXELS**0.5)
    for data in (png_header(side + 1, side + 1), jpeg_header(side + 1, side + 1)):
        with pytest.raises(ImageError, match=f"more than {MAX_PIXELS:,}"):
            decode_image(data)
    with pytest.raises(ImageError, match="not a readable image"):  # allowed by its header, and then too short
        decode_image(png_header(100, 100))


def test_names_do_not_matter_and_every_kind_becomes_three_channels(folder):
    rgb = Image.fromarray(PIXELS)
    sixteen = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    kinds = [
        encode(rgb, "PNG"),  # a PNG called .jpg
        encode(rgb.convert("CMYK")),
        encode(rgb.convert("L")),
        encode(rgb.convert("P"), "GIF"),
        encode(sixteen, "PNG"),
        encode(sixteen, "TIFF"),
        encode(rgb.convert("RGBA"), "WEBP", lossless=True),
        b"P5 16 12 65535\n" + (PIXELS[..., 0].astype(">u2") * 257).tobytes(),
    ]
    for number, data in enumerate(kinds):
        (folder / "good" / f"{2 * number:02d}.jpg").write_bytes(data)
    config = config_of(folder, image_size=12)
    batches = list(eval_batches(open_source(config, "train"), config, batch_size=8))
    assert sum(batch["mask"].sum() for batch in batches) == 40
    assert all(batch["image"].shape == (8, 12, 12, 3) for batch in batches)
    np.testing.assert_array_equal(decode_image(kinds[4]), PIXELS[..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(decode_image(kinds[7]), decode_image(kinds[4]))
    np.testing.assert_array_equal(decode_image(kinds[0]), PIXELS)
    np.testing.assert_array_equal(decode_image(kinds[6]), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", ["first", "behind a long segment"])
def test_every_exif_rotation_is_applied_wherever_it_stands(orientation, place):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 255  # the top left quarter is white
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(turned), quality=95, exif=exif)
    if place != "first":
        data = data[:2] + b"\xff\xed" + struct.pack(">H", 20_002) + bytes(20_000) + data[2:]
    decoded = decode_image(data)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() < 12


# Folders


def test_links_that_lead_nowhere_or_in_circles_and_pipes_are_refused_or_damaged_examples(folder):
    (folder / "good" / "more").symlink_to(folder / "odd")  # a link to a folder is followed
    assert len(open_source(config_of(folder), "train")) == 60
    (folder / "odd" / "up").symlink_to(folder / "odd")
    with pytest.raises(ValueError, match=r"/up is a link to a folder that it lies in; remove it"):
        open_source(config_of(folder), "train")
    (folder / "odd" / "up").unlink()
    (folder / "good" / "more").unlink()
    for target in ("ring", "nowhere"):
        (folder / "ring").symlink_to(folder / target)
        with pytest.raises(ValueError, match="ring is a link that leads nowhere"):
            open_source(config_of(folder), "train")
        (folder / "ring").unlink()

    unreadable = {
        "circle.jpg": "good/circle.jpg",
        "gone.jpg": "nowhere.jpg",
        "failing.jpg": "/proc/self/mem",  # opens as a regular file, and reading it fails, for root too
        "device.jpg": "/dev/zero",
    }
    for name, target in unreadable.items():
        (folder / "good" / name).symlink_to(folder / target)
    os.mkfifo(folder / "good" / "pipe.jpg")
    source = open_source(config_of(folder), "train")
    assert len(source) == 45  # each name counts as an example
    assert len(source.fingerprint) == 64
    for name in (*unreadable, "pipe.jpg"):
        with pytest.raises(ImageError, match=rf"good/{name}: (cannot be read|not a regular file)"):
            source[[*source.files].index(f"good/{name}")]


# Training


def test_damaged_images_are_left_out_counted_and_logged_by_path(folder, caplog):
    bad = {f"good/{2 * i:02d}.jpg": data for i, data in enumerate(DAMAGED.values())}
    config = config_of(folder, max_damaged=0.3, image_size=224, crop="none")
    whole, none = batches_of(config, 15)
    assert none == {}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    source = open_source(config, "train")
    with caplog.at_level(logging.WARNING, "absl"):
        logging.use_absl_handler()
        logging.get_absl_logger().propagate = True
        batches, damaged = batches_of(config, 15)  # three epochs
    assert {source.files[index] for index in damaged} == set(bad)
    for name in bad:  # each is logged once, whatever the number of epochs
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    assert "skipped damaged image 10 (12 allowed of 40)" in caplog.text
    for batch, sound in zip(batches, whole, strict=True):
        np.testing.assert_array_equal(batch["index"], sound["index"])  # no other example in their place
        skipped = np.isin(batch["index"], [*damaged])
        np.testing.assert_array_equal(batch["mask"], 1 - skipped)
        assert not batch["image"][skipped].any()
        np.testing.assert_array_equal(batch["image"][~skipped], sound["image"][~skipped])


def test_training_stops_at_one_damaged_image_more_than_the_share_allows(folder):
    for number in range(4):
        (folder / "odd" / f"{2 * number + 1:02d}.jpg").write_bytes(b"")
    batches, damaged = batches_of(config_of(folder, max_damaged=0.1), 20)
    assert (len(batches), len(damaged)) == (20, 4)
    (folder / "odd" / "39.jpg").unlink()
    (folder / "odd" / "39.jpg").symlink_to("gone")
    with pytest.raises(ImageError, match=r"(?s)5 of the 40 images .* more than the 4 of data\.max_damaged=0\.1: .*jpg"):
        batches_of(config_of(folder, max_damaged=0.1), 20)
    with pytest.raises(ImageError, match="1 of the 40 images"):
        batches_of(config_of(folder), 20)  # one in a thousand by default


def test_workers_skip_the_same_images(folder):
    (folder / "odd" / "01.jpg").write_bytes(b"<html>")
    config = config_of(folder, max_damaged=0.1, crop="random_resized")
    expected, damaged = batches_of(config, 6)
    found, also_damaged = batches_of(dataclasses.replace(config, num_workers=1), 6)
    assert damaged == also_damaged
    assert len(damaged) == 1
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


class Linear(nn.Module):
    """What a step needs of a model, and compiles in no time."""

    @nn.compact
    def __call__(self, images, *, train=False, return_features=False):
        logits = nn.Dense(10)(images.reshape(len(images), -1))
        return (logits, None) if return_features else logits


STEP_CONFIG = TrainConfig(
    data=DataConfig(source="fake:size=8"),
    model=ModelConfig("Ti/4", num_classes=10),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", momentum_dtype="float32"),
    batch_size=16,
    total_steps=4,
)


@functools.cache
def initial():
    config = STEP_CONFIG
    mesh, model = make_mesh(config.mesh, jax.devices()[:2]), Linear()
    tx, schedule_fn = make_optimizer(config.optimizer, config.total_steps)
    init_fn = functools.partial(init_state, model=model, image_shape=(8, 8, 3), tx=tx, ema=False)
    plan = plan_state(init_fn, mesh, config.mesh.fsdp_min_size)
    return jax.device_get(create_state(init_fn, plan, config.seed)), plan, mesh, (model, tx, schedule_fn, plan)


@functools.cache
def step_of(config):
    return make_train_step(config, *initial()[-1])


def one_step(config, batch):
    state, plan, mesh, _ = initial()
    state = jax.tree.map(lambda leaf, planned: jax.device_put(leaf, planned.sharding), state, plan)
    state, metrics = step_of(config)(state, put_batch(batch, mesh))
    return jax.device_get((state.params, metrics))


def test_a_step_learns_from_the_rows_that_count_and_from_nothing_else():
    """The update equals one by the sound rows alone, with microbatches too; neither pixels nor labels of the others
    matter, and MixUp mixes nothing into an image whose neighbour is none."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 16, dtype=np.int32)
    mask = np.ones(16, np.float32)
    mask[[0, 3, 4, 9, 10, 11, 13, 14]] = 0
    batch = {"image": images, "label": labels, "index": np.arange(16), "mask": mask}
    keep = mask > 0
    alone = {"image": images[keep], "label": labels[keep], "index": np.arange(8)}
    params, metrics = one_step(STEP_CONFIG, batch)
    expected, sound = one_step(dataclasses.replace(STEP_CONFIG, batch_size=8), alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), params, expected)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], sound[name], rtol=1e-5)
    micro, _ = one_step(dataclasses.replace(STEP_CONFIG, accumulate_steps=2), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), micro, expected)

    mixing = dataclasses.replace(STEP_CONFIG, loss=LossConfig(mixup_alpha=0.5))
    changed = batch | {
        "image": np.where(keep[:, None, None, None], images, 255 - images),
        "label": (labels + ~keep) % 10,
    }
    first, second = one_step(mixing, batch), one_step(mixing, changed)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_trains_over_damaged_images_to_its_end(folder, tmp_path_factory):
    for number in (0, 1):
        (folder / ("good", "odd")[number] / f"{number:02d}.jpg").write_bytes(b"")
    config = TrainConfig(
        data=config_of(folder, max_damaged=0.1, eval_split="train[:1]"),
        model=ModelConfig("Ti/4", width=16, depth=1, num_heads=1, mlp_dim=16, num_classes=2),
        batch_size=8,
        total_steps=6,
        log_every_steps=3,
    )
    first = open_source(config.data, config.data.eval_split).files
    assert not {"good/00.jpg", "odd/01.jpg"} & set(first)
    workdir = tmp_path_factory.mktemp("run")
    metrics = train(config, workdir)
    assert np.isfinite(metrics["train/loss"])
    assert metrics["eval/count"] == 1
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [line["train/num_damaged"] for line in lines if "train/loss" in line]
    assert logged[-1] == 2  # past the first epoch
    assert sorted(logged) == logged


# Evaluation


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_evaluation_refuses_a_damaged_image_by_its_path_and_counts_all_others_before(folder, num_workers):
    config = config_of(folder, max_damaged=0.9, num_workers=num_workers)
    source = open_source(config, "train")
    (folder / source.files[20]).write_bytes(encode(PIXELS)[:200])
    stream = eval_batches(source, config, batch_size=8)
    try:
        seen = [next(stream)["index"].tolist(), next(stream)["index"].tolist()]
        with pytest.raises(
            Exception, match=rf"{source.files[20]}: not a readable image.*replace or remove it"
        ) as found:
            next(stream)
    finally:
        stream.close()
    assert isinstance(found.value, ImageError)
    assert seen == [[*range(8)], [*range(8, 16)]]


# Workers


def test_a_worker_that_is_killed_while_it_starts_ends_the_stream_within_seconds():
    # Its source is larger than a pipe, through which a process gets what it starts from.
    source = open_source(DataConfig(source="digits"), "train")
    assert source.images.nbytes > 2**16

    def workers():
        found = set()
        for file in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread or a process has just ended
                for pid in file.read_text().split():
                    if b"spawn_main" in Path("/proc", pid, "cmdline").read_bytes():
                        found.add(int(pid))
        return found

    before = workers()

    def kill_at_birth():
        while not (born := workers() - before):
            time.sleep(0.001)
        os.kill(born.pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill_at_birth)
    stream = train_batches(source, DataConfig(source="digits", num_workers=1), global_batch_size=4, seed=0)
    killer.start()
    try:
        start = time.perf_counter()
        with pytest.raises(ChildProcessError, match=r"a data worker died.*exit code -9"):
            next(stream)
        assert time.perf_counter() - start < 10
    finally:
        killer.join()
        stream.close()


def test_a_killed_worker_ends_the_stream_within_seconds():
    config = DataConfig(source="fake:size=12,examples=4000", num_workers=2)
    source, before = open_source(config, "test"), multiprocessing.active_children()
    stream = train_batches(source, config, global_batch_size=4, seed=0)
    try:
        next(stream)
        workers = [child for child in multiprocessing.active_children() if child not in before]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        start = time.perf_counter()
        with pytest.raises(ChildProcessError, match=r"a data worker died.*exit code -9.*data\.num_workers=2"):
            collections.deque(itertools.islice(stream, 1000), maxlen=0)
        assert time.perf_counter() - start < 10
    finally:
        stream.close()


def test_workers_end_with_a_parent_that_was_killed():
    script = """
        import multiprocessing, time
        from levattn.data import DataConfig, open_source, train_batches

        config = DataConfig(source="fake:size=12,examples=400", num_workers=2)
        stream = train_batches(open_source(config, "test"), config, global_batch_size=4, seed=0)
        next(stream)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()

    def is_running(pid):
        with contextlib.suppress(OSError):
            return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
